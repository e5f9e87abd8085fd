"""Checkpoints in and out: files to a parameter tree and back. Knows no decoding."""

from orthrus_jax.checkpoint.reader import (
    TOKENIZER_FILE,
    Checkpoint,
    check_target,
    inside,
    load_checkpoint,
    resolve,
    save_checkpoint,
)

__all__ = [
    "TOKENIZER_FILE",
    "Checkpoint",
    "check_target",
    "inside",
    "load_checkpoint",
    "resolve",
    "save_checkpoint",
]

"""Checkpoints in and out: files to a parameter tree and back. Knows no decoding."""

from orthrus_jax.checkpoint.directory import TOKENIZER_FILE, check_target, resolve
from orthrus_jax.checkpoint.head import HEAD_FILE, load_head, save_head
from orthrus_jax.checkpoint.hf_config import config_from_hf, config_to_hf, read_config
from orthrus_jax.checkpoint.reader import Checkpoint, load_checkpoint
from orthrus_jax.checkpoint.tensors import tensor_specs
from orthrus_jax.checkpoint.writer import save_checkpoint

__all__ = [
    "HEAD_FILE",
    "TOKENIZER_FILE",
    "Checkpoint",
    "check_target",
    "config_from_hf",
    "config_to_hf",
    "load_checkpoint",
    "load_head",
    "read_config",
    "resolve",
    "save_checkpoint",
    "save_head",
    "tensor_specs",
]

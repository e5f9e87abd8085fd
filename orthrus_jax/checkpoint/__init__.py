"""Checkpoints in and out: files to a parameter tree and back. Knows no decoding."""

from orthrus_jax.checkpoint.directory import TOKENIZER_FILE, check_target, resolve
from orthrus_jax.checkpoint.gguf_file import open_gguf
from orthrus_jax.checkpoint.gguf_model import gguf_config
from orthrus_jax.checkpoint.gguf_tokenizer import gguf_tokenizer
from orthrus_jax.checkpoint.head import HEAD_FILE, load_head, save_head
from orthrus_jax.checkpoint.hf_config import config_from_hf, config_to_hf, read_config
from orthrus_jax.checkpoint.reader import Checkpoint, load_checkpoint, load_gguf
from orthrus_jax.checkpoint.tensors import tensor_specs
from orthrus_jax.checkpoint.view import open_view, save_view, view_file
from orthrus_jax.checkpoint.writer import save_checkpoint

__all__ = [
    "HEAD_FILE",
    "TOKENIZER_FILE",
    "Checkpoint",
    "check_target",
    "config_from_hf",
    "config_to_hf",
    "gguf_config",
    "gguf_tokenizer",
    "load_checkpoint",
    "load_gguf",
    "load_head",
    "open_gguf",
    "open_view",
    "read_config",
    "resolve",
    "save_checkpoint",
    "save_head",
    "save_view",
    "tensor_specs",
    "view_file",
]

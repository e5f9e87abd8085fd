"""Exact parallel decoding of a frozen base: one model, two attention views, one shared KV cache.

import orthrus_jax
model = orthrus_jax.load("path/or/hub-id")
print(model.generate(["What is 2+2?"])[0].text)
"""

import importlib
from typing import TYPE_CHECKING

from orthrus_jax.errors import interrupt_quietly

if TYPE_CHECKING:
    from orthrus_jax.attention import KVCacheConfig
    from orthrus_jax.conversation import Conversation
    from orthrus_jax.decoding import Strategy
    from orthrus_jax.engine import Auto, Completion, SamplingParams
    from orthrus_jax.llm import LLM, load, save_view

__version__ = "0.1.0"  # pyproject.toml reads it here

_HOMES = {
    "Auto": "engine",
    "Completion": "engine",
    "Conversation": "conversation",
    "KVCacheConfig": "attention",
    "LLM": "llm",
    "SamplingParams": "engine",
    "Strategy": "decoding",
    "load": "llm",
    "save_view": "llm",
}
__all__ = [
    "LLM",
    "Auto",
    "Completion",
    "Conversation",
    "KVCacheConfig",
    "SamplingParams",
    "Strategy",
    "__version__",
    "load",
    "save_view",
]


interrupt_quietly()


def __getattr__(name: str) -> object:
    # Late: `--help` and the submodules without jax need not wait for it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"orthrus_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

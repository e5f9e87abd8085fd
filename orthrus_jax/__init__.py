"""Exact parallel decoding of a frozen Qwen3: one model, two attention views, one shared KV cache.

import orthrus_jax
model = orthrus_jax.load("path/or/hub-id")
print(model.generate(["What is 2+2?"])[0].text)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthrus_jax.engine import Completion, SamplingParams
    from orthrus_jax.llm import LLM, Conversation, load

_HOMES = {
    "Completion": "engine",
    "Conversation": "llm",
    "LLM": "llm",
    "SamplingParams": "engine",
    "load": "llm",
}
__all__ = ["LLM", "Completion", "Conversation", "SamplingParams", "load"]


def __getattr__(name: str) -> object:
    # Late, so that `--help` and submodules do not pay for importing jax and all of generation.
    if name in _HOMES:
        return getattr(importlib.import_module(f"orthrus_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

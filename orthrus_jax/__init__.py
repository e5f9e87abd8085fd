"""Exact parallel decoding of a frozen Qwen3: one model, two attention views, one shared KV cache.

import orthrus_jax
model = orthrus_jax.load("path/or/hub-id")
print(model.generate(["What is 2+2?"])[0].text)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthrus_jax.generate import Completion, Generator, load

__all__ = ["Completion", "Generator", "load"]


def __getattr__(name: str) -> object:
    # Late, so that `--help` and submodules do not pay for importing jax and all of generation.
    if name in __all__:
        from orthrus_jax import generate

        return getattr(generate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

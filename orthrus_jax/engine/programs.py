"""Few static shapes for many requests: buckets, and the programs compiled for them.

Decides when something is compiled, and keeps that time apart. Knows no requests and no text.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental
from jax.sharding import Mesh

from orthrus_jax import decoding
from orthrus_jax.attention import KVCache, QuantisedCache
from orthrus_jax.sharding import batch_sharding

# Until jax 0.8 it lay in jax.experimental.
_enable_x64: Any = (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64


@contextlib.contextmanager
def _usual_settings() -> Iterator[None]:
    """Trace with JAX's own defaults, whatever this process has set: no setting changes a text.

    With 64 bits (JAX_ENABLE_X64) a loop's counts would change their type, and a seed its noise.
    """
    with (
        _enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def bucket(n: int) -> int:
    """Return the smallest of 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, ... that holds n.

    Four steps per octave keep padding below a quarter and the number of programs logarithmic.
    """
    if n <= 64:
        return 64
    step = 1 << ((n - 1).bit_length() - 3)
    return -(-n // step) * step


class Programs:
    """Functions compiled ahead of time, once per shape of their arguments, and kept.

    Attributes:
      compiled: the programs, by function, structure, shapes and static arguments.
      compile_seconds: wall-clock time spent on compiling so far.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.mesh = mesh
        self.compiled: dict[tuple, Any] = {}
        self.compile_seconds = 0.0

    def run(
        self,
        function: Any,
        *arguments: Any,
        model: tuple[Any, Any] | None = None,
        static: dict[str, Any] | None = None,
        **named: Any,
    ) -> Any:
        """Call a jitted function of decoding/; compile it first if this shape is new.

        Args:
          function: arguments that it donates are lost, even if the call is interrupted.
          arguments, named: arrays and trees of arrays.
          model: the model (static) and its parameters, as first arguments of `function`.
          static: the other static arguments.
        """
        static = static or {}
        arguments, named = self._on_mesh((arguments, named))
        leaves, tree = jax.tree.flatten((arguments, named))
        key = (function, tree, tuple((x.shape, x.dtype) for x in leaves), *static.items())
        if key not in self.compiled:
            begin = time.perf_counter()
            with _usual_settings():
                lowered = function.lower(*(model or ()), *arguments, **named, **static)
                self.compiled[key] = lowered.compile()
            self.compile_seconds += time.perf_counter() - begin
        weights = () if model is None else model[1:]
        return self.compiled[key](*weights, *arguments, **named)

    def _on_mesh(self, inputs: Any) -> Any:
        """Place inputs as the programs expect them, wherever the last program left them."""
        if self.mesh is None:
            return inputs
        mesh = self.mesh

        def where(x: Any) -> Any:
            if isinstance(x, decoding.DecodeState):
                return decoding.shardings(x, mesh)
            return x.shardings() if isinstance(x, caches) else batch_sharding(x.shape, mesh)

        caches = (KVCache, QuantisedCache)
        whole = lambda x: isinstance(x, (decoding.DecodeState, *caches))
        return jax.device_put(inputs, jax.tree.map(where, inputs, is_leaf=whole))

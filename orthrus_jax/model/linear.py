"""Products of rows and weights: the one place that decides how a device is made to compute them.

A weight lies as checkpoints have it, [out, in], and is loaded and exported so. Knows no layers.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

Array = jax.Array
LEAST_ROWS = 8  # of a product on the matrix unit of a TPU or GPU
CPU_COLUMNS = range(2, 65)  # rows that a CPU multiplies faster as columns


class Linear(nn.Module):
    """x W^T + b: rows [..., T, in] -> [..., T, out].

    The weight [out, in] starts as N(0, 0.02), as Qwen's do, the bias [out] as zeros; both are cast
    to `dtype`.
    """

    features: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.features, x.shape[-1])
        weight = self.param("weight", nn.initializers.normal(0.02), shape)
        out = rows_times(x.astype(self.dtype), weight.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            out += bias.astype(self.dtype)
        return out


def rows_times(x: Array, weight: Array, dtype: Any = None) -> Array:
    """x W^T of rows x [..., T, in] and a weight [out, in], in `dtype` or that of the rows.

    A decoding forward has few rows, and no compiler makes of these by itself what is fast:

    - A CPU reads the weight at memory's speed for columns, W x^T: up to twice as fast as for rows
      (docs/log.md). XLA would turn the product back; the barriers keep it from that.
    - TPUs and GPUs multiply fewer than LEAST_ROWS rows by elementwise arithmetic and sums: a head
      of one row was estimated at 3 times a head of 32 on a TPU, and a GPU wrote the products of a
      whole weight to memory (docs/log.md, 2026-11-25). They are padded, each sequence by itself,
      so that no device needs another's rows.
    """
    rows = math.prod(x.shape[:-1])
    product = lambda x, weight: jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype
    )
    forms: dict[str, Callable[[Array, Array], Array]] = {}
    if rows in CPU_COLUMNS:
        forms |= {"cpu": lambda x, weight: _as_columns(x, weight, dtype)}
    if rows < LEAST_ROWS:
        padded = lambda x, weight: _padded(product, x, weight)
        forms |= {"tpu": padded, "cuda": padded}
    return jax.lax.platform_dependent(x, weight, default=product, **forms)


def _as_columns(x: Array, weight: Array, dtype: Any) -> Array:
    barrier = jax.lax.optimization_barrier
    columns = barrier(x.reshape(-1, x.shape[-1]).T)
    out = barrier(jnp.matmul(weight, columns, preferred_element_type=dtype))
    return out.T.reshape(*x.shape[:-1], -1)


def _padded(product: Callable[[Array, Array], Array], x: Array, weight: Array) -> Array:
    sequences, rows = math.prod(x.shape[:-2]), x.shape[-2]
    more = -(-LEAST_ROWS // sequences) - rows
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])
    out = product(jax.lax.optimization_barrier(x), weight)  # else the padding is undone
    return jax.lax.slice_in_dim(out, 0, rows, axis=-2)


def least_rows(mesh: Mesh | None) -> int:
    """Rows below which a whole forward is padded on a mesh's devices, or on this machine's.

    To pad each product costs a TPU or GPU two small kernels per product; the layers' other work is
    the same for LEAST_ROWS rows as for one.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return 1 if device.platform == "cpu" else LEAST_ROWS

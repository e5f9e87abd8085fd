"""The tiles of a quantised cache: encoder, packed codes, decoder. Source: arXiv 2606.03458 (KVarN).

A tile is G tokens by D channels of one key head. Keys are rounded per channel over the tokens,
values per token over the channels; the other axis has a scale of its own, which variance
normalisation finds. The same tile gives the same bytes in every program: sums are made in a fixed
order, and no product meets a sum that a compiler could contract. Knows no cache and no positions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from orthrus_jax.attention.kv_config import KVCacheConfig, rotated_block

Array = jax.Array
LEAST_SCALE, MOST_SCALE = np.exp(-0.3).astype(np.float32), np.exp(10.0).astype(np.float32)
LEAST_SD, MOST_SD = np.float32(1e-3), np.float32(1e3)
LEAST_STEP = np.float32(1e-10)  # of a row, in units of the tile's root mean square
CLIP_SDS = np.float32(1.5)
SCALE_TYPE = jnp.bfloat16


class Half(struct.PyTreeNode):
    """The keys, or the values, of tiles. R rows are rounded, C columns have a scale.

    Of keys the rows are the D channels and the columns the G tokens; of values the reverse. An
    element is (code * step[row] + low[row]) * scale[column], rotated back.

    Attributes:
      codes: uint8[..., G * bits / 8, D]. With n = 8 / bits, byte j of a channel holds the tokens j,
        j + G / n, ..., the lowest bits first.
      step, low: bfloat16[..., R].
      scale: bfloat16[..., C].
    """

    codes: Array
    step: Array
    low: Array
    scale: Array


@functools.cache
def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix over its root, float32[size, size]: orthonormal and symmetric.

    Of a size that is no power of two, as many blocks as needed of the largest one that divides it:
    head sizes that the paper does not have.
    """
    block = rotated_block(size)
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(size // block), matrix / np.sqrt(block)).astype(np.float32)


def rotate(x: Array) -> Array:
    """x [..., D] @ H, in float32. Its own inverse."""
    matrix = jnp.asarray(hadamard(x.shape[-1]))
    return jnp.matmul(x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST)


def encode_keys(k: Array, config: KVCacheConfig) -> Half:
    """Encode keys [..., G, D], after their norm and the rotary embedding."""
    half, codes = _encode(_rotated(k, config).swapaxes(-1, -2), config.key_bits, config)
    return half.replace(codes=pack(codes.swapaxes(-1, -2), config.key_bits))


def encode_values(v: Array, config: KVCacheConfig) -> Half:
    """Encode values [..., G, D]."""
    half, codes = _encode(_rotated(v, config), config.value_bits, config)
    return half.replace(codes=pack(codes, config.value_bits))


def decode_keys(half: Half, config: KVCacheConfig) -> Array:
    """The keys that a `Half` stands for, float32[..., G, D]."""
    codes = unpack(half.codes, config.key_bits).astype(jnp.float32)
    step, low, scale = (x.astype(jnp.float32) for x in (half.step, half.low, half.scale))
    x = (codes * step[..., None, :] + low[..., None, :]) * scale[..., None]
    return rotate(x) if config.rotate else x


def decode_values(half: Half, config: KVCacheConfig) -> Array:
    """The values that a `Half` stands for, float32[..., G, D]."""
    codes = unpack(half.codes, config.value_bits).astype(jnp.float32)
    step, low, scale = (x.astype(jnp.float32) for x in (half.step, half.low, half.scale))
    x = (codes * step[..., None] + low[..., None]) * scale[..., None, :]
    return rotate(x) if config.rotate else x


def pack(codes: Array, bits: int) -> Array:
    """Codes uint8[..., G, D] to bytes [..., G * bits / 8, D]; see `Half`."""
    parts = jnp.split(codes, 8 // bits, axis=-2)
    shifted = [part << np.uint8(bits * i) for i, part in enumerate(parts)]
    return functools.reduce(jnp.bitwise_or, shifted)


def unpack(packed: Array, bits: int) -> Array:
    """The inverse of `pack`: uint8[..., G, D]."""
    parts = [packed >> np.uint8(bits * i) & np.uint8(2**bits - 1) for i in range(8 // bits)]
    return jnp.concatenate(parts, axis=-2)


def _encode(x: Array, bits: int, config: KVCacheConfig) -> tuple[Half, Array]:
    """Round the rows of float32[..., R, C]; return vectors and codes uint8[..., R, C].

    Codes are computed against the vectors as they are stored, rounded to bfloat16. A row's own
    scale changes nothing of its rounding, so only the columns' is kept.
    """
    size = _root_mean_square(x)
    scale = _stored(column_scales(_single(x / size), config.iterations))
    x = x / scale
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    if config.clip and bits == 2:
        mean, sd = _moments(x, -1)
        reach = _single(CLIP_SDS * sd)
        low, high = jnp.maximum(low, mean - reach), jnp.minimum(high, mean + reach)
    top = np.float32(2**bits - 1)
    step = _stored(jnp.maximum((high - low) * (1 / top), LEAST_STEP * size))
    low = _stored(low)
    codes = jnp.clip(jnp.round((x - low) / step), 0, top).astype(jnp.uint8)
    step, low, scale = (x.astype(SCALE_TYPE) for x in (step[..., 0], low[..., 0], scale[..., 0, :]))
    return Half(codes, step, low, scale), codes


def column_scales(x: Array, iterations: int) -> Array:
    """Variance normalisation: the scales float32[..., 1, C] of the columns of x [..., R, C].

    Divide by the columns' standard deviations, then by the rows', in turn; of all steps the least
    imbalance counts. The paper adds logarithms, l <- clip(l + ln sd, -0.3, 10); their exponentials
    are multiplied here, which is the same and needs neither exp nor log.
    """
    bounded = lambda scale: jnp.clip(scale, LEAST_SCALE, MOST_SCALE)
    ones = lambda axis: jnp.ones_like(x.max(axis=axis, keepdims=True))
    rows, columns = _moments(x, -1)[1], _moments(x, -2)[1]

    def step(_: Array | int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        by_row, by_column, sd, best, least = carry
        by_column = bounded(by_column * sd)
        by_row = bounded(by_row * _moments(x / _single(by_row * by_column), -1)[1])
        quotient = x / _single(by_row * by_column)
        rows, sd = _moments(quotient, -1)[1], _moments(quotient, -2)[1]
        imbalance = _imbalance(rows, sd)
        better = imbalance < least
        best = jnp.where(better, by_column, best)
        return by_row, by_column, sd, best, jnp.where(better, imbalance, least)

    start = (ones(-1), ones(-2), columns, ones(-2), _imbalance(rows, columns))
    return jax.lax.fori_loop(0, iterations, step, start)[3]


def _imbalance(rows: Array, columns: Array) -> Array:
    """Largest over least standard deviation of the rows, and of the columns, added: [..., 1, 1]."""
    ratio = lambda sd: sd.max((-1, -2), keepdims=True) / sd.min((-1, -2), keepdims=True)
    return ratio(rows) + ratio(columns)


def _moments(x: Array, axis: int) -> tuple[Array, Array]:
    """Mean and standard deviation (n - 1; bounded) along an axis, which stays with size 1."""
    n = x.shape[axis]
    mean = _single(_sum(x, axis) * np.float32(1 / n))
    squares = _single((x - mean) * (x - mean))
    sd = jnp.sqrt(_sum(squares, axis) * np.float32(1 / (n - 1)))
    return mean, jnp.clip(sd, LEAST_SD, MOST_SD)


def _root_mean_square(x: Array) -> Array:
    """Of a whole tile [..., R, C]: [..., 1, 1], above 0. Squares of huge tiles do not overflow."""
    most = jnp.abs(x).max((-1, -2), keepdims=True)
    most = jnp.where(most > 0, most, 1)
    unit = _single(x / most)
    mean = _sum(_sum(_single(unit * unit), -1), -2) * np.float32(1 / (x.shape[-1] * x.shape[-2]))
    return jnp.where(mean > 0, _single(jnp.sqrt(mean) * most), 1)


def _rotated(x: Array, config: KVCacheConfig) -> Array:
    """`rotate` by butterflies: sums and differences in a fixed order, whatever the program."""
    x, size = x.astype(jnp.float32), rotated_block(x.shape[-1])
    if not config.rotate:
        return x
    half = 1
    while half < size:
        low, high = jnp.split(x.reshape(*x.shape[:-1], -1, 2, half), 2, axis=-2)
        x = jnp.concatenate([low + high, low - high], axis=-2).reshape(x.shape)
        half *= 2
    return _single(x * np.float32(size**-0.5))


def _sum(x: Array, axis: int) -> Array:
    """The sum along an axis: half added to half, an odd rest in turn; in a fixed order."""
    while x.shape[axis] % 2 == 0:
        low, high = jnp.split(x, 2, axis=axis)
        x = low + high
    return functools.reduce(jnp.add, jnp.split(x, x.shape[axis], axis=axis))


def _single(x: Array) -> Array:
    """Round to 22 bits: what was computed before is neither contracted nor reordered."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=22)


def _stored(x: Array) -> Array:
    """Round to bfloat16, in float32; a pair of casts may be dropped by a compiler."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

"""KVarN's encoder in NumPy, written from the paper's steps: one tile at a time, loops and all."""

import ml_dtypes
import numpy as np

F = np.float32


def to_bfloat16(x):
    return np.asarray(x, F).astype(ml_dtypes.bfloat16).astype(F)


def to_22_bits(x):
    """Round float32 to 22 bits of mantissa, half to even."""
    bits = np.asarray(x, F).view(np.uint32)
    rounded = bits + (bits >> 1 & 1)
    return (rounded & ~np.uint32(1)).view(F)


def sum_of(values, axis):
    """Sums along an axis, half added to half while it can be halved, then in turn."""
    values = np.moveaxis(np.asarray(values, F), axis, 0)
    while len(values) % 2 == 0:
        half = len(values) // 2
        values = values[:half] + values[half:]
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def deviations_along(x, axis):
    """Standard deviation and mean along an axis."""
    n = x.shape[axis]
    mean = to_22_bits(sum_of(x, axis) * F(1 / n))
    off = x - np.expand_dims(mean, axis)
    variance = sum_of(to_22_bits(off * off), axis) * F(1 / (n - 1))
    return np.clip(np.sqrt(variance), F(1e-3), F(1e3)), mean


def deviations(x):
    """Of rows and columns."""
    return deviations_along(x, 1)[0], deviations_along(x, 0)[0]


def imbalance(rows, columns):
    return rows.max() / rows.min() + columns.max() / columns.min()


def column_scales(x, iterations):
    bounded = lambda s: np.clip(s, np.exp(-0.3).astype(F), np.exp(10.0).astype(F))
    by_row, by_column = np.ones(len(x), F), np.ones(x.shape[1], F)
    rows, columns = deviations(x)
    best, least = by_column, imbalance(rows, columns)
    for _ in range(iterations):
        by_column = bounded(by_column * deviations(quotient(x, by_row, by_column))[1])
        by_row = bounded(by_row * deviations(quotient(x, by_row, by_column))[0])
        now = imbalance(*deviations(quotient(x, by_row, by_column)))
        if now < least:
            best, least = by_column, now
    return best


def quotient(x, by_row, by_column):
    return x / to_22_bits(by_row[:, None] * by_column)


def size_of(x):
    most = np.abs(x).max()
    most = most if most > 0 else F(1)
    unit = to_22_bits(x / most)
    squares = to_22_bits(unit * unit)
    mean = sum_of(sum_of(squares, 1), 0) * F(1 / x.size)
    return to_22_bits(np.sqrt(mean) * most) if mean > 0 else F(1)


def rotated(x):
    """x [T, D] @ H by butterflies."""
    x, size, half = x.astype(F), x.shape[-1], 1
    block = 128 if size == 128 else {16: 16, 48: 16}[size]
    while half < block:
        out = np.empty_like(x)
        for i in range(0, size, 2 * half):
            low, high = x[:, i : i + half], x[:, i + half : i + 2 * half]
            out[:, i : i + half], out[:, i + half : i + 2 * half] = low + high, low - high
        x, half = out, 2 * half
    return to_22_bits(x * F(block**-0.5))


def encode_rows(x, bits, *, clip=False, iterations=8):
    """Codes [R, C], step [R], low [R] and column scales [C] of x [R, C]."""
    size = size_of(x)
    scale = to_bfloat16(column_scales(to_22_bits(x / size), iterations))
    x, top = x / scale, F(2**bits - 1)
    codes, steps, lows = [], [], []
    for row in x:
        low, high = row.min(), row.max()
        if clip and bits == 2:
            sd, mean = (part[0] for part in deviations_along(row[None], 1))
            reach = to_22_bits(F(1.5) * sd)
            low, high = max(low, mean - reach), min(high, mean + reach)
        step = to_bfloat16(max((high - low) * F(1 / top), F(1e-10) * size))
        low = to_bfloat16(low)
        codes.append(np.clip(np.rint((row - low) / step), 0, top).astype(np.uint8))
        steps.append(step)
        lows.append(low)
    return np.array(codes), np.array(steps), np.array(lows), scale


def pack(codes, bits):
    """Codes [G, D] to bytes: n = 8 / bits tokens, G / n apart, in each byte."""
    count = len(codes) * bits // 8
    packed = np.zeros((count, codes.shape[1]), np.uint8)
    for token, row in enumerate(codes):
        packed[token % count] |= row << (bits * (token // count))
    return packed


def encode(tile, kind, bits, **options):
    """A tile of keys or values [G, D]: packed codes, step, low, scale as float32."""
    turned = rotated(tile).T if kind == "k" else rotated(tile)
    codes, step, low, scale = encode_rows(turned, bits, **options)
    return pack(codes.T if kind == "k" else codes, bits), step, low, scale

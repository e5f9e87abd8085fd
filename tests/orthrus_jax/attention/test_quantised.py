"""The quantised cache: the same slots give the same bytes however they came, and rows read q(p)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax.attention import KVCacheConfig, QuantisedCache, TreeMask, attend, attend_blocks
from orthrus_jax.attention.kvarn import decode_keys, decode_values
from orthrus_jax.attention.quantised import resumable
from tests.support.compare import relative_error
from tests.support.configs import tiny_config

CONFIG = tiny_config(num_hidden_layers=1)
HEADS, D, SLOTS, BATCH = 2, 16, 96, 3
LENGTHS = np.array([75, 60, 41])  # final slots per sequence
CACHE = KVCacheConfig(4, 2, tile=8)
RNG = np.random.default_rng(0)
TRUE = [jnp.asarray(RNG.normal(size=(BATCH, SLOTS + 16, HEADS, D)), jnp.float32) for _ in "kv"]
NOISE = [jnp.asarray(RNG.normal(size=(BATCH, SLOTS + 16, HEADS, D)), jnp.float32) for _ in "kv"]


def empty(kv_cache=CACHE, batch: int = BATCH, **options) -> QuantisedCache:
    return QuantisedCache.zeros(CONFIG, batch, SLOTS, kv_cache, **options)


@functools.partial(jax.jit, static_argnames="width")
def pass_over(cache, true, accepted, *, width: int):
    """A pass over `width` slots, of which `accepted` [B] become final; the rest is noise."""
    cache = cache.settle(width)
    rows = jnp.arange(width)
    at = cache.position[:, None] + rows
    right = (rows < accepted[:, None])[..., None, None]
    of = lambda x: jnp.take_along_axis(x, at[..., None, None], axis=1)
    k, v = (jnp.where(right, of(t), of(n[: len(at)])) for t, n in zip(true, NOISE, strict=True))
    layers = [layer.write(k, v, cache.position) for layer in cache.layers]
    return cache.with_layers(layers).commit(cache.position + accepted)


@jax.jit
def tree_pass(cache, true, accepted, path):
    """A tree of 8 nodes of which the rows `path` [B, 8] are on the accepted path."""
    cache = cache.settle(8)
    rows = jnp.arange(8)
    at = cache.position[:, None] + rows
    of = lambda x: jnp.take_along_axis(x, at[..., None, None], axis=1)
    on_path = (path[:, :, None] == rows) & (rows[:, None] < accepted[:, None, None])  # [B, j, row]
    place = jnp.argmax(on_path, axis=1)[..., None, None]  # whose final slot a row is
    right = on_path.any(axis=1)[..., None, None]
    of_path = lambda x: jnp.take_along_axis(of(x), place, axis=1)
    k, v = (
        jnp.where(right, of_path(t), of(n[: len(at)])) for t, n in zip(true, NOISE, strict=True)
    )
    layers = [layer.write(k, v, cache.position) for layer in cache.layers]
    cache = cache.with_layers(layers).compact(cache.position, path)
    return cache.commit(cache.position + accepted)


def fed(how: str, kv_cache=CACHE, cache=None, rows=slice(None)) -> QuantisedCache:
    """A cache of the true slots up to LENGTHS that came one way; `rows` of the batch."""
    true, rng = [x[rows] for x in TRUE], np.random.default_rng(1)
    cache = empty(kv_cache, len(true[0])) if cache is None else cache
    while (left := LENGTHS[rows] - np.asarray(cache.position)).any():
        some = jnp.asarray(np.minimum(left, rng.integers(0, 9, len(left))), jnp.int32)
        if how == "tree":
            order = np.sort(np.argsort(rng.random((len(left), 8)))[:, : int(some.max())], axis=1)
            order[:, :1] = 0
            path = np.pad(order, ((0, 0), (0, 8 - order.shape[1])), mode="edge")
            cache = tree_pass(cache, true, some, jnp.asarray(path, jnp.int32))
        elif how == "verifications":
            cache = pass_over(cache, true, some, width=8)
        else:  # AR steps, or pieces of a prompt: all rows of a pass become final
            width = int(how)
            cache = pass_over(cache, true, jnp.asarray(np.minimum(left, width)), width=width)
    return cache


@jax.jit
def finished(cache):
    """All final tiles encoded."""
    return cache.encode().encode().encode()


def logical(cache: QuantisedCache, b: int, length: int) -> list[np.ndarray]:
    """The bytes that a row at position `length` - 1 or later may read of sequence b."""
    c = cache.config
    end = int(c.quantised_end(length))
    tiles = (end - c.sink) // c.tile
    halves = jax.tree.map(lambda x: np.asarray(x[b, :, :tiles]), (cache.k, cache.v))
    places = np.r_[: c.sink, np.arange(end, length) - int(cache.base[b]) + c.sink]
    slots = cache.exact.layers[0].read(0, c.exact_slots)
    exact = [
        np.asarray(x)[b][..., places, :] for x in (slots.key_columns().swapaxes(-1, -2), slots.v)
    ]
    return [*jax.tree.leaves(halves), *exact]


@pytest.mark.parametrize("how", ["verifications", "tree", "7", "8", "insert", "one by one"])
def test_slots_have_the_same_bytes_however_they_came(how: str) -> None:
    expected = finished(fed("1"))
    if how == "insert":
        cache = finished(fed("7"))
        for b in range(BATCH):
            row = finished(fed("7", rows=slice(b, b + 1)))
            cache = cache.insert(row, jnp.int32(b))
    elif how == "one by one":
        cache = finished(fed("8"))
        parts = [cache.extract(jnp.int32(b)) for b in range(BATCH)]
        for b in (2, 0, 1):
            cache = cache.insert(parts[b], jnp.int32(b))
    else:
        cache = finished(fed(how))
    for b, length in enumerate(LENGTHS):
        for ours, theirs in zip(
            logical(cache, b, length), logical(expected, b, length), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_cache_that_goes_back_encodes_the_same_bytes_again() -> None:
    cache = finished(fed("verifications"))
    kept = jnp.asarray([72, 8, 41])
    assert [resumable(cache, b, int(n)) for b, n in enumerate(kept)] == [72, 8, 41]
    assert resumable(cache, 1, 30) == 8  # its exact slots are gone: from the sink on
    again = finished(fed("7", cache=cache.resume(kept)))
    expected = finished(fed("1"))
    for b, length in enumerate(LENGTHS):
        for ours, theirs in zip(
            logical(again, b, length), logical(expected, b, length), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


# Reading


def mixture(cache: QuantisedCache, kv_cache, position: int, b: int) -> list[np.ndarray]:
    """The keys and values [H, S, D] that a row at `position` must read, by the published rule."""
    end = max(kv_cache.tile, kv_cache.tile * ((position - kv_cache.wait) // kv_cache.tile))
    decoded = decode_keys(cache.k[0], kv_cache), decode_values(cache.v[0], kv_cache)
    parts = []
    for exact, tiles in zip(TRUE, decoded, strict=True):
        whole = np.array(exact[b]).swapaxes(0, 1)
        flat = np.asarray(tiles[b]).reshape(HEADS, -1, D)
        whole[:, kv_cache.sink : end] = flat[:, : end - kv_cache.sink]
        parts.append(whole)
    return parts


def plain(q, k, v) -> np.ndarray:
    """One row's attention: q [2 per key head, D] over all slots k, v [H, S, D]."""
    q = q.reshape(HEADS, -1, D)
    scores = np.einsum("hrd,hsd->hrs", q, k) * D**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (np.einsum("hrs,hsd->hrd", weights, v) / weights.sum(-1, keepdims=True)).reshape(-1, D)


def written(cache, position, width: int) -> QuantisedCache:
    """The true rows of a pass, written and not final."""
    at = position[:, None] + jnp.arange(width)
    k, v = (jnp.take_along_axis(x, at[..., None, None], axis=1) for x in TRUE)
    return cache.with_layers([layer.write(k, v, position) for layer in cache.layers])


@pytest.mark.parametrize("transposed", [True, False])
def test_rows_of_a_pass_read_what_their_positions_say(transposed: bool) -> None:
    cache = fed("verifications", cache=empty(keys_transposed=transposed)).settle(9)
    cache = written(cache, cache.position, 9)
    q = jnp.asarray(RNG.normal(size=(BATCH, 9, 4, D)), jnp.float32)
    positions = cache.position[:, None] + jnp.arange(9)
    layer = cache.layers[0]
    out = attend(q, layer, None, positions + 1, positions.max() + 1)
    final = finished(cache)  # also the tiles that a row must not read yet
    ends = set()
    for b in range(BATCH):
        for t in range(9):
            p = int(positions[b, t])
            k, v = mixture(final, CACHE, p, b)
            assert (
                relative_error(out[b, t], plain(np.asarray(q[b, t]), k[:, : p + 1], v[:, : p + 1]))
                < 1e-5
            )
            ends.add(CACHE.quantised_end(p))
    assert len(ends) > 3


def test_rows_of_a_tree_and_blocks_read_by_depth() -> None:
    cache = fed("8").settle(8)
    cache = written(cache, cache.position, 8)
    layer, first = cache.layers[0], cache.position
    depth = np.array([0, 1, 1, 2, 2, 3])
    path = np.eye(6, dtype=bool)
    for row, parent in enumerate([0, 0, 0, 1, 2, 3]):
        path[row] |= path[parent]
    mask = jnp.broadcast_to(jnp.asarray(path), (BATCH, 6, 6))
    q = jnp.asarray(RNG.normal(size=(BATCH, 6, 4, D)), jnp.float32)
    ends = jnp.broadcast_to(first[:, None], (BATCH, 6))
    args = None, ends, first.max() + 6
    out = attend(q, layer, *args, tree_mask=TreeMask(first, mask))
    own = [jnp.asarray(RNG.normal(size=(BATCH, 6, 1, HEADS, D)), jnp.float32) for _ in "kv"]
    tree = TreeMask(first, mask)
    blocks = attend_blocks(q[:, :, None], layer, *own, *args, tree_mask=tree)
    final = finished(cache)
    for b in range(BATCH):
        a = int(first[b])
        for row in range(6):
            for anchored, got in ((0, out[b, row]), (1, blocks[b, row, 0])):
                k, v = mixture(final, CACHE, a + depth[row] + anchored, b)
                seen = np.r_[:a, a + path[row].nonzero()[0]]
                k, v = k[:, seen], v[:, seen]
                if anchored:
                    k, v = (np.concatenate([x, np.asarray(o[b, row]).swapaxes(0, 1)], 1)
                            for x, o in zip((k, v), own, strict=True))  # fmt: skip
                assert relative_error(got, plain(np.asarray(q[b, row]), k, v)) < 1e-5


def test_pass_longer_than_the_lag_reads_tiles_that_are_not_there() -> None:
    """W = K - 1 passes; W = K - 2, planted past the refusal, gives another mixture than AR."""

    def worst(lag: int, block: int = 6) -> float:
        kv_cache, errors = KVCacheConfig(4, 4, tile=8, lag=lag), []
        for anchor in range(40, 48):
            cache = empty(kv_cache, 1)
            for at in range(0, anchor, 5):
                some = jnp.asarray([min(5, anchor - at)])
                cache = pass_over(cache, [x[:1] for x in TRUE], some, width=5)
            cache = finished(cache)
            kept = cache.position
            at = kept[:, None] + jnp.arange(block)
            k, v = (jnp.take_along_axis(x[:1], at[..., None, None], axis=1) for x in TRUE)
            layer = cache.layers[0].write(k, v, kept)
            q = jnp.ones((1, block, 4, D), jnp.float32)
            out = attend(q, layer, None, at + 1, at.max() + 1)
            final = finished(cache.with_layers([layer]).commit(kept + block))
            p = anchor + block - 1
            k, v = mixture(final, kv_cache, p, 0)
            expected = plain(np.ones((4, D), np.float32), k[:, : p + 1], v[:, : p + 1])
            errors.append(relative_error(out[0, -1], expected))
        return max(errors)

    assert worst(5) < 1e-5
    assert worst(4) > 1e-2
    with pytest.raises(ValueError, match="6 slots is over 5"):
        empty(KVCacheConfig(tile=8, lag=4)).ready(6)

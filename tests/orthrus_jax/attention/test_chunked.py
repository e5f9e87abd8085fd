"""Attention over a long cache, chunk by chunk, equals one softmax over all of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import attention
from orthrus_jax.attention import LayerCache
from orthrus_jax.attention.cache import CHUNK_ABOVE, KV_CHUNK
from tests.support.cases import ATTENTION
from tests.support.compare import relative_error, same_bits

SLOTS = 4 * KV_CHUNK


@pytest.fixture(scope="module", params=ATTENTION)
def implementation(request) -> str:
    return request.param


def layer_of(k, v) -> LayerCache:
    """Keys [B, G, D, S] and values [B, G, S, D] as KVCache stores them: no leading 1s."""
    stored = lambda x: x.reshape(*itertools.dropwhile(lambda n: n == 1, x.shape[:2]), *x.shape[2:])
    return LayerCache(stored(k), stored(v))


@pytest.fixture(scope="module")
def attend(implementation: str):
    return jax.jit(
        lambda q, k, v, *ranges: attention.attend(
            q, layer_of(k, v), *ranges, implementation=implementation
        )
    )


@pytest.fixture(scope="module")
def attend_blocks(implementation: str):
    return jax.jit(
        lambda q, k, v, *rest: attention.attend_blocks(
            q, layer_of(k, v), *rest, implementation=implementation
        )
    )


HEADS = [(groups, per_group) for groups in (1, 2) for per_group in (1, 3)]
ENDS = [1, 2, 511, 512, 513, 700, 1023, 1024, 1025, 1536, 1900, 2047, 2048]


def normal(rng, *shape: int, dtype=jnp.float32):
    return jnp.asarray(rng.normal(0, 1.5, shape), dtype)


def by_definition(q, k, v, visible) -> np.ndarray:
    """Softmax attention in float64: q [B, R, H, D], k [B, R, G, S, D] or [B, 1, G, S, D], v alike.

    visible: bool[B, R, S].
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    per_group = q.shape[2] // k.shape[2]
    for b, r, h in np.ndindex(q.shape[:3]):
        at = min(r, k.shape[1] - 1)
        keys, values = (x[b, at, h // per_group][visible[b, r]] for x in (k, v))
        scores = keys @ q[b, r, h] / q.shape[-1] ** 0.5
        weights = np.exp(scores - scores.max())
        out[b, r, h] = weights @ values / weights.sum()
    return out


def rows_of(seed: int, groups: int, per_group: int, *, batch: int = 3, rows: int = 5):
    """q, k, v, and starts and ends on all sides of the borders between chunks."""
    rng = np.random.default_rng(seed)
    q = normal(rng, batch, rows, groups * per_group, 16)
    k = normal(rng, batch, groups, 16, SLOTS)
    v = normal(rng, batch, groups, SLOTS, 16)
    end = rng.choice(ENDS, (batch, rows)).astype(np.int32)
    end[0, :2] = 1, SLOTS
    start = (end * rng.random((batch, rows))).astype(np.int32)
    return q, k, v, jnp.asarray(start), jnp.asarray(end)


@pytest.mark.parametrize(("groups", "per_group"), HEADS)
@pytest.mark.parametrize("started", [False, True])
def test_chunked_attention_equals_plain_attention(attend, groups, per_group, started) -> None:
    assert SLOTS > CHUNK_ABOVE
    for seed in range(3):
        q, k, v, start, end = rows_of(seed, groups, per_group)
        start = start if started else None
        plain = attend(q, k, v, start, end)
        chunked = attend(q, k, v, start, end, end.max())
        assert chunked.dtype == plain.dtype
        assert relative_error(chunked, plain) < 2e-6
        slots = np.arange(SLOTS)
        visible = slots < np.asarray(end)[..., None]
        if started:
            visible &= slots >= np.asarray(start)[..., None]
        heads = lambda x: x[:, None]
        expected = by_definition(q, heads(k.swapaxes(2, 3)), heads(v), visible)
        assert relative_error(chunked, expected) < 2e-6


def test_batch_of_one_attends_like_the_same_row_of_a_batch(attend) -> None:
    """A batch of one is stored without its first axis."""
    for groups in (1, 2):
        q, k, v, _, end = rows_of(5, groups, 3)
        whole = attend(q, k, v, None, end, end.max())
        for b in range(3):
            x = slice(b, b + 1)
            alone = attend(q[x], k[x], v[x], None, end[x], end[x].max())
            assert relative_error(alone, whole[x]) < 2e-6


def test_few_slots_or_no_kv_len_take_the_plain_path(attend, implementation) -> None:
    q, k, v, _, end = rows_of(6, 2, 1)
    end = jnp.minimum(end, CHUNK_ABOVE)
    few_k, few_v = k[..., :CHUNK_ABOVE], v[:, :, :CHUNK_ABOVE]
    plain = attend(q, few_k, few_v, None, end)
    few = attend(q, few_k, few_v, None, end, end.max())
    if implementation == "xla":
        assert same_bits(few, plain)
    assert relative_error(few, plain) < 2e-6
    assert relative_error(attend(q, k, v, None, end, end.max()), plain) < 2e-6


@pytest.mark.parametrize("groups", [1, 2])
def test_chunks_after_the_last_live_slot_change_no_bit(attend, attend_blocks, groups) -> None:
    q, k, v, start, end = rows_of(7, groups, 3)
    end = jnp.minimum(end, 600)
    start = jnp.minimum(start, end - 1)
    few = attend(q, k, v, start, end, jnp.int32(600))
    for kv_len in (601, 1024, 1025, 2000, SLOTS):
        assert same_bits(attend(q, k, v, start, end, jnp.int32(kv_len)), few)
    q, k, v, own_k, own_v, start, end = blocks_of(7, groups, 3)
    end = jnp.minimum(end, 600)
    few = attend_blocks(q, k, v, own_k, own_v, None, end, jnp.int32(600))
    for kv_len in (601, 1024, 1025, 2000, SLOTS):
        assert same_bits(attend_blocks(q, k, v, own_k, own_v, None, end, jnp.int32(kv_len)), few)


def test_slots_after_the_end_change_no_bit(attend) -> None:
    q, k, v, _, end = rows_of(8, 2, 1)
    end = jnp.minimum(end, 900)
    few = attend(q, k, v, None, end, jnp.int32(900))
    other_k, other_v = k.at[..., 900:].set(1e6), v.at[:, :, 900:].set(-1e6)
    assert same_bits(attend(q, other_k, other_v, None, end, jnp.int32(900)), few)


def blocks_of(seed: int, groups: int, per_group: int, *, blocks: int = 4, rows: int = 4):
    """q, the slots, the blocks' own keys and values, starts and ends; some blocks see no slot."""
    rng = np.random.default_rng(seed)
    q = normal(rng, 2, blocks, rows, groups * per_group, 16)
    k = normal(rng, 2, groups, 16, SLOTS)
    v = normal(rng, 2, groups, SLOTS, 16)
    own_k, own_v = (normal(rng, 2, blocks, rows, groups, 16) for _ in range(2))
    end = rng.choice([0, *ENDS], (2, blocks)).astype(np.int32)
    end[0, :2] = 0, SLOTS
    start = (end * rng.random((2, blocks))).astype(np.int32)
    start[1, 0] = end[1, 0]
    return q, k, v, own_k, own_v, jnp.asarray(start), jnp.asarray(end)


@pytest.mark.parametrize(("groups", "per_group"), HEADS)
@pytest.mark.parametrize("started", [False, True])
def test_chunked_blocks_equal_plain_blocks(attend_blocks, groups, per_group, started) -> None:
    for seed in range(3):
        q, k, v, own_k, own_v, start, end = blocks_of(seed, groups, per_group)
        start = start if started else None
        plain = attend_blocks(q, k, v, own_k, own_v, start, end)
        chunked = attend_blocks(q, k, v, own_k, own_v, start, end, end.max())
        assert chunked.dtype == plain.dtype
        assert relative_error(chunked, plain) < 2e-6

        slots = np.arange(SLOTS)
        visible = slots < np.asarray(end)[..., None]
        if started:
            visible &= slots >= np.asarray(start)[..., None]
        blocks, rows = q.shape[1:3]
        for a in range(blocks):
            both = np.concatenate([visible[:, a], np.ones((2, rows), bool)], axis=1)
            seen = np.repeat(both[:, None], rows, axis=1)
            own = lambda x, a=a: x[:, a].swapaxes(1, 2)  # [B, G, K, D]
            keys = jnp.concatenate([k.swapaxes(2, 3), own(own_k)], axis=2)[:, None]
            values = jnp.concatenate([v, own(own_v)], axis=2)[:, None]
            expected = by_definition(q[:, a], keys, values, seen)
            assert relative_error(chunked[:, a], expected) < 2e-6


@pytest.mark.parametrize("kv_len", [0, 1, SLOTS])
def test_blocks_that_see_no_slot_see_only_themselves(attend_blocks, kv_len: int) -> None:
    q, k, v, own_k, own_v, _, end = blocks_of(9, 2, 3)
    args = (q, k, v, own_k, own_v, None, end * 0)
    assert relative_error(attend_blocks(*args, jnp.int32(kv_len)), attend_blocks(*args)) < 2e-6


def test_chunked_bfloat16_is_as_near_to_float32_as_plain_bfloat16(attend) -> None:
    q, k, v, _, end = rows_of(10, 2, 3)
    exact = attend(q, k, v, None, end)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    errors = []
    for kv_len in (None, end.max()):
        out = attend(*low, None, end, kv_len)
        assert out.dtype == jnp.bfloat16
        errors.append(relative_error(out.astype(jnp.float32), exact))
    assert errors[1] < 1.5 * errors[0] < 0.1

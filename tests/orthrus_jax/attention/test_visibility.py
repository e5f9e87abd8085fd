"""Who sees whom, on `Model.forward` itself: by perturbing one thing and comparing bits.

What a row does not see leaves it equal in every bit; what it sees changes it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import attention
from orthrus_jax.attention import LayerCache
from orthrus_jax.attention.attend import IMPLEMENTATIONS
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, Segment, View, ar_segment, block_segment
from tests.support.compare import relative_error, same_bits
from tests.support.configs import FAMILIES, tiny_config
from tests.support.marks import slow
from tests.support.weights import random_params

CONFIG = tiny_config()
PARAMS = random_params(CONFIG, 7)
K, SLOTS = 4, 16
BOUND = 2e-5  # between programs of different shapes; within one program the claims are of bits
RNG = np.random.default_rng(3)
TOKENS = RNG.integers(0, 63, (3, SLOTS)).astype(np.int32)
reference = jax.jit(functools.partial(Model(CONFIG).forward, PARAMS))


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def implementation(request) -> str:
    return request.param


VIEWS = [
    *((name, "qwen3") for name in IMPLEMENTATIONS),
    ("xla", "qwen2"),
    *slow(*(("xla", name) for name in FAMILIES if name not in ("qwen3", "qwen2"))),
]


@pytest.fixture(scope="module", params=VIEWS, ids="-".join)
def forward(request):
    """`Model.forward` of one implementation of attention and one family, compiled.

    The caches are those of CONFIG for all: what they hold are any numbers.
    """
    name, family = request.param
    config = tiny_config(**FAMILIES[family])
    model = Model(config, attention=name)
    return jax.jit(functools.partial(model.forward, random_params(config, 7)))


def blocks(tokens, first) -> Segment:
    """A diffusion segment of blocks [B, A, K] at anchors' positions [B, A]."""
    tokens, first = jnp.asarray(tokens, jnp.int32), jnp.asarray(first, jnp.int32)
    positions = first[..., None] + jnp.arange(tokens.shape[2])
    flat = (tokens.shape[0], -1)
    return Segment(
        tokens.reshape(flat), positions.reshape(flat), View.DIFFUSION, block=tokens.shape[2]
    )


@functools.cache
def full_cache(batch: int):
    """A cache with every slot written."""
    rows = ar_segment(jnp.asarray(TOKENS[:batch]), jnp.zeros(batch, jnp.int32))
    return reference([rows], Model(CONFIG).init_cache(batch, SLOTS))[1]


def poke(cache, row: int, slot: int, which: str = "kv"):
    """Move the keys and/or values of one slot of one row, in all layers, far away."""
    lead = () if cache.k[0].ndim == 3 else (row,)
    k, v = cache.k, cache.v
    if "k" in which:
        k = tuple(x.at[(*lead, slice(None), slice(None), slot)].add(5.0) for x in k)
    if "v" in which:
        v = tuple(x.at[(*lead, slice(None), slot)].add(5.0) for x in v)
    return cache.replace(k=k, v=v)


def rows_changed(before, after) -> np.ndarray:
    """bool[B, T]: which rows differ in any bit."""
    return (np.asarray(before) != np.asarray(after)).any(-1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("which", ["k", "v"])
def test_block_sees_exactly_the_slots_below_its_anchor(forward, batch: int, which: str) -> None:
    anchors = np.array([[5, 9], [1, 5], [12, 0]])[:batch]
    segment = blocks(RNG.integers(0, 63, (batch, 2, K)), anchors)
    (before,), _ = forward([segment], full_cache(batch))
    for row in range(batch):
        for slot in range(SLOTS):
            (after,), _ = forward([segment], poke(full_cache(batch), row, slot, which))
            expected = np.zeros((batch, 2, K), bool)
            expected[row] = (slot < anchors[row])[:, None]
            changed = rows_changed(before, after).reshape(batch, 2, K)
            np.testing.assert_array_equal(changed, expected, err_msg=f"row {row}, slot {slot}")


@pytest.mark.parametrize("batch", [1, 3])
def test_block_row_sees_its_own_block_and_no_other(forward, batch: int) -> None:
    tokens = RNG.integers(0, 62, (batch, 3, K))
    anchors = np.array([[5, 9, 5], [1, 5, 2], [12, 0, 11]])[:batch]
    (before,), _ = forward([blocks(tokens, anchors)], full_cache(batch))
    for row, block, j in np.ndindex(batch, 3, K):
        moved = tokens.copy()
        moved[row, block, j] += 1
        (after,), _ = forward([blocks(moved, anchors)], full_cache(batch))
        expected = np.zeros((batch, 3, K), bool)
        expected[row, block] = True
        changed = rows_changed(before, after).reshape(batch, 3, K)
        np.testing.assert_array_equal(changed, expected, err_msg=f"{row}, {block}, {j}")


@pytest.mark.parametrize("batch", [1, 3])
def test_ar_row_sees_exactly_the_slots_up_to_its_own(forward, batch: int) -> None:
    """Slots first ... first + T - 1 are written before they are read: poking has no effect."""
    first = np.array([6, 0, 9])[:batch]
    tokens = RNG.integers(0, 62, (batch, K))
    run = lambda tokens, cache: forward(
        [ar_segment(jnp.asarray(tokens, jnp.int32), jnp.asarray(first))], cache
    )
    (before,), _ = run(tokens, full_cache(batch))
    for row, slot, which in ((r, s, w) for r in range(batch) for s in range(SLOTS) for w in "kv"):
        (after,), _ = run(tokens, poke(full_cache(batch), row, slot, which))
        expected = np.zeros((batch, K), bool)
        expected[row] = slot < first[row]
        np.testing.assert_array_equal(
            rows_changed(before, after), expected, err_msg=f"row {row}, slot {slot}, {which}"
        )
    for row, j in np.ndindex(batch, K):
        moved = tokens.copy()
        moved[row, j] += 1
        (after,), _ = run(moved, full_cache(batch))
        expected = np.zeros((batch, K), bool)
        expected[row, j:] = True
        np.testing.assert_array_equal(rows_changed(before, after), expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_ar_rows_are_written_at_their_slots_and_blocks_write_nothing(forward, batch: int) -> None:
    first = np.array([6, 0, 12])[:batch]
    old = full_cache(batch)
    rows = ar_segment(jnp.asarray(RNG.integers(0, 63, (batch, K)), jnp.int32), jnp.asarray(first))
    block = block_segment(jnp.zeros(batch, jnp.int32), jnp.asarray(first), K, 63)
    _, drafted = forward([block], old)
    _, verified = forward([rows], old)
    for layer in range(CONFIG.num_hidden_layers):
        assert same_bits(drafted.k[layer], old.k[layer])
        assert same_bits(drafted.v[layer], old.v[layer])
        k = (verified.k[layer] != old.k[layer]).reshape(batch, -1, 16, SLOTS).any((1, 2))
        v = (verified.v[layer] != old.v[layer]).reshape(batch, -1, SLOTS, 16).any((1, 3))
        slots = np.arange(SLOTS)
        expected = (slots >= first[:, None]) & (slots < first[:, None] + K)
        np.testing.assert_array_equal(k, expected)
        np.testing.assert_array_equal(v, expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("block_first", [False, True], ids=["ar-first", "block-first"])
def test_early_block_reads_the_fresh_rows_of_its_own_forward(
    forward, batch: int, block_first
) -> None:
    """A block at L + n beside verify rows L ... L + K - 1 is the block run after them."""
    length = np.array([6, 2, 8])[:batch]
    rows = ar_segment(jnp.asarray(RNG.integers(0, 63, (batch, K)), jnp.int32), jnp.asarray(length))
    anchors = RNG.integers(0, 63, (batch, K, 1))
    tokens = np.concatenate([anchors, np.full((batch, K, K - 1), 63)], axis=2)
    early = blocks(tokens, length[:, None] + np.arange(1, K + 1))  # n = 1 ... K, all at once
    stale = full_cache(batch)

    together = [early, rows] if block_first else [rows, early]
    hidden, joined = forward(together, stale)
    got_blocks, got_rows = hidden if block_first else hidden[::-1]
    (alone,), cache = forward([rows], stale)
    (after,), _ = forward([early], cache)
    (unread,), _ = forward([early], stale)

    assert relative_error(got_rows, alone) < BOUND
    got, after, unread = (
        np.asarray(x).reshape(batch, K, K, -1) for x in (got_blocks, after, unread)
    )
    for n in range(K):
        assert relative_error(got[:, n], after[:, n]) < BOUND
        assert relative_error(got[:, n], unread[:, n]) > 0.05, "stale slots must make a difference"
    for mine, other in zip((*joined.k, *joined.v), (*cache.k, *cache.v), strict=True):
        assert relative_error(mine, other) < BOUND


def test_early_block_sees_only_the_fresh_rows_below_its_anchor(forward) -> None:
    length, tokens = jnp.array([6]), RNG.integers(0, 62, (1, K))
    early = blocks(RNG.integers(0, 63, (1, K, K)), 6 + np.arange(K)[None])
    run = lambda tokens: forward(
        [ar_segment(jnp.asarray(tokens, jnp.int32), length), early], full_cache(1)
    )[0][1]
    before = run(tokens)
    for j in range(K):
        moved = tokens.copy()
        moved[0, j] += 1
        changed = rows_changed(before, run(moved)).reshape(K, K)
        expected = np.repeat((np.arange(K) > j)[:, None], K, axis=1)
        np.testing.assert_array_equal(changed, expected)


def packed(tokens: np.ndarray, block_tokens: np.ndarray) -> list[Segment]:
    """Documents of 7 and 9 rows in one row; blocks anchored at 3 (first), 9 and 12 (second)."""
    start = np.where(np.arange(SLOTS) < 7, 0, 7)[None]
    clean = ar_segment(jnp.asarray(tokens), jnp.zeros(1, jnp.int32))
    part = blocks(block_tokens, np.array([[3, 9, 12]]))
    block_start = jnp.asarray(np.repeat([[0, 7, 7]], K, axis=1))
    return [clean.replace(start=jnp.asarray(start)), part.replace(start=block_start)]


@pytest.mark.parametrize("cached", [False, True], ids=["training", "with a cache"])
def test_packed_documents_do_not_see_each_other(forward, cached: bool) -> None:
    tokens, inside = TOKENS[:1], RNG.integers(0, 63, (1, 3, K))
    cache = Model(CONFIG).init_cache(1, SLOTS) if cached else None
    clean, drafted = forward(packed(tokens, inside), cache)[0]
    for slot in range(SLOTS):
        moved = tokens.copy()
        moved[0, slot] = (moved[0, slot] + 1) % 63
        clean_after, drafted_after = forward(packed(moved, inside), cache)[0]
        index = np.arange(SLOTS)
        same_document = (index < 7) == (slot < 7)
        np.testing.assert_array_equal(
            rows_changed(clean, clean_after)[0], same_document & (index >= slot)
        )
        seen = [slot < 3, 7 <= slot < 9, 7 <= slot < 12]
        np.testing.assert_array_equal(
            rows_changed(drafted, drafted_after).reshape(3, K), np.repeat(seen, K).reshape(3, K)
        )


def test_block_at_the_first_row_of_a_document_sees_only_itself(forward) -> None:
    """start = end: no slot at all, and yet no NaN."""
    segment = blocks(RNG.integers(0, 63, (1, 1, K)), [[7]])
    segment = segment.replace(start=jnp.full((1, K), 7))
    (before,), _ = forward([segment], full_cache(1))
    assert np.isfinite(before).all()
    for slot in range(SLOTS):
        (after,), _ = forward([segment], poke(full_cache(1), 0, slot))
        assert same_bits(before, after)


def test_max_kv_len_changes_no_result(forward) -> None:
    first = jnp.array([2, 5, 0])
    rows = ar_segment(jnp.asarray(TOKENS[:, :K]), first)
    block = block_segment(jnp.array([1, 2, 3]), first, K, 63)
    for segment, max_kv_len in ((rows, 9), (block, 5)):
        (whole,), _ = forward([segment], full_cache(3))
        (cut,), _ = forward([segment.replace(max_kv_len=max_kv_len)], full_cache(3))
        assert relative_error(cut, whole) < BOUND


def test_cache_of_one_sequence_has_no_batch_axis_and_gives_the_same_as_in_a_batch(forward) -> None:
    one, three = full_cache(1), full_cache(3)
    assert (one.k[0].shape, one.v[0].shape) == ((2, 16, SLOTS), (2, SLOTS, 16))
    assert (three.k[0].shape, three.v[0].shape) == ((3, 2, 16, SLOTS), (3, 2, SLOTS, 16))
    for layer in range(CONFIG.num_hidden_layers):
        assert relative_error(one.k[layer], three.k[layer][0]) < BOUND
        assert relative_error(one.v[layer], three.v[layer][0]) < BOUND
    first = jnp.array([5, 8, 2])
    segment = block_segment(jnp.array([1, 2, 3]), first, K, 63)
    (batched,), _ = forward([segment], three)
    (alone,), _ = forward([jax.tree.map(lambda x: x[:1], segment)], one)
    assert relative_error(alone[0], batched[0]) < BOUND


def dense(q, k, v, visible):
    """Attention of q [T, H, D] over k, v [S, H, D] by definition, in float64."""
    scores = np.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    weights = np.where(visible, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("with_start", [False, True])
def test_attention_equals_the_definition_in_float64(implementation, groups, with_start) -> None:
    b, a, heads, dim, slots = 2, 3, 6, 8, 11
    rng = np.random.default_rng(groups)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32) * 2
    q, k, v = (
        normal(b, a, K, heads, dim),
        normal(b, slots, groups, dim),
        normal(b, slots, groups, dim),
    )
    own_k, own_v = normal(b, a, K, groups, dim), normal(b, a, K, groups, dim)
    start = rng.integers(0, 4, (b, a)) if with_start else np.zeros((b, a), int)
    end = start + rng.integers(0, 7, (b, a))
    end[0, 0] = start[0, 0]  # a block that sees only itself
    layer = LayerCache.from_rows(jnp.asarray(k), jnp.asarray(v))
    got = attention.attend_blocks(
        jnp.asarray(q),
        layer,
        jnp.asarray(own_k),
        jnp.asarray(own_v),
        jnp.asarray(start) if with_start else None,
        jnp.asarray(end),
        implementation=implementation,
    )
    rows = attention.attend(
        jnp.asarray(q[:, 0]),
        layer,
        jnp.asarray(np.repeat(start[:, :1], K, 1)) if with_start else None,
        jnp.asarray(start[:, :1] + np.arange(K) + 1),
        implementation=implementation,
    )
    per_head = lambda x: np.repeat(x, heads // groups, axis=-2).astype(np.float64)
    index = np.arange(slots)
    for i, j in np.ndindex(b, a):
        visible = (index >= start[i, j]) & (index < end[i, j])
        visible = np.concatenate([visible, np.ones(K, bool)])[None, None]
        both_k = np.concatenate([per_head(k[i]), per_head(own_k[i, j])])
        both_v = np.concatenate([per_head(v[i]), per_head(own_v[i, j])])
        assert relative_error(got[i, j], dense(q[i, j], both_k, both_v, visible)) < BOUND
    for i in range(b):
        ends = start[i, 0] + np.arange(K)[:, None] + 1
        visible = ((index >= start[i, 0]) & (index < ends))[None]
        assert (
            relative_error(rows[i], dense(q[i, 0], per_head(k[i]), per_head(v[i]), visible)) < BOUND
        )


def test_unknown_attention_is_refused_with_the_known_names() -> None:
    with pytest.raises(UserError, match=r"attention=other is unknown; known: .*xla"):
        Model(CONFIG, attention="other")
    q, kv = jnp.zeros((1, 1, 4, 16)), jnp.zeros((1, 1, 2, 16))
    with pytest.raises(UserError, match="known: "):
        attention.attend(
            q, LayerCache.from_rows(kv, kv), None, jnp.ones((1, 1)), implementation="other"
        )

"""The cache: both key layouts give the same texts and slots; moves, exchanges and commits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.attention import cache
from orthrus_jax.attention.cache import KVCache
from orthrus_jax.decoding import Strategy
from orthrus_jax.model import Model
from tests.support.configs import NO_EOS, tiny_config
from tests.support.decoding import orthrus_decode
from tests.support.weights import random_params

NEW = 12
FIRST = jnp.array([3, 20, 40])
ROWS = jnp.array([[0, 2, 5, 5, 5, 5], [0, 1, 2, 2, 2, 2], [0, 4, 5, 5, 5, 5]])  # walks' ways
TREE = Strategy("orthrus-1f", 4, 6, early_blocks=2, candidates=4)


class TPULayoutModel(Model):
    """The model with keys stored like the values, as on a TPU."""

    def init_cache(self, batch: int, slots: int) -> KVCache:
        return KVCache.zeros(self.config, batch, slots, keys_transposed=False)


def start(model, params, rows: int, slots: int) -> decoding.DecodeState:
    prompts = np.random.default_rng(1).integers(0, 63, (rows, 10)).astype(np.int32)
    full = lambda n: jnp.full(rows, n, jnp.int32)
    return decoding.prefill(
        model, params, jnp.asarray(prompts), full(10) - jnp.arange(rows), full(NEW), NO_EOS,
        slots=slots, max_new_tokens=NEW, lookahead=TREE.tree_nodes,
    )  # fmt: skip


def paper(model, params, state):
    return orthrus_decode(model, params, state)


def tree(model, params, state):
    state = state.replace(drafter=decoding.no_draft(TREE, state.anchor.shape[0]))
    return decoding.one_forward_decode(model, params, state, strategy=TREE)


@pytest.mark.parametrize(
    ("loop", "rows", "slots", "heads"),
    [
        (decoding.ar_decode, 2, 1536, 2),
        (paper, 1, 64, 1),
        (tree, 1, 64, 2),
        (tree, 3, 64, 2),
        (tree, 2, 1536, 2),
    ],
    ids=["ar, chunked", "paper, one head", "a tree", "a tree in a batch", "a tree, chunked"],
)
def test_both_key_layouts_decode_the_same_tokens_and_keep_the_same_slots(
    loop, rows, slots, heads
) -> None:
    config = tiny_config(num_key_value_heads=heads)
    params = random_params(config, 5, copy=True)  # drafts well: some of each tree is kept
    states = [
        loop(model, params, start(model, params, rows, slots))
        for model in (Model(config), TPULayoutModel(config))
    ]
    transposed, plain = jax.device_get(states)
    assert plain.cache.k[0].shape == plain.cache.v[0].shape != transposed.cache.k[0].shape
    np.testing.assert_array_equal(transposed.tokens, plain.tokens)
    np.testing.assert_array_equal(transposed.cycles, plain.cycles)
    assert loop is decoding.ar_decode or (transposed.accepted > 0).any()
    for k, other in zip(transposed.cache.k, plain.cache.k, strict=True):
        live = np.arange(slots) < 10 - (rows - 1) + NEW - 1  # of every row; the others are stale
        other = np.swapaxes(other, -1, -2)
        np.testing.assert_allclose(k[..., live], other[..., live], rtol=1e-5, atol=1e-5)


def test_both_key_layouts_compact_and_insert_alike() -> None:
    config, rng = tiny_config(), np.random.default_rng(2)
    transposed = KVCache.zeros(config, 3, 64)
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    transposed = transposed.replace(
        k=tuple(map(noise, transposed.k)), v=tuple(map(noise, transposed.v))
    )
    like_values = lambda x: x.replace(
        k=tuple(k.swapaxes(-1, -2) for k in x.k), keys_transposed=False
    )
    row = KVCache.zeros(config, 1, 64)

    def check(act) -> None:
        expected = like_values(act(transposed))
        jax.tree.map(np.testing.assert_array_equal, expected, act(like_values(transposed)))

    check(lambda cache: cache.compact(FIRST, ROWS))
    one = {True: row, False: like_values(row)}
    check(lambda cache: cache.insert(one[cache.keys_transposed], jnp.int32(1)))


def test_compact_row_by_row_equals_compact_at_once() -> None:
    rng = np.random.default_rng(3)
    for axis, shape in {-1: (3, 2, 16, 64), -2: (3, 2, 64, 16)}.items():
        buffer = jnp.asarray(rng.normal(size=shape))
        one_by_one = buffer
        for b in range(3):
            one_by_one = cache._moved_in_row(one_by_one, jnp.int32(b), FIRST, ROWS, axis)
        at_once = cache._moved(buffer, FIRST, ROWS, axis)
        np.testing.assert_array_equal(one_by_one, at_once)
        moved = np.moveaxis(np.asarray(buffer), axis, 1)
        np.testing.assert_array_equal(np.moveaxis(np.asarray(at_once), axis, 1)[0, 5], moved[0, 8])


def test_key_layout_follows_the_platform(monkeypatch) -> None:
    class Chip:
        platform = "tpu"

    model = Model(tiny_config())
    assert model.init_cache(1, 64).keys_transposed
    monkeypatch.setattr(jax, "devices", lambda: [Chip])
    assert not model.init_cache(1, 64).keys_transposed


@pytest.mark.parametrize("batch", [1, 2])
def test_commit_compiles_to_nothing(batch: int) -> None:
    cache = Model(tiny_config()).init_cache(batch, 64)
    position = jnp.arange(batch)
    assert cache.commit(position) is cache
    assert jax.make_jaxpr(lambda cache: cache.commit(position))(cache).eqns == []


@pytest.mark.parametrize("keys_transposed", [True, False])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_read_returns_the_rows_that_write_stored(keys_transposed, batch, heads) -> None:
    config, rng = tiny_config(num_key_value_heads=heads), np.random.default_rng(4)
    cache = KVCache.zeros(config, batch, 64, keys_transposed=keys_transposed)
    k, v = (jnp.asarray(rng.normal(size=(batch, 6, heads, 16)), jnp.float32) for _ in range(2))
    start = jnp.full(batch, 7, jnp.int32)
    layer = cache.layers[0].write(k, v, start)
    assert (layer.num_slots, layer.kv_heads) == (64, heads)
    q = jnp.asarray(rng.normal(size=(batch, heads, 5, 16)), jnp.float32)
    for chunk in (layer.read(9, 3), jax.jit(lambda at: layer.read(at, 3))(jnp.int32(9))):
        np.testing.assert_array_equal(chunk.key_columns(), k[:, 2:5].transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(chunk.v, v[:, 2:5].transpose(0, 2, 1, 3))
        scores = np.einsum("bgrd,bsgd->bgrs", q, k[:, 2:5]) / 4
        np.testing.assert_allclose(chunk.scores(q), scores, rtol=1e-5, atol=1e-5)
        mixed = np.einsum("bgrs,bsgd->bgrd", scores, v[:, 2:5])
        np.testing.assert_allclose(
            chunk.mix(jnp.asarray(scores), jnp.float32), mixed, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_extracted_row_goes_back_where_it_came_from(batch, heads) -> None:
    config, rng = tiny_config(num_key_value_heads=heads), np.random.default_rng(4)
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    whole = KVCache.zeros(config, batch, 64)
    whole = whole.replace(k=tuple(map(noise, whole.k)), v=tuple(map(noise, whole.v)))
    for at in range(batch):
        row = decoding.extract(whole, jnp.int32(at))
        like = KVCache.zeros(config, 1, 64)
        assert jax.tree.map(jnp.shape, row) == jax.tree.map(jnp.shape, like)
        jax.tree.map(np.testing.assert_array_equal, whole.insert(row, jnp.int32(at)), whole)
        jax.tree.map(lambda x: x.delete(), row)  # a copy: the batch keeps its own

"""Keys that lie as the values do, as on a TPU: the same texts, the same cache, turned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.attention import cache
from orthrus_jax.attention.cache import KVCache
from orthrus_jax.decoding import overlapped as ahead
from orthrus_jax.decoding.overlapped import Scheme
from orthrus_jax.model import Model
from tests.support.configs import NO_EOS, tiny_config
from tests.support.weights import random_params

NEW = 12
FIRST = jnp.array([3, 20, 40])
ROWS = jnp.array([[0, 2, 5, 5, 5, 5], [0, 1, 2, 2, 2, 2], [0, 4, 5, 5, 5, 5]])  # walks' ways
TREE = Scheme(4, nodes=6, early=2, choices=4)


class Unturned(Model):
    """The model as it is on a TPU."""

    def init_cache(self, batch: int, slots: int) -> KVCache:
        return KVCache.zeros(self.config, batch, slots, turned=False)


def start(model, params, rows: int, slots: int) -> decoding.DecodeState:
    prompts = np.random.default_rng(1).integers(0, 63, (rows, 10)).astype(np.int32)
    full = lambda n: jnp.full(rows, n, jnp.int32)
    return decoding.prefill(
        model, params, jnp.asarray(prompts), full(10) - jnp.arange(rows), full(NEW), NO_EOS,
        slots=slots, max_new_tokens=NEW, reach=TREE.nodes,
    )  # fmt: skip


def paper(model, params, state):
    return decoding.orthrus_decode(model, params, state)


def tree(model, params, state):
    state = state.replace(ahead=TREE.nothing(state.anchor.shape[0]))
    return ahead.one_forward_decode(model, params, state, scheme=TREE)


@pytest.mark.parametrize(
    ("loop", "rows", "slots", "heads"),
    [
        (decoding.ar_decode, 2, 1536, 2),
        (paper, 1, 64, 1),
        (tree, 1, 64, 2),
        (tree, 3, 64, 2),
        (tree, 2, 1536, 2),
    ],
    ids=["ar, walked", "paper, one head", "a tree", "a tree in a batch", "a tree, walked"],
)
def test_turned_or_not_the_same_is_decoded_and_kept(loop, rows, slots, heads) -> None:
    config = tiny_config(num_key_value_heads=heads)
    params = random_params(config, 5, copy=True)  # drafts well: some of each tree is kept
    states = [
        loop(model, params, start(model, params, rows, slots))
        for model in (Model(config), Unturned(config))
    ]
    turned, plain = jax.device_get(states)
    assert plain.cache.k[0].shape == plain.cache.v[0].shape != turned.cache.k[0].shape
    np.testing.assert_array_equal(turned.tokens, plain.tokens)
    np.testing.assert_array_equal(turned.cycles, plain.cycles)
    assert loop is decoding.ar_decode or (turned.accepted > 0).any()
    for k, other in zip(turned.cache.k, plain.cache.k, strict=True):
        live = np.arange(slots) < 10 - (rows - 1) + NEW - 1  # of every row; what is behind is stale
        other = np.swapaxes(other, -1, -2)
        np.testing.assert_allclose(k[..., live], other[..., live], rtol=1e-5, atol=1e-5)


def test_rows_are_exchanged_and_moved_alike() -> None:
    config, rng = tiny_config(), np.random.default_rng(2)
    turned = KVCache.zeros(config, 3, 64)
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    turned = turned.replace(k=tuple(map(noise, turned.k)), v=tuple(map(noise, turned.v)))
    as_values = lambda x: x.replace(k=tuple(k.swapaxes(-1, -2) for k in x.k), turned=False)
    row = KVCache.zeros(config, 1, 64)

    def check(act) -> None:
        jax.tree.map(np.testing.assert_array_equal, as_values(act(turned)), act(as_values(turned)))

    check(lambda cache: cache.compact(FIRST, ROWS))
    one = {True: row, False: as_values(row)}
    check(lambda cache: cache.insert(one[cache.turned], jnp.int32(1)))


def test_a_batch_moved_row_by_row_is_the_batch_moved_at_once() -> None:
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


def test_the_platform_chooses(monkeypatch) -> None:
    class Chip:
        platform = "tpu"

    model = Model(tiny_config())
    assert model.init_cache(1, 64).turned
    monkeypatch.setattr(jax, "devices", lambda: [Chip])
    assert not model.init_cache(1, 64).turned

"""Attention by tiles against one dense softmax: values, gradients, and what it must not keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import attention
from orthrus_jax.attention import flash as tiled

B, G, D = 2, 2, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles small enough that a few hundred rows fill several."""
    monkeypatch.setattr(tiled, "ROW_TILE", 48)
    monkeypatch.setattr(tiled, "SLOT_TILE", 32)


def made(seed, rows, slots, dtype=jnp.float32):
    """Random q, k, v, and ranges in ascending order, some of them empty."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), dtype)
    end = np.sort(rng.integers(0, slots + 1, (B, rows)), axis=1)
    start = np.minimum(np.sort(rng.integers(0, slots, (B, rows)), axis=1) // 2, end)
    start[:, 3] = end[:, 3]
    return (
        normal(B, G, rows, D),
        normal(B, G, D, slots),
        normal(B, G, slots, D),
        jnp.asarray(start, jnp.int32),
        jnp.asarray(end, jnp.int32),
    )


def dense(q, k, v, start, end):
    """The same in one softmax; a row that sees nothing gives 0."""
    slots = jnp.arange(k.shape[3])
    seen = (slots >= start[..., None]) & (slots < end[..., None])
    scores = jnp.where(seen[:, None], (q @ k).astype(jnp.float32) * D**-0.5, -1e30)
    peak = scores.max(-1, keepdims=True)
    weights = jnp.where(seen[:, None], jnp.exp(scores - peak), 0.0)
    mass = weights.sum(-1, keepdims=True)
    return (weights / jnp.maximum(mass, 1e-30)) @ v, jnp.where(
        mass > 0, peak + jnp.log(mass), -jnp.inf
    )


@pytest.mark.parametrize(("rows", "slots"), [(48, 32), (144, 96), (40, 128), (480, 224)])
def test_values_and_the_gradient_are_those_of_one_softmax(rows, slots):
    q, k, v, start, end = made(rows, rows, slots)
    sees = np.asarray(start < end)[:, None, :, None]
    assert 0 < (~sees).sum() < sees.size / 2
    mix = jax.random.normal(jax.random.key(0), (B, G, rows, D))

    def total(function, q):
        out, log_mass = function(q, k, v, start, end)
        return (out * mix).sum() + jnp.where(sees, jnp.sin(log_mass), 0.0).sum()

    found = jax.jit(tiled.ranged_attention)(q, k, v, start, end)
    expected = dense(q, k, v, start, end)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.where(sees, found[1], 0), np.where(sees, expected[1], 0), rtol=1e-5, atol=1e-5
    )
    gradient = jax.jit(jax.grad(lambda q: total(tiled.ranged_attention, q)))(q)
    reference = jax.grad(lambda q: total(dense, q))(q)
    assert np.abs(reference).max() > 0.1
    np.testing.assert_allclose(gradient, reference, atol=1e-5 * np.abs(reference).max())


def test_a_gradient_for_keys_is_refused_and_not_wrong():
    q, k, v, start, end = made(0, 48, 32)
    with pytest.raises(NotImplementedError, match="keys and values"):
        jax.grad(lambda k: tiled.ranged_attention(q, k, v, start, end)[0].sum())(k)


def test_only_slots_in_some_row_s_range_are_read():
    q, k, v, _, _ = made(1, 48, 128)
    start, end = jnp.full((B, 48), 40), jnp.full((B, 48), 90)
    spoilt = lambda x, axis: x.at[(slice(None),) * axis + (slice(0, 32),)].set(jnp.nan)
    found = tiled.ranged_attention(q, spoilt(k, 3), spoilt(v, 2), start, end)
    clean = tiled.ranged_attention(q, k, v, start, end)
    np.testing.assert_array_equal(found[0], clean[0])  # nan would show: 0 * nan is nan


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_by_tiles_are_blocks_in_one_softmax(packed, dtype, monkeypatch):
    rng = np.random.default_rng(0)
    blocks, block, heads, slots = 16, 4, 2 * G, 96
    normal = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), dtype)
    q, own_k, own_v = (
        normal(B, blocks, block, heads, D),
        *(normal(B, blocks, block, G, D) for _ in range(2)),
    )
    k, v = normal(B, G, D, slots), normal(B, G, slots, D)
    end = jnp.asarray(np.sort(rng.integers(0, slots, (B, blocks))), jnp.int32)
    start = end // 2 if packed else None
    mix = normal(*q.shape).astype(jnp.float32)

    def value_and_gradients():
        def total(q, own_k, own_v):
            out = attention.attend_blocks(q, k, v, own_k, own_v, start, end)
            return (out.astype(jnp.float32) * mix).sum(), out

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, own_k, own_v)

    assert not tiled.fits(blocks * block * 2, 100)
    assert tiled.fits(blocks * block * 2 + 16, slots)
    monkeypatch.setattr(tiled, "ROW_TILE", 32)
    assert tiled.fits(blocks * block * 2, slots)
    by_tiles = value_and_gradients()
    monkeypatch.setattr(tiled, "fits", lambda rows, slots: False)
    at_once = value_and_gradients()
    tolerance = 1e-5 if dtype is jnp.float32 else 2e-2
    for ours, theirs in zip(jax.tree.leaves(by_tiles), jax.tree.leaves(at_once), strict=True):
        theirs = np.asarray(theirs, np.float32)
        assert (
            np.abs(np.asarray(ours, np.float32) - theirs).max() <= tolerance * np.abs(theirs).max()
        )


def test_causal_rows_by_tiles_are_causal_rows_in_one_softmax(monkeypatch):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
    q, k, v = normal(B, 96, 2 * G, D), normal(B, G, D, 96), normal(B, G, 96, D)
    end = jnp.tile(jnp.arange(1, 97), (B, 1))
    start = (end - 1) // 40 * 40
    by_tiles = attention.attend(q, k, v, start, end)
    assert tiled.fits(192, 96)
    monkeypatch.setattr(tiled, "fits", lambda rows, slots: False)
    np.testing.assert_allclose(
        by_tiles, attention.attend(q, k, v, start, end), rtol=1e-5, atol=1e-5
    )


def test_no_score_matrix_is_kept_or_made():
    rows, slots = 480, 224
    q, k, v, start, end = made(2, rows, slots)
    grad = jax.jit(jax.grad(lambda q: tiled.ranged_attention(q, k, v, start, end)[0].sum()))
    memory = grad.lower(q).compile().memory_analysis()
    if memory is None:
        pytest.skip("this platform does not analyse memory")
    matrix = B * G * rows * slots * 4
    several_rows = 12 * B * G * rows * D * 4
    assert memory.temp_size_in_bytes < several_rows + 8 * B * G * 48 * 32 * 4 < matrix

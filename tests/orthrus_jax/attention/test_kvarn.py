"""KVarN's encoder: byte for byte the reference in NumPy, and the same bytes in every program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax.attention import kvarn
from orthrus_jax.attention.kv_config import KVCacheConfig, kv_cache_of
from orthrus_jax.errors import UserError
from tests.support import kvarn_reference as reference
from tests.support.configs import tiny_config

ENCODERS = {
    "k": (kvarn.encode_keys, kvarn.decode_keys),
    "v": (kvarn.encode_values, kvarn.decode_values),
}


def tiles_of(*lead: int, tokens: int = 128, size: int = 128, seed: int = 0) -> np.ndarray:
    """Tiles with outlier channels and tokens, as keys have them; rounded to bfloat16."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*lead, tokens, size))
    x *= np.exp(rng.normal(size=(*lead, 1, size))) * np.exp(
        0.5 * rng.normal(size=(*lead, tokens, 1))
    )
    return reference.to_bfloat16(x * 0.3)


def parts(half: kvarn.Half) -> list[np.ndarray]:
    return [np.asarray(x) for x in (half.codes, half.step, half.low, half.scale)]


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(our, their)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("bits", "clip"), [(2, False), (2, True), (4, False)])
@pytest.mark.parametrize(("tokens", "size"), [(128, 128), (8, 48)])
def test_encoder_gives_the_bytes_of_the_reference(kind, bits, clip, tokens, size) -> None:
    config = KVCacheConfig(bits, bits, clip, tile=tokens)
    x = tiles_of(3, tokens=tokens, size=size)
    ours = parts(jax.jit(ENCODERS[kind][0], static_argnums=1)(x, config))
    for i in range(len(x)):
        codes, *vectors = reference.encode(x[i], kind, bits, clip=clip)
        same([part[i] for part in ours], [codes, *(v.astype(ours[1].dtype) for v in vectors)])


@pytest.mark.parametrize(("kind", "bits", "dtype"), [("k", 4, jnp.float32), ("v", 2, jnp.bfloat16)])
def test_a_tile_has_the_same_bytes_in_every_program(kind, bits, dtype) -> None:
    config, x = KVCacheConfig(bits, bits), jnp.asarray(tiles_of(4, 2), dtype)
    encode = lambda x: ENCODERS[kind][0](x, config)
    whole = parts(jax.jit(encode)(x))
    same(whole, parts(encode(x)))  # eager
    for b in range(4):
        same([part[b : b + 1] for part in whole], parts(jax.jit(encode)(x[b : b + 1])))
    same([part[1, 1] for part in whole], parts(jax.jit(encode)(x[1, 1])))
    same(whole, parts(jax.jit(lambda x: jax.lax.map(encode, x))(x)))
    same(whole, parts(jax.vmap(jax.vmap(encode))(x)))

    def loop(x):  # beside what changes from turn to turn, as in decoding
        step = lambda i, carry: (encode(x + 0 * carry[1].max()), carry[1] + i)
        empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(encode, x))
        return jax.lax.fori_loop(0, 3, step, (empty, jnp.zeros_like(x)))[0]

    same(whole, parts(jax.jit(loop)(x)))


def test_hadamard_matrix_is_its_own_inverse() -> None:
    for size in (16, 48, 128):
        matrix = kvarn.hadamard(size).astype(np.float64)
        np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=1e-6)
        np.testing.assert_array_equal(matrix, matrix.T)
        x = np.random.default_rng(0).normal(size=(5, size)).astype(np.float32)
        np.testing.assert_allclose(kvarn.rotate(kvarn.rotate(x)), x, atol=1e-5)
        np.testing.assert_allclose(kvarn.rotate(x), reference.rotated(x), atol=1e-5)


def test_packed_codes_are_unpacked() -> None:
    rng = np.random.default_rng(0)
    for bits in (2, 4):
        codes = rng.integers(0, 2**bits, (3, 16, 8)).astype(np.uint8)
        packed = kvarn.pack(jnp.asarray(codes), bits)
        assert packed.shape == (3, 2 * bits, 8)
        np.testing.assert_array_equal(packed[1], reference.pack(codes[1], bits))
        np.testing.assert_array_equal(kvarn.unpack(packed, bits), codes)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_constant_zero_and_huge_tiles_survive(kind, bits) -> None:
    config = KVCacheConfig(bits, bits)
    encode, decode = (jax.jit(f, static_argnums=1) for f in ENCODERS[kind])
    noise = tiles_of()
    cases = {
        "zero": 0 * noise,
        "constant": 0 * noise + 3,
        "huge": noise * 1e30,
        "tiny": noise * 1e-30,
    }
    expected = decode(encode(noise, config), config)
    for name, x in cases.items():
        half = encode(x.astype(np.float32), config)
        assert all(np.isfinite(part.astype(np.float32)).all() for part in parts(half)), name
        back = np.asarray(decode(half, config))
        assert np.isfinite(back).all(), name
        if name in ("huge", "tiny"):  # the same up to the rounding of the vectors
            scale = 1e30 if name == "huge" else 1e-30
            np.testing.assert_allclose(back / scale, expected, atol=0.05 * np.abs(expected).max())
        else:
            np.testing.assert_allclose(back, x, atol=0.05 * max(1, np.abs(x).max()))
    one_token = np.where(np.arange(128)[:, None] == 5, 100.0, 0.0).astype(np.float32) + 0 * noise
    assert np.isfinite(decode(encode(one_token, config), config)).all()


@functools.partial(jax.jit, static_argnums=(0, 1))
def there_and_back(kind: str, config: KVCacheConfig, x):
    encode, decode = ENCODERS[kind]
    return decode(encode(x, config), config)


def error(kind: str, config: KVCacheConfig, x: np.ndarray) -> float:
    """Mean squared error over the mean square."""
    back = np.asarray(there_and_back(kind, config, x))
    return float(((back - x) ** 2).mean() / (x**2).mean())


def test_rotation_and_normalisation_lower_the_error() -> None:
    x = tiles_of(6)
    for kind in ENCODERS:
        for bits in (2, 4):
            both = KVCacheConfig(bits, bits)
            plain = dataclasses.replace(both, rotate=False, iterations=0)
            assert error(kind, both, x) < 0.8 * error(kind, plain, x)
        assert error(kind, KVCacheConfig(4, 4), x) < 0.1 * error(kind, KVCacheConfig(2, 2), x)
        clipped = KVCacheConfig(2, 2, clip=True)
        assert error(kind, clipped, x) < error(kind, KVCacheConfig(2, 2), x)


def test_normalisation_does_not_depend_on_the_size_of_a_tile() -> None:
    x, config = tiles_of(2), KVCacheConfig(2, 2)
    for kind in ENCODERS:
        small = error(kind, config, reference.to_bfloat16(x * 2**-6))
        assert small == pytest.approx(error(kind, config, x), rel=1e-3)


def test_bytes_of_a_tile_are_those_of_the_published_layout() -> None:
    for name, expected in {"k4v4": 17_920, "k4v2": 13_824, "k2v2": 9_728}.items():
        config = kv_cache_of(name)
        x = tiles_of()
        halves = kvarn.encode_keys(x, config), kvarn.encode_values(x, config)
        assert sum(part.nbytes for half in halves for part in parts(half)) == expected


# The rule of visibility


@pytest.mark.parametrize(("tile", "lag"), [(8, None), (8, 5), (128, None), (32, 31)])
def test_quantised_end_is_the_published_rule(tile: int, lag: int | None) -> None:
    config = KVCacheConfig(tile=tile, lag=lag)
    wait = tile if lag is None else lag
    for p in range(6 * tile):
        expected = max(tile, tile * ((p - wait) // tile))
        assert config.quantised_end(p) == expected
        assert not config.worthwhile(p + 1) or config.quantised_end(p) >= tile
    positions = jnp.arange(6 * tile)
    ends = [config.quantised_end(p) for p in range(6 * tile)]
    assert config.quantised_end(positions).tolist() == ends
    last = max(p for p in range(6 * tile) if config.quantised_end(p) == tile)
    assert not config.worthwhile(last + 1)
    assert config.worthwhile(last + 2)


@pytest.mark.parametrize("block", [4, 7])
def test_every_tile_that_a_pass_reads_is_final_from_lag_k_minus_1_on(block: int) -> None:
    def reads_a_tile_too_early(lag: int) -> bool:
        config = KVCacheConfig(tile=8, lag=lag)
        return any(config.quantised_end(a + block - 1) > max(a, 8) for a in range(100))

    assert not reads_a_tile_too_early(block - 1)
    assert reads_a_tile_too_early(block - 2)
    assert KVCacheConfig(tile=8, lag=block - 1).longest_pass == block


def test_values_that_no_cache_can_have_are_refused() -> None:
    for changes in ({"key_bits": 3}, {"value_bits": 8}, {"tile": 100}, {"tile": 2}, {"lag": 200}):
        with pytest.raises(UserError, match=next(iter(changes))):
            KVCacheConfig(**changes)
    for name in ("k3v3", "int4", 4, ""):
        with pytest.raises(UserError, match="k4v4"):
            kv_cache_of(name)
    assert kv_cache_of("bf16") is None
    assert kv_cache_of(None) is None
    assert kv_cache_of("k4v2") == KVCacheConfig(4, 2)
    assert kv_cache_of(kv_cache_of("k2v2")).name == "k2v2"
    with pytest.raises(UserError, match="head_dim=24"):
        KVCacheConfig().check(tiny_config(head_dim=24))

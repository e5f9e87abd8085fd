"""Forwards and products of few rows, padded as TPUs and GPUs have them: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.model import Model, ar_segment, layers, transformer
from tests.support.compare import relative_error, same_bits
from tests.support.configs import NO_EOS, tiny_config
from tests.support.weights import random_params

CONFIG = tiny_config()
PARAMS = random_params(CONFIG, 5)
SLOTS = 32


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_padded_forward_equals_the_plain_one_and_writes_its_own_slots_alone(
    rows: int, batch: int, monkeypatch
) -> None:
    model = Model(CONFIG)
    rng = np.random.default_rng(rows)
    ids = lambda n: jnp.asarray(rng.integers(0, 63, (batch, n)), jnp.int32)
    first = jnp.zeros(batch, jnp.int32)
    _, cache = model.forward(
        PARAMS, [ar_segment(ids(SLOTS), first)], model.init_cache(batch, SLOTS)
    )
    segment = ar_segment(ids(rows), first + SLOTS - rows)  # to the cache's end: no room for more
    (plain,), expected, tapped = model.forward(PARAMS, [segment], cache, (0,))
    monkeypatch.setattr(transformer, "least_rows", lambda _: 8)
    (hidden,), written, also = model.forward(PARAMS, [segment], cache, (0,))
    assert hidden.shape == plain.shape
    assert relative_error(hidden, plain) < 2e-5
    assert relative_error(also[0], tapped[0]) < 2e-5
    for ours, theirs, old in zip(written.v, expected.v, cache.v, strict=True):
        assert relative_error(ours, theirs) < 2e-5
        assert same_bits(ours[..., : SLOTS - rows, :], old[..., : SLOTS - rows, :])


def test_ar_text_of_padded_forwards_is_the_plain_one(monkeypatch) -> None:
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 63, (2, 8)), jnp.int32)
    lengths, budget = jnp.array([8, 5], jnp.int32), jnp.full(2, 16, jnp.int32)

    def text(config) -> list:
        model = Model(config)
        sizes = {"slots": 64, "max_new_tokens": 16}
        state = decoding.prefill(model, PARAMS, prompts, lengths, budget, NO_EOS, **sizes)
        return decoding.ar_decode(model, PARAMS, state).tokens.tolist()

    plain = text(CONFIG)
    monkeypatch.setattr(transformer, "least_rows", lambda _: 8)
    assert text(tiny_config(rms_norm_eps=1.0001e-6)) == plain  # another config: traced again


@pytest.mark.parametrize("shape", [(1, 16), (1, 1, 16), (2, 3, 16), (9, 16)])
def test_product_of_padded_rows_is_the_product(shape: tuple[int, ...], monkeypatch) -> None:
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, **_: tpu(*args))
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, (16, 12)))
    seen: list[int] = []

    def product(x, w):
        seen.append(x[..., 0].size)
        return x @ w

    out = layers.few_rows_padded(product, x, w)
    assert out.shape == (*shape[:-1], 12)
    assert relative_error(out, x @ w) < 1e-6
    assert seen[0] >= 8


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 1), ("tpu", 8), ("gpu", 8)])
def test_least_rows_are_the_platform_s(platform: str, rows: int, monkeypatch) -> None:
    device = type("Device", (), {"platform": platform})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert layers.least_rows(None) == rows

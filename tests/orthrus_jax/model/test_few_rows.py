"""Forwards and products of few rows, as each platform makes them: the same numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.model import Model, ar_segment, linear, transformer
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


ROWS = [(1, 16), (2, 16), (1, 1, 16), (2, 3, 16), (8, 8, 16), (65, 16), (2, 3, 11, 16)]


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "rocm"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_every_platforms_product_is_the_product(
    platform: str, shape: tuple[int, ...], monkeypatch
) -> None:
    def chosen(*args, default, **forms):
        return forms.get(platform, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, (12, 16)))
    out = linear.rows_times(x, w)
    assert out.shape == (*shape[:-1], 12)
    assert relative_error(out, np.asarray(x) @ np.asarray(w).T) < 1e-6


def products(rows: int, platform: str) -> list[tuple[int, ...]]:
    """Shapes of the products in the program that a platform gets for so many rows."""
    x, w = jnp.zeros((1, rows, 16)), jnp.zeros((12, 16))
    traced = jax.jit(linear.rows_times).trace(x, w)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    shapes = re.findall(r"dot_general.*-> tensor<([\dx]+)xf32>", text)
    return [tuple(map(int, shape.split("x"))) for shape in shapes]


@pytest.mark.parametrize(
    ("platform", "rows", "shape"),
    [
        ("cpu", 1, (1, 1, 12)),
        ("cpu", 2, (12, 2)),
        ("cpu", 64, (12, 64)),
        ("cpu", 65, (1, 65, 12)),
        ("tpu", 1, (1, 8, 12)),
        ("tpu", 8, (1, 8, 12)),
        ("cuda", 7, (1, 8, 12)),
    ],
)
def test_few_rows_are_columns_on_a_cpu_and_eight_elsewhere(
    platform: str, rows: int, shape: tuple[int, ...]
) -> None:
    assert products(rows, platform) == [shape]


def test_gradient_goes_through_columns() -> None:
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 16), (12, 16)))
    loss = lambda product: lambda x, w: (product(x, w) ** 2).sum()
    ours = jax.jit(jax.grad(loss(linear.rows_times), (0, 1)))(x, w)
    theirs = jax.grad(loss(lambda x, w: x @ w.T), (0, 1))(x, w)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 1), ("tpu", 8), ("gpu", 8)])
def test_least_rows_are_the_platform_s(platform: str, rows: int, monkeypatch) -> None:
    device = type("Device", (), {"platform": platform})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert linear.least_rows(None) == rows

"""Promises of the compiled loops: one compile, a donated cache, no copy of the cache."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.model import Model, ar_segment
from orthrus_jax.model import params as params_lib
from tests.support.configs import NO_EOS, tiny_config
from tests.support.decoding import orthrus_decode
from tests.support.fake_models import scripted
from tests.support.fake_models.scripted import ScriptedModel, plain_text
from tests.support.weights import random_params

SLOTS, N = 96, 12


def prefilled(model, params, prompt, length: int, *, batch: int = 1, slots: int = SLOTS):
    prompts = jnp.asarray(np.tile(prompt, (batch, 1)), jnp.int32)
    lengths, budgets = jnp.full(batch, length, jnp.int32), jnp.full(batch, N, jnp.int32)
    return decoding.prefill(
        model, params, prompts, lengths, budgets, NO_EOS, slots=slots, max_new_tokens=N
    )


LOOPS = {"ar": decoding.ar_decode, "orthrus": orthrus_decode}


def test_fifty_prompt_lengths_of_one_bucket_compile_each_program_once() -> None:
    config = tiny_config(num_hidden_layers=1, rms_norm_eps=3e-6)  # no other test's programs
    model, params = Model(config), random_params(config, 0)
    programs = (decoding.prefill, *LOOPS.values())
    before = [program._cache_size() for program in programs]
    prompt = np.random.default_rng(0).integers(0, 63, 64)
    for length in range(1, 51):
        for loop in LOOPS.values():
            state = loop(model, params, prefilled(model, params, prompt, length))
            assert int(state.count[0]) == N
    assert [program._cache_size() for program in programs] == [n + 1 for n in before]


def test_program_traces_its_forwards_once() -> None:
    """Equal models are one static argument: a new instance per call does not trace again."""
    config = tiny_config(rms_norm_eps=4e-6)
    text = plain_text(1, SLOTS + 8)
    params = {"text": jnp.asarray(text), "drafts": jnp.asarray(text)}
    scripted.traces.clear()
    for length in range(1, 51):
        model = ScriptedModel(config)
        state = prefilled(model, params, text[0, :64], length)
        state = orthrus_decode(model, params, state)
        assert np.asarray(state.tokens)[0].tolist() == text[0, length : length + N].tolist()
    prefill, *cycle = scripted.traces
    assert prefill == "ar"
    assert len(cycle) % 2 == 0, cycle
    assert cycle == ["diffusion", "ar"] * (len(cycle) // 2)
    assert len(cycle) <= 4, "a while_loop's body is traced at most twice"


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batch", [1, 2])
def test_passed_state_is_donated(loop: str, batch: int) -> None:
    config = tiny_config()
    model, params = Model(config), random_params(config, 0)
    state = prefilled(model, params, np.arange(8), 5, batch=batch)
    if not donates():
        pytest.skip("this backend does not donate")
    after = LOOPS[loop](model, params, state)
    for name in ("k", "v"):
        for old, new in zip(getattr(state.cache, name), getattr(after.cache, name), strict=True):
            assert old.is_deleted()
            assert new.shape == old.shape
    assert state.tokens.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def donates() -> bool:
    x = jnp.zeros(8)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    return x.is_deleted()


def copies_of_a_cache(program: str, config, slots: int) -> list[str]:
    """HLO lines that copy or transpose an array with the dimensions of a layer's keys or values."""
    without_ones = lambda dims: sorted(d for d in dims if d != 1)
    cache = without_ones((config.num_key_value_heads, config.head_dim, slots))
    copies = []
    for line in program.splitlines():
        copy = re.search(r"= \w+\[([\d,]+)\]\S* (copy|copy-start|transpose)\(", line)
        if copy and without_ones(map(int, copy[1].split(","))) == cache:
            copies.append(line.strip())
    return copies


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a claim about XLA's CPU compiler")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("groups", [1, 2])
def test_loop_of_one_sequence_copies_no_cache(loop: str, groups: int) -> None:
    """Keys f32[G,16,95] and values f32[G,95,16] of 2 layers; only rotary has 95 too."""
    slots = 95
    config = tiny_config(num_key_value_heads=groups)
    model, params = Model(config), random_params(config, 0)
    state = prefilled(model, params, np.arange(8), 5, slots=slots)
    program = LOOPS[loop].lower(model, params, state).compile().as_text()
    assert re.search(rf"f32\[(1,)?({groups},)?{slots},16\]", program), (
        "the cache is not in the text"
    )
    assert " while(" in program
    assert copies_of_a_cache(program, config, slots) == []


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a claim about XLA's CPU compiler")
@pytest.mark.parametrize("groups", [1, 2])
def test_copy_of_a_cache_is_detected(groups: int) -> None:
    config = tiny_config(num_key_value_heads=groups)
    cache = Model(config).init_cache(1, 95)
    copies = jax.jit(lambda k: (k.swapaxes(-1, -2) + 0.0, jnp.copy(k)))
    program = copies.lower(cache.k[0]).compile().as_text()
    assert copies_of_a_cache(program, config, 95) != []


def lowered_for(platform: str, loop: str, *, slots: int = SLOTS, **changes) -> str:
    """A loop's text for a platform that need not be there, nor its compiler."""
    config = tiny_config(**changes)
    model = Model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    prompt = np.arange(8)
    state = jax.eval_shape(lambda params: prefilled(model, params, prompt, 5, slots=slots), params)
    traced = LOOPS[loop].trace(model, params, state)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "loop", "split", "around"),
    [
        ("tpu", "ar", 3, 1),
        ("tpu", "orthrus", 3, 1),
        ("cuda", "ar", 0, 1),
        ("cuda", "orthrus", 0, 1),
        ("cpu", "ar", 0, 0),  # one row is no column
        ("cpu", "orthrus", 0, 2),
    ],
)
def test_projections_have_barriers_where_their_compiler_needs_them(
    platform: str, loop: str, split: int, around: int
) -> None:
    """After the split into heads, see layers.py; around a product of few rows, see linear.py."""
    config = tiny_config()
    text = lowered_for(platform, loop)
    products = 7 * config.num_hidden_layers + 1
    forwards = {"ar": 1, "orthrus": 2}[loop]
    expected = forwards * (split * config.num_hidden_layers + around * products)
    assert text.count("stablehlo.optimization_barrier") == expected


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("slots", [SLOTS, 2048], ids=["few slots", "read in chunks"])
def test_float32_products_ask_for_the_highest_precision_and_bfloat16_for_none(
    loop: str, platform: str, slots: int
) -> None:
    products = lambda dtype: re.findall(
        r"stablehlo.dot_general.*", lowered_for(platform, loop, slots=slots, dtype=dtype)
    )
    float32 = products("float32")
    assert len(float32) > 18
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in float32)
    assert not any("HIGH" in line for line in products("bfloat16"))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_product_of_one_row_is_made_of_eight(platform: str) -> None:
    config = tiny_config(intermediate_size=96)
    text = lowered_for(platform, "ar", intermediate_size=96)
    assert len(re.findall(r"dot_general.*-> tensor<1x8x96xf32>", text)) == (
        2 * config.num_hidden_layers
    )
    assert not re.findall(r"dot_general.*-> tensor<1x1x96xf32>", text)


def test_forward_without_taps_compiles_to_the_same_text() -> None:
    config = tiny_config()
    model, tokens = Model(config), jnp.zeros((2, 8), jnp.int32)
    segment = ar_segment(tokens, jnp.zeros(2, jnp.int32))
    whole = random_params(config, 0)
    for params, cache in (
        (whole, model.init_cache(2, 16)),
        (whole, None),
        (params_lib.stack(whole), None),
    ):
        texts = [
            jax.jit(lambda *args, options=options: model.forward(*args, **options))
            .lower(params, [segment], cache)
            .compile()
            .as_text()
            for options in ({}, {"taps": ()}, {"taps": (0,)})
        ]
        plain, none, tapped = (re.sub(r"metadata=\{[^}]*\}", "", text) for text in texts)
        assert none == plain
        assert tapped != plain

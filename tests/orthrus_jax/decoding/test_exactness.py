"""Lossless in float32, on the real model: `orthrus_decode` emits what `ar_decode` emits.

One configuration, one set of static shapes: each program compiles once for the whole file.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from orthrus_jax import decoding
from orthrus_jax.model import Model, params
from tests.support.configs import NO_EOS, tiny_config
from tests.support.decoding import assert_same_decoding, orthrus_decode, texts
from tests.support.fake_models.drafted import DraftedModel
from tests.support.weights import random_params

CONFIG = tiny_config()
K, BATCH, PROMPT, SLOTS, N = CONFIG.block_size, 8, 12, 48, 30
WIDTH = SLOTS + 2 * K


def prompts_of(seed: int, rows: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 63, (rows, PROMPT)).astype(np.int32)


def decoded(loop: str, model, params, prompts, lengths, budgets, eos=NO_EOS, *, slots=SLOTS):
    """The final state of a loop, its arrays in numpy."""
    eos = jnp.asarray(eos, jnp.int32)
    lengths, budgets = (jnp.asarray(x, jnp.int32) for x in (lengths, budgets))
    state = decoding.prefill(
        model, params, jnp.asarray(prompts), lengths, budgets, eos, slots=slots, max_new_tokens=N
    )
    run = {"ar": decoding.ar_decode, "orthrus": orthrus_decode}[loop]
    return jax.tree.map(np.asarray, run(model, params, state))


def assert_consistent_statistics(state) -> None:
    """A row's tokens are its first, and of each cycle the accepted drafts and at most one more."""
    for count, cycles, accepted in zip(state.count, state.cycles, state.accepted, strict=True):
        assert (accepted[:cycles] >= 0).all()
        assert (accepted[cycles:] == -1).all()
        if count:
            whole = accepted[: max(cycles - 1, 0)]
            last = count - 1 - (whole + 1).sum()  # tokens of the last cycle
            assert last in (accepted[cycles - 1], accepted[cycles - 1] + 1) if cycles else last == 0


LENGTHS = [1, 2, 3, 4, 5, 7, 10, 12]
BUDGETS = [N, 3, N, 17, 6, N, 1, 0]


@pytest.mark.parametrize("view", ["a copy of the AR view", "random weights"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ar_text_comes_with_any_diffusion_weights(view: str, seed: int) -> None:
    model, params = Model(CONFIG), random_params(CONFIG, seed, copy=view.startswith("a copy"))
    args = (model, params, prompts_of(seed), LENGTHS, BUDGETS)
    ar, orthrus = decoded("ar", *args), decoded("orthrus", *args)
    assert ar.count.tolist() == BUDGETS
    assert len({token for text in texts(ar) for token in text}) > 8, "a text that says nothing"
    assert_same_decoding(ar, orthrus)
    assert_consistent_statistics(orthrus)


@functools.cache
def ar_text(seed: int) -> np.ndarray:
    """int32[B, WIDTH]: prompts of LENGTHS continued by the AR loop as far as N; then zeros."""
    params = {"model": random_params(CONFIG, seed), "drafts": jnp.zeros((BATCH, WIDTH), jnp.int32)}
    prompts = prompts_of(seed)
    state = decoded("ar", DraftedModel(CONFIG), params, prompts, LENGTHS, [N] * BATCH)
    text = np.zeros((BATCH, WIDTH), np.int32)
    for row, length in enumerate(LENGTHS):
        text[row, :length] = prompts[row, :length]
        text[row, length : length + N] = state.tokens[row]
    return text


def drafts_for(seed: int, agree) -> np.ndarray:
    return np.where(agree, ar_text(seed), (ar_text(seed) + 1) % 64).astype(np.int32)


DRAFTERS = {"always right": 1.0, "always wrong": 0.0, "half right": 0.5, "mostly right": 0.85}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("seed", [3, 4])
def test_ar_text_comes_with_any_drafter(drafter: str, seed: int) -> None:
    agree = np.random.default_rng(seed).random((BATCH, WIDTH)) < DRAFTERS[drafter]
    drafts = jnp.asarray(drafts_for(seed, agree))
    params = {"model": random_params(CONFIG, seed), "drafts": drafts}
    args = (DraftedModel(CONFIG), params, prompts_of(seed), LENGTHS, BUDGETS)
    ar, orthrus = decoded("ar", *args), decoded("orthrus", *args)
    assert_same_decoding(ar, orthrus)
    assert_consistent_statistics(orthrus)
    rest = np.maximum(ar.count - 1, 0)
    cycles = {"always right": -(-rest // K), "always wrong": rest}.get(drafter)
    if cycles is not None:
        np.testing.assert_array_equal(orthrus.cycles, cycles)


@pytest.mark.parametrize("agree", [0.0, 0.6, 1.0])
def test_eos_ids_that_occur_in_the_text_stop_both_loops_alike(agree: float) -> None:
    seed, stopped = 5, 0
    text, params = ar_text(seed), random_params(CONFIG, seed)
    right = np.random.default_rng(6).random((BATCH, WIDTH)) < agree
    params = {"model": params, "drafts": jnp.asarray(drafts_for(seed, right))}
    for offset in range(0, 12, 2):
        eos = [text[r, LENGTHS[r] + offset] for r in (0, 3, 5)]
        args = (DraftedModel(CONFIG), params, prompts_of(seed), LENGTHS, BUDGETS, eos)
        ar, orthrus = decoded("ar", *args), decoded("orthrus", *args)
        assert_same_decoding(ar, orthrus)
        for row, (budget, said) in enumerate(zip(BUDGETS, texts(ar), strict=True)):
            plain = text[row, LENGTHS[row] :][:budget].tolist()
            ends = [i + 1 for i, token in enumerate(plain) if token in eos]
            assert said == plain[: min(ends, default=budget)]
            stopped += len(said) < budget
    assert stopped > 10, "the EOS ids did not stop rows"


@pytest.mark.parametrize("agree", [0.0, 0.6, 1.0])
def test_cache_filled_to_its_last_slot_gives_the_ar_text(agree: float) -> None:
    """24 slots hold 21 tokens: every row is cut there and nowhere else."""
    seed, slots = 3, 24
    right = np.random.default_rng(7).random((BATCH, WIDTH)) < agree
    drafts = jnp.asarray(drafts_for(seed, right))
    params = {"model": random_params(CONFIG, seed), "drafts": drafts}
    args = (DraftedModel(CONFIG), params, prompts_of(seed), LENGTHS, [N] * BATCH)
    ar, orthrus = (decoded(loop, *args, slots=slots) for loop in ("ar", "orthrus"))
    assert ar.count.tolist() == [21 - length for length in LENGTHS]
    assert_same_decoding(ar, orthrus)
    free = [ar_text(seed)[r, n : n + 21 - n].tolist() for r, n in enumerate(LENGTHS)]
    assert texts(ar) == free, "a short cache changes no token before the cut"


def test_text_does_not_depend_on_the_batch() -> None:
    model, params, prompts = Model(CONFIG), random_params(CONFIG, 1), prompts_of(1)
    together = texts(decoded("orthrus", model, params, prompts, LENGTHS, BUDGETS))
    for row, (length, budget) in enumerate(zip(LENGTHS, BUDGETS, strict=True)):
        for loop in ("ar", "orthrus"):
            alone = decoded(loop, model, params, prompts[row : row + 1], [length], [budget])
            assert texts(alone) == [together[row]]


def test_text_does_not_depend_on_padding() -> None:
    model, params, prompts = Model(CONFIG), random_params(CONFIG, 1), prompts_of(1)
    other = np.where(np.arange(PROMPT) < np.array(LENGTHS)[:, None], prompts, 63)
    runs = [decoded("orthrus", model, params, p, LENGTHS, BUDGETS) for p in (prompts, other)]
    assert texts(runs[0]) == texts(runs[1])
    np.testing.assert_array_equal(runs[0].accepted, runs[1].accepted)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, PROMPT), min_size=BATCH, max_size=BATCH),
    budgets=st.lists(st.integers(0, N + 3), min_size=BATCH, max_size=BATCH),
    eos=st.lists(st.integers(0, 63), min_size=3, max_size=3),
    copy=st.booleans(),
    short=st.booleans(),
)
def test_orthrus_equals_ar_whatever_the_batch(seed, lengths, budgets, eos, copy, short) -> None:
    params = random_params(CONFIG, seed % 4, copy=copy)
    slots = 24 if short else SLOTS
    args = (Model(CONFIG), params, prompts_of(seed), lengths, budgets, eos)
    ar, orthrus = (decoded(loop, *args, slots=slots) for loop in ("ar", "orthrus"))
    assert_same_decoding(ar, orthrus)
    assert_consistent_statistics(orthrus)
    room = [min(b, N, slots - (K - 1) - n) for n, b in zip(lengths, budgets, strict=True)]
    assert (ar.count <= room).all()
    for said, most in zip(texts(ar), room, strict=True):
        assert len(said) == most or said[-1] in eos
        assert not set(said[:-1]) & set(eos)


@pytest.mark.parametrize("loop", ["ar", "orthrus"])
def test_stacked_layers_decode_to_the_same_bits(loop: str) -> None:
    """Training decodes from the layers as it keeps them."""
    tree, lengths = random_params(CONFIG, 3), np.full(BATCH, PROMPT, np.int32)
    budgets = np.full(BATCH, N, np.int32)
    apart, stacked = (
        decoded(loop, Model(CONFIG), weights, prompts_of(5), lengths, budgets)
        for weights in (tree, params.stack(tree))
    )
    np.testing.assert_array_equal(apart.tokens, stacked.tokens)
    np.testing.assert_array_equal(apart.accepted, stacked.accepted)

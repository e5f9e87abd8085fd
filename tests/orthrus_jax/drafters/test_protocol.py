"""The Drafter protocol, with a drafter that is no view of the model: it looks things up."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from orthrus_jax import decoding
from orthrus_jax.decoding import Drafts
from orthrus_jax.model import Model, ar_segment
from tests.support.configs import NO_EOS, tiny_config
from tests.support.decoding import texts
from tests.support.weights import random_params

CONFIG = tiny_config()
MODEL, PARAMS = Model(CONFIG), random_params(CONFIG, 2, gain=2.0)
BATCH, PROMPT, NEW, SLOTS, DRAFTS = 3, 8, 24, 64, 3
LENGTHS, BUDGETS = [8, 3, 5], [NEW, 9, NEW]


class Memory(struct.PyTreeNode):
    """What the drafter carries: the token that last followed each token, and what it was told."""

    after: jax.Array  # int32[B, V]
    accepted: jax.Array  # int32[B], of all cycles
    proposals: jax.Array  # int32[B]
    tapped: jax.Array  # float32[B], the sum of the first row's tapped state in the last cycle


@dataclasses.dataclass(frozen=True)
class LookupDrafter:
    """Proposes the token that followed last time; with `taps` it also notes what it was shown."""

    lookahead: int = DRAFTS
    taps: tuple[int, ...] = ()

    def init(self, batch: int, slots: int) -> Memory:
        del slots
        zeros = lambda *shape: jnp.zeros((batch, *shape), jnp.int32)  # each an array of its own
        after = zeros(CONFIG.vocab_size)
        return Memory(after, zeros(), zeros(), jnp.zeros(batch, jnp.float32))

    def propose(self, params: Any, state) -> tuple[Drafts, Memory]:
        del params
        memory, token, guesses = state.drafter, state.anchor, []
        for _ in range(self.lookahead):
            token = jnp.take_along_axis(memory.after, token[:, None], axis=1)[:, 0]
            guesses.append(token)
        return Drafts(jnp.stack(guesses, axis=1)), memory.replace(proposals=memory.proposals + 1)

    def observe(self, params: Any, state, taps, accepted) -> Memory:
        del params
        memory, index = state.drafter, jnp.arange(state.tokens.shape[1])

        def learn(after, tokens, count):
            pair = lambda i, after: jnp.where(
                i + 1 < count, after.at[tokens[i]].set(tokens[i + 1]), after
            )
            return jax.lax.fori_loop(0, len(index) - 1, pair, after)

        tapped = taps[0][:, 0].sum(-1) if self.taps else memory.tapped
        return memory.replace(
            after=jax.vmap(learn)(memory.after, state.tokens, state.count),
            accepted=memory.accepted + accepted,
            tapped=tapped,
        )


def start(drafter: LookupDrafter, rows=slice(None)) -> decoding.DecodeState:
    prompts = np.random.default_rng(3).integers(0, 63, (BATCH, PROMPT)).astype(np.int32)[rows]
    numbers = lambda values: jnp.asarray(values[rows], jnp.int32)
    state = decoding.prefill(
        MODEL, PARAMS, jnp.asarray(prompts), numbers(LENGTHS), numbers(BUDGETS), NO_EOS,
        slots=SLOTS, max_new_tokens=NEW, lookahead=drafter.lookahead,
    )  # fmt: skip
    return state.replace(drafter=drafter.init(len(prompts), SLOTS))


def decode(drafter: LookupDrafter, state, **pause):
    return decoding.speculative_decode(MODEL, PARAMS, state, drafter=drafter, **pause)


def ar_texts() -> list[list[int]]:
    state = decoding.ar_decode(MODEL, PARAMS, start(LookupDrafter()).replace(drafter=None))
    return texts(jax.tree.map(np.asarray, state))


@pytest.mark.parametrize("lookahead", [1, 3, 7])
@pytest.mark.parametrize("taps", [(), (1, 0)])
def test_ar_text_comes_with_any_lookup_drafter(lookahead: int, taps: tuple[int, ...]) -> None:
    drafter = LookupDrafter(lookahead, taps)
    state = jax.tree.map(np.asarray, decode(drafter, start(drafter)))
    assert texts(state) == ar_texts()
    assert state.accepted.max() > 0, "a drafter that is never right tests little"


def test_drafter_observes_the_accepted_drafts_of_each_sequence() -> None:
    drafter = LookupDrafter()
    state = jax.tree.map(np.asarray, decode(drafter, start(drafter)))
    counted = np.where(state.accepted >= 0, state.accepted, 0).sum(axis=1)
    np.testing.assert_array_equal(state.drafter.accepted, counted)
    assert state.drafter.proposals.tolist() == [int(state.cycles.max())] * BATCH


def test_carry_of_a_drafter_survives_pauses() -> None:
    drafter = LookupDrafter()
    whole, paused = decode(drafter, start(drafter)), start(drafter)
    for _ in range(NEW):
        paused = decode(drafter, paused, max_cycles=jnp.int32(1))
    whole, paused = (jax.tree.map(np.asarray, s.replace(cache=None)) for s in (whole, paused))
    np.testing.assert_array_equal(paused.tokens, whole.tokens)
    np.testing.assert_array_equal(paused.accepted, whole.accepted)
    np.testing.assert_array_equal(paused.drafter.after, whole.drafter.after)


def test_inserted_sequence_brings_its_own_carry() -> None:
    drafter = LookupDrafter()
    state = decode(drafter, start(drafter), max_cycles=jnp.int32(4))
    before = np.asarray(state.drafter.proposals)
    state = decoding.insert(state, start(drafter, slice(0, 1)), jnp.int32(1))
    assert np.asarray(state.drafter.proposals).tolist() == [before[0], 0, before[2]]
    state = jax.tree.map(np.asarray, decode(drafter, state))
    expected = ar_texts()
    assert texts(state) == [expected[0], expected[0], expected[2]]


def test_taps_are_the_verified_rows_states_after_that_layer() -> None:
    """The anchor's row of the first verification, from a forward of the prompt and the anchor."""
    drafter = LookupDrafter(taps=(1,))
    state = start(drafter)
    anchors, positions = np.asarray(state.anchor), np.asarray(state.position)
    prompts = np.random.default_rng(3).integers(0, 63, (BATCH, PROMPT)).astype(np.int32)
    seen = np.asarray(decode(drafter, state, max_cycles=jnp.int32(1)).drafter.tapped)
    for row in range(BATCH):
        ids = [*prompts[row, : LENGTHS[row]], anchors[row]]
        segment = ar_segment(jnp.asarray([ids], jnp.int32), jnp.zeros(1, jnp.int32))
        _, _, (states,) = MODEL.forward(PARAMS, [segment], None, (1,))
        assert positions[row] == len(ids) - 1
        np.testing.assert_allclose(seen[row], states[0, -1].sum(), rtol=1e-4, atol=1e-4)

"""Decoding loops under test: how they start on a script, its PATHS, and what the end must be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from orthrus_jax import decoding
from orthrus_jax.decoding import AcceptRule, Drafts, Strategy
from orthrus_jax.decoding.sampling import NoiseKey, gumbel_sample, probabilities
from orthrus_jax.decoding.state import mask_eos_until_min_tokens, next_positions
from orthrus_jax.drafters import DiffusionDrafter
from orthrus_jax.model import block_segment
from tests.support.compare import relative_error
from tests.support.configs import tiny_config
from tests.support.fake_models import scripted
from tests.support.fake_models.scripted import ScriptedModel, plain_text

K, SLOTS, PROMPT, N = 4, 40, 12, 20
WIDTH = SLOTS + 2 * K  # scripts run past the cache, so that reading there is always defined
MODEL = ScriptedModel(tiny_config(block_size=K))
COUNTED = ScriptedModel(tiny_config(block_size=K), counted=True)


class OrthrusDecode:
    """The paper's cycle, called like `ar_decode`: the model's own diffusion view drafts."""

    def __call__(self, *args, **options):
        return self._do(decoding.speculative_decode, *args, **options)

    def lower(self, *args, **options):
        return self._do(decoding.speculative_decode.lower, *args, **options)

    def trace(self, *args, **options):
        return self._do(decoding.speculative_decode.trace, *args, **options)

    def _cache_size(self) -> int:
        return decoding.speculative_decode._cache_size()

    def _do(
        self,
        function,
        model,
        params,
        state,
        *,
        block_size=None,
        rule=AcceptRule.REJECTION,
        drafter=DiffusionDrafter,
        **pause,
    ):
        drafter = drafter(model, block_size, rule)
        return function(model, params, state, drafter=drafter, rule=rule, **pause)


orthrus_decode = OrthrusDecode()


def switching_decode(model, params, state, *, choose):
    """Decode each sequence by a loop of its own, cycle by cycle.

    `choose(state, after)` gives int32[B], which of the states `after` a cycle of AR, of the paper's
    cycle under rejection and of the two-forward cycle each sequence goes on with.
    """
    strategy = Strategy("orthrus-2f", pairwise=False).resolve(model.config)
    loops = [
        decoding.ar_decode,
        orthrus_decode,
        functools.partial(decoding.two_forward_decode, strategy=strategy),
    ]
    while not state.done.all():
        copies = [jax.tree.map(jnp.copy, state) for _ in loops]
        after = [
            loop(model, params, copy, max_cycles=jnp.int32(1))
            for loop, copy in zip(loops, copies, strict=True)
        ]
        place = choose(state, after)

        def pick(*leaves, place=place):
            stacked = jnp.stack(leaves)
            return stacked[place, jnp.arange(len(place))]

        state = jax.tree.map(pick, *after)
    return state


def by_the_past(state, after):
    """A choice from what has been emitted and accepted."""
    last = jnp.maximum(state.cycles - 1, 0)[:, None]
    accepted = jnp.take_along_axis(state.accepted, last, axis=1)[:, 0]
    return (state.anchor + state.count + accepted) % len(after)


def by_the_future(state, after):
    """A fault: the loop that would emit the smallest token next."""
    at = state.count[:, None]
    tokens = [jnp.take_along_axis(one.tokens, at, axis=1, mode="clip")[:, 0] for one in after]
    return jnp.argmin(jnp.stack(tokens), axis=0)


@dataclasses.dataclass(frozen=True)
class DrawingDrafter(DiffusionDrafter):
    """Proposes a draw from the view's own distribution q, as other drafters do, and keeps q."""

    def propose(self, params, state):
        block = block_segment(
            state.anchor, state.position, self.rows, self.model.config.mask_token_id
        )
        (hidden,), _ = self.model.forward(params, [block], state.cache)
        logits = self.model.logits(params, hidden[:, :-1])
        q = probabilities(mask_eos_until_min_tokens(state, logits), state.sampler)
        tokens = gumbel_sample(q, state.sampler, next_positions(state, q), NoiseKey.DRAFT)
        return Drafts(tokens, q), None


def start(
    model,
    text,
    drafts,
    lengths,
    budgets,
    eos=(),
    *,
    slots=SLOTS,
    padded=PROMPT,
    new=N,
    lookahead=None,
):
    """The state after prefill, the params and the EOS array."""
    text, lengths = np.asarray(text), np.asarray(lengths, np.int32)
    prompts = np.where(np.arange(padded) < lengths[:, None], text[:, :padded], scripted.POISON)
    params = {"text": jnp.asarray(text), "drafts": jnp.asarray(drafts)}
    ids = jnp.asarray([*eos, -1, -1, -1][:3], jnp.int32)
    state = decoding.prefill(
        model,
        params,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(lengths),
        jnp.asarray(budgets, jnp.int32),
        ids,
        slots=slots,
        max_new_tokens=new,
        lookahead=lookahead,
    )
    return state, params


def check(state, row: int, text, outcome: scripted.Outcome) -> None:
    """Every field of one row, and every live slot of its cache."""
    count = len(outcome.tokens)
    assert int(state.count[row]) == count
    assert np.asarray(state.tokens)[row, :count].tolist() == outcome.tokens
    assert int(state.cycles[row]) == outcome.cycles
    padding = [-1] * (state.accepted.shape[1] - outcome.cycles)
    assert np.asarray(state.accepted)[row].tolist() == outcome.accepted + padding
    assert int(state.position[row]) == outcome.position
    assert bool(state.done[row])
    if count:
        assert int(state.anchor[row]) == outcome.tokens[-1]
    live = np.asarray(state.cache.tokens)[row, : outcome.position]
    assert live.tolist() == np.asarray(text)[row, : outcome.position].tolist()


# One row, prompt of 5 tokens; positions 5, 6, 7 ... are emitted. EOS is 1 (and 0, 2 where named).
# name: (tokens put into the text, positions where drafts disagree, budget, eos, emitted, accepted)
ALWAYS = range(WIDTH)
PATHS = {
    "no draft accepted": ({}, ALWAYS, 4, (), 4, [0, 0, 0]),
    "all drafts accepted": ({}, (), 9, (), 9, [3, 3]),
    "some drafts accepted": ({}, (7, 10, 11), 10, (), 10, [1, 2, 0, 3]),
    "agreement after a miss is not accepted": ({}, (6, 10), 8, (), 8, [0, 3, 2]),
    "EOS as the first token": ({5: 1}, (), 9, (1,), 1, []),
    "EOS as the first draft": ({6: 1}, (), 9, (1,), 2, [1]),
    "EOS inside the drafts": ({7: 1}, (), 9, (1,), 3, [2]),
    "EOS as the last draft": ({8: 1}, (), 9, (1,), 4, [3]),
    "EOS as the bonus token": ({9: 1}, (), 9, (1,), 5, [3]),
    "EOS as the correction": ({7: 1}, (7,), 9, (1,), 3, [1]),
    "EOS as a correction at once": ({6: 1}, (6,), 9, (1,), 2, [0]),
    "EOS in a rejected draft only": ({}, (7,), 6, (17,), 6, [1, 3]),
    "EOS id 0": ({7: 0}, (), 9, (0,), 3, [2]),
    "EOS id 0 as the first token": ({5: 0}, (), 9, (0,), 1, []),
    "several EOS ids, the second comes": ({8: 2}, (), 9, (1, 2, 0), 4, [3]),
    "several EOS ids, two in one block": ({7: 2, 8: 1}, (), 9, (1, 2), 3, [2]),
    "EOS in the prompt does not stop": ({2: 1, 4: 1}, (), 5, (1,), 5, [3]),
    "budget 1": ({}, (), 1, (), 1, []),
    "budget 2": ({}, (), 2, (), 2, [1]),
    "budget inside the accepted drafts": ({}, (), 3, (), 3, [2]),
    "budget at the last draft": ({}, (), 4, (), 4, [3]),
    "budget at the bonus token": ({}, (), 5, (), 5, [3]),
    "budget at the correction": ({}, (7,), 3, (), 3, [1]),
    "budget one before the correction": ({}, (8,), 3, (), 3, [2]),
    "EOS just past the budget": ({8: 1}, (), 3, (1,), 3, [2]),
    "EOS and budget at once": ({7: 1}, (), 3, (1,), 3, [2]),
    "budget 0: a filler": ({}, (), 0, (), 0, []),
}


def script_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The text and drafts of a path; 17 is in no text, and is the draft where drafts disagree."""
    put, misses, *_ = PATHS[name]
    text = plain_text(1, WIDTH, seed=1)
    text[text == 17] = 18
    for position, token in put.items():
        text[0, position] = token
    return text, np.where(np.isin(np.arange(WIDTH), misses), 17, text)


def texts(state) -> list[list[int]]:
    return [row[:count].tolist() for row, count in zip(state.tokens, state.count, strict=True)]


def assert_same_decoding(ar, orthrus) -> None:
    """Text, counts, positions, anchors; and every live slot, to float32 rounding."""
    assert texts(orthrus) == texts(ar)
    for name in ("count", "budget", "done", "position"):
        np.testing.assert_array_equal(getattr(orthrus, name), getattr(ar, name), err_msg=name)
    some = ar.count > 0
    np.testing.assert_array_equal(orthrus.anchor[some], ar.anchor[some])
    live = np.arange(ar.cache.k[0].shape[-1]) < ar.position[:, None]
    for ours, theirs in zip(orthrus.cache.k, ar.cache.k, strict=True):
        rows = live[:, None, None, :]
        assert relative_error(ours * rows, theirs * rows) < 2e-5
    for ours, theirs in zip(orthrus.cache.v, ar.cache.v, strict=True):
        rows = live[:, None, :, None]
        assert relative_error(ours * rows, theirs * rows) < 2e-5

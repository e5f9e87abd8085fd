"""Every scheme's acceptance from one recording of what the drafting view guesses.

Greedily, what a block guesses depends on its anchor alone: the text before it is the model's own,
whatever cycle it came from. So a model's answers and the guesses of a block at each of their tokens
say how any cycle would have gone. `simulate` runs the loops of ahead.py and decode.py themselves,
with a model that looks its hidden states up in the recording.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from orthrus_jax import decoding
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding import overlapped as ahead
from orthrus_jax.decoding.overlapped import CHOICES, Scheme, likeliest
from orthrus_jax.engine import bucket
from orthrus_jax.llm import LLM
from orthrus_jax.model import Segment, View, ar_segment

FILLERS = 64  # ids that share what probability the likeliest guesses leave
RIGHT = 1  # the answer's own token; 0 is none's
ANCHORS = 32  # blocks a forward of `record`


@dataclasses.dataclass(frozen=True)
class Recording:
    """What blocks of one length guessed along N answers of up to L tokens.

    Attributes:
      lengths: int32[N], tokens of each answer.
      guesses: int32[N, L, K, M], for the block anchored at token i, its row j: RIGHT where the
        guess of that rank is the answer's token i + j + 1, else a number of the rank's own.
      log_probs: float32[N, L, K, M].
    """

    lengths: np.ndarray
    guesses: np.ndarray
    log_probs: np.ndarray

    @property
    def block_size(self) -> int:
        """Rows of the recorded blocks."""
        return self.guesses.shape[2]


def record(
    model: LLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], block: int
) -> Recording:
    """Run a block of `block` rows at each token of each answer.

    Args:
      model: whose drafting view guesses.
      prompts, answers: ids; the answers are the model's own, greedy.
      block: from 2 to the trained K.
    """
    inner, weights = model.engine.model, model.params
    choices = min(CHOICES, model.config.vocab_size)
    longest = max(map(len, answers))
    shape = (len(answers), longest, block, choices)
    found, log_probs = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
    slots = bucket(max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = np.zeros((1, slots), np.int32)
        ids[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        cache = _read(inner, weights, jnp.asarray(ids))
        for first in range(0, len(answer), ANCHORS):
            at = len(prompt) + np.minimum(first + np.arange(ANCHORS), len(answer) - 1)
            rows = _guesses(inner, weights, cache, jnp.asarray(ids), jnp.asarray(at), block)
            tokens, probs = (np.asarray(x)[: len(answer) - first] for x in rows)
            target = np.minimum(at[: len(tokens), None] + 1 + np.arange(block), slots - 1)
            equal = tokens == ids[0, target][..., None]
            ranks = RIGHT + 1 + np.arange(choices)
            found[n, first : first + len(tokens)] = np.where(equal, RIGHT, ranks)
            log_probs[n, first : first + len(tokens)] = probs
    return Recording(np.array([len(a) for a in answers], np.int32), found, log_probs)


@functools.partial(jax.jit, static_argnames="model")
def _read(model: Any, weights: Any, ids: jax.Array) -> Any:
    cache = model.init_cache(*ids.shape)
    return model.forward(weights, [ar_segment(ids, jnp.zeros(1, jnp.int32))], cache)[1]


@functools.partial(jax.jit, static_argnames=("model", "block"))
def _guesses(
    model: Any, weights: Any, cache: Any, ids: jax.Array, at: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """Likeliest tokens and their log-probabilities, [A, K, M], of blocks at positions `at` [A]."""
    offset = jnp.arange(block)
    tokens = jnp.where(offset == 0, ids[0, at][:, None], model.config.mask_token_id)
    flat = lambda x: x.reshape(1, -1)
    segment = Segment(flat(tokens), flat(at[:, None] + offset), View.DIFFUSION, block=block)
    (hidden,), _ = model.forward(weights, [segment], cache)
    scores = jax.nn.log_softmax(model.logits(weights, hidden), axis=-1)
    found = likeliest(scores, min(CHOICES, scores.shape[-1]))
    probs = jnp.take_along_axis(scores, found, axis=-1)
    by_block = lambda x: x.reshape(len(at), block, -1)
    return by_block(found), by_block(probs)


class NoCache(struct.PyTreeNode):
    """Nothing is kept: what a row says follows from its position."""

    def compact(self, first: jax.Array, rows: jax.Array) -> "NoCache":
        """Return itself."""
        del first, rows
        return self


@dataclasses.dataclass(frozen=True)
class RecordedModel:
    """`decoding.DecodingModel` by recording. All of an answer is RIGHT, from position 1 on.

    A hidden state is the M guesses of a row and their log-probabilities. Where a block stands on
    text that did not come about, it says what it would say on the text that did: nothing looks.
    """

    config: ModelConfig

    def init_cache(self, batch: int, slots: int) -> NoCache:
        """A cache of nothing."""
        del batch, slots
        return NoCache()

    def forward(
        self, params: Any, segments: list[Segment], cache: NoCache
    ) -> tuple[list[jax.Array], NoCache]:
        """Look up what each row says."""
        hidden = []
        for segment in segments:
            anchors = segment.positions
            if segment.view is View.AR:
                rank = jnp.arange(params["guesses"].shape[3])
                said = jnp.concatenate([rank + RIGHT, jnp.where(rank == 0, 0.0, -jnp.inf)])
                hidden.append(jnp.broadcast_to(said, (*anchors.shape, len(said))))
                continue
            index = jnp.clip(anchors[:, :: segment.block] - 1, 0, params["guesses"].shape[1] - 1)
            take = lambda x, i=index: jnp.take_along_axis(x, i[..., None, None], axis=1)
            said, log_probs = take(params["guesses"]), take(params["log_probs"])
            both = jnp.concatenate([said.astype(jnp.float32), log_probs], axis=-1)
            hidden.append(both.reshape(*anchors.shape, -1))
        return hidden, cache

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Log-probabilities of the guesses; what they leave is shared by ids that none is."""
        tokens, log_probs = jnp.split(hidden, 2, axis=-1)
        left = jnp.maximum(1 - jnp.exp(log_probs).sum(-1, keepdims=True), 1e-30)
        filler = jnp.minimum(jnp.log(left / FILLERS), log_probs.min(-1, keepdims=True) - 1e-3)
        is_it = tokens[..., None] == jnp.arange(tokens.shape[-1] + RIGHT + 1)
        scores = jnp.where(is_it, log_probs[..., None], -jnp.inf).max(axis=-2)
        return jnp.concatenate([scores, jnp.repeat(filler, FILLERS, axis=-1)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a cycle went along the recorded answers.

    Attributes:
      tokens, forwards: int[N], of each answer, its prefill counted.
      accepted: mean drafts emitted a verification.
      hits: of the verifications after the first, the share with a draft made for what came of the
        one before; 1 where drafts are not made ahead.
    """

    tokens: np.ndarray
    forwards: np.ndarray
    accepted: float
    hits: float


def simulate(recording: Recording, cycle: str, scheme: Scheme) -> Outcome:
    """Decode the recorded answers by a cycle of engine.CYCLES, or by "ar"."""
    choices = recording.guesses.shape[3]
    config = ModelConfig(
        vocab_size=choices + RIGHT + 1 + FILLERS,
        hidden_size=2, intermediate_size=2, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=2,
        block_size=recording.block_size, mask_token_id=0,
    )  # fmt: skip
    model = RecordedModel(config)
    params = {"guesses": recording.guesses, "log_probs": recording.log_probs}
    params = jax.tree.map(jnp.asarray, params)
    batch, longest = recording.guesses.shape[:2]
    full = lambda n: jnp.full(batch, n, jnp.int32)
    state = decoding.prefill(
        model, params, jnp.zeros((batch, 1), jnp.int32), full(1), jnp.asarray(recording.lengths),
        jnp.array([-1]), slots=2 * longest + scheme.drafts + 2, max_new_tokens=longest,
        reach=max(scheme.drafts, config.block_size - 1),
    )  # fmt: skip
    if cycle == "ar":
        state = decoding.ar_decode(model, params, state)
    elif cycle == "paper":
        state = decoding.orthrus_decode(model, params, state, block_size=scheme.block_size)
    elif cycle == "two-forward":
        state = ahead.two_forward_decode(model, params, state, scheme=scheme)
    else:
        state = state.replace(ahead=scheme.nothing(batch))
        return _outcome(*_watched(model, params, state, scheme), forwards=1)
    return _outcome(state, 1.0, forwards=1 if cycle == "ar" else 2)


def _watched(
    model: RecordedModel, params: Any, state: decoding.DecodeState, scheme: Scheme
) -> tuple[decoding.DecodeState, float]:
    """Decode cycle by cycle; see which drafts are a block's own, and not what was left."""
    hits = cycles = 0
    known = _believed(np.asarray(params["log_probs"]), scheme.trust)
    rows = np.arange(len(state.done))
    while not state.done.all():
        state = ahead.one_forward_decode(model, params, state, scheme=scheme, cycles=jnp.int32(1))
        going = ~np.asarray(state.done)
        index = np.asarray(state.position) - 1  # the anchor's, in its answer
        early = known[rows, np.clip(index - 1, 0, known.shape[1] - 1)][:, 1:]
        fresh = known[rows, np.minimum(index, known.shape[1] - 1)][:, :-1]
        drafted = np.asarray(state.ahead.probs)[:, : early.shape[1], 0]
        hit = [np.isclose(drafted, by, rtol=0.02, atol=1e-6) for by in (early, fresh)]
        hits += ((hit[0].all(axis=1) | hit[1].all(axis=1)) & going).sum()
        cycles += going.sum()
    return state, hits / max(cycles, 1)


def _believed(log_probs: np.ndarray, trust: float) -> np.ndarray:
    """The likeliest guesses' probabilities as ahead.guess finds them in RecordedModel.logits."""
    left = np.maximum(1 - np.exp(log_probs).sum(-1), 1e-30)
    filler = np.minimum(np.log(left / FILLERS), log_probs.min(-1) - 1e-3)
    mass = np.exp(log_probs / trust).sum(-1) + FILLERS * np.exp(filler / trust)
    return np.exp(log_probs[..., 0] / trust) / np.maximum(mass, 1e-30)


def _outcome(state: decoding.DecodeState, hits: float, forwards: int) -> Outcome:
    accepted = np.asarray(state.accepted)
    return Outcome(
        tokens=np.asarray(state.count),
        forwards=1 + forwards * np.asarray(state.cycles),
        accepted=float(accepted[accepted >= 0].mean()),
        hits=float(hits),
    )

"""Replay one recording of the drafter's guesses to get the acceptance of any strategy.

Greedily, the guesses of a block depend on its anchor alone: the text before it is the model's own,
whichever cycle emitted it. So a model's answers, with the guesses of a block at each of their
tokens, determine how any cycle would have gone. `simulate` runs the compiled loops themselves, with
a model that looks its hidden states up in the recording. Knows no clock.
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
from orthrus_jax.decoding import DecodeState, Strategy
from orthrus_jax.decoding.guesses import top_ids
from orthrus_jax.decoding.strategy import CANDIDATES
from orthrus_jax.drafters import first_carry, loop_of
from orthrus_jax.engine import bucket
from orthrus_jax.llm import LLM
from orthrus_jax.metrics import acceptance_length
from orthrus_jax.model import Segment, View, ar_segment, pairwise
from orthrus_jax.model.pairwise import HEAD, TABLE, Head

FILLER_IDS = 64  # ids that share the probability left by the likeliest guesses
CORRECT = 1  # stands for the answer's own token at every place; 0 for no token
ANCHORS = 32  # blocks per forward of `record`


@dataclasses.dataclass(frozen=True)
class Recording:
    """The guesses of blocks of one length along N answers of up to L tokens.

    Attributes:
      lengths: int32[N], tokens of each answer.
      guesses: int32[N, L, K, M], for row j of the block anchored at token i: CORRECT where the
        guess of that rank is the answer's token i + j + 1, else the number of the guessed token
        among those guessed for this place.
      log_probs: float32[N, L, K, M].
      ids: int32[N, L + K, C], the token that each number stands for, by place in the answer.
      head: the model's pairwise head, as tables; None if it has none.
    """

    lengths: np.ndarray
    guesses: np.ndarray
    log_probs: np.ndarray
    ids: np.ndarray
    head: Head | None = None

    @property
    def block_size(self) -> int:
        """Rows of the recorded blocks."""
        return self.guesses.shape[2]


def record(
    model: LLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], block: int
) -> Recording:
    """Run a block of `block` rows at each token of each answer.

    Args:
      model: the one whose drafting view guesses.
      prompts, answers: ids; the answers are the model's own greedy ones.
      block: from 2 to the trained K.
    """
    inner, weights = model.engine.model, model.params
    choices = min(CANDIDATES, model.config.vocab_size)
    longest = max(map(len, answers))
    shape = (len(answers), longest, block, choices)
    guesses, log_probs = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
    slots = bucket(max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))
    numbered: list[list[np.ndarray]] = []
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = np.zeros((1, slots), np.int32)
        ids[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        cache = _read(inner, weights, jnp.asarray(ids))
        for first in range(0, len(answer), ANCHORS):
            at = len(prompt) + np.minimum(first + np.arange(ANCHORS), len(answer) - 1)
            rows = _guesses(inner, weights, cache, jnp.asarray(ids), jnp.asarray(at), block)
            tokens, scores = (np.asarray(x)[: len(answer) - first] for x in rows)
            guesses[n, first : first + len(tokens)] = tokens
            log_probs[n, first : first + len(tokens)] = scores
        places = np.arange(len(answer) + block)
        truth = ids[0, np.minimum(len(prompt) + places, slots - 1)]
        numbered.append(_number(guesses[n, : len(answer)], truth))
    ids = _padded(numbered, longest + block, CORRECT + 1 + choices)
    lengths = np.array([len(a) for a in answers], np.int32)
    return Recording(lengths, guesses, log_probs, ids, _head_as_tables(model))


def _number(guesses: np.ndarray, truth: np.ndarray) -> list[np.ndarray]:
    """Put numbers for the ids guesses [L, K, M], in place; return the ids by place and number."""
    length, block, _ = guesses.shape
    listed = []
    for place, token in enumerate(truth):
        rows = np.arange(max(0, place - length), min(block, place))  # of the blocks that guess it
        at = (place - 1 - rows, rows)
        wrong, numbers = np.unique(guesses[at], return_inverse=True)
        is_true = wrong == token
        number = np.where(is_true, CORRECT, CORRECT + np.cumsum(~is_true))
        guesses[at] = number[numbers.reshape(guesses[at].shape)]
        listed.append(np.array([0, token, *wrong[~is_true]], np.int32))
    return listed


def _padded(listed: list[list[np.ndarray]], places: int, least: int) -> np.ndarray:
    """The lists of ids by answer and place as one array [N, places, C], C at least `least`."""
    most = max(least, *(len(ids) for answer in listed for ids in answer))
    whole = np.zeros((len(listed), places, most), np.int32)
    for n, answer in enumerate(listed):
        for place, ids in enumerate(answer):
            whole[n, place, : len(ids)] = ids
    return whole


def _head_as_tables(model: LLM) -> Head | None:
    """The model's pairwise head with the vectors of all tokens in tables, of either kind."""
    head = model.params.get(HEAD)
    if head is None:
        return None
    tokens = jnp.arange(model.config.vocab_size)
    vectors = model.engine.model.pair_vectors(model.params, tokens, tokens)
    tables = zip(("previous", "current"), vectors, strict=True)
    return head | {name: {TABLE: vectors} for name, vectors in tables}


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
    tokens = jnp.where(offset == 0, ids[0, at][:, None], model.config.mask_id)
    flat = lambda x: x.reshape(1, -1)
    segment = Segment(flat(tokens), flat(at[:, None] + offset), View.DIFFUSION, block=block)
    (hidden,), _ = model.forward(weights, [segment], cache)
    scores = jax.nn.log_softmax(model.logits(weights, hidden), axis=-1)
    likeliest_ids = top_ids(scores, min(CANDIDATES, scores.shape[-1]))
    log_probs = jnp.take_along_axis(scores, likeliest_ids, axis=-1)
    by_block = lambda x: x.reshape(len(at), block, -1)
    return by_block(likeliest_ids), by_block(log_probs)


class NoCache(struct.PyTreeNode):
    """An empty cache: the replay model's output depends on position alone."""

    def commit(self, position: jax.Array) -> "NoCache":
        """Return itself."""
        del position
        return self

    def compact(self, first: jax.Array, rows: jax.Array) -> "NoCache":
        """Return itself."""
        del first, rows
        return self


@dataclasses.dataclass(frozen=True)
class ReplayModel:
    """A `decoding.DecodingModel` of a recording: every answer is CORRECT from position 1 on.

    A hidden state is the M guesses of a row and their log-probabilities. A block anchored on
    rejected text returns the guesses for the accepted text: no loop reads them.
    """

    config: ModelConfig

    def init_cache(self, batch: int, slots: int) -> NoCache:
        """Return an empty cache."""
        del batch, slots
        return NoCache()

    def forward(
        self,
        params: Any,
        segments: list[Segment],
        cache: NoCache,
        taps: tuple[int, ...] = (),
    ) -> tuple[list[jax.Array], NoCache]:
        """Look up the guesses of each row."""
        assert not taps, "a recording holds no hidden states"
        hidden = []
        for segment in segments:
            anchors = segment.positions
            if segment.view is View.AR:
                rank = jnp.arange(params["guesses"].shape[3])
                row = jnp.concatenate([rank + CORRECT, jnp.where(rank == 0, 0.0, -jnp.inf)])
                hidden.append(jnp.broadcast_to(row, (*anchors.shape, len(row))))
                continue
            index = jnp.clip(anchors[:, :: segment.block] - 1, 0, params["guesses"].shape[1] - 1)
            take = lambda x, i=index: jnp.take_along_axis(x, i[..., None, None], axis=1)
            guesses, log_probs = take(params["guesses"]), take(params["log_probs"])
            both = jnp.concatenate([guesses.astype(jnp.float32), log_probs], axis=-1)
            hidden.append(both.reshape(*anchors.shape, -1))
        return hidden, cache

    def pair_vectors(
        self, params: Any, tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The vectors of the tokens that these numbers stand for at their positions."""
        batch, places, count = params["ids"].shape
        place = jnp.clip(jnp.broadcast_to(positions, tokens.shape) - 1, 0, places - 1)
        index = place * count + jnp.minimum(tokens, count - 1)
        every = params["ids"].reshape(batch, -1)
        ids = jnp.take_along_axis(every, index.reshape(batch, -1), axis=1).reshape(tokens.shape)
        return pairwise.vectors(params[HEAD], None, ids)

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Log-probabilities of the guesses; filler ids, never guessed, share the rest."""
        tokens, log_probs = jnp.split(hidden, 2, axis=-1)
        left = jnp.maximum(1 - jnp.exp(log_probs).sum(-1, keepdims=True), 1e-30)
        filler = jnp.minimum(jnp.log(left / FILLER_IDS), log_probs.min(-1, keepdims=True) - 1e-3)
        matches = tokens[..., None] == jnp.arange(params["ids"].shape[-1])
        scores = jnp.where(matches, log_probs[..., None], -jnp.inf).max(axis=-2)
        return jnp.concatenate([scores, jnp.repeat(filler, FILLER_IDS, axis=-1)], axis=-1)


@dataclasses.dataclass(frozen=True)
class ReplayResult:
    """Tokens, forwards and acceptance of a strategy along the recorded answers.

    Attributes:
      tokens, forwards: int[N], of each answer, its prefill counted.
      accepted: mean drafts emitted per verification.
      hit_rate: of the verifications after the first, the share whose draft was made for the actual
        outcome of the one before; 1 where drafts are not made ahead.
    """

    tokens: np.ndarray
    forwards: np.ndarray
    accepted: float
    hit_rate: float


def simulate(recording: Recording, strategy: Strategy) -> ReplayResult:
    """Decode the recorded answers with a strategy."""
    config = ModelConfig(
        vocab_size=recording.ids.shape[2] + FILLER_IDS,
        hidden_size=2, intermediate_size=2, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=2,
        block_size=recording.block_size, mask_token_id=0,
    )  # fmt: skip
    model, head = ReplayModel(config), recording.head
    strategy = strategy.resolve(config, head=head is not None)
    fields = ("guesses", "log_probs", "ids")
    params = {name: jnp.asarray(getattr(recording, name)) for name in fields}
    weights: dict[str, Any] = params if head is None else params | {HEAD: head}
    batch, longest = recording.guesses.shape[:2]
    full = lambda n: jnp.full(batch, n, jnp.int32)
    state = decoding.prefill(
        model, params, jnp.zeros((batch, 1), jnp.int32), full(1), jnp.asarray(recording.lengths),
        jnp.array([-1]), slots=(slots := 2 * longest + strategy.drafts + 2), max_new_tokens=longest,
        lookahead=max(strategy.drafts, config.block_size - 1),
    )  # fmt: skip
    state = state.replace(drafter=first_carry(strategy, model, batch, slots))
    if strategy.method == "orthrus-1f":
        return _result(*_decode_counting_hits(model, weights, state, strategy), forwards=1)
    loop, static = loop_of(strategy, model)
    return _result(loop(model, weights, state, **static), 1.0, forwards=strategy.forwards)


def _decode_counting_hits(
    model: ReplayModel, params: Any, state: DecodeState, strategy: Strategy
) -> tuple[DecodeState, float]:
    """Decode cycle by cycle; count the drafts that come from a block made for that outcome."""
    hits = cycles = 0
    loop, static = loop_of(strategy, model)
    probs = _likeliest_probs(np.asarray(params["log_probs"]), strategy.draft_temperature or 1.0)
    rows = np.arange(len(state.done))
    while not state.done.all():
        state = loop(model, params, state, **static, max_cycles=jnp.int32(1))
        going = ~np.asarray(state.done)
        index = np.asarray(state.position) - 1  # the anchor's, in its answer
        early = probs[rows, np.clip(index - 1, 0, probs.shape[1] - 1)][:, 1:]
        fresh = probs[rows, np.minimum(index, probs.shape[1] - 1)][:, :-1]
        drafted = np.asarray(state.drafter.probs)[:, : early.shape[1], 0]
        hit = [np.isclose(drafted, by, rtol=0.02, atol=1e-6) for by in (early, fresh)]
        hits += ((hit[0].all(axis=1) | hit[1].all(axis=1)) & going).sum()
        cycles += going.sum()
    return state, hits / max(cycles, 1)


def _likeliest_probs(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """The likeliest guesses' probabilities, which overlapped.guess computes from the logits."""
    left = np.maximum(1 - np.exp(log_probs).sum(-1), 1e-30)
    filler = np.minimum(np.log(left / FILLER_IDS), log_probs.min(-1) - 1e-3)
    mass = np.exp(log_probs / temperature).sum(-1) + FILLER_IDS * np.exp(filler / temperature)
    return np.exp(log_probs[..., 0] / temperature) / np.maximum(mass, 1e-30)


def _result(state: DecodeState, hits: float, forwards: int) -> ReplayResult:
    return ReplayResult(
        tokens=np.asarray(state.count),
        forwards=1 + forwards * np.asarray(state.cycles),
        accepted=acceptance_length(row[row >= 0].tolist() for row in np.asarray(state.accepted)),
        hit_rate=float(hits),
    )

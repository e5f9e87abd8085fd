"""Ids in, ids out: requests go through the compiled loops in a batch that is kept full.

Decides how requests become a few static shapes (buckets), so that a new prompt length compiles
nothing; when the loop pauses for the host; and what is counted as time. How a token is chosen is
decode.py and sampling.py; text is generate.py and stream.py.
"""

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from orthrus_jax import decoding
from orthrus_jax.attention.cache import KVCache
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding.sampling import Filters, Sampler
from orthrus_jax.decoding.strategy import Strategy
from orthrus_jax.drafters import first_carry, loop_of
from orthrus_jax.engine.detokenizer import TextStream
from orthrus_jax.engine.programs import bucket
from orthrus_jax.engine.request import (
    Answer,
    Event,
    Plan,
    Request,
    SamplingParams,
)
from orthrus_jax.engine.session import Memory
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, Params
from orthrus_jax.sharding import batch_sharding, to_host
from orthrus_jax.tokenizer import Tokenizer

STREAM_CYCLES = 8  # cycles between two looks of the host at the text, where it has to look
FOREVER = np.iinfo(np.int32).max
PADDING = 4096  # tokens of padding that a batch may be begun with, however short its prompts


@dataclasses.dataclass
class _Row:
    """A request in flight."""

    index: int
    request: Request
    text: TextStream | None
    began: float
    compiled: float  # the engine's compile seconds when it began
    read: int = 0  # tokens the host has looked at
    first: float | None = None  # seconds until its first token was there


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What all programs of one serving share."""

    slots: int
    width: int
    ends: int
    sampled: bool
    filtered: bool
    least: bool
    logprobs: bool


class Engine:
    """A model's compiled programs, kept by shape, and the loop that feeds them.

    On a `mesh` the rows of a batch are shared out over `data` and `fsdp`, heads over `tensor`; the
    parameters lie there already (`sharding.tree_shardings`). `draft_temperature` is this model's,
    where a strategy names none.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer = None,
        mesh: Mesh | None = None,
        draft_temperature: float = 1.0,
    ) -> None:
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh
        self.draft_temperature = draft_temperature
        self.model = Model(config, mesh)
        self.compile_seconds = 0.0
        self._programs: dict[tuple, Any] = {}

    def check(self, requests: Sequence[Request], plan: Plan) -> None:
        """Refuse what cannot be done.

        Raises:
          UserError: naming the value and its limit.
        """
        config = self.config
        plan.strategy.resolve(config)
        if plan.batch_size < 1:
            raise UserError(f"batch_size={plan.batch_size} must be at least 1")
        for i, request in enumerate(requests):
            new = request.sampling.max_new_tokens
            if not len(request.prompt):
                raise UserError(f"prompt {i} is empty: give at least one token")
            if len(request.prompt) + new > config.max_position_embeddings:
                raise UserError(
                    f"prompt {i} has {len(request.prompt)} tokens; with max_new_tokens={new} "
                    f"that is over the model's {config.max_position_embeddings} positions"
                )
            beyond = [t for t in request.sampling.stop_token_ids if t >= config.vocab_size]
            if beyond:
                raise UserError(
                    f"stop_token_ids={beyond} are not below the vocabulary's {config.vocab_size}"
                )
            if request.sampling.stop and self.tokenizer is None:
                raise UserError("stop strings need a tokenizer: this model was loaded without one")

    def slots(self, prompt: int, new: int, plan: Plan) -> int:
        """Cache slots that a prompt and its answer, of at most so many tokens, are given."""
        behind = max(self.config.block_size, plan.strategy.tree_nodes + 1)
        return bucket(bucket(prompt) + bucket(new) + behind)

    def serve(
        self, requests: Sequence[Request], plan: Plan, memory: Memory | None = None
    ) -> Iterator[Event]:
        """Answer all requests, in the order they finish.

        Args:
          requests: at least one.
          plan: how.
          memory: a conversation to continue, and to leave its new state in; one request then.
        """
        self.check(requests, plan)
        shape = self._shape(requests, plan, memory)
        queue = collections.deque(enumerate(requests))
        rows: list[_Row | None] = [None] * plan.batch_size
        state: Any = None
        while queue or any(rows):
            if not any(rows):
                rows, state = self._start(queue, shape, plan, memory)
            state = self._advance(state, rows, plan, refilling=plan.refill and bool(queue))
            found = _fetch(state)
            for i, row in enumerate(rows):
                if row is None:
                    continue
                event = self._look(row, *(x[i] for x in found))
                if memory is not None:
                    memory.cache = state.cache
                    memory.ids = [*requests[0].prompt, *found.tokens[0][: found.emitted[0] - 1]]
                if event.answer is not None:
                    rows[i] = None
                if event.text or event.answer is not None:
                    yield event
            if not any(rows):
                continue
            idle = np.array([row is None for row in rows])
            if (idle & ~found.done).any():  # ended by a stop string
                state = self._run(decoding.stop, state, jnp.array(idle))
            for i in idle.nonzero()[0].tolist() if plan.refill else ():
                rows[i], state = self._refill(i, state, queue, shape, plan)

    def _start(
        self, queue: collections.deque, shape: _Shape, plan: Plan, memory: Memory | None
    ) -> tuple[list[_Row | None], decoding.DecodeState]:
        """Begin a batch: all prompts at once, padded to the longest, or one after another.

        Where one is much longer than the rest, the padding would be most of what is read.
        """
        places = range(plan.batch_size)
        widths = [bucket(len(queue[i][1].prompt)) for i in places[: len(queue)]]
        padding = len(places) * max(widths) - sum(widths)
        if memory is not None or padding <= max(PADDING, sum(widths)):
            rows = [self._admit(queue, plan) for _ in places]
            return rows, self._prefill(rows, shape, plan, memory)
        rows = [None for _ in places]
        state = self._prefill(rows, shape, plan)
        for i in places[: len(widths)]:
            rows[i], state = self._refill(i, state, queue, shape, plan)
        return rows, state

    def _refill(
        self,
        i: int,
        state: decoding.DecodeState,
        queue: collections.deque,
        shape: _Shape,
        plan: Plan,
    ) -> tuple[_Row | None, decoding.DecodeState]:
        """Put the next request in place of row i, if there is one."""
        row = self._admit(queue, plan)
        if row is not None:
            fresh = self._prefill([row], shape, plan)
            state = self._run(decoding.insert, state, fresh, jnp.int32(i))
        return row, state

    def _admit(self, queue: collections.deque, plan: Plan) -> _Row | None:
        if not queue:
            return None
        index, request = queue.popleft()
        text = None
        if request.sampling.stop or plan.stream:
            text = TextStream(self.tokenizer, request.sampling.stop)
        return _Row(index, request, text, time.perf_counter(), self.compile_seconds)

    def _shape(self, requests: Sequence[Request], plan: Plan, memory: Memory | None) -> _Shape:
        asked = [request.sampling for request in requests]
        new = max(sampling.max_new_tokens for sampling in asked)
        longest = max(len(request.prompt) for request in requests)
        slots = max(self.slots(longest, new, plan), bucket(plan.slots))
        if memory is not None:
            if slots > memory.slots:
                memory.slots, memory.cache = slots, None
            slots = memory.slots
        ends = len(self.config.eos_token_ids) + max(len(s.stop_token_ids) for s in asked)
        return _Shape(
            slots=slots,
            width=bucket(new),
            ends=1 << max(ends - 1, 0).bit_length(),
            sampled=any(s.temperature > 0 for s in asked),
            filtered=any(s.temperature > 0 and s.filtered for s in asked),
            least=any(s.min_new_tokens for s in asked),
            logprobs=any(s.logprobs for s in asked),
        )

    def _prefill(
        self,
        rows: Sequence[_Row | None],
        shape: _Shape,
        plan: Plan,
        memory: Memory | None = None,
    ) -> decoding.DecodeState:
        """Start rows as one batch; a missing row is filled and done at once."""
        kept = 0
        prompts = [[0] if row is None else list(row.request.prompt) for row in rows]
        if memory is not None:
            kept = memory.common(prompts[0])
            if kept + bucket(len(prompts[0]) - kept) > shape.slots:
                kept = 0
            prompts = [prompts[0][kept:]]
        ids = np.zeros((len(rows), bucket(max(map(len, prompts)))), np.int32)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = prompt
        asked = [row.request.sampling if row else None for row in rows]
        ends = np.full((len(rows), shape.ends), -1, np.int32)
        for i, sampling in enumerate(asked):
            own = (*self.config.eos_token_ids, *(sampling.stop_token_ids if sampling else ()))
            ends[i, : len(own)] = own
        of_each = lambda get, dtype: jnp.array([get(s) if s else 0 for s in asked], dtype)
        resumed = {}
        if memory is not None and kept:
            resumed = {"cache": memory.cache, "start": jnp.array([kept], jnp.int32)}
        state = self._run(
            decoding.prefill,
            jnp.array(ids),
            jnp.array([len(prompt) for prompt in prompts], jnp.int32),
            of_each(lambda s: s.max_new_tokens, jnp.int32),
            jnp.array(ends),
            sampler=self._sampler(rows, shape),
            min_tokens=of_each(lambda s: s.min_new_tokens, jnp.int32) if shape.least else None,
            **resumed,
            static={
                "slots": shape.slots,
                "max_new_tokens": shape.width,
                "logprobs": shape.logprobs,
                "lookahead": max(self.config.block_size - 1, plan.strategy.tree_nodes),
            },
        )
        strategy = self._resolved(plan.strategy)
        carry = first_carry(strategy, self.model, len(rows), shape.slots)
        state = state.replace(drafter=carry)
        if plan.time_first:
            jax.block_until_ready(state.tokens)
            for row in filter(None, rows):
                compiled = self.compile_seconds - row.compiled
                row.first = time.perf_counter() - row.began - compiled
        return state

    def _sampler(self, rows: Sequence[_Row | None], shape: _Shape) -> Sampler | None:
        if not shape.sampled:
            return None
        filler = Request([0], SamplingParams())
        requests = [row.request if row else filler for row in rows]
        array = lambda get, dtype: jnp.array(np.array([get(r) for r in requests], dtype))
        filters = None
        if shape.filtered:
            filters = Filters(
                top_k=array(lambda r: r.sampling.top_k, np.int32),
                top_p=array(lambda r: r.sampling.top_p, np.float32),
                min_p=array(lambda r: r.sampling.min_p, np.float32),
            )
        return Sampler(
            temperature=array(lambda r: r.sampling.temperature, np.float32),
            seed=array(lambda r: r.sampling.seed, np.uint32),
            noise_id=array(lambda r: r.stream, np.uint32),
            filters=filters,
        )

    def _advance(
        self, state: decoding.DecodeState, rows: Sequence[_Row | None], plan: Plan, refilling: bool
    ) -> decoding.DecodeState:
        """Run the loop until the host has something to do."""
        active = sum(row is not None for row in rows)
        watched = any(row is not None and row.text is not None for row in rows)
        pause = {
            "max_cycles": jnp.int32(STREAM_CYCLES if watched else FOREVER),
            "min_active": jnp.int32(active - 1 if refilling else 0),
        }
        sampled = state.sampler is not None
        loop, static = loop_of(self._resolved(plan.strategy), self.model, sampled=sampled)
        return self._run(loop, state, **pause, static=static)

    def _resolved(self, strategy: Strategy) -> Strategy:
        return strategy.resolve(self.config, self.draft_temperature)

    def _look(self, row: _Row, *found: Any) -> Event:
        """What is new of a row since the host last looked."""
        tokens, count, done, cycles, accepted, logprobs = found
        text = ""
        if row.text is not None:
            text = row.text.push(tokens[row.read : count].tolist())
            row.read = int(count)
            text += row.text.close() if done else ""
        stopped = row.text is not None and row.text.stopped
        if not (done or stopped):
            return Event(row.index, text)
        ids = tokens[: row.text.used if row.text is not None and stopped else count].tolist()
        ends = (*self.config.eos_token_ids, *row.request.sampling.stop_token_ids)
        compiled = self.compile_seconds - row.compiled
        answer = Answer(
            tokens=ids,
            text=None if row.text is None else row.text.text,
            finish_reason="stop" if stopped or ids[-1] in ends else "length",
            logprobs=logprobs[: len(ids)].tolist() if row.request.sampling.logprobs else None,
            cycles=int(cycles),
            accepted=accepted[:cycles].tolist(),
            seconds=time.perf_counter() - row.began - compiled,
            compile_seconds=compiled,
            first_seconds=row.first,
        )
        return Event(row.index, text, answer)

    def _run(
        self, function: Any, *arguments: Any, static: dict[str, Any] | None = None, **named: Any
    ) -> Any:
        """Call a function of decode.py, compiled ahead of time once a shape."""
        static = static or {}
        arguments, named = self._on_mesh((arguments, named))
        leaves, tree = jax.tree.flatten((arguments, named))
        key = (function, tree, tuple((x.shape, x.dtype) for x in leaves), *static.items())
        of_model = function not in (decoding.stop, decoding.insert)
        if key not in self._programs:
            begin = time.perf_counter()
            first = (self.model, self.params) if of_model else ()
            self._programs[key] = function.lower(*first, *arguments, **named, **static).compile()
            self.compile_seconds += time.perf_counter() - begin
        weights = (self.params,) if of_model else ()
        return self._programs[key](*weights, *arguments, **named)

    def _on_mesh(self, inputs: Any) -> Any:
        """Put inputs where the programs look for them, whatever the last one left where."""
        if self.mesh is None:
            return inputs
        mesh = self.mesh

        def where(x: Any) -> Any:
            if isinstance(x, decoding.DecodeState):
                return decoding.shardings(x, mesh)
            return x.shardings() if isinstance(x, KVCache) else batch_sharding(x.shape, mesh)

        whole = lambda x: isinstance(x, decoding.DecodeState | KVCache)
        return jax.device_put(inputs, jax.tree.map(where, inputs, is_leaf=whole))


class _Found(NamedTuple):
    """What the host reads of a state, in one transfer."""

    tokens: np.ndarray
    emitted: np.ndarray
    done: np.ndarray
    cycles: np.ndarray
    accepted: np.ndarray
    logprobs: np.ndarray


def _fetch(state: decoding.DecodeState) -> _Found:
    logprobs = state.tokens if state.logprobs is None else state.logprobs
    found = (state.tokens, state.count, state.done, state.cycles, state.accepted, logprobs)
    return _Found(*to_host(found))

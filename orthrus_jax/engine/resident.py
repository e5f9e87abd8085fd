"""The queue of a server: its state stays on the device, and finished rows keep their caches.

Decides which cache a request begins with, which of two compiled variants of the loop runs, and what
a row is held to by a grammar. All shapes are announced: `warm_up` compiles every program that a
request within the capacity needs.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from orthrus_jax import decoding
from orthrus_jax.attention.quantised import QuantisedCache, resumable
from orthrus_jax.decoding.constrained import MASKED_METHODS, mask_words
from orthrus_jax.engine.capacity import Capacity
from orthrus_jax.engine.prefixes import place
from orthrus_jax.engine.queue import STREAM_CYCLES, Decoder, HostView, Queue, Row
from orthrus_jax.engine.request import Event, Plan, Request, SamplingParams
from orthrus_jax.engine.turns import NO_LIMIT
from orthrus_jax.errors import UserError
from orthrus_jax.sharding import to_host


class MaskingDecoder(Decoder, Protocol):
    """The part of the engine that this queue uses in addition; see `Engine`."""

    def propose(self, state: decoding.DecodeState, plan: Plan) -> jax.Array: ...

    def masked_cycle(
        self, state: decoding.DecodeState, plan: Plan, drafts: jax.Array, allowed: np.ndarray
    ) -> decoding.DecodeState: ...


class ResidentQueue(Queue):
    """A queue that is opened once and serves for long. `Engine.open_resident` makes one.

    A request continues the cache of the row that shares its longest beginning, and reads only the
    rest. If a row fails, only its request ends, with `Event.error`; after any other exception of
    `step` the running requests are dropped, and the next begin with empty caches.
    """

    _engine: MaskingDecoder

    def __init__(self, engine: MaskingDecoder, plan: Plan, capacity: Capacity) -> None:
        super().__init__(engine, plan, capacity, None)
        self._held: list[list[int]] = [[] for _ in self._rows]  # of rows in which no request runs
        self._last_used = [-1] * plan.batch_size
        self._clock = 0

    @property
    def waiting(self) -> tuple[int, ...]:
        """The tickets in line."""
        return tuple(self._waiting)

    @property
    def running(self) -> int:
        """How many requests have a row."""
        return sum(row is not None for row in self._rows)

    def submit(self, request: Request) -> int:
        """Put a request in line; see `Queue.submit`."""
        if request.grammar is not None:
            if not self.capacity.grammar:
                raise UserError("a grammar needs a queue opened with grammar=True")
            if len(request.prompt) < 2:
                raise UserError("a grammar needs a prompt of at least 2 tokens")
        return super().submit(request)

    def cancel(self, ticket: int) -> None:
        """Forget a request; its row keeps what was read."""
        for i, row in enumerate(self._rows):
            if row is not None and row.ticket == ticket:
                self._keep(i, row)
        super().cancel(ticket)

    def warm_up(self) -> None:
        """Compile and run once each program that a request within the capacity can need."""
        engine, plan, capacity = self._engine, self.plan, self.capacity
        run = engine.programs.run
        state = self._prefill([None] * plan.batch_size)
        for width in capacity.widths:
            request = Request([0] * width, SamplingParams(max_new_tokens=1))
            row = engine.prefill([request], plan, capacity)
            cache = run(decoding.extract, state.cache, jnp.int32(0))
            row = engine.prefill([request], plan, capacity, cache, 1)
            if capacity.grammar:
                row = run(decoding.reanchor, row, jnp.zeros(1, jnp.int32))
        for strategy in plan.strategies:
            one = dataclasses.replace(plan, strategy=strategy)
            state = engine.restart_drafts(state, one, capacity)
            row = engine.restart_drafts(row, one, capacity)
            state = self._warm_up_loop(state, row, one)
        jax.block_until_ready(state.tokens)

    def _warm_up_loop(
        self, state: decoding.DecodeState, row: decoding.DecodeState, plan: Plan
    ) -> decoding.DecodeState:
        """Run the programs of one strategy on a state without unfinished rows."""
        engine, run = self._engine, self._engine.programs.run
        state = run(decoding.insert, state, row, jnp.int32(0))
        state = run(decoding.stop, state, jnp.ones(plan.batch_size, bool))
        for plain in (True, False):
            state = engine.decode(state, plan, STREAM_CYCLES, 0, plain=plain)
        if self.capacity.grammar and plan.strategy.method in MASKED_METHODS:
            drafts = engine.propose(state, plan)
            state = engine.masked_cycle(state, plan, drafts, self._full_masks(drafts.shape[1]))
        return state

    # Turns

    def _begin_turn(self) -> None:
        if not self._masked:
            super()._begin_turn()

    @property
    def _masked(self) -> bool:
        """Whether a grammar holds a running row."""
        return any(row is not None and row.matcher is not None for row in self._rows)

    # Rows

    def _fill_rows(self) -> None:
        if self._state is None:
            if not self._waiting:
                return
            self._state = self._prefill([None] * self.plan.batch_size)
            self._done = np.ones(self.plan.batch_size, bool)
        idle = self._stop_idle()
        while idle and self._waiting:
            idle.remove(self._begin_next(idle))

    def _begin_next(self, idle: Sequence[int]) -> int:
        """Give the next waiting request one of the `idle` rows; return which."""
        row = self._admit()
        assert row is not None
        held = [
            ids if running is None else _live_ids(running)
            for ids, running in zip(self._held, self._rows, strict=True)
        ]
        at, source, kept = place(row.request.prompt, held, self._last_used, idle)
        fresh = self._read(row, source, kept)
        self._rows[at] = row
        self._use(at)  # not `source`: what was used of it is in both rows now
        self._state = self._engine.programs.run(
            decoding.insert, self._take_state(), fresh, jnp.int32(at)
        )
        return at

    def _admit(self) -> Row | None:
        row = super()._admit()
        if row is not None:
            row.request = dataclasses.replace(row.request, prompt=list(row.request.prompt))
            if row.request.grammar is not None:
                row.matcher, row.first = row.request.grammar(), 0
        return row

    def _read(self, row: Row, source: int, kept: int) -> decoding.DecodeState:
        """Read a prompt after the first `kept` slots of row `source`, in parts that are not wide.

        With a grammar the prompt's last token is not read: the first cycle begins with it.
        """
        length = len(row.request.prompt) - (row.matcher is not None)
        widest = self.capacity.widths[-1]
        assert self._state is not None
        kept = resumable(self._state.cache, source, min(kept, length - 1))
        row.cached = done = self._fitting(kept, length)
        cache: Any = None
        run = self._engine.programs.run
        if done:
            cache = run(decoding.extract, self._state.cache, jnp.int32(source))
        read = partial(self._engine.prefill, [row.request], self._turns.plan, self.capacity)
        while length - done > widest:
            cache = read(cache, done, done + widest).cache
            done += widest
        state = read(cache, self._fitting(done, length), length)
        if row.matcher is None:
            return state
        return run(decoding.reanchor, state, jnp.array(row.request.prompt[-1:], jnp.int32))

    def _fitting(self, kept: int, length: int) -> int:
        """`kept`, or fewer where the padded rest of a prompt would run over the row's end.

        A quantised cache has no such end: its exact slots move along.
        """
        capacity = self.capacity
        if self._state is not None and isinstance(self._state.cache, QuantisedCache):
            return kept
        while kept:
            width = capacity.width(min(length - kept, capacity.widths[-1]))
            if kept + width <= capacity.slots:
                break
            kept = max(capacity.slots - width, 0)
        return kept

    def _keep(self, i: int, row: Row) -> None:
        """Note what the cache of row i holds now that its request has ended."""
        self._held[i] = _live_ids(row)
        self._use(i)

    def _use(self, i: int) -> None:
        self._clock += 1
        self._last_used[i] = self._clock

    def _release_if_idle(self) -> None:
        """The state stays."""

    def _drop_running(self, *, sound: bool) -> None:
        del sound  # rows that an exception dropped are not continued
        self._state = None
        self._rows = [None] * self.plan.batch_size
        self._held = [[] for _ in self._rows]
        self._last_used = [-1] * self.plan.batch_size

    # The loop

    def _run_loop(self) -> None:
        rows = [row for row in self._rows if row is not None]
        if self._masked:
            self._run_masked_cycle()
            return
        samplings = [row.request.sampling for row in rows]
        assert self._state is not None
        self._turns.start(self._state, self._engine.compile_seconds)
        self._state = self._engine.decode(
            self._take_state(),
            self._turns.plan,
            min(STREAM_CYCLES if self.plan.stream else NO_LIMIT, self._turns.limit),
            len(rows) - 1 if self._waiting else 0,
            plain=not any(s.temperature > 0 or s.logprobs for s in samplings),
        )

    def _run_masked_cycle(self) -> None:
        strategies = (self._turns.plan.strategy, *self.plan.strategies)
        if self._turns.use(next(s for s in strategies if s.method in MASKED_METHODS)):
            self._restart_drafts()
        assert self._state is not None
        plan = self._turns.plan
        drafts = self._engine.propose(self._state, plan)
        guesses = to_host(drafts)
        allowed = self._full_masks(drafts.shape[1])
        for i, row in enumerate(self._rows):
            if row is not None and row.matcher is not None:
                row.matcher.fill(guesses[i].tolist(), allowed[i])
        self._state = self._engine.masked_cycle(self._take_state(), plan, drafts, allowed)

    def _full_masks(self, drafts: int) -> np.ndarray:
        """Masks that allow all tokens: uint32[B, drafts + 1, W]."""
        words = mask_words(self._engine.config.vocab_size)
        return np.full((self.plan.batch_size, drafts + 1, words), 0xFFFFFFFF, np.uint32)

    def _event(self, i: int, row: Row, view: HostView) -> Event:
        try:
            event = super()._event(i, row, view)
        except UserError as error:
            self._held[i], self._last_used[i] = [], -1
            return Event(row.ticket, error=str(error))
        if event.completion is not None:
            self._keep(i, row)
        return event


def _live_ids(row: Row) -> list[int]:
    """The ids of a row's live slots: the last token is not in the cache yet."""
    ids = [*row.request.prompt, *row.tokens]
    return ids[:-1] if row.tokens or row.matcher is not None else ids

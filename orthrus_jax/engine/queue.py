"""The open queue: requests in at any time, events out, the rows of one batch kept full.

A request's life: (1) `submit` checks it and puts it in line; (2) `step` reads its prompt into a
free row; (3) the loop decodes all rows and pauses when the host has something to do; (4) the host
reads the tokens back, turns them into text, and frees the row when its answer has ended.

How a token is chosen and which program runs is the engine's business.
"""

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from orthrus_jax import decoding
from orthrus_jax.attention.quantised import resumable
from orthrus_jax.config import ModelConfig
from orthrus_jax.engine.auto import Chooser
from orthrus_jax.engine.capacity import Capacity
from orthrus_jax.engine.detokenizer import IncrementalDetokenizer
from orthrus_jax.engine.programs import Programs, bucket
from orthrus_jax.engine.request import Completion, Event, Matcher, Plan, Request
from orthrus_jax.engine.session import Session
from orthrus_jax.engine.turns import NO_LIMIT, Stretches, Turns
from orthrus_jax.errors import UserError
from orthrus_jax.sharding import to_host
from orthrus_jax.tokenizer import Tokenizer
from orthrus_jax.tokenizer import decode as decode_text

STREAM_CYCLES = 8  # cycles between two readings of the tokens, if the host must follow the text
MAX_PREFILL_PADDING = 4096  # tokens of padding with which a batch may always begin


class Decoder(Protocol):
    """The part of the engine that a queue uses; see `Engine`."""

    config: ModelConfig
    tokenizer: Tokenizer
    programs: Programs

    @property
    def compile_seconds(self) -> float: ...

    def check_request(self, request: Request, number: int) -> None: ...

    def lookahead(self, plan: Plan) -> int: ...

    def chooser(self, plan: Plan, capacity: Capacity) -> Chooser | None: ...

    def restart_drafts(
        self, state: decoding.DecodeState, plan: Plan, capacity: Capacity
    ) -> decoding.DecodeState: ...

    def prefill(
        self,
        rows: Sequence[Request | None],
        plan: Plan,
        capacity: Capacity,
        cache: Any = None,
        kept: int = 0,
        end: int | None = None,
    ) -> decoding.DecodeState: ...

    def decode(
        self,
        state: decoding.DecodeState,
        plan: Plan,
        max_cycles: int,
        min_active: int,
        *,
        plain: bool = False,
    ) -> decoding.DecodeState: ...


@dataclasses.dataclass
class Row:
    """A request in flight, as the host knows it."""

    ticket: int
    request: Request
    text: IncrementalDetokenizer | None
    began: float
    compiled: float  # the engine's compile seconds when it began
    tokens: list[int] = dataclasses.field(default_factory=list)  # as far as the host has read
    cycles: int = 0  # likewise
    stretches: Stretches = dataclasses.field(default_factory=Stretches)  # of these cycles
    first: int = 1  # tokens that its prefill emitted
    cached: int = 0  # tokens of its prompt that were not read
    matcher: Matcher | None = None
    time_to_first_token: float | None = None


class HostView(NamedTuple):
    """The part of a state that the host reads, in one transfer."""

    tokens: np.ndarray
    emitted: np.ndarray
    done: np.ndarray
    cycles: np.ndarray
    accepted: np.ndarray
    logprobs: np.ndarray


class Queue:
    """Requests waiting and running, in one batch of static shape. `Engine.open` makes one.

    For one thread. A text depends neither on the time of submission nor on the other requests.
    """

    def __init__(
        self, engine: Decoder, plan: Plan, capacity: Capacity, session: Session | None
    ) -> None:
        self.plan, self.capacity = plan, capacity
        self._engine, self._session = engine, session
        self._turns = Turns(plan, engine.chooser(plan, capacity))
        self._waiting: collections.OrderedDict[int, Request] = collections.OrderedDict()
        self._rows: list[Row | None] = [None] * plan.batch_size
        self._tickets = 0
        # None while no row runs, and while a program has it: donated arrays are never kept.
        self._state: decoding.DecodeState | None = None
        self._done = np.zeros(plan.batch_size, bool)  # rows that the device counts as done
        self._live: list[int] = []  # with a session, the ids of the cache's live slots

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._waiting) or any(self._rows)

    def submit(self, request: Request) -> int:
        """Put a request in line; return its ticket: 0, 1, 2, ... in the order of submission.

        Raises:
          UserError: if the model or this queue's capacity cannot serve it, naming value and limit.
        """
        engine, ticket = self._engine, self._tickets
        engine.check_request(request, ticket)
        eos = len(engine.config.eos_token_ids)
        self.capacity.check(request, ticket, eos, engine.lookahead(self.plan))
        self._tickets += 1
        self._waiting[ticket] = request
        return ticket

    def cancel(self, ticket: int) -> None:
        """Forget a request: no event of it follows, its row is free at the next step.

        A ticket that is unknown or finished is ignored.
        """
        self._waiting.pop(ticket, None)
        for i, row in enumerate(self._rows):
            if row is not None and row.ticket == ticket:
                self._rows[i] = None
                self._release_if_idle()

    def step(self) -> list[Event]:
        """Fill free rows, decode until the host has something to do, and report the news.

        It returns when a row has finished that a waiting request can take, when all rows have, or,
        if the plan streams or a request has stop strings, after STREAM_CYCLES cycles; and, where
        the plan is to choose among strategies, after a turn.

        Returns:
          One event per row with new text or a completion, in the order of the rows; maybe none.

        Raises:
          UserError: if the model's logits are not finite. After this or any other exception the
            requests that were running are dropped; those waiting stay.
        """
        try:
            self._begin_turn()
            self._fill_rows()
            if not any(self._rows):
                return []
            self._run_loop()
            events = self._collect()
        except BaseException as error:
            # An interrupt between two programs finds a sound cache; after an error it may be wrong.
            self._drop_running(sound=not isinstance(error, Exception))
            raise
        self._release_if_idle()
        return events

    def close(self) -> None:
        """Forget all requests; a session gets its cache back."""
        self._waiting.clear()
        self._drop_running(sound=True)

    # Turns

    def _begin_turn(self) -> None:
        """Choose the strategy that decodes until the next pause."""
        if self._turns.choose():
            self._restart_drafts()

    def _restart_drafts(self) -> None:
        """The strategy is another: the cache stays, its drafts begin anew."""
        if self._state is not None:
            state, plan = self._take_state(), self._turns.plan
            self._state = self._engine.restart_drafts(state, plan, self.capacity)

    # Rows

    def _fill_rows(self) -> None:
        """Give free rows to waiting requests: as a new batch if none runs, else one by one."""
        if not any(self._rows):
            if self._waiting:
                self._start_batch()
            return
        idle = self._stop_idle()
        for i in idle if self.plan.refill else ():
            self._refill(i)

    def _stop_idle(self) -> list[int]:
        """Return the rows without a request, none of which keeps the loop running any more."""
        idle = np.array([row is None for row in self._rows])
        if (idle & ~self._done).any():  # ended by a stop string, or cancelled
            stop = jnp.array(idle)
            self._state = self._engine.programs.run(decoding.stop, self._take_state(), stop)
        return idle.nonzero()[0].tolist()

    def _start_batch(self) -> None:
        """Begin a batch: all prompts at once, padded to the longest, or one after another.

        If one is much longer than the rest, a common prefill would mostly read padding.
        """
        size = self.plan.batch_size
        first = list(self._waiting.values())[:size]
        widths = [bucket(len(request.prompt)) for request in first]
        padding = size * max(widths) - sum(widths)
        if self._session is not None or padding <= max(MAX_PREFILL_PADDING, sum(widths)):
            self._rows = [self._admit() for _ in range(size)]
            self._state = self._prefill(self._rows)
            return
        self._state = self._prefill([None] * size)
        for i in range(len(first)):
            self._refill(i)

    def _refill(self, i: int) -> None:
        """Put the next waiting request into row i, if there is one."""
        row = self._admit()
        if row is not None:
            fresh = self._prefill([row])
            self._rows[i] = row
            self._state = self._engine.programs.run(
                decoding.insert, self._take_state(), fresh, jnp.int32(i)
            )

    def _admit(self) -> Row | None:
        if not self._waiting:
            return None
        ticket, request = self._waiting.popitem(last=False)
        text = None
        if request.sampling.stop or self.plan.stream:
            text = IncrementalDetokenizer(self._engine.tokenizer, request.sampling.stop)
        return Row(ticket, request, text, time.perf_counter(), self._engine.compile_seconds)

    def _prefill(self, rows: Sequence[Row | None]) -> decoding.DecodeState:
        requests = [None if row is None else row.request for row in rows]
        cache, kept = None, 0
        if self._session is not None and rows[0] is not None:
            self._live = list(rows[0].request.prompt)
            cache, kept = self._take_cache(self._session, self._live)
            rows[0].cached = kept
        state = self._engine.prefill(requests, self._turns.plan, self.capacity, cache, kept)
        if self.plan.time_to_first_token:
            jax.block_until_ready(state.tokens)
            for row in filter(None, rows):
                row.time_to_first_token = self._seconds(row)
        return state

    def _take_cache(self, session: Session, prompt: list[int]) -> tuple[Any, int]:
        """The session's cache and how much of the prompt it holds; None if it holds nothing."""
        kept, slots = session.shared_prefix(prompt), self.capacity.slots
        cache = session.take()
        if session.slots != slots or kept + bucket(len(prompt) - kept) > slots:
            kept = 0
        kept = resumable(cache, 0, kept)
        return (cache, kept) if kept else (None, 0)  # freed before a new one is allocated

    def _seconds(self, row: Row) -> float:
        """Wall-clock time since a row began, compilation excluded."""
        compiled = self._engine.compile_seconds - row.compiled
        return time.perf_counter() - row.began - compiled

    # The device's state

    def _take_state(self) -> decoding.DecodeState:
        """The state, for a program that it is donated to: if that is interrupted, it is lost."""
        state, self._state = self._state, None
        assert state is not None
        return state

    def _drop_running(self, *, sound: bool) -> None:
        """Free all rows. Unless the state is `sound`, a session stays empty."""
        self._rows = [None] * self.plan.batch_size
        if not sound:
            self._state = None
        self._release_if_idle()

    def _release_if_idle(self) -> None:
        """If no row runs, free the state; a session gets its cache back."""
        if any(self._rows) or self._state is None:
            return
        state = self._take_state()
        if self._session is not None:
            self._session.give(state.cache, self.capacity.slots, self._live)

    def _run_loop(self) -> None:
        """Decode until the host has something to do."""
        active = sum(row is not None for row in self._rows)
        watched = any(row is not None and row.text is not None for row in self._rows)
        refilling = self.plan.refill and bool(self._waiting)
        assert self._state is not None
        self._turns.start(self._state, self._engine.compile_seconds)
        self._state = self._engine.decode(
            self._take_state(),
            self._turns.plan,
            max_cycles=min(STREAM_CYCLES if watched else NO_LIMIT, self._turns.limit),
            min_active=active - 1 if refilling else 0,
        )

    # The host's side

    def _collect(self) -> list[Event]:
        """Read the state back; free the rows that have ended."""
        assert self._state is not None
        view, events = _fetch(self._state), []
        self._done = view.done
        self._end_turn(view)
        for i, row in enumerate(self._rows):
            if row is None:
                continue
            event = self._event(i, row, view)
            if self._session is not None:  # the last token is not in the cache yet
                self._live = [*row.request.prompt, *view.tokens[i, : view.emitted[i] - 1].tolist()]
            ended = event.completion is not None or event.error is not None
            if ended:
                self._rows[i] = None
            if ended or event.text or (self.plan.stream and event.tokens):
                events.append(event)
        return events

    def _end_turn(self, view: HostView) -> None:
        running = [(i, row) for i, row in enumerate(self._rows) if row is not None]
        for i, row in running:
            row.stretches.add(self._turns.plan.strategy, int(view.cycles[i]) - row.cycles)
        accepted = [view.accepted[i, row.cycles : view.cycles[i]].tolist() for i, row in running]
        self._turns.end(accepted, self._engine.compile_seconds)

    def _event(self, i: int, row: Row, view: HostView) -> Event:
        """The news of row i since it was last read."""
        read, count, done = len(row.tokens), int(view.emitted[i]), bool(view.done[i])
        fresh = view.tokens[i, read:count].tolist()
        self._check_finite(i, row, fresh)
        taken = None if row.matcher is None else row.matcher.consume(fresh)
        text, stopped = "", taken is not None
        fresh = fresh[:taken]
        row.tokens += fresh
        if row.text is not None:
            text = row.text.push(fresh)
            text += row.text.close() if done or stopped else ""
            stopped = stopped or row.text.stopped
            fresh = fresh[: max(row.text.used - read, 0)]
        news = {"tokens": fresh} | self._origins(i, row, view, read, len(fresh))
        if done or stopped:
            news["completion"] = self._completion(i, row, view, stopped)
        return Event(row.ticket, text, **news)

    def _origins(self, i: int, row: Row, view: HostView, read: int, count: int) -> dict[str, Any]:
        """Fields of an event: where the next `count` tokens of row i, after `read`, come from."""
        drafted, cycles = [False] * (row.first - read), [0] * (row.first - read)
        leading = self._turns.plan.strategy.leading_tokens
        for cycle in range(row.cycles, int(view.cycles[i])):
            drafts = int(view.accepted[i, cycle])
            drafted += [False] * leading + [True] * drafts + [False]
            cycles += [cycle + 1] * (leading + drafts + 1)
        row.cycles = int(view.cycles[i])
        wanted = row.request.sampling.logprobs
        logprobs = view.logprobs[i, read : read + count].tolist() if wanted else ()
        cycles = cycles[:count]
        forwards = row.stretches.first(cycles[-1]).forwards if cycles else row.stretches.forwards
        origins = {"drafted": drafted[:count], "cycles": cycles}
        return origins | {"logprobs": logprobs, "forwards": forwards}

    def _check_finite(self, i: int, row: Row, fresh: Sequence[int]) -> None:
        """Refuse ids that no logit chose: with NaN among them, none is the largest."""
        vocab = self._engine.config.vocab_size
        start = len(row.tokens)
        at = next((t for t, token in enumerate(fresh, start) if not 0 <= token < vocab), None)
        if at is not None:
            raise UserError(
                f"request {row.ticket} (row {i}): the logits of answer token {at}, at position "
                f"{len(row.request.prompt) + at}, are not finite: weights of inf or NaN, or "
                f"temperature={row.request.sampling.temperature} is too small"
            )

    def _completion(self, i: int, row: Row, view: HostView, stopped: bool) -> Completion:
        sampling, tokenizer = row.request.sampling, self._engine.tokenizer
        seconds = self._seconds(row)
        tokens = list(row.tokens)
        accepted = view.accepted[i, : view.cycles[i]].tolist()
        if stopped:
            tokens = tokens if row.text is None else tokens[: row.text.used]
            accepted = row.stretches.needed(accepted, len(tokens) - row.first)
        stretches = row.stretches.first(len(accepted))
        if row.text is not None:
            text = row.text.text
        else:
            text = "" if tokenizer is None else decode_text(tokenizer, tokens)
        ends = (*self._engine.config.eos_token_ids, *sampling.stop_token_ids)
        return Completion(
            text=text,
            tokens=tokens,
            finish_reason="stop" if stopped or tokens[-1] in ends else "length",
            cycles=len(accepted),
            accepted=accepted,
            forwards=stretches.forwards,
            seconds=seconds,
            compile_seconds=self._engine.compile_seconds - row.compiled,
            logprobs=view.logprobs[i, : len(tokens)].tolist() if sampling.logprobs else None,
            sample=row.request.sample,
            time_to_first_token=row.time_to_first_token,
            cached_tokens=row.cached,
            strategies=tuple(stretches.parts),
        )


def _fetch(state: decoding.DecodeState) -> HostView:
    logprobs = state.tokens if state.logprobs is None else state.logprobs
    parts = (state.tokens, state.count, state.done, state.cycles, state.accepted, logprobs)
    return HostView(*to_host(parts))

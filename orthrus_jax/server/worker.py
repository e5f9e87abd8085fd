"""The thread that owns the device: calls in, news out, one step of each lane after another.

Decides what happens when a step fails. Knows no HTTP; the event loop never waits for it.
"""

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from orthrus_jax.engine import Event, Request, ResidentQueue
from orthrus_jax.errors import UserError
from orthrus_jax.server.problems import ApiError, invalid, step_failed

logger = logging.getLogger("orthrus_jax.server")
MAX_FAILURES = 3  # steps that fail in a row until the server says that it is not healthy


@dataclasses.dataclass(frozen=True)
class News:
    """What has become of one of a call's answers.

    Attributes:
      choice: which of them.
      event: its new tokens and text, and its completion in the end; None with a failure.
      failure: why it ended without a completion.
      seconds: for which the device has worked for its lane since the call came.
    """

    choice: int
    event: Event | None
    failure: ApiError | None = None
    seconds: float = 0.0

    @property
    def last(self) -> bool:
        """Whether nothing more comes of this answer."""
        return self.failure is not None or (
            self.event is not None and self.event.completion is not None
        )


@dataclasses.dataclass(eq=False)
class Call:
    """The answers that one HTTP request wants; `news` is read on the event loop `loop`."""

    requests: Sequence[Request]
    lane: str
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[News] = dataclasses.field(default_factory=asyncio.Queue)
    began: float = 0.0  # on its lane's clock


@dataclasses.dataclass(eq=False)
class Lane:
    """A queue, whose answers its tickets are, and how long the device has worked for it."""

    queue: ResidentQueue
    answers: dict[int, tuple[Call, int]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


class Worker:
    """Runs the lanes on a thread of its own. Its methods may be called from any other thread.

    Attributes:
      failures: steps that have failed since the last that succeeded.
    """

    def __init__(self, lanes: dict[str, ResidentQueue], stepped: Callable[[str], None]) -> None:
        """Begin nothing yet.

        Args:
          lanes: queues by name; the thread alone touches them from `start` on.
          stepped: is called on the thread after each step, "ok" or "failed".
        """
        self.failures = 0
        self._lanes = {name: Lane(queue) for name, queue in lanes.items()}
        self._stepped = stepped
        self._mail: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ready: list[BaseException | None] = []
        self._warm = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Compile all programs, and return when the first request can be served.

        Raises:
          Exception: what compiling raised.
        """
        self._thread.start()
        self._warm.wait()
        if self._ready:
            error = self._ready[0]
            assert error is not None
            raise error

    @property
    def alive(self) -> bool:
        """Whether the thread runs and its steps succeed."""
        return self._thread.is_alive() and self.failures < MAX_FAILURES

    @property
    def load(self) -> tuple[int, int]:
        """How many answers run and how many wait; an estimate while a step runs."""
        queues = [lane.queue for lane in self._lanes.values()]
        return sum(q.running for q in queues), sum(len(q.waiting) for q in queues)

    def submit(self, call: Call) -> None:
        """Put a call's answers in line."""
        self._mail.put(lambda: self._submit(call))

    def cancel(self, call: Call) -> None:
        """Forget a call: its rows are free at the next pause."""
        self._mail.put(lambda: self._cancel(call))

    def abort(self, why: ApiError) -> None:
        """End all answers with a failure."""
        self._mail.put(lambda: self._abort(why))

    def stop(self, seconds: float) -> None:
        """End the thread after its present step; wait for it so long."""
        self._mail.put(None)
        self._thread.join(seconds)

    # On the thread

    def _run(self) -> None:
        try:
            for lane in self._lanes.values():
                lane.queue.warm_up()
        except BaseException as error:
            self._ready.append(error)
            return
        finally:
            self._warm.set()
        try:
            while self._read_mail():
                for lane in self._lanes.values():
                    if lane.queue.busy:
                        self._step(lane)
        except BaseException:  # a bug: nobody will answer any more, and `alive` says so
            logger.exception("the engine's thread ended")
        finally:
            self._abort(step_failed())

    def _read_mail(self) -> bool:
        """Do what has come by mail, waiting for it if no lane has work; False is the end."""
        while True:
            try:
                busy = any(lane.queue.busy for lane in self._lanes.values())
                message = self._mail.get(block=not busy)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()

    def _submit(self, call: Call) -> None:
        lane = self._lanes[call.lane]
        call.began = lane.seconds
        for choice, request in enumerate(call.requests):
            try:
                lane.answers[lane.queue.submit(request)] = (call, choice)
            except UserError as error:
                _tell(call, [News(choice, None, invalid(str(error)))])

    def _cancel(self, call: Call) -> None:
        lane = self._lanes[call.lane]
        for ticket in [t for t, (other, _) in lane.answers.items() if other is call]:
            lane.queue.cancel(ticket)
            del lane.answers[ticket]

    def _abort(self, why: ApiError) -> None:
        for lane in self._lanes.values():
            for ticket in list(lane.answers):
                lane.queue.cancel(ticket)
            self._fail(lane, list(lane.answers), why)

    def _step(self, lane: Lane) -> None:
        begin = time.perf_counter()
        try:
            events = lane.queue.step()
        except Exception:
            # The running answers are lost with the state; those in line begin with a fresh one.
            logger.exception("a step of the engine failed")
            self.failures += 1
            self._stepped("failed")
            waiting = set(lane.queue.waiting)
            self._fail(lane, [t for t in lane.answers if t not in waiting], step_failed())
            return
        finally:
            lane.seconds += time.perf_counter() - begin
        self.failures = 0
        self._stepped("ok")
        for event in events:
            self._report(lane, event)

    def _report(self, lane: Lane, event: Event) -> None:
        call, choice = lane.answers[event.index]
        failure = None
        if event.error is not None:
            # A grammar is the client's; logits are the model's.
            status = 500 if call.requests[choice].grammar is None else 400
            failure = ApiError(status, event.error, code="answer_failed")
        if failure is not None or event.completion is not None:
            del lane.answers[event.index]
        seconds = lane.seconds - call.began
        _tell(call, [News(choice, None if failure else event, failure, seconds)])

    def _fail(self, lane: Lane, tickets: Sequence[int], why: ApiError) -> None:
        for ticket in tickets:
            call, choice = lane.answers.pop(ticket)
            _tell(call, [News(choice, None, why)])


def _tell(call: Call, news: Sequence[News]) -> None:
    for one in news:
        try:
            call.loop.call_soon_threadsafe(call.news.put_nowait, one)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return

"""Coordination of a run's hosts, which share a file system: who writes a file, who waits for it.

Every host runs the same program and makes the same calls in the same order. Knows no file's
content.
"""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from orthrus_jax.errors import UserError

WEEK = 7 * 24 * 3600 * 1000  # milliseconds; a host that dies ends the others at once
SECONDS = 120  # how long a shared file system may lag
_barriers = itertools.count()  # a barrier's name can be used only once


def begin(several: bool) -> None:
    """Connect to the other hosts if the run has `several`; call it before JAX finds devices."""
    if several:
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this is the host that writes the files of the whole run."""
    return jax.process_index() == 0


def wait() -> None:
    """Wait until all hosts call this; uses JAX's coordination service, so no device is blocked."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"orthrus_{next(_barriers)}", timeout_ms=WEEK)


def wait_until_visible(ready: Callable[[], bool], what: object) -> None:
    """Wait for a file written by another host to appear here (shared file systems lag).

    Args:
      ready: whether the file is visible.
      what: names it in the error.

    Raises:
      UserError: when it is not visible after two minutes.
    """
    for _ in range(SECONDS):
        if ready():
            return
        time.sleep(1)
    raise UserError(
        f"{what} is not visible here although another host wrote it: the run directory must be on "
        "a disk that all hosts share"
    )


def on_first_host(work: Callable[[], object]) -> None:
    """Run `work` on the first host, while the others wait."""
    if is_first():
        work()
    wait()


def first_host_then_rest(work: Callable[[], Any]) -> Any:
    """Run `work` on the first host, then on the rest, who find the files that it wrote."""
    if is_first():
        result = work()
        wait()
        return result
    wait()
    return work()


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
    """Yield a function of the step: whether SIGTERM, as before a preemption, or Ctrl-C has arrived.

    A second Ctrl-C does not wait for the step. Several hosts stop at the same step, whichever of
    them got the signal: JAX's coordination service makes them agree.

    Raises:
      KeyboardInterrupt: at the end of the block, after a Ctrl-C.
    """
    received: set[int] = set()

    def receive(number: int, _: Any) -> None:
        if number in received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.add(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # for which JAX has a handler of its own

    several = jax.process_count() > 1
    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        if several:
            from jax.experimental import multihost_utils

            yield multihost_utils.reached_preemption_sync_point
        else:
            yield lambda step: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in received:
        raise KeyboardInterrupt

"""Several hosts of one run, which share a disk: who writes a file, and who waits for it.

All hosts run the same program and come to the same calls in the same order.
"""

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from orthrus_jax.errors import UserError

WEEK = 7 * 24 * 3600 * 1000  # milliseconds; a host that dies ends the others at once
SECONDS = 120  # that a disk may be late
_turns = itertools.count()  # a barrier's name is used once


def begin(several: bool) -> None:
    """Find the other hosts, if this run has `several`. Before anything asks for devices."""
    if several:
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this is the host that writes what is written once."""
    return jax.process_index() == 0


def wait() -> None:
    """Wait until all hosts are here; on their own service, so no device is held."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"orthrus_{next(_turns)}", timeout_ms=WEEK)


def wait_until_visible(ready: Callable[[], bool], what: object) -> None:
    """Wait until this host sees what another has written: a network's disk may be late.

    Raises:
      UserError: when it does not for two minutes.
    """
    for _ in range(SECONDS):
        if ready():
            return
        time.sleep(1)
    raise UserError(
        f"{what} is not seen here, where another host has written it: the run directory must be on "
        "a disk that all hosts share"
    )


def on_first_host(work: Callable[[], object]) -> None:
    """Let the first host do it, while the others wait."""
    if is_first():
        work()
    wait()


def first_host_then_rest(work: Callable[[], Any]) -> Any:
    """Let the first host write files, which the others, who then do the same, find there."""
    if is_first():
        found = work()
        wait()
        return found
    wait()
    return work()


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
    """Give a function that says whether SIGTERM has come: a machine that is about to be taken.

    Several hosts stop at the same step, whichever of them was told: JAX's own service sees to that.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield lambda step: asked
    finally:
        signal.signal(signal.SIGTERM, before)

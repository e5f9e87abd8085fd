"""Memory before it is taken: what weights and decoding need, and what the devices have left.

Decides when an allocation is refused, in one line, rather than tried: a machine without the memory
ends a process without a word. Estimates are from below. Knows no flags and no files of models.
"""

import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from orthrus_jax.config import ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.model import params

GB = 10**9
CGROUP = pathlib.Path("/sys/fs/cgroup")  # a container's limit is not in /proc/meminfo


def check_memory(
    needed: int, purpose: str, remedy: str, devices: Sequence[jax.Device] | None = None
) -> None:
    """Refuse what needs more bytes than `devices` have left.

    Args:
      needed: bytes on all the devices together; see `weight_bytes`, `decoding_bytes`.
      purpose: what needs them, the subject of the message: flag or argument, and its value.
      remedy: what to do instead.
      devices: that the arrays will lie on; None is the default device.

    Raises:
      UserError: "PURPOSE needs about 50 GB of memory, 20 GB are free: REMEDY".
    """
    devices = list(devices or jax.devices()[:1])
    here = [device for device in devices if device.process_index == jax.process_index()]
    free = free_bytes(here)
    needed = needed * len(here) // len(devices)  # of several hosts, each has its part
    if free is not None and needed > free:
        raise UserError(
            f"{purpose} needs about {needed / GB:.3g} GB of memory, {free / GB:.3g} GB are free: "
            f"{remedy}"
        )


def free_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that may still be allocated on `devices`, all together; None where nobody knows.

    A device that keeps no account of its own (a CPU) shares the machine's memory with the others.
    """
    accounts = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in account for account in accounts):
        return sum(account["bytes_limit"] - account["bytes_in_use"] for account in accounts)
    return _machine_bytes()


@functools.lru_cache(maxsize=64)
def weight_bytes(config: ModelConfig) -> int:
    """Bytes of a model's weights, both views, in the config's dtype."""
    count = sum(math.prod(shape) for shape in params.shapes(config).values())
    return count * jnp.dtype(config.dtype).itemsize


@functools.lru_cache(maxsize=256)
def decoding_bytes(model: Any, batch: int, slots: int, rows: int) -> int:
    """Bytes that decoding needs beside the weights: the cache, and its largest forward.

    Args:
      model: a `decoding.DecodingModel`.
      batch: B, sequences decoded together.
      slots: S, cache slots per sequence.
      rows: R of a sequence in one forward; see `Strategy.rows`.

    Of a forward count its logits, float32[B, R, V], and the rows that each row sees of its own
    forward, [B, R, R], of one byte: the largest arrays that no compiler can do without.
    """
    cache = jax.eval_shape(lambda: model.init_cache(batch, slots))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return held + batch * rows * (4 * model.config.vocab_size + rows)


def _machine_bytes() -> int | None:
    """Memory that this process may still take of the machine's, or of its container's."""
    limits = [limit for limit in (_available(), _of_container()) if limit is not None]
    return min(limits, default=None)


def _available() -> int | None:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().split("\n")
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all the machine has
        names = getattr(os, "sysconf_names", {})
        pages = "SC_PHYS_PAGES" in names and os.sysconf("SC_PHYS_PAGES")
        return pages * os.sysconf("SC_PAGE_SIZE") if pages and pages > 0 else None


def _of_container() -> int | None:
    """What a limit on this process's group leaves; files that it has cached can be given up."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(x.split() for x in (CGROUP / "memory.stat").read_text().strip().split("\n"))
        return max(int(limit) - used + int(stat["inactive_file"]), 0)
    except (OSError, ValueError, KeyError):  # another version of the interface, or none
        return None

"""Floating-point operations of a training step, and a run's rates: tokens/s and MFU.

A multiply-add of a matrix product counts as two operations. Recomputation (remat) is not counted:
it is no useful work.
"""

import time
from typing import Any

import jax

from orthrus_jax.model import Model
from train.objective import Objective

PEAK = {  # bfloat16 FLOP/s per chip, from the makers' data sheets, by jax's device_kind
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def per_row(model: Model, objective: Objective, length: int) -> dict[str, float]:
    """Operations of one packed row of `length` tokens, by part.

    The teacher's tokens run forward only. Block tokens run forward, and backward to their inputs
    and to the diffusion weights. The vocabulary projection runs forward for both, and backward to
    the block tokens.
    """
    c = model.config
    blocks = objective.anchors * c.block_size
    attention = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    heads = 2 * c.num_attention_heads * c.head_dim  # of q @ k and of weights @ v
    layer = {
        "teacher": 2 * length * (attention + mlp) + 2 * length * heads * length / 2,
        "blocks": 2 * blocks * (3 * attention + 2 * mlp)
        + 2 * blocks * heads * (2 * length / 2 + 3 * c.block_size),
    }
    vocabulary = 2 * c.hidden_size * c.vocab_size * (length + 2 * blocks)
    return {name: c.num_hidden_layers * n for name, n in layer.items()} | {"vocabulary": vocabulary}


class Meter:
    """Counts a run's tokens and time between two calls of `lap`."""

    def __init__(self, model: Model, objective: Objective) -> None:
        self.model, self.objective = model, objective
        self._tokens, self._rows, self._begin = 0, 0, time.perf_counter()

    def add(self, rows: int, length: int) -> None:
        """Count a batch of packed rows."""
        self._rows += rows
        self._tokens += rows * length

    def lap(self) -> dict[str, Any]:
        """Rates since the last call; the first lap includes compilation."""
        now = time.perf_counter()
        seconds, self._begin = now - self._begin, now
        rows, tokens, self._rows, self._tokens = self._rows, self._tokens, 0, 0
        if not rows:
            return {}
        rates = {"tokens_per_second": tokens / seconds, "rows_per_second": rows / seconds}
        peak = PEAK.get(jax.devices()[0].device_kind)
        work = sum(per_row(self.model, self.objective, tokens // rows).values()) * rows
        mfu = {"mfu": work / seconds / peak / jax.device_count()} if peak else {}
        return rates | {"tflops": work / seconds / 1e12} | mfu | memory()


def memory() -> dict[str, float]:
    """Peak GiB in use on this host's first device, on platforms that report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {"peak_gib": peak / 2**30} if peak else {}

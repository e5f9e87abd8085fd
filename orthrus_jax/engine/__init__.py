"""Requests in, completions out: the host's side of decoding. Knows no checkpoints."""

from orthrus_jax.engine.auto import Auto, Contender
from orthrus_jax.engine.capacity import Capacity
from orthrus_jax.engine.loop import Engine
from orthrus_jax.engine.programs import Programs, bucket
from orthrus_jax.engine.queue import STREAM_CYCLES, Queue
from orthrus_jax.engine.request import (
    Completion,
    Event,
    Matcher,
    Plan,
    Request,
    SamplingParams,
)
from orthrus_jax.engine.resident import ResidentQueue
from orthrus_jax.engine.session import Session

__all__ = [
    "STREAM_CYCLES",
    "Auto",
    "Capacity",
    "Completion",
    "Contender",
    "Engine",
    "Event",
    "Matcher",
    "Plan",
    "Programs",
    "Queue",
    "Request",
    "ResidentQueue",
    "SamplingParams",
    "Session",
    "bucket",
]

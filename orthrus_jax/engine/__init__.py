"""Requests in, answers out: the host's side of decoding. Knows no checkpoints."""

from orthrus_jax.engine.loop import STREAM_CYCLES, Engine
from orthrus_jax.engine.programs import bucket
from orthrus_jax.engine.request import (
    Answer,
    Event,
    Plan,
    Request,
    SamplingParams,
)
from orthrus_jax.engine.session import Memory

__all__ = [
    "STREAM_CYCLES",
    "Answer",
    "Engine",
    "Event",
    "Memory",
    "Plan",
    "Request",
    "SamplingParams",
    "bucket",
]

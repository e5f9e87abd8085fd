"""Requests in, answers out: the host's side of decoding. Knows no checkpoints."""

from orthrus_jax.engine.loop import (
    BLOCKS,
    CYCLES,
    MODES,
    STREAM_CYCLES,
    Answer,
    Engine,
    Event,
    Memory,
    Plan,
    Request,
    bucket,
)

__all__ = [
    "BLOCKS",
    "CYCLES",
    "MODES",
    "STREAM_CYCLES",
    "Answer",
    "Engine",
    "Event",
    "Memory",
    "Plan",
    "Request",
    "bucket",
]

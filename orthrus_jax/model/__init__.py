"""The dual-view transformer: one network, two attention views, pure functions of its parameters."""

from orthrus_jax.model.segment import Segment, View, ar_segment, block_segment
from orthrus_jax.model.transformer import (
    REMAT,
    STACKED,
    DualViewTransformer,
    Layer,
    Model,
    Params,
)

__all__ = [
    "REMAT",
    "STACKED",
    "DualViewTransformer",
    "Layer",
    "Model",
    "Params",
    "Segment",
    "View",
    "ar_segment",
    "block_segment",
]

"""Measurements of decoding: benchmarks, exactness, speed, calibration."""

from orthrus_jax.errors import require_extra

require_extra("eval")

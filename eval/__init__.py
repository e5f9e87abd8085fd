"""Measurements of decoding: benchmarks, exactness, speed, calibration."""

import sys

from orthrus_jax.errors import require_extra

if "eval.accelerator" not in sys.orig_argv:  # it runs where little is installed
    require_extra("eval")

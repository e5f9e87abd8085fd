"""Ahead-of-time compilation for chips that are not attached: `python -m orthrus_jax.aot --help`."""

from orthrus_jax.aot.chips import CHIPS, Chip
from orthrus_jax.aot.command import main
from orthrus_jax.aot.programs import PROGRAMS, Program, lower_decoding, on_mesh, weights
from orthrus_jax.aot.report import compile_report, finish, grow, largest
from orthrus_jax.aot.targets import chip_of, devices_of

__all__ = [
    "CHIPS",
    "PROGRAMS",
    "Chip",
    "Program",
    "chip_of",
    "compile_report",
    "devices_of",
    "finish",
    "grow",
    "largest",
    "lower_decoding",
    "main",
    "on_mesh",
    "weights",
]

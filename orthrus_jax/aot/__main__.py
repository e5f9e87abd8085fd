"""`python -m orthrus_jax.aot`."""

from orthrus_jax.aot.command import main
from orthrus_jax.errors import run_command

run_command(main)

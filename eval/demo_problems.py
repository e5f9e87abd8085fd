"""Accuracy, acceptance and speed on the demo's problems: `python -m eval.demo_problems`.

Needs no file: train/problems.py makes the rows, held out from training. The model is the demo's.
"""

from collections.abc import Sequence

from eval.benchmarks import BENCHMARKS
from eval.harness import command_parser, run
from orthrus_jax.errors import run_command

MODEL, NEW_TOKENS = "runs/demo/model", 224  # what `make demo` leaves; its longest answers fit


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    benchmark = BENCHMARKS["demo_problems"]
    parser = command_parser(
        benchmark.name, benchmark.title, model=MODEL, data="made here", new_tokens=NEW_TOKENS
    )
    run(benchmark, parser.parse_args(argv))


if __name__ == "__main__":
    run_command(main)

"""Accuracy, acceptance and speed on AIME: `python -m eval.aime --year 25 --model DIR_OR_ID`."""

from collections.abc import Sequence

from eval.benchmarks import BENCHMARKS
from eval.harness import command_parser, run
from orthrus_jax.errors import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command_parser("aime", "AIME 2024 or 2025")
    parser.add_argument("--year", choices=("24", "25"), default="25", help="default: %(default)s")
    args = parser.parse_args(argv)
    run(BENCHMARKS[f"aime{args.year}"], args)


if __name__ == "__main__":
    run_command(main)

"""The console command: `orthrus COMMAND ...`, or `python -m orthrus_jax COMMAND ...`.

Decides which command runs. Knows none of their options, and imports only the one that it runs.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from orthrus_jax import __version__
from orthrus_jax.errors import program_name, run_command

COMMANDS = {
    "generate": "answer prompts",
    "chat": "hold a dialogue",
    "serve": "answer over HTTP, as the OpenAI protocol has it",
    "convert": "turn a base into an Orthrus checkpoint, untrained",
    "aot": "compile for a TPU or GPU that is not attached: does it fit?",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; `argv` is the process's own by default."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        _parser().parse_args(arguments)  # --help, --version, or an error: it does not return
    name, *rest = arguments
    run_command(lambda: importlib.import_module(f"orthrus_jax.{name}").main(rest))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name(),
        description="Exact parallel decoding of a frozen base: Qwen3, Qwen2, Llama, Mistral.",
        epilog="COMMAND --help lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"orthrus_jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser


if __name__ == "__main__":
    main()

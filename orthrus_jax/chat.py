"""Talk to a model: `python -m orthrus_jax.chat --model DIR_OR_ID`.

Each turn continues from the cache of the turns before: only tokens that the cache lacks are read.
The text equals that of a fresh prefill of the whole dialogue.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from orthrus_jax.cli import (
    add_kv_cache,
    add_mode,
    add_runtime,
    add_sampling,
    chosen_decoding,
    decoding_of,
    print_pieces,
    runtime_options,
    sampling_options,
)
from orthrus_jax.conversation import Conversation
from orthrus_jax.engine import Completion
from orthrus_jax.errors import PromptLengthError, UserError, program_name, run_command
from orthrus_jax.llm import load

HELP = "/reset forgets the dialogue, /exit or end of input leaves"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program_name("chat"), description=HELP)
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="checkpoint or hub id")
    add_mode(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    add_sampling(parser)
    add_runtime(parser)
    add_kv_cache(parser)
    return parser


def _answer(conversation: Conversation, text: str, options: dict[str, Any]) -> Completion | None:
    """Print one answer; return None if the user interrupted it."""
    try:
        with contextlib.closing(conversation.ask(text, **options)) as pieces:
            return print_pieces(pieces)
    except KeyboardInterrupt:
        return None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    decoding_of(args)  # flags that do not fit each other are refused before a model is loaded
    sampling = sampling_options(args)
    if sys.stdin is None:
        raise UserError("standard input is closed: chat reads its questions there")
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no UTF-8 are then refused by line
        sys.stdin.reconfigure(errors="surrogateescape")
    model = load(args.model, **runtime_options(args))
    options = sampling | {"strategy": chosen_decoding(args, model, 1)}
    model.engine.check([], model.plan_of(options["strategy"], stream=True))
    conversation = Conversation(model, system=args.system, thinking=args.thinking)
    print(HELP, file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            print(f"{text.split()[0]} is unknown: {HELP}", file=sys.stderr)
        elif text:
            try:
                completion = _answer(conversation, text, options)
            except UserError as error:
                full = isinstance(error, PromptLengthError) and conversation.begun
                hint = "; /reset makes room" if full else ""
                print(f"error: {error}{hint}", file=sys.stderr)
                continue
            print()
            print(f"[{completion or 'interrupted'}]", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)

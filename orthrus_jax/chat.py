"""Talk to a model: `python -m orthrus_jax.chat --model DIR_OR_ID`.

Each turn continues from the cache of the turns before: only what the cache lacks is read. The text
is that of a fresh prefill of the whole dialogue.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from orthrus_jax import machine
from orthrus_jax.engine import MODES, Memory
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.generate import Completion, Generator, Pieces, load, print_pieces
from orthrus_jax.options import add_sampling, decoding_options, spend_rows
from orthrus_jax.tokenizer import encode_messages

HELP = "/reset forgets the dialogue, /exit or end of input leaves"


class Conversation:
    """A dialogue with a model: its messages, and the cache of what the model has read of it."""

    def __init__(
        self, model: Generator, *, system: str = "", thinking: bool = False, slots: int = 2048
    ) -> None:
        """Begin a dialogue.

        Args:
          model: loaded with its tokenizer.
          system: what the dialogue starts with, if anything.
          thinking: let the template open a thinking part.
          slots: cache positions to begin with; a dialogue that outgrows them is read anew.
        """
        if model.tokenizer is None:
            raise UserError("a conversation needs a model with its tokenizer")
        self.model, self.system, self.thinking = model, system, thinking
        self.memory = Memory(min(slots, model.config.max_position_embeddings))
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str, **options: Any) -> Pieces:
        """Say `text` and return the answer's pieces as they grow; see Generator.stream.

        An answer that is abandoned half way stays in the dialogue as far as it was read.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = encode_messages(self.model.tokenizer, asked, thinking=self.thinking)
        pieces = self.model.stream_ids(ids, memory=self.memory, **options)
        return self._remember(asked, pieces)

    def _remember(self, asked: list[dict[str, str]], pieces: Pieces) -> Pieces:
        said: list[str] = []
        try:
            while True:
                try:
                    said.append(next(pieces))
                except StopIteration as end:
                    return end.value
                yield said[-1]
        finally:
            self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m orthrus_jax.chat", description=HELP)
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="checkpoint or hub id")
    parser.add_argument("--mode", choices=MODES, default="orthrus", help="default: orthrus")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    add_sampling(parser)
    machine.add_options(parser)
    return parser


def _answer(conversation: Conversation, text: str, options: dict[str, Any]) -> Completion | None:
    """Print one answer; return None where the user interrupted it."""
    try:
        return print_pieces(conversation.ask(text, **options))
    except KeyboardInterrupt:
        return None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    model = load(args.model, **machine.prepare(args))
    spend_rows(args, model, 1)
    options = decoding_options(args)
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
                print(f"error: {error}; /reset makes room", file=sys.stderr)
                continue
            print()
            print(f"[{completion or 'interrupted'}]", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)

"""A dialogue with a model: which messages it keeps, and the cache of what the model has read."""

import contextlib
from typing import Any

from orthrus_jax.engine import Session
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM, Pieces
from orthrus_jax.tokenizer import encode_messages
from orthrus_jax.values import check_switch, check_type, check_whole


class Conversation:
    """A dialogue with a model: its messages, and the cache of the tokens that the model has read.

    Answers that are open at the same time do not disturb each other; the one that ends last
    decides the messages.
    """

    def __init__(
        self, model: LLM, *, system: str = "", thinking: bool = False, slots: int = 2048
    ) -> None:
        """Begin a dialogue.

        Args:
          model: loaded with its tokenizer.
          system: the system message, if any.
          thinking: let the template open a thinking part.
          slots: cache slots to begin with; a dialogue that outgrows them is read again.
        """
        check_type("model", model, LLM, "a loaded LLM")
        check_type("system", system, str, "a string")
        check_switch("thinking", thinking)
        check_whole("slots", slots, 1)
        if model.tokenizer is None:
            raise UserError("a conversation needs a model with its tokenizer")
        self.model, self.system, self.thinking = model, system, thinking
        self.session = Session(min(slots, model.config.max_position_embeddings))
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    @property
    def begun(self) -> bool:
        """Whether there are messages that `reset` would forget."""
        return any(message["role"] != "system" for message in self.messages)

    def ask(self, text: str, **options: Any) -> Pieces:
        """Add `text` to the dialogue and return the answer's pieces as they grow; see LLM.stream.

        An answer that is abandoned or interrupted stays in the dialogue, as much of it as was read.

        Raises:
          UserError: before anything is read, for a bad argument or a dialogue that does not fit.
        """
        check_type("text", text, str, "a string")
        if not text:
            raise UserError("text is empty: give at least one character")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = encode_messages(self.model.tokenizer, messages, thinking=self.thinking)
        pieces = self.model.stream_ids(ids, session=self.session, **options)
        return self._remember(messages, pieces)

    def _remember(self, messages: list[dict[str, str]], pieces: Pieces) -> Pieces:
        answer: list[str] = []
        try:
            with contextlib.closing(pieces):
                while True:
                    try:
                        answer.append(next(pieces))
                    except StopIteration as end:
                        return end.value
                    yield answer[-1]
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

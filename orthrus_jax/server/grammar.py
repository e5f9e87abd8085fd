"""Grammars of answers, by llguidance: JSON schemas and regular expressions to masks of tokens.

Needs the extra `structured`. Knows no device: the masks are words of bits on the host.
"""

from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np

from orthrus_jax.config import ModelConfig
from orthrus_jax.engine import Matcher
from orthrus_jax.errors import UserError
from orthrus_jax.server.problems import invalid
from orthrus_jax.server.schema import GrammarSpec
from orthrus_jax.tokenizer import Tokenizer

# Between the parts of JSON: enough to indent. Without an end, a model that likes spaces writes
# nothing else (the demo's base filled 500 tokens with them).
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \t\n]{1,20}"}
SHOWN = 300  # characters of the library's message


class Grammars:
    """Compiles grammars for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        """Read the vocabulary; takes about a second for a large one.

        Raises:
          UserError: for a tokenizer that the library cannot follow.
        """
        self._ends = list(config.eos_token_ids)
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=config.vocab_size, eos_token=self._ends or None
            )
        except Exception as error:  # whatever a library in another language raises
            raise UserError(
                f"the tokenizer cannot be followed by a grammar ({error}): --no-structured serves "
                "without response_format"
            ) from None

    def compile(self, spec: GrammarSpec) -> Callable[[], Matcher]:
        """What makes a matcher per answer.

        Raises:
          ApiError: for a schema or pattern that the library refuses.
        """
        try:
            if spec.kind == "regex":
                grammar = llguidance.LLMatcher.grammar_from_regex(spec.source)
            else:
                grammar = llguidance.LLMatcher.grammar_from_json_schema(spec.source, JSON_OPTIONS)
            matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        except ValueError as error:
            raise invalid(f"{spec.param}: {_first_line(str(error))}", spec.param) from None
        if matcher.is_error():
            raise invalid(f"{spec.param}: {_first_line(matcher.get_error())}", spec.param)
        return lambda: GuidedMatcher(matcher.deep_copy(), self._ends)


class GuidedMatcher:
    """One answer in its grammar; see `engine.Matcher`."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: Sequence[int]) -> None:
        self._matcher, self._ends = matcher, ends

    def fill(self, drafts: Sequence[int], allowed: np.ndarray) -> None:
        """Write the masks of the next token and of those after each draft that fits."""
        matcher = self._matcher
        ends = [j for j, token in enumerate(drafts) if token in self._ends]
        fits = matcher.validate_tokens(list(drafts[: ends[0]] if ends else drafts))
        taken = 0
        for j in range(fits + 1):
            self._write(allowed[j])
            if j == fits or matcher.is_stopped() or not matcher.consume_token(drafts[j]):
                break
            taken += 1
        if taken:
            matcher.rollback(taken)
        self._check()

    def consume(self, tokens: Sequence[int]) -> int | None:
        """Take the next tokens; the answer is complete at an end token or where none may follow."""
        for count, token in enumerate(tokens, 1):
            if token in self._ends:
                return count
            self._matcher.consume_token(token)
            self._check()
            if self._matcher.is_stopped():
                return count
        return None

    def _write(self, mask: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_accepting() or not mask.any():
            for end in self._ends:
                mask[end // 32] |= np.uint32(1 << end % 32)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"the grammar: {_first_line(self._matcher.get_error())}")


def _first_line(message: str) -> str:
    lines = message.strip().split("\n")
    return lines[0][:SHOWN] if lines else "it cannot be compiled"

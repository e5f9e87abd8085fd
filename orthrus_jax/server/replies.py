"""Answers in the protocol's words: whole objects and chunks of a stream. Knows no HTTP."""

import collections
import dataclasses
import importlib.metadata
import itertools
import time
import uuid
from collections.abc import Sequence
from typing import Any

from orthrus_jax import metrics
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Completion, Event, Plan, Request
from orthrus_jax.engine.detokenizer import REPLACEMENT, IncrementalDetokenizer
from orthrus_jax.tokenizer import Tokenizer
from orthrus_jax.tokenizer import decode as decode_text

VERSION = importlib.metadata.version("orthrus-jax")


class Reply:
    """One call's reply: its id, its choices as they grow, its usage.

    `chat` chooses between the objects of the two endpoints.
    """

    def __init__(
        self,
        chat: bool,
        model: str,
        plan: Plan,
        requests: Sequence[Request],
        tokenizer: Tokenizer,
        pieces: bool = False,
    ) -> None:
        """Begin a reply.

        Args:
          chat: of /v1/chat/completions.
          model: its name in the protocol.
          plan: how it is decoded.
          requests: one per choice.
          tokenizer: for the text of single tokens.
          pieces: chunks say which text was drafted.
        """
        self.chat, self.model, self._plan = chat, model, plan
        self._requests, self._tokenizer = requests, tokenizer
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._pieces = [
            IncrementalDetokenizer(tokenizer, r.sampling.stop) if pieces else None for r in requests
        ]
        self._progress = [{"tokens": 0, "forwards": 0} for _ in requests]
        self._characters = [0] * len(requests)
        self._begun = [False] * len(requests)
        self.completions: dict[int, Completion] = {}

    # Whole

    def whole(self) -> dict[str, Any]:
        """The object of a reply whose answers have all ended."""
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [self._choice(i) for i in range(len(self._requests))],
            "usage": self.usage(),
            "orthrus": self.orthrus(),
        }

    def _choice(self, i: int) -> dict[str, Any]:
        completion = self.completions[i]
        logprobs = self._logprobs(i, completion.tokens, completion.logprobs or ())
        text: dict[str, Any] = {"text": completion.text}
        if self.chat:
            message = {"role": "assistant", "content": completion.text, "refusal": None}
            text = {"message": message}
        end = {"logprobs": logprobs, "finish_reason": completion.finish_reason}
        return {"index": i, **text, **end}

    # Chunks

    def chunk(self, i: int, event: Event, seconds: float) -> dict[str, Any] | None:
        """The chunk for news of choice i; None if it has nothing to show yet."""
        completion = event.completion
        logprobs = self._logprobs(i, event.tokens, event.logprobs)
        pieces = self._coloured(i, event)
        if not (event.text or logprobs or completion is not None or pieces or not self._begun[i]):
            return None
        text: dict[str, Any] = {"text": event.text}
        if self.chat:
            role = {} if self._begun[i] else {"role": "assistant"}
            text = {"delta": {**role, "content": event.text}}
        self._begun[i] = True
        finish = None if completion is None else completion.finish_reason
        choice = {"index": i, **text, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._chunk_head(), "choices": [choice]}
        if self._pieces[i] is not None:
            chunk["orthrus"] = {"pieces": pieces, "seconds": seconds, **self._progress[i]}
        return chunk

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, which has no choice."""
        return {
            **self._chunk_head(),
            "choices": [],
            "usage": self.usage(),
            "orthrus": self.orthrus(),
        }

    def _coloured(self, i: int, event: Event) -> list[list[Any]]:
        """[text, cycle, drafted] per run of new tokens of one origin."""
        text = self._pieces[i]
        if text is None:
            return []
        if event.tokens:
            tokens = self._progress[i]["tokens"] + len(event.tokens)
            self._progress[i] = {"tokens": tokens, "forwards": event.forwards}
        pieces: list[list[Any]] = []
        origins = zip(event.tokens, event.cycles, event.drafted, strict=True)
        for token, cycle, drafted in origins:
            if pieces and pieces[-1][1:] == [cycle, drafted]:
                pieces[-1][0] += text.push([token])
            else:
                pieces.append([text.push([token]), cycle, drafted])
        if event.completion is not None and (rest := text.close()):
            pieces.append([rest, event.completion.cycles, False])
        return pieces

    # Parts

    def usage(self) -> dict[str, Any]:
        """Tokens read and written, over all choices; a prompt with n answers counts once."""
        prompts = {id(r.prompt): len(r.prompt) for r in self._requests}
        prompt = sum(prompts.values())
        new = sum(len(c.tokens) for c in self.completions.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self._cached()},
        }

    def orthrus(self) -> dict[str, Any]:
        """How the answers were decoded; see docs/metrics.md."""
        answers = list(self.completions.values())
        forwards = sum(c.forwards for c in answers)
        ran: collections.Counter[Strategy] = collections.Counter()
        for strategy, cycles in itertools.chain(*(c.strategies for c in answers)):
            ran[strategy] += cycles
        return {
            "strategy": {"mode": "auto"} if self._plan.auto else self._plan.strategy.given(),
            "strategies": [strategy.given() | {"cycles": n} for strategy, n in ran.items()],
            "cycles": sum(c.cycles for c in answers),
            "forwards": forwards,
            "acceptance_length": metrics.acceptance_length([c.accepted for c in answers]),
            "tokens_per_forward": metrics.tokens_per_forward(
                sum(len(c.tokens) for c in answers), forwards
            ),
            "cached_prompt_tokens": self._cached(),
            "seeds": sorted({r.sampling.seed for r in self._requests if r.sampling.temperature}),
        }

    def _cached(self) -> int:
        """Cached tokens of each prompt's first answer: the others share its own reading."""
        firsts = [i for i, r in enumerate(self._requests) if r.sample == 0]
        return sum(self.completions[i].cached_tokens for i in firsts if i in self.completions)

    def _head(self, kind: str) -> dict[str, Any]:
        fingerprint = f"orthrus_jax-{VERSION}"
        head = {"id": self.id, "object": kind, "created": self._created, "model": self.model}
        return {**head, "system_fingerprint": fingerprint}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _logprobs(
        self, i: int, tokens: Sequence[int], values: Sequence[float]
    ) -> dict[str, Any] | None:
        if not values:
            return None
        texts = [decode_text(self._tokenizer, [token]) for token in tokens]
        if self.chat:
            content = [_token(t, v) for t, v in zip(texts, values, strict=True)]
            return {"content": content, "refusal": None}
        offsets = []
        for text in texts:
            offsets.append(self._characters[i])
            self._characters[i] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": list(values),
            "top_logprobs": None,
            "text_offset": offsets,
        }


def _token(text: str, logprob: float) -> dict[str, Any]:
    # Of a token that is a part of a character only, the text does not tell the bytes.
    data = None if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": data, "top_logprobs": []}


@dataclasses.dataclass
class Timing:
    """When an answer began, and its first token came, on the monotonic clock."""

    began: float
    first: dict[int, float] = dataclasses.field(default_factory=dict)

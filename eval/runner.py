"""Decode the dialogues of a benchmark: problems in, answers and seconds out.

Decides the order of turns and samples, and which time counts as decoding. Knows no grades, no files
and no command line.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from eval.benchmarks import Problem
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Completion, Plan, Request, SamplingParams
from orthrus_jax.llm import LLM
from orthrus_jax.tokenizer import decode, encode_messages

Served = Generator[tuple[int, Completion], None, None]  # indices and answers, as they finish


@dataclasses.dataclass
class Dialogue:
    """One sample of a problem in one loop: its messages so far, and its answers as recorded."""

    problem: Problem
    sample: int
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    prompt: list[int] = dataclasses.field(default_factory=list)
    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Runner:
    """A model and how it decodes: problems in, answers and seconds out.

    Each of `names` is a loop, "ar" or "orthrus", in turn; the latter has the strategy of `plan`.
    """

    model: LLM
    sampling: SamplingParams
    names: Sequence[str]
    plan: Plan
    thinking: bool

    def answer(self, problems: Sequence[Problem], loop: str) -> tuple[list[Dialogue], float]:
        """Decode every sample of every problem, turn by turn; and its wall-clock seconds."""
        every = [Dialogue(p, sample) for p in problems for sample in range(self.sampling.n)]
        seconds = 0.0
        for turn in range(max(len(p.turns) for p in problems)):
            going = [
                d for d in every if turn < len(d.problem.turns) and self._add_turn(d, turn, loop)
            ]
            answers, turn_seconds = self._decode(going, loop) if going else ([], 0.0)
            seconds += turn_seconds
            for dialogue, answer in zip(going, answers, strict=True):
                text = decode(self.model.tokenizer, answer.tokens)
                dialogue.messages.append({"role": "assistant", "content": text})
                forwards = 1 + self.plan_of(loop).strategy.forwards * answer.cycles
                dialogue.answers.append(_record(dialogue, turn, loop, answer, text, forwards))
        return every, seconds

    def warm(self, problems: Sequence[Problem]) -> None:
        """Run each loop until its first answer, so that later runs are not charged for start-up."""
        for loop in self.names:
            every = [Dialogue(p, sample) for p in problems for sample in range(self.sampling.n)]
            if going := [d for d in every if self._add_turn(d, 0, loop)]:
                with contextlib.closing(self._serve(going, loop)) as answers:
                    next(answers)

    def fitted(self, problems: Sequence[Problem]) -> "Runner":
        """This runner with a cache for the longest dialogue, so that all chunks share a shape."""
        new = self.sampling.max_new_tokens
        longest = 0
        for problem in problems:
            messages = [{"role": "user", "content": turn} for turn in problem.turns]
            ids = encode_messages(self.model.tokenizer, messages, thinking=self.thinking)
            longest = max(longest, len(ids) + (len(messages) - 1) * new)
        longest = min(longest, self.model.config.max_position_embeddings - new)
        slots = self.model.engine.slots(longest, new, self.plan)
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, slots=slots))

    def _add_turn(self, dialogue: Dialogue, turn: int, loop: str) -> bool:
        """Add the next user turn; False if its prompt, or one before, does not fit the model."""
        if any("skipped" in answer for answer in dialogue.answers):
            return False
        dialogue.messages.append({"role": "user", "content": dialogue.problem.turns[turn]})
        dialogue.prompt = encode_messages(
            self.model.tokenizer, dialogue.messages, thinking=self.thinking
        )
        room = self.model.config.max_position_embeddings - self.sampling.max_new_tokens
        if len(dialogue.prompt) <= room:
            return True
        why = f"{len(dialogue.prompt)} prompt tokens; there is room for {room}"
        dialogue.answers.append(
            {"loop": loop, "sample": dialogue.sample, "turn": turn, "skipped": why}
        )
        return False

    def _serve(self, dialogues: Sequence[Dialogue], loop: str) -> Served:
        requests = [Request(d.prompt, self.sampling, d.sample) for d in dialogues]
        for event in self.model.engine.serve(requests, self.plan_of(loop)):
            if event.completion is not None:
                yield event.index, event.completion

    def plan_of(self, loop: str) -> Plan:
        """The plan of one loop."""
        return (
            dataclasses.replace(self.plan, strategy=Strategy("ar")) if loop == "ar" else self.plan
        )

    def _decode(self, dialogues: Sequence[Dialogue], loop: str) -> tuple[list[Completion], float]:
        """Answers in the dialogues' order, and seconds without the engine's compiling."""
        engine = self.model.engine
        compiled, begin = engine.compile_seconds, time.perf_counter()
        answers = dict(self._serve(dialogues, loop))
        seconds = time.perf_counter() - begin - (engine.compile_seconds - compiled)
        return [answers[i] for i in range(len(dialogues))], seconds


def _record(
    d: Dialogue, turn: int, loop: str, answer: Completion, text: str, forwards: int
) -> dict[str, Any]:
    """An answer as answers.jsonl keeps it."""
    orthrus = loop == "orthrus"
    return {
        "loop": loop,
        "sample": d.sample,
        "turn": turn,
        "text": text,
        "prompt_tokens": len(d.prompt),
        "tokens": len(answer.tokens),
        "digest": checksum(np.array(answer.tokens, "<i4")),
        "finish_reason": answer.finish_reason,
        "cycles": answer.cycles,
        "accepted": answer.accepted if orthrus else [],
        "forwards": forwards,
        "seconds": answer.seconds,
        "first_seconds": answer.time_to_first_token,
    }


def checksum(numbers: np.ndarray) -> str:
    """16 hex digits that depend on the array's bytes."""
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]

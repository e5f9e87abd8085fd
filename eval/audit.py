"""Audit of greedy and coupled texts, token by token, and what all parts of an audit share.

Orthrus decodes; reference.py reads its texts again; every token that is neither the AR view's own
nor a near-tie is a failure. `Audit` holds the requests, plan and model of one audit. Sampled texts
are audit_law.py, the command is lossless.py.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from eval.reference import Texts, TokenCheck, near_tie, no_cache, one_row
from orthrus_jax.decoding import Sampler, Strategy
from orthrus_jax.engine import Completion, Plan, Request, SamplingParams, bucket
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from orthrus_jax.metrics import acceptance_length

PARTS = ("greedy", "coupled", "rejection")


@dataclasses.dataclass(frozen=True)
class Options:
    """The parts of an audit and its limits; the command has options of the same names.

    Attributes:
      parts: of PARTS.
      max_new_tokens: of each answer.
      batch_size: texts decoded and checked together.
      strategy: how to decode.
      temperature: of the sampled parts.
      seeds: 0 ... seeds - 1, texts per prompt in the sampled parts.
      near_tie: in standard deviations of the row's logits, None is `near_tie(config)`.
      progress: show a bar on standard error.

    Raises:
      UserError: naming the option that does not fit.
    """

    parts: tuple[str, ...] = PARTS
    max_new_tokens: int = 128
    batch_size: int = 8
    strategy: Strategy = dataclasses.field(default_factory=Strategy)
    temperature: float = 0.8
    seeds: int = 4
    near_tie: float | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if not self.parts or (unknown := set(self.parts) - set(PARTS)):
            names = ", ".join(sorted(unknown)) if self.parts else "nothing"
            raise UserError(f"--parts names {names}: expected some of {', '.join(PARTS)}")
        if self.strategy.method == "ar":
            raise UserError("strategy 'ar' drafts nothing: there is nothing to audit")
        if "rejection" in self.parts and self.strategy.method != "orthrus":
            raise UserError(
                f"--cycle {self.strategy.flags()['cycle']} emits AR's own draws under either rule: "
                "audit --parts greedy,coupled"
            )
        if {"coupled", "rejection"} & set(self.parts) and self.temperature == 0:
            raise UserError("--temperature 0 leaves nothing to sample: use --parts greedy")
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds} must be at least 1")
        if self.near_tie is not None and not 0 <= self.near_tie < math.inf:
            raise UserError(f"--near-tie {self.near_tie} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why an audit fails, at one token or for a whole part.

    Attributes:
      part: of PARTS.
      text: whose text, "orthrus" or "ar".
      why: the reference that disagrees, or another cause.
      prompt, seed: of the text; None for a part as a whole.
      position: of the token in the answer, from 0.
      token, ar_token: the emitted token, and the one that the reference takes there.
      gap, limit: in logits.
    """

    part: str
    text: str
    why: str
    prompt: int | None = None
    seed: int | None = None
    position: int | None = None
    token: int | None = None
    ar_token: int | None = None
    gap: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        where = "" if self.prompt is None else f" prompt {self.prompt}, seed {self.seed},"
        if self.ar_token is None:
            return f"{self.part}:{where} {self.text}: {self.why}"
        return (
            f"{self.part}:{where} position {self.position}: {self.text} emitted {self.token}, "
            f"AR takes {self.ar_token}: gap {self.gap:.4g} logits, limit {self.limit:.4g} "
            f"(reference: {self.why})"
        )


class Audit:
    """A model, its prompts' ids, and the requests of one audit."""

    def __init__(self, model: LLM, prompts: Sequence[Sequence[int]], options: Options):
        self.model, self.prompts, self.options = model, prompts, options
        self.near_tie = near_tie(model.config) if options.near_tie is None else options.near_tie
        self.padded = bucket(max(map(len, prompts)))
        self.width = bucket(options.max_new_tokens)
        self.plan = Plan(model.strategy(options.strategy), batch_size=options.batch_size)
        self.bar: Any = tqdm(disable=True)

    def requests(self, part: str) -> list[Request]:
        """The requests of a part, the seeds of a prompt side by side.

        Equal prompts count as samples of one: with the same noise their texts would be equal, and
        the tokens no independent evidence of a distribution.
        """
        n, sampled = self.options.max_new_tokens, part != "greedy"
        common = SamplingParams(
            temperature=self.options.temperature if sampled else 0.0,
            max_new_tokens=n,
            logprobs=part == "rejection",
        )
        seeds = range(self.options.seeds if sampled else 1)
        samplings = [dataclasses.replace(common, seed=seed) for seed in seeds]
        earlier: collections.Counter[tuple[int, ...]] = collections.Counter()
        requests = []
        for prompt in self.prompts:
            sample = earlier[tuple(prompt)]
            requests += [Request(prompt, sampling, sample) for sampling in samplings]
            earlier[tuple(prompt)] += 1
        return requests

    def decode(
        self, requests: Sequence[Request], accept: str, batch_size: int = 0
    ) -> list[Completion]:
        """Answer the requests with the audit's plan and a rule, or by the baseline with "ar"."""
        strategy = dataclasses.replace(self.plan.strategy, accept=accept)
        plan = dataclasses.replace(
            self.plan,
            strategy=Strategy("ar") if accept == "ar" else strategy,
            batch_size=batch_size or self.plan.batch_size,
        )
        self.bar.set_description(f"{plan.strategy.method}, batch {plan.batch_size}")
        answers: dict[int, Completion] = {}
        for event in self.model.engine.serve(requests, plan):
            if event.completion is not None:
                answers[event.index] = event.completion
                self.bar.update()
        return [answers[i] for i in range(len(requests))]

    def read_again(
        self,
        reference: Any,
        requests: Sequence[Request],
        answers: Sequence[Completion],
        rivals: Sequence[Completion],
        **static: Any,
    ) -> list[Any]:
        """Have `reference` (one_row or no_cache) read every answer of n tokens: arrays [n].

        One compiled program serves the whole part: the last batch is filled up.

        Args:
          reference: the program.
          requests, answers: what it reads.
          rivals: other answers to the same requests.
          static: its static arguments. With `block` the drafts are made again, which is for
            answers of the paper's cycle.
        """
        name = "one row" if reference is one_row else "no cache"
        self.bar.set_description(f"reference: {name}")
        # Without a cache one text is already many rows, and its scores take memory.
        batch = self.options.batch_size if reference is one_row else 1
        checks = []
        for some in _batches(list(zip(requests, answers, rivals, strict=True)), batch):
            filled = [*some, *[None] * (batch - len(some))]
            texts = self._texts(filled, anchored="block" in static)
            engine = self.model.engine
            arrays = reference(engine.model, engine.params, texts, padded=self.padded, **static)
            arrays = jax.device_get(arrays)
            for i, (_, answer, _) in enumerate(some):
                checks.append(type(arrays)(*(x[i, : len(answer.tokens)] for x in arrays)))
            self.bar.update(len(some))
        return checks

    def _texts(
        self, some: Sequence[tuple[Request, Completion, Completion] | None], *, anchored: bool
    ) -> Texts:
        """Lay texts out for a reference, with their cycles' anchors or none; None fills a row."""
        rows = np.zeros((len(some), self.padded + self.width), np.int32)
        rivals, anchors = np.zeros((2, len(some), self.width), np.int32)
        lengths, counts = np.ones(len(some), np.int32), np.zeros(len(some), np.int32)
        keys = np.zeros((2, len(some)), np.uint32)
        sampled = False
        for i, (request, answer, rival) in ((i, x) for i, x in enumerate(some) if x is not None):
            whole = [*request.prompt, *answer.tokens]
            rows[i, : len(whole)] = whole
            rivals[i, : len(rival.tokens)] = rival.tokens
            if anchored:
                anchors[i, : len(answer.tokens)] = _anchors(len(request.prompt), answer)
            lengths[i], counts[i] = len(request.prompt), len(answer.tokens)
            keys[:, i] = request.sampling.seed, request.noise_id
            sampled = request.sampling.temperature > 0
        sampler = None
        if sampled:
            temperature = jnp.full(len(some), self.options.temperature, jnp.float32)
            sampler = Sampler(temperature, seed=jnp.asarray(keys[0]), noise_id=jnp.asarray(keys[1]))
        return Texts(
            rows=jnp.asarray(rows),
            lengths=jnp.asarray(lengths),
            counts=jnp.asarray(counts),
            rivals=jnp.asarray(rivals),
            anchors=jnp.asarray(anchors),
            sampler=sampler,
        )


def _anchors(prompt: int, answer: Completion) -> list[int]:
    """The index, in prompt and answer, of the anchor from which each answer token was drafted.

    A cycle of the paper's that accepts n drafts emits n + 1 tokens after its anchor, if there is
    room. The first token of all was not drafted: the prompt's last token counts as its anchor.
    """
    runs = [1, *(n + 1 for n in answer.accepted)]
    firsts = itertools.accumulate(runs, initial=prompt)
    anchors = [first - 1 for first, n in zip(firsts, runs, strict=False) for _ in range(n)]
    return anchors[: len(answer.tokens)]


def audit_choices(
    run: Audit, part: str, requests: Sequence[Request]
) -> tuple[dict[str, Any], list[Failure]]:
    """Audit greedy or coupled texts token by token, and measure AR's own noise floor."""
    size = run.options.batch_size
    other = 2 if size == 1 else 1
    ar = run.decode(requests, "ar")
    again = run.decode(requests, "ar", batch_size=other)
    orthrus = run.decode(requests, "coupled")
    checks = run.read_again(one_row, requests, orthrus, ar)
    uncached = run.read_again(no_cache, requests, orthrus, ar)
    floor = run.read_again(no_cache, requests, ar, orthrus)

    failures = []
    for i, request in enumerate(requests):
        failure = functools.partial(
            Failure, part, prompt=i // _seeds(run, part), seed=request.sampling.seed
        )
        failures += bad_ends(run, failure, "orthrus", orthrus[i])
        failures += _bad_tokens(run, failure, "orthrus", "one row", orthrus[i], checks[i])
        failures += _bad_tokens(run, failure, "orthrus", "no cache", orthrus[i], uncached[i])
        failures += _bad_tokens(run, failure, "ar", "no cache", ar[i], floor[i])
    result = {
        "texts": len(requests),
        "acceptance_length": acceptance_length(a.accepted for a in orthrus),
        "orthrus": _agreement(orthrus, ar, checks),
        "floor": {
            f"AR, batch {other}": {"exact_match": _exact(again, ar)},
            "AR, no cache": _agreement(None, ar, floor),
        },
        "divergences": _divergences(run, part, requests, orthrus, ar, checks),
        "median_spread": float(np.median(np.concatenate([c.spread for c in checks]))),
    }
    return result, failures


def _seeds(run: Audit, part: str) -> int:
    return 1 if part == "greedy" else run.options.seeds


def _exact(answers: Sequence[Completion], others: Sequence[Completion]) -> float:
    return float(np.mean([a.tokens == b.tokens for a, b in zip(answers, others, strict=True)]))


def _agreement(
    answers: Sequence[Completion] | None, ar: Sequence[Completion], checks: Sequence[TokenCheck]
) -> dict[str, Any]:
    """How a reference agrees with texts.

    Without `answers`, exact_match is the share of AR's texts that the reference would itself have
    emitted. Fed AR's text, it would have emitted that text exactly if it differs at no token: at
    the first that differs the two texts would part.
    """
    flips = [c.gap > 0 for c in checks]
    same = np.mean([not f.any() for f in flips]) if answers is None else _exact(answers, ar)
    relative = np.concatenate([c.gap / c.spread for c in checks])
    return {
        "exact_match": float(same),
        "tokens": len(relative),
        "flips": int((relative > 0).sum()),
        "largest_gap": float(max(c.gap.max() for c in checks)),
        "largest_relative_gap": float(relative.max()),
    }


def _bad_tokens(
    run: Audit,
    failure: Callable[..., Failure],
    text: str,
    reference: str,
    answer: Completion,
    check: TokenCheck,
) -> list[Failure]:
    limit = run.near_tie * check.spread
    return [
        failure(
            text=text,
            why=reference,
            position=t,
            token=answer.tokens[t],
            ar_token=int(check.best[t]),
            gap=float(check.gap[t]),
            limit=float(limit[t]),
        )
        # Written so that a gap of NaN fails.
        for t in np.flatnonzero(~(check.gap <= limit)).tolist()
    ]


def bad_ends(
    run: Audit, failure: Callable[..., Failure], text: str, answer: Completion
) -> list[Failure]:
    """The failure of an answer that ends neither with its first end token nor at the budget."""
    ends, most = run.model.config.eos_token_ids, run.options.max_new_tokens
    first = next((i + 1 for i, token in enumerate(answer.tokens) if token in ends), most)
    if len(answer.tokens) == first:
        return []
    return [failure(text=text, why=f"{len(answer.tokens)} tokens, which must end after {first}")]


def _divergences(
    run: Audit,
    part: str,
    requests: Sequence[Request],
    orthrus: Sequence[Completion],
    ar: Sequence[Completion],
    checks: Sequence[TokenCheck],
) -> list[dict[str, Any]]:
    """Where each text first leaves AR's, and the gap between the two tokens by `one_row`."""
    divergences = []
    for i, (ours, theirs, check) in enumerate(zip(orthrus, ar, checks, strict=True)):
        pairs = list(itertools.zip_longest(ours.tokens, theirs.tokens))
        at = next((t for t, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            continue
        token, ar_token = pairs[at]
        both = token is not None and ar_token is not None
        divergences.append(
            {
                "prompt": i // _seeds(run, part),
                "seed": requests[i].sampling.seed,
                "position": at,
                "token": token,
                "ar_token": ar_token,
                "gap": float(check.rival_gap[at]) if both else None,
                "limit": float(run.near_tie * check.spread[at]) if both else None,
            }
        )
    return divergences


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]

"""Audit a model: let Orthrus decode, let the judges read it, find every token that is wrong.

Greedy and coupled texts are held to the AR view's own tokens, one by one (judges.py). Of sampled
ones the law is tested. With p the judge's distribution, f(x) - E[f] of the emitted tokens x has
mean 0 and a variance known exactly for any f that is fixed before x is: summed over all tokens and
divided by its standard deviation it is N(0, 1). Two f are tried. log p(x) shows tokens that come
from another p. The drafter's favour min(1, q(x) / p(x)), q drafted again from the anchor of the
token's cycle, is the direction in which every rule errs that accepts too much or replaces wrongly.
Its mean is the chance that a draft stands; a rule that accepts every draft moves it to E_q[favour],
and one that draws a refused draft's replacement from p rather than max(p - q, 0) moves it by its
variance v: 36 / v tokens then show it 98 times in 100, a few hundred. The report prints the shift
of each mean that its tokens would show. The other two statistics ask whether the mass of p before x
(before in the vocabulary; before by likelihood) is uniform, by a chi-square over 20 bins on a
normal's scale. A p that is itself off, as a corrupted cache makes it, moves all of these little: so
the log p that Orthrus reports of every token is held to the judge's, to within two near-ties.
"""

import dataclasses
import functools
import itertools
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from eval.judges import Choice, Law, Texts, near_tie, no_cache, one_row
from orthrus_jax.decoding.sampling import Proposal, Rule, Sampler
from orthrus_jax.engine import BLOCKS, Completion, Plan, Request, SamplingParams, bucket
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM

PARTS = ("greedy", "coupled", "rejection")
Z_LIMIT = 4.0  # 6 in 100,000 honest audits exceed it
BINS = 20
LEAST_TOKENS = 5 * BINS  # a chi-square wants 5 a bin


@dataclasses.dataclass(frozen=True)
class Options:
    """What is audited, and how strictly; the command's options of the same names.

    Attributes:
      parts: of PARTS.
      max_new_tokens: of each answer.
      batch_size: texts decoded and judged together.
      draft_length: rows of a draft block, None is the model's own.
      cycle, early_blocks, fresh_blocks, tree_nodes: what decodes, see LLM.complete.
      temperature: of the sampled parts.
      proposal: what the rejection rule proposes, of sampling.Proposal.
      seeds: 0 ... seeds - 1, texts of each prompt in the sampled parts.
      near_tie: in standard deviations of the row's logits, None is `near_tie(config)`.
      progress: show a bar on standard error.
    """

    parts: tuple[str, ...] = PARTS
    max_new_tokens: int = 128
    batch_size: int = 8
    draft_length: int | None = None
    cycle: str = Plan.cycle
    early_blocks: int = Plan.early_blocks
    fresh_blocks: int = Plan.fresh_blocks
    tree_nodes: int = Plan.tree_nodes
    temperature: float = 0.8
    proposal: str = Plan.proposal.value
    seeds: int = 4
    near_tie: float | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if not self.parts or (unknown := set(self.parts) - set(PARTS)):
            found = ", ".join(sorted(unknown)) if self.parts else "nothing"
            raise UserError(f"--parts names {found}: expected some of {', '.join(PARTS)}")
        if "rejection" in self.parts and self.cycle != "paper":
            raise UserError(
                f"--cycle {self.cycle} says AR's own draws under either rule, token for token: "
                "audit --parts greedy,coupled"
            )
        if {"coupled", "rejection"} & set(self.parts) and self.temperature == 0:
            raise UserError("--temperature 0 leaves nothing to sample: use --parts greedy")
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds} must be at least 1")
        if self.near_tie is not None and not 0 <= self.near_tie < math.inf:
            raise UserError(f"--near-tie {self.near_tie} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class Case:
    """Why an audit fails, at one token or for a whole part.

    Attributes:
      part: of PARTS.
      text: whose text, "orthrus" or "ar".
      prompt, seed: of the text; None for a part as a whole.
      position: of the token in the answer, from 0.
      token, ar_token: what was emitted, and what the judge takes there.
      gap, limit: in logits.
      why: the judge, or what else is wrong.
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
            f"(judge: {self.why})"
        )


class Audit:
    """A model, its prompts' ids, and the requests of one audit."""

    def __init__(self, model: LLM, prompts: Sequence[Sequence[int]], options: Options):
        self.model, self.prompts, self.options = model, prompts, options
        self.near_tie = near_tie(model.config) if options.near_tie is None else options.near_tie
        self.padded = bucket(max(map(len, prompts)))
        self.width = bucket(options.max_new_tokens)
        draft = model.draft_length if options.draft_length is None else options.draft_length
        self.plan = Plan(
            draft_length=draft,
            cycle=options.cycle,
            **{name: getattr(options, name) for name in BLOCKS},
            batch_size=options.batch_size,
        )
        self.bar: Any = tqdm(disable=True)

    def requests(self, part: str) -> list[Request]:
        """The requests of a part, the seeds of a prompt side by side."""
        n, sampled = self.options.max_new_tokens, part != "greedy"
        common = SamplingParams(
            temperature=self.options.temperature if sampled else 0.0,
            max_new_tokens=n,
            logprobs=part == "rejection",
        )
        seeds = range(self.options.seeds if sampled else 1)
        asked = [dataclasses.replace(common, seed=seed) for seed in seeds]
        return [Request(*pair) for pair in itertools.product(self.prompts, asked)]

    def decode(self, requests: Sequence[Request], **how: Any) -> list[Completion]:
        """Answer the requests by the audit's plan, but for `how`."""
        plan = dataclasses.replace(self.plan, **how)
        self.bar.set_description(f"{plan.mode}, batch {plan.batch_size}")
        answers: dict[int, Completion] = {}
        for event in self.model.engine.serve(requests, plan):
            if event.completion is not None:
                answers[event.index] = event.completion
                self.bar.update()
        return [answers[i] for i in range(len(requests))]

    def judge(
        self,
        judge: Any,
        requests: Sequence[Request],
        answers: Sequence[Completion],
        rivals: Sequence[Completion],
        **static: Any,
    ) -> list[Any]:
        """Have `judge` (one_row or no_cache) read every answer: arrays [n] of its n tokens.

        Its compiled program is one for the whole part: the last batch is filled up.
        """
        name = "one row" if judge is one_row else "no cache"
        self.bar.set_description(f"judge: {name}")
        # Without a cache a text is many rows by itself, and its scores take memory.
        batch = self.options.batch_size if judge is one_row else 1
        found = []
        for some in _batches(list(zip(requests, answers, rivals, strict=True)), batch):
            texts = self._texts([*some, *[None] * (batch - len(some))])
            engine = self.model.engine
            seen = judge(engine.model, engine.params, texts, padded=self.padded, **static)
            seen = jax.device_get(seen)
            for i, (_, answer, _) in enumerate(some):
                found.append(type(seen)(*(x[i, : len(answer.tokens)] for x in seen)))
            self.bar.update(len(some))
        return found

    def _texts(self, some: Sequence[tuple[Request, Completion, Completion] | None]) -> Texts:
        """Lay texts out for a judge; None fills a row."""
        rows = np.zeros((len(some), self.padded + self.width), np.int32)
        rivals, anchors = np.zeros((2, len(some), self.width), np.int32)
        lengths, counts = np.ones(len(some), np.int32), np.zeros(len(some), np.int32)
        keys = np.zeros((2, len(some)), np.uint32)
        sampled = False
        for i, (request, answer, rival) in ((i, x) for i, x in enumerate(some) if x is not None):
            whole = [*request.prompt, *answer.tokens]
            rows[i, : len(whole)] = whole
            rivals[i, : len(rival.tokens)] = rival.tokens
            anchors[i, : len(answer.tokens)] = _anchors(len(request.prompt), answer)
            lengths[i], counts[i] = len(request.prompt), len(answer.tokens)
            keys[:, i] = request.sampling.seed, request.noise_id
            sampled = request.sampling.temperature > 0
        sampler = None
        if sampled:
            heat = jnp.full(len(some), self.options.temperature, jnp.float32)
            sampler = Sampler(heat, seed=jnp.asarray(keys[0]), stream=jnp.asarray(keys[1]))
        return Texts(
            rows=jnp.asarray(rows),
            lengths=jnp.asarray(lengths),
            counts=jnp.asarray(counts),
            rivals=jnp.asarray(rivals),
            anchors=jnp.asarray(anchors),
            sampler=sampler,
        )


def _anchors(prompt: int, answer: Completion) -> list[int]:
    """Which token of prompt and answer each of the answer's was drafted behind.

    A cycle that accepts n drafts emits n + 1 tokens behind its anchor, if there is room. The first
    token of all was not drafted: it stands as if behind the prompt's last.
    """
    runs = [1, *(n + 1 for n in answer.accepted)]
    firsts = itertools.accumulate(runs, initial=prompt)
    behind = [first - 1 for first, n in zip(firsts, runs, strict=False) for _ in range(n)]
    return behind[: len(answer.tokens)]


def audit(model: LLM, prompts: Sequence[Sequence[int]], options: Options) -> dict[str, Any]:
    """Audit a model on prompts of ids.

    Returns:
      Settings, one entry a part (see `audit_choices` and `audit_law`) and "failures", a list of
      Case: none is a pass.

    Raises:
      UserError: for what cannot be decoded, or too few tokens to say anything.
    """
    if not prompts:
        raise UserError("there is no prompt to audit")
    run = Audit(model, prompts, options)
    asked = {part: run.requests(part) for part in PARTS if part in options.parts}
    for requests in asked.values():
        model.engine.check(requests, run.plan)
    passes = {"greedy": 6, "coupled": 6, "rejection": 2}
    total = sum(passes[part] * len(requests) for part, requests in asked.items())
    parts, failures = {}, []
    with tqdm(total=total, unit="text", file=sys.stderr, disable=not options.progress) as run.bar:
        for part, requests in asked.items():
            work = audit_law if part == "rejection" else audit_choices
            parts[part], found = work(run, part, requests)
            failures += found
    return {
        "hardware": f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}",
        "dtype": model.config.dtype,
        "near_tie": run.near_tie,
        "prompts": len(prompts),
        "options": dataclasses.asdict(options),
        "parts": parts,
        "failures": failures,
    }


# --- Greedy and coupled: every token -------------------------------------------------------------


def audit_choices(
    run: Audit, part: str, requests: Sequence[Request]
) -> tuple[dict[str, Any], list[Case]]:
    """Audit greedy or coupled texts token by token, and measure the noise floor beside them."""
    size = run.options.batch_size
    other = 2 if size == 1 else 1
    ar = run.decode(requests, mode="ar")
    again = run.decode(requests, mode="ar", batch_size=other)
    orthrus = run.decode(requests, mode="orthrus", accept=Rule.COUPLED)
    judged = run.judge(one_row, requests, orthrus, ar)
    apart = run.judge(no_cache, requests, orthrus, ar)
    floor = run.judge(no_cache, requests, ar, orthrus)

    cases = []
    for i, request in enumerate(requests):
        name = functools.partial(
            Case, part, prompt=i // _seeds(run, part), seed=request.sampling.seed
        )
        cases += _bad_ends(run, name, "orthrus", orthrus[i])
        cases += _bad_tokens(run, name, "orthrus", "one row", orthrus[i], judged[i])
        cases += _bad_tokens(run, name, "orthrus", "no cache", orthrus[i], apart[i])
        cases += _bad_tokens(run, name, "ar", "no cache", ar[i], floor[i])
    result = {
        "texts": len(requests),
        "acceptance_length": _acceptance(orthrus),
        "orthrus": _agreement(orthrus, ar, judged),
        "floor": {
            f"AR, batch {other}": {"exact_match": _exact(again, ar)},
            "AR, no cache": _agreement(None, ar, floor),
        },
        "divergences": _divergences(run, part, requests, orthrus, ar, judged),
        "median_spread": float(np.median(np.concatenate([c.spread for c in judged]))),
    }
    return result, cases


def _seeds(run: Audit, part: str) -> int:
    return 1 if part == "greedy" else run.options.seeds


def _acceptance(answers: Sequence[Completion]) -> float:
    cycles = sum(len(a.accepted) for a in answers)
    return sum(sum(a.accepted) for a in answers) / max(cycles, 1)


def _exact(answers: Sequence[Completion], others: Sequence[Completion]) -> float:
    return float(np.mean([a.tokens == b.tokens for a, b in zip(answers, others, strict=True)]))


def _agreement(
    answers: Sequence[Completion] | None, ar: Sequence[Completion], judged: Sequence[Choice]
) -> dict[str, Any]:
    """How a judge agrees with texts; without `answers`, what it would itself have said for AR's.

    A judge that is told AR's text says it too exactly if it differs at no token: the first that
    differs would be where the texts part.
    """
    flips = [c.gap > 0 for c in judged]
    same = np.mean([not f.any() for f in flips]) if answers is None else _exact(answers, ar)
    relative = np.concatenate([c.gap / c.spread for c in judged])
    return {
        "exact_match": float(same),
        "tokens": len(relative),
        "flips": int((relative > 0).sum()),
        "largest_gap": float(max(c.gap.max() for c in judged)),
        "largest_relative_gap": float(relative.max()),
    }


def _bad_tokens(
    run: Audit, name: Callable[..., Case], text: str, judge: str, answer: Completion, seen: Choice
) -> list[Case]:
    limit = run.near_tie * seen.spread
    return [
        name(
            text=text,
            why=judge,
            position=t,
            token=answer.tokens[t],
            ar_token=int(seen.best[t]),
            gap=float(seen.gap[t]),
            limit=float(limit[t]),
        )
        # Written so that a gap that is no number fails.
        for t in np.flatnonzero(~(seen.gap <= limit)).tolist()
    ]


def _bad_ends(run: Audit, name: Callable[..., Case], text: str, answer: Completion) -> list[Case]:
    """An answer ends with its first end token, or at the budget."""
    ends, most = run.model.config.eos_token_ids, run.options.max_new_tokens
    first = next((i + 1 for i, token in enumerate(answer.tokens) if token in ends), most)
    if len(answer.tokens) == first:
        return []
    return [name(text=text, why=f"{len(answer.tokens)} tokens, which must end after {first}")]


def _divergences(
    run: Audit,
    part: str,
    requests: Sequence[Request],
    orthrus: Sequence[Completion],
    ar: Sequence[Completion],
    judged: Sequence[Choice],
) -> list[dict[str, Any]]:
    """Where each text first leaves AR's, and the one-row judge's gap between the two tokens."""
    found = []
    for i, (ours, theirs, seen) in enumerate(zip(orthrus, ar, judged, strict=True)):
        pairs = list(itertools.zip_longest(ours.tokens, theirs.tokens))
        at = next((t for t, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            continue
        token, ar_token = pairs[at]
        both = token is not None and ar_token is not None
        found.append(
            {
                "prompt": i // _seeds(run, part),
                "seed": requests[i].sampling.seed,
                "position": at,
                "token": token,
                "ar_token": ar_token,
                "gap": float(seen.rival_gap[at]) if both else None,
                "limit": float(run.near_tie * seen.spread[at]) if both else None,
            }
        )
    return found


# --- Rejection: the distribution -----------------------------------------------------------------


def audit_law(
    run: Audit, part: str, requests: Sequence[Request]
) -> tuple[dict[str, Any], list[Case]]:
    """Audit sampled texts by where their tokens stand in the AR view's distributions."""
    proposal = Proposal(run.options.proposal)
    answers = run.decode(requests, mode="orthrus", accept=Rule.REJECTION, proposal=proposal)
    tokens = sum(len(a.tokens) for a in answers)
    if tokens < LEAST_TOKENS:
        raise UserError(
            f"{tokens} sampled tokens say nothing of a distribution: raise --seeds, --limit or "
            f"--max-new-tokens to have at least {LEAST_TOKENS}"
        )
    block = run.plan.draft_length or run.model.config.block_size
    laws = run.judge(one_row, requests, answers, answers, block=block, proposal=proposal)
    whole = Law(*(np.concatenate(x).astype(np.float64) for x in zip(*laws, strict=True)))
    statistics = law_statistics(whole)
    cases = []
    for i, (request, answer, seen) in enumerate(zip(requests, answers, laws, strict=True)):
        seed = request.sampling.seed
        name = functools.partial(Case, part, prompt=i // run.options.seeds, seed=seed)
        cases += _bad_ends(run, name, "orthrus", answer)
        cases += _bad_chances(run, name, answer, seen)
    for key, z in statistics["z"].items():
        if not abs(z) <= Z_LIMIT:
            cases.append(Case(part, "orthrus", f"{key}: z = {z:.1f}, beyond +-{Z_LIMIT:g}"))
    result = {"texts": len(requests), "acceptance_length": _acceptance(answers), **statistics}
    return result, cases


def _bad_chances(
    run: Audit, name: Callable[..., Case], answer: Completion, seen: Law
) -> list[Case]:
    """Tokens that cannot be, and those whose log p Orthrus and the judge do not agree on."""
    reported, limit = np.array(answer.logprobs), 2 * run.near_tie * seen.spread
    right = (seen.own > 0) & (np.abs(reported - seen.log_prob) <= limit)
    return [
        name(
            text="orthrus",
            why=f"position {t}: emitted {answer.tokens[t]} at log p {reported[t]:.4f}, the judge's "
            f"is {seen.log_prob[t]:.4f}, limit {limit[t]:.2g}; drawn with chance {seen.own[t]:.2g}",
        )
        for t in np.flatnonzero(~right).tolist()
    ]


def law_statistics(seen: Law) -> dict[str, Any]:
    """The statistics of the tokens of all texts, each N(0, 1) if they are drawn from p.

    Returns:
      "tokens"; "z" by name; of the means, "shift", and "would_see", the shift that exceeds the
      limit 98 times in 100: nats for log p(x), and probability for the drafter's favour.
    """
    n = len(seen.own)
    result: dict[str, Any] = {"tokens": n, "z": {}, "shift": {}, "would_see": {}}
    for name, values, variances in (
        ("log p(x)", seen.surprise, seen.surprise_variance),
        ("drafter's favour", seen.favour, seen.favour_variance),
    ):
        spread = math.sqrt(variances.sum())
        result["z"][name] = float(values.sum() / spread) if spread else 0.0
        result["shift"][name] = float(values.mean())
        result["would_see"][name] = (Z_LIMIT + 2) * spread / n
    # A token takes up the mass p(x): where in it the point falls is drawn, so that it is uniform.
    point = np.random.default_rng(0).random((2, n)) * seen.own
    result["z"]["mass before x, by id"] = uniform_z(seen.before + point[0])
    result["z"]["mass before x, by likelihood"] = uniform_z(seen.likelier + point[1])
    return result


def uniform_z(points: np.ndarray) -> float:
    """The chi-square of `points` in [0, 1] over BINS equal bins, as a normal's z.

    By the cube root of Wilson and Hilferty (1931): at z = 4 the exact one is 4.03.
    """
    counts, _ = np.histogram(np.clip(points, 0, 1), BINS, (0, 1))
    expected, free = len(points) / BINS, BINS - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    scale = 2 / (9 * free)
    return float(((chi_square / free) ** (1 / 3) - (1 - scale)) / math.sqrt(scale))


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]

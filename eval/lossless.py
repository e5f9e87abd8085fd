"""Audit exactness: `python -m eval.lossless --model DIR_OR_ID --prompts FILE.jsonl`.

Says whether what Orthrus emits is the AR view's own text, with these weights, in this dtype, on
this machine. Orthrus decodes; then the AR view reads each text again, told every token
(teacher-forced), and judges all of them, not only the first that differs. Three parts:

  greedy     each token is the AR view's argmax, or a near-tie
  coupled    the same with the temperature's noise added to the logits: AR's text for the seed
  rejection  the tokens are distributed as the AR view's p: four statistics, each within +-4

There are two judges. "one row" is AR decoding itself: one token a forward, over a cache that only
it writes. "no cache" reads prompt and text in one pass of many rows, so that a fault of the cache
which all decoding shares shows too. How far the two disagree on AR's own text is the noise floor:
no other shape of the same arithmetic does better, and Orthrus is not asked to.

Near-ties. The gap of a token is the logits by which the AR view's argmax leads it. Rounding in
another shape moves each logit by about e * s, s the standard deviation of the row's logits (what a
relative error of the last hidden state amounts to, whatever the scale of the model), and a gap by
sqrt(2) times that. In bfloat16 and float16 matmuls accumulate in float32 and each of the 2 L
additions to the residual stream is rounded once: e is about u * sqrt(2 L + 1), u half the dtype's
eps. Eight times that is allowed: 0.08 s for 3 layers of bfloat16, 0.24 s for 28, where the gap of
a wrong token is typically 0.4 to 4 s. In float32 the allowance is 1e-3 s, far above what the CPU's
rounding does (1e-5 s) and far below what a fault leaves; accelerators multiply float32 in shorter
floats unless jax_default_matmul_precision is "highest", and are allowed what those floats are.
`--near-tie` sets another multiple of s.

Rejection. With p the judge's distribution, f(x) - E[f] of the emitted tokens x has mean 0 and a
variance known exactly for any f that is fixed before x is: summed over all tokens and divided by
its standard deviation it is N(0, 1). Two f are tried. log p(x) shows tokens that come from another
p. The drafter's favour min(1, q(x) / p(x)), q drafted again from the anchor of the token's cycle,
is the direction in which every rule errs that accepts too much or replaces wrongly. Its mean is the
chance that a draft stands; a rule that accepts every draft moves it to E_q[favour], and one that
draws a refused draft's replacement from p rather than max(p - q, 0) moves it by its variance v:
36 / v tokens then show it 98 times in 100, a few hundred. The report prints the shift of each mean
that its tokens would show. The other two statistics ask whether the mass of p before x (before in
the vocabulary; before by likelihood) is uniform, by a chi-square over 20 bins on a normal's scale.
A p that is itself off, as a corrupted cache makes it, moves all of these little: so the log p that
Orthrus reports of every token is held to the judge's, to within two near-ties.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tqdm import tqdm

import orthrus_jax
from orthrus_jax import decode, machine, sampling
from orthrus_jax.config import ModelConfig
from orthrus_jax.engine import Answer, Plan, Request, bucket
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.generate import Generator, read_prompts
from orthrus_jax.model import Model, ar_segment, block_segment
from orthrus_jax.sampling import Proposal, Purpose, Rule, Sampler, SamplingParams
from orthrus_jax.tokenizer import encode

Array = jax.Array
PARTS = ("greedy", "coupled", "rejection")
Z_LIMIT = 4.0  # 6 in 100,000 honest audits exceed it
BINS = 20
LEAST_TOKENS = 5 * BINS  # a chi-square wants 5 a bin
SHOWN = 10  # cases and divergences printed; --json has all
POSITIONS = 16  # whose logits exist at a time where a text is read in one pass; divides a bucket


def near_tie(config: ModelConfig) -> float:
    """The widest gap that rounding explains, in standard deviations of the row's logits."""
    multiplied = config.dtype
    settings: Any = jax.config
    precise = settings.jax_default_matmul_precision in ("highest", "float32")
    if config.dtype == "float32" and not precise:
        # What "default" is on each; TF32 has float16's significand.
        multiplied = {"gpu": "float16", "tpu": "bfloat16"}.get(jax.default_backend(), "float32")
    unit = float(jnp.finfo(multiplied).eps) / 2
    return max(8 * unit * math.sqrt(2 * config.num_hidden_layers + 1), 1e-3)


# --- The judges ----------------------------------------------------------------------------------


class Texts(struct.PyTreeNode):
    """Texts to judge. Of row b, tokens lengths[b] ... lengths[b] + counts[b] - 1 are the answer's.

    Attributes:
      rows: int32[B, P + N], prompt and answer without a gap, then anything.
      lengths: int32[B], tokens of each prompt, at most P.
      counts: int32[B], tokens of each answer, at most N.
      rivals: int32[B, N], another candidate for each of the answer's tokens.
      anchors: int32[B, N], which token of the row each of them was drafted behind.
      sampler: what they were drawn with, or None for greedy texts.
    """

    rows: Array
    lengths: Array
    counts: Array
    rivals: Array
    anchors: Array
    sampler: Sampler | None = None


class Choice(NamedTuple):
    """How the AR view chooses at each token: arrays [B, N], or [n] of one text.

    Attributes:
      best: int32, the token it takes.
      gap: float32, logits by which `best` leads the emitted token; 0 where they are one.
      rival_gap: float32, the same of the rival, which may be behind: then it is negative.
      spread: float32, the standard deviation of the logits.
    """

    best: Any
    gap: Any
    rival_gap: Any
    spread: Any


class Law(NamedTuple):
    """Where each emitted token x stands in the AR view's p: float32 [B, N], or [n] of one text.

    Attributes:
      surprise: log p(x) - E[log p], and `surprise_variance`, the variance of log p under p.
      favour: min(1, q(x) / p(x)) less its mean under p, and `favour_variance`.
      own: p(x).
      log_prob: of x without temperature, and `spread`, the standard deviation of the logits.
      before: the mass of ids below x.
      likelier: the mass of tokens likelier than x (of equals, those of lower id).
    """

    surprise: Any
    surprise_variance: Any
    favour: Any
    favour_variance: Any
    own: Any
    log_prob: Any
    spread: Any
    before: Any
    likelier: Any


def choice(
    logits: Array, tokens: Array, rivals: Array, positions: Array, sampler: Sampler | None
) -> Choice:
    """Compare `tokens` [B, T] with what the AR view takes from logits [B, T, V].

    Args:
      logits: of the rows before the tokens.
      tokens, rivals: int32[B, T].
      positions: int32[B, T], of the tokens.
      sampler: adds its temperature times the positions' noise, as a coupled draw does.
    """
    scores = logits
    if sampler is not None:
        keys = sampling._keys(sampler, positions, Purpose.TOKEN)
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(keys)
        scores = logits + sampler.temperature[:, None, None] * noise
    of = lambda x: jnp.take_along_axis(scores, x[..., None], axis=-1)[..., 0]
    return Choice(
        best=sampling.greedy(scores),
        gap=scores.max(axis=-1) - of(tokens),
        rival_gap=of(rivals) - of(tokens),
        spread=logits.std(axis=-1),
    )


def law(logits: Array, p: Array, q: Array, tokens: Array) -> Law:
    """Place `tokens` [B, T] in p [B, T, V], which a drafter takes for q [B, T, V].

    `logits` [B, T, V] are those that temperature made p of.
    """
    own = jnp.take_along_axis(p, tokens[..., None], axis=-1)
    ids, x = jnp.arange(p.shape[-1]), tokens[..., None]
    mass = lambda where: jnp.where(where, p, 0).sum(axis=-1)

    def against_mean(f: Array) -> tuple[Array, Array]:
        mean = (p * f).sum(axis=-1, keepdims=True)
        at_x = jnp.take_along_axis(f - mean, x, axis=-1)[..., 0]
        return at_x, (p * (f - mean) ** 2).sum(axis=-1)

    possible = jnp.where(p > 0, p, 1.0)
    surprise, surprise_variance = against_mean(jnp.log(possible))
    favour, favour_variance = against_mean(jnp.minimum(q / possible, 1.0))
    return Law(
        surprise=surprise,
        surprise_variance=surprise_variance,
        favour=favour,
        favour_variance=favour_variance,
        own=own[..., 0],
        log_prob=sampling.log_prob(logits, tokens),
        spread=logits.std(axis=-1),
        before=mass(ids < x),
        likelier=mass((p > own) | ((p == own) & (ids < x))),
    )


@functools.partial(jax.jit, static_argnames=("model", "padded", "block", "proposal"))
def one_row(
    model: Model,
    params: Any,
    texts: Texts,
    *,
    padded: int,
    block: int = 0,
    proposal: Proposal | None = None,
) -> Choice | Law:
    """Read each text as AR decoding does, one row a forward.

    Args:
      model: static.
      params: of the model.
      texts: with prompts of up to `padded` (P) tokens.
      padded: static.
      block, proposal: static, rows of a draft block and how the drafter proposed: then the Law of
        every token is returned. Without a proposal, its Choice.

    Returns:
      Arrays [B, N]; what lies behind an answer's end means nothing.
    """
    batch, total = texts.rows.shape
    state = decode.prefill(
        model,
        params,
        texts.rows[:, :padded],
        texts.lengths,
        jnp.ones(batch, jnp.int32),
        jnp.full(1, -1, jnp.int32),
        slots=total,
        max_new_tokens=1,
    )
    token_at = lambda index: jnp.take_along_axis(texts.rows, index, axis=1)

    def read(t: Array, cache: Any) -> tuple[Any, Any]:
        # The prompt's last token is read a second time: the first answer is judged like the rest.
        at = texts.lengths[:, None] - 1 + t
        (hidden,), cache = model.forward(params, [ar_segment(token_at(at), at[:, 0])], cache)
        logits = model.logits(params, hidden)
        target, of_step = token_at(at + 1), lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)
        if proposal is None:
            return choice(logits, target, of_step(texts.rivals), at + 1, texts.sampler), cache
        anchor, mask = of_step(texts.anchors), model.config.mask_token_id
        assert mask is not None, "drafting needs config.mask_token_id"
        segment = block_segment(token_at(anchor)[:, 0], anchor[:, 0], block, mask)
        (hidden,), _ = model.forward(params, [segment], cache)  # it sees the slots below its anchor
        guess = model.logits(params, jnp.take_along_axis(hidden, (at - anchor)[..., None], axis=1))
        assert texts.sampler is not None, "a greedy text has no law"
        p, q = (sampling.probabilities(x, texts.sampler) for x in (logits, guess))
        if proposal is Proposal.ARGMAX:
            q = jax.nn.one_hot(sampling.greedy(guess), q.shape[-1])
        return law(logits, p, q, target), cache

    def step(t: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        found, cache = carry
        new, cache = read(t, cache)
        put = lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, t, axis=1)
        return jax.tree.map(put, found, new), cache

    shapes, _ = jax.eval_shape(read, jnp.int32(0), state.cache)
    empty = jax.tree.map(lambda x: jnp.zeros((batch, total - padded), x.dtype), shapes)
    found, _ = jax.lax.fori_loop(0, texts.counts.max(), step, (empty, state.cache))
    return found


@functools.partial(jax.jit, static_argnames=("model", "padded"))
def no_cache(model: Model, params: Any, texts: Texts, *, padded: int) -> Choice:
    """Give what `one_row` does, a Choice, in one pass over prompt and text without a cache."""
    batch, total = texts.rows.shape
    zeros = jnp.zeros(batch, jnp.int32)
    (hidden,), _ = model.forward(params, [ar_segment(texts.rows, zeros)], None)
    at = texts.lengths[:, None] - 1 + jnp.arange(total - padded)
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    targets = jnp.take_along_axis(texts.rows, at + 1, axis=1)

    def read(some: tuple[Array, ...]) -> Any:
        hidden, tokens, rivals, positions = (x.swapaxes(0, 1) for x in some)
        logits = model.logits(params, hidden)
        seen = choice(logits, tokens, rivals, positions, texts.sampler)
        return jax.tree.map(lambda x: x.swapaxes(0, 1), seen)

    # Logits of a few positions at a time: those of all would be N vocabularies.
    parts = lambda x: x.swapaxes(0, 1).reshape(-1, POSITIONS, batch, *x.shape[2:])
    found = jax.lax.map(read, tuple(map(parts, (hidden, targets, texts.rivals, at + 1))))
    return jax.tree.map(lambda x: x.reshape(-1, batch).swapaxes(0, 1), found)


# --- Decoding and judging ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """What is audited, and how strictly; the command's options of the same names.

    Attributes:
      parts: of PARTS.
      max_new_tokens: of each answer.
      batch_size: texts decoded and judged together.
      draft_length: rows of a draft block, None is the model's own.
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
    temperature: float = 0.8
    proposal: str = Plan.proposal.value
    seeds: int = 4
    near_tie: float | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if not self.parts or (unknown := set(self.parts) - set(PARTS)):
            found = ", ".join(sorted(unknown)) if self.parts else "nothing"
            raise UserError(f"--parts names {found}: expected some of {', '.join(PARTS)}")
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

    def __init__(self, model: Generator, prompts: Sequence[Sequence[int]], options: Options):
        self.model, self.prompts, self.options = model, prompts, options
        self.near_tie = near_tie(model.config) if options.near_tie is None else options.near_tie
        self.padded = bucket(max(map(len, prompts)))
        self.width = bucket(options.max_new_tokens)
        draft = model.draft_length if options.draft_length is None else options.draft_length
        self.plan = Plan(draft_length=draft, batch_size=options.batch_size)
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

    def decode(self, requests: Sequence[Request], **how: Any) -> list[Answer]:
        """Answer the requests by the audit's plan, but for `how`."""
        plan = dataclasses.replace(self.plan, **how)
        self.bar.set_description(f"{plan.mode}, batch {plan.batch_size}")
        answers: dict[int, Answer] = {}
        for event in self.model.engine.serve(requests, plan):
            if event.answer is not None:
                answers[event.index] = event.answer
                self.bar.update()
        return [answers[i] for i in range(len(requests))]

    def judge(
        self,
        judge: Any,
        requests: Sequence[Request],
        answers: Sequence[Answer],
        rivals: Sequence[Answer],
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

    def _texts(self, some: Sequence[tuple[Request, Answer, Answer] | None]) -> Texts:
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
            keys[:, i] = request.sampling.seed, request.stream
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


def _anchors(prompt: int, answer: Answer) -> list[int]:
    """Which token of prompt and answer each of the answer's was drafted behind.

    A cycle that accepts n drafts emits n + 1 tokens behind its anchor, if there is room. The first
    token of all was not drafted: it stands as if behind the prompt's last.
    """
    runs = [1, *(n + 1 for n in answer.accepted)]
    firsts = itertools.accumulate(runs, initial=prompt)
    behind = [first - 1 for first, n in zip(firsts, runs, strict=False) for _ in range(n)]
    return behind[: len(answer.tokens)]


def audit(model: Generator, prompts: Sequence[Sequence[int]], options: Options) -> dict[str, Any]:
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


def _acceptance(answers: Sequence[Answer]) -> float:
    cycles = sum(len(a.accepted) for a in answers)
    return sum(sum(a.accepted) for a in answers) / max(cycles, 1)


def _exact(answers: Sequence[Answer], others: Sequence[Answer]) -> float:
    return float(np.mean([a.tokens == b.tokens for a, b in zip(answers, others, strict=True)]))


def _agreement(
    answers: Sequence[Answer] | None, ar: Sequence[Answer], judged: Sequence[Choice]
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
    run: Audit, name: Callable[..., Case], text: str, judge: str, answer: Answer, seen: Choice
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


def _bad_ends(run: Audit, name: Callable[..., Case], text: str, answer: Answer) -> list[Case]:
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
    orthrus: Sequence[Answer],
    ar: Sequence[Answer],
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


def _bad_chances(run: Audit, name: Callable[..., Case], answer: Answer, seen: Law) -> list[Case]:
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


# --- The command ---------------------------------------------------------------------------------


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table, the widest divergences, the cases and the verdict."""
    lines = [
        f"{result['prompts']} prompts, {result['dtype']}, {result['hardware']}; near-tie: "
        f"{result['near_tie']:.4g} standard deviations of the row's logits",
        "",
        "| part | compared with AR | texts | exact match | tokens | not AR's argmax "
        "| largest gap, logits (deviations) |",
        "|---|---|---|---|---|---|---|",
    ]
    chosen = {k: v for k, v in result["parts"].items() if k != "rejection"}
    for part, found in chosen.items():
        for name, f in {"Orthrus": found["orthrus"], **found["floor"]}.items():
            tail = "| | | |"
            if "tokens" in f:
                tail = (
                    f"| {f['tokens']} | {f['flips']} | {f['largest_gap']:.3g} "
                    f"({f['largest_relative_gap']:.3g}) |"
                )
            lines.append(f"| {part} | {name} | {found['texts']} | {f['exact_match']:.4f} {tail}")
    for part, found in chosen.items():
        lines += _divergence_lines(part, found["divergences"])
    if "rejection" in result["parts"]:
        lines += _law_lines(result["parts"]["rejection"])
    lines.append("")
    for part, found in result["parts"].items():
        lines.append(f"{part}: {found['acceptance_length']:.2f} drafts accepted a cycle")
        if not found["acceptance_length"]:
            lines[-1] += ": only corrections were audited, no accepted draft"
    return "\n".join([*lines, "", *_verdict(result["failures"])])


def _divergence_lines(part: str, found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    width = lambda d: math.inf if d["gap"] is None else abs(d["gap"])
    lines = [
        "",
        f"{part}: {len(found)} texts leave AR's; where, and how far the two tokens are apart",
    ]
    for d in sorted(found, key=width, reverse=True)[:SHOWN]:
        where = f"prompt {d['prompt']}, seed {d['seed']}, position {d['position']}"
        lines.append(f"  {where}: {d['token']}, AR {d['ar_token']}")
        if d["gap"] is not None:
            lines[-1] += f", gap {d['gap']:.4g} logits (near-tie: {d['limit']:.4g})"
    if len(found) > SHOWN:
        lines.append(f"  and {len(found) - SHOWN} with narrower gaps")
    return lines


def _law_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"| rejection: {found['texts']} texts, {found['tokens']} tokens "
        f"| z (within +-{Z_LIMIT:g}) | shift of the mean | would show |",
        "|---|---|---|---|",
    ]
    for name, z in found["z"].items():
        shifts = [found[key].get(name) for key in ("shift", "would_see")]
        cells = ["" if x is None else f"{x:.4f}" for x in shifts]
        lines.append(f"| {name} | {z:+.2f} | {' | '.join(cells)} |")
    return lines


def _verdict(failures: list[Case]) -> list[str]:
    if not failures:
        return ["PASS"]
    shown: list[Case] = []
    for part in PARTS:  # some of each part that fails
        shown += [case for case in failures if case.part == part][:SHOWN]
    more = len(failures) - len(shown)
    tail = f", {more} more not shown" if more else ""
    return [*map(str, shown), f"FAIL: {len(failures)} cases{tail}"]


def _parser() -> argparse.ArgumentParser:
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m eval.lossless",
        description="Audit that Orthrus emits what AR decoding does, token by token and in law.",
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="checkpoint or hub id")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE.jsonl", help='one {"prompt": TEXT} a line'
    )
    number = lambda flag, kind, metavar, text: parser.add_argument(
        flag,
        type=kind,
        metavar=metavar,
        default=getattr(default, flag[2:].replace("-", "_"), None),
        help=text,
    )
    parser.add_argument("--limit", type=int, default=64, help="prompts used; default: %(default)s")
    number("--max-new-tokens", int, "N", "of each answer; default: %(default)s")
    number("--batch-size", int, "N", "texts decoded together; default: %(default)s")
    number("--draft-length", int, "K", "default: what tune measured here, or the trained K")
    number("--temperature", float, "X", "of the sampled parts; default: %(default)s")
    number("--seeds", int, "N", "samples a prompt in the sampled parts; default: %(default)s")
    parser.add_argument(
        "--proposal",
        choices=[proposal.value for proposal in Proposal],
        default=default.proposal,
        help="what the rejection rule proposes; default: %(default)s",
    )
    number(
        "--near-tie",
        float,
        "X",
        "the gap that is still a tie, in standard deviations of the row's logits; "
        "default: by dtype and depth",
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="LIST", help="default: %(default)s"
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wrap each prompt in the chat template",
    )
    machine.add_options(parser)
    parser.add_argument("--json", metavar="OUT", help="write all figures and cases there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exits with status 1 where the audit fails."""
    args = _parser().parse_args(argv)
    names = [f.name for f in dataclasses.fields(Options) if f.name not in ("parts", "progress")]
    chosen = {name: getattr(args, name) for name in names}
    options = Options(parts=tuple(args.parts.split(",")), progress=True, **chosen)
    if args.limit < 1:
        raise UserError(f"--limit {args.limit} must be at least 1")
    if args.json and not pathlib.Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: its directory does not exist")
    prompts = read_prompts(args.prompts)[: args.limit]
    model = orthrus_jax.load(args.model, **machine.prepare(args))
    ids = [encode(model.tokenizer, text, chat=args.chat) for text in prompts]
    result = audit(model, ids, options)
    print(table(result))
    if args.json:
        plain = result | {"failures": [dataclasses.asdict(case) for case in result["failures"]]}
        pathlib.Path(args.json).write_text(json.dumps(plain, indent=2) + "\n")
    if result["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)

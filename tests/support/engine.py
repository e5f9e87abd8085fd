"""LLMs over HashModel, requests for them, and their expected texts."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from orthrus_jax.decoding import AcceptRule, Strategy
from orthrus_jax.engine import Contender, Engine, Plan, Request, SamplingParams
from orthrus_jax.engine.auto import Turn
from orthrus_jax.llm import LLM
from orthrus_jax.tokenizer import decode as decode_text
from tests.support.fake_models.hashed import CONFIG, RESULTS, VOCAB, HashModel, greedy_text
from tests.support.tokenizers import small_tokenizer

TEXTS = [
    "How many apples are 12 and 30?",
    "They are 42 apples. The answer is \\boxed{42}.",
    "Ein Käfer, 6 große Bäume: 日本語 für 3 €.",
] * 20


@functools.cache
def tokenizer():
    return small_tokenizer(TEXTS, VOCAB)


@functools.cache
def table_of(kind: str) -> np.ndarray:
    """Logits for texts of ASCII tokens and the special token 0, or of bytes that are seldom so."""
    table = np.random.default_rng(0).normal(0, 2, (RESULTS, VOCAB)).astype(np.float32)
    pieces = [decode_text(tokenizer(), [i]) for i in range(VOCAB)]
    plain = np.array([bool(t) and t.isascii() and t.isprintable() for t in pieces])
    if kind == "plain":
        table[:, ~plain] -= 50
        table[:, 0] += 50
    else:
        high = [i for i, t in enumerate(pieces) if not t.isascii()]
        table[:, high] += 2
    return table


@functools.cache
def hashing(*, counted: bool = False, **changes) -> LLM:
    """A generator over a HashModel, with a tokenizer. One for each use: it keeps its programs."""
    config = dataclasses.replace(CONFIG, **changes)
    found = LLM(config, {"table": jnp.asarray(table_of("plain"))}, tokenizer())
    found.engine.model = HashModel(config, counted)
    return found


def prompts_of(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB - 1, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


KINDS = {
    "greedy": AcceptRule.COUPLED,
    "coupled": AcceptRule.COUPLED,
    "rejection": AcceptRule.REJECTION,
}


def plan_of(mode: str, kind: str = "greedy", **fields) -> Plan:
    """The paper's cycle or AR, with the accept rule of a kind of requests."""
    return Plan(Strategy(mode, accept=KINDS[kind]), **fields)


def requests_of(count: int, kind: str) -> list[Request]:
    """Mixed lengths, budgets, seeds and temperatures; the last request is the first one again."""
    rng = np.random.default_rng(1)
    budgets = [1, 40, 2, *rng.integers(1, 41, count - 3).tolist()]
    budgets[-1] = budgets[0] = 25
    heats = [0.0] * count if kind == "greedy" else [(0.9, 0.0, 1.3)[i % 3] for i in range(count)]
    prompts = prompts_of(count - 1)
    prompts.append(prompts[0])
    seeds = [i % 4 for i in range(count)]
    seeds[-1], heats[-1] = seeds[0], heats[0]
    return [
        Request(prompt, SamplingParams(temperature=heat, seed=seed, max_new_tokens=budget))
        for prompt, heat, seed, budget in zip(prompts, heats, seeds, budgets, strict=True)
    ]


def served(engine: Engine, requests, plan: Plan):
    """The answers by index, and the indices as they were answered."""
    events = [e for e in engine.serve(requests, plan) if e.completion is not None]
    order = [e.index for e in events]
    assert sorted(order) == list(range(len(requests))), "one answer each"
    return {e.index: e.completion for e in events}, order


@functools.cache
def answers_alone(kind: str, mode: str, count: int = 23):
    answers = {}
    engine = hashing().engine
    for i, request in enumerate(requests_of(count, kind)):
        (event,) = engine.serve([request], plan_of(mode, kind))
        answers[i] = event.completion
    return answers


def plain_text_of(prompt, budget: int = 40) -> tuple[list[int], str]:
    ids = greedy_text(prompt, table_of("plain"), budget)
    return ids, decode_text(tokenizer(), ids)


def cut_at(ids: list[int], stops) -> tuple[list[int], str, str]:
    """Ids, text and finish_reason of an answer `ids` with stop strings, by looking at all of it."""
    text = decode_text(tokenizer(), ids)
    starts = [(text.find(s), len(s)) for s in stops if s in text]
    if not starts:
        return ids, text, "length"
    start, size = min(starts)
    needed = next(
        n for n in range(1, len(ids) + 1) if len(decode_text(tokenizer(), ids[:n])) >= start + size
    )
    return ids[:needed], text[:start], "stop"


def stop_strings_of(prompt) -> list[tuple[str, ...]]:
    """Stop strings out of the text: within tokens, over borders of tokens, of cycles; and none."""
    ids, text = plain_text_of(prompt)
    ends = np.cumsum([len(decode_text(tokenizer(), [i])) for i in ids])
    assert text.isascii()
    assert ends[-1] == len(text)
    over = [(text[e - 2 : e + 2],) for e in ends[:24].tolist() if 2 <= e < len(text) - 2]
    long = [(text[e - 1 : e + 12],) for e in ends[1:20:5].tolist()]
    single = [(text[i],) for i in (0, 1, 7, 30)]
    several = [(text[20:23], text[9:14], "\u00e9"), (text[9:14], text[9:11]), ("never in it",)]
    return [*over, *long, *single, *several, (text[-3:],)]


@dataclasses.dataclass
class RestlessChooser:
    """Chooses at random for every turn, among contenders and lengths; keeps what it was told."""

    contenders: tuple[Contender, ...]
    seed: int = 0
    longest: int = 6
    turns: list[tuple[Strategy, list[int], int, float]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def choose(self) -> Turn:
        place = int(self.rng.integers(len(self.contenders)))
        return Turn(place, int(self.rng.integers(1, self.longest + 1)))

    def learn(self, contender, tokens, cycles, milliseconds, compiling=0.0) -> None:
        strategy = self.contenders[contender].strategy
        self.turns.append((strategy, list(tokens), cycles, compiling))


def plan_among(strategies, **fields) -> Plan:
    """A plan that chooses among strategies, of which it expects nothing in particular."""
    contenders = tuple(Contender(s, 1.0 + (s.method != "ar"), 1.0) for s in strategies)
    return Plan(contenders[0].strategy, auto=contenders, **fields)


def restless(engine: Engine, **fields) -> list[RestlessChooser]:
    """Let the engine's queues choose at random; return the choosers that they will have got."""
    choosers: list[RestlessChooser] = []

    def chooser(plan, capacity):
        if not plan.auto:
            return None
        choosers.append(RestlessChooser(plan.auto, **fields))
        return choosers[-1]

    engine.chooser = chooser
    return choosers

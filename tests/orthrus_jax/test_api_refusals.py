"""Calls of the API with wrong types or values, and edge cases: a UserError, or a right answer."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import orthrus_jax
from orthrus_jax.checkpoint import (
    check_target,
    config_from_hf,
    config_to_hf,
    load_checkpoint,
    save_checkpoint,
)
from orthrus_jax.config import ModelConfig
from orthrus_jax.conversation import Conversation
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Capacity, Engine, Plan, Request, SamplingParams, Session, planner
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from orthrus_jax.model import Model, params
from tests.support.configs import text_config
from tests.support.tokenizers import small_tokenizer

TEXTS = ["How many apples are 12 and 30?", "They are 42 apples. The answer is 42."] * 20


class Subject(NamedTuple):
    """What the calls are made on."""

    llm: LLM
    bare: LLM
    folder: pathlib.Path

    @property
    def engine(self) -> Engine:
        return self.llm.engine

    def queue(self, **fields: Any) -> Any:
        return self.engine.open(Plan(**fields), Capacity(slots=192, max_new_tokens=64))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    config = text_config()
    weights = params.init(Model(config), jax.random.key(0))
    llm = LLM(config, weights, small_tokenizer(TEXTS, 400))
    return Subject(llm, LLM(config, weights), tmp_path_factory.mktemp("api"))


Call = Callable[[Subject], Any]
HUGE = 10**400
USER = {"role": "user", "content": "Hi"}
GREEDY = SamplingParams(max_new_tokens=3)
NEW = {"max_new_tokens": 3}
whole = "must be a whole number"

REFUSED: dict[str, tuple[Call, str]] = {
    # LLM.generate
    "generate None": (lambda s: s.llm.generate(None), "prompts=None must be a string"),
    "generate number": (lambda s: s.llm.generate(5), "prompts=5 must be a string"),
    "generate bytes": (lambda s: s.llm.generate(b"Hi"), r"prompts=b'Hi' must be a string"),
    "generate set": (lambda s: s.llm.generate({"Hi"}), "prompts={'Hi'} must be a string"),
    "generate one message": (lambda s: s.llm.generate(USER), "prompts={'role'.* must be a string"),
    "generate bytes in a list": (lambda s: s.llm.generate([b"Hi"]), "prompt 0 is b'Hi': expected"),
    "generate message among texts": (lambda s: s.llm.generate(["a", USER]), "prompt 1 is {'role'"),
    "generate empty text": (lambda s: s.llm.generate(""), "the prompt is empty"),
    "generate empty dialogue": (lambda s: s.llm.generate([[]]), r"prompt 0 is \[\]: expected"),
    "generate surrogate": (lambda s: s.llm.generate("a\ud800"), "lone surrogate '.ud800'"),
    "generate chat text": (lambda s: s.llm.generate("a", chat="no"), "chat='no' must be True or"),
    "generate thinking": (lambda s: s.llm.generate("a", thinking=1), "thinking=1 must be True or"),
    "generate unknown": (lambda s: s.llm.generate("a", tempo=1), "unknown option tempo"),
    "generate without tokenizer": (lambda s: s.bare.generate("a"), "without a tokenizer"),
    "generate long": (lambda s: s.llm.generate("a " * 999), "over the model's 256 positions"),
    "generate one sampling": (
        lambda s: s.llm.generate(["a", "b"], [GREEDY]),
        "sampling=.* must be one SamplingParams, or one per prompt: 2",
    ),
    "generate sampling dict": (lambda s: s.llm.generate("a", {"n": 1}), "sampling={'n': 1} must"),
    "generate n": (lambda s: s.llm.generate("a", n=2), "n=2 with temperature=0"),
    "generate n over batch": (
        lambda s: s.llm.generate("a", n=2, temperature=1.0),
        "n=2 is over batch_size=1",
    ),
    # LLM.complete
    "complete None": (lambda s: s.llm.complete(None), "prompts=None must be a list of lists"),
    "complete text": (lambda s: s.llm.complete("Hi"), "prompts='Hi' must be a list of lists"),
    "complete flat ids": (lambda s: s.llm.complete([1, 2]), "prompt 0 is 1: expected a sequence"),
    "complete bytes": (lambda s: s.llm.complete([b"ab"]), "prompt 0 is b'ab': expected"),
    "complete set": (lambda s: s.llm.complete([{1, 2}]), "prompt 0 is {1, 2}: expected"),
    "complete matrix": (
        lambda s: s.llm.complete([np.ones((2, 2), int)]),
        r"prompt 0 is array\(\[\[1, 1\], \[1, 1\]\]\): expected",
    ),
    "complete no ids": (lambda s: s.llm.complete([[]]), "prompt 0 is empty"),
    "complete float id": (lambda s: s.llm.complete([[1, 2.0]]), "prompt 0, token 1: 2.0 is not"),
    "complete bool id": (lambda s: s.llm.complete([[True]]), "prompt 0, token 0: True is not"),
    "complete negative id": (lambda s: s.llm.complete([[-1]]), "prompt 0, token 0: -1 is not"),
    "complete high id": (lambda s: s.llm.complete([[1], [400]]), "prompt 1, token 0: 400 is not"),
    "complete huge id": (lambda s: s.llm.complete([[HUGE]]), "prompt 0, token 0: 10*.* is not"),
    "complete batch": (lambda s: s.llm.complete([[1]], batch_size="2"), f"batch_size='2' {whole}"),
    "complete no batch": (lambda s: s.llm.complete([[1]], batch_size=0), "batch_size=0 must be"),
    "complete huge batch": (
        lambda s: s.llm.complete([[1]], batch_size=10**9),
        r"batch_size=1000000000 .* needs about .* GB of memory, .* GB are free: lower the batch",
    ),
    "complete refill": (lambda s: s.llm.complete([[1]], refill=None), "refill=None must be True"),
    "complete progress": (lambda s: s.llm.complete([[1]], progress=2), "progress=2 must be True"),
    "complete strategy": (lambda s: s.llm.complete([[1]], strategy=3), "strategy=3 must be a Str"),
    "complete method": (lambda s: s.llm.complete([[1]], strategy=""), "method='' is not one of"),
    "complete stop id": (
        lambda s: s.llm.complete([[1]], stop_token_ids=[400]),
        r"stop_token_ids=\[400\] are not below",
    ),
    "complete stop text": (
        lambda s: s.bare.complete([[1]], stop=["x"]),
        "stop strings need a tokenizer",
    ),
    # LLM.stream, stream_ids
    "stream list": (lambda s: s.llm.stream(["a"]), r"prompt 0 is \['a'\]: expected"),
    "stream chat": (lambda s: s.llm.stream([USER], chat=False), "chat=False takes strings"),
    "stream n": (lambda s: s.llm.stream("a", n=2, temperature=1.0), "n=2: a stream is of one"),
    "stream samplings": (lambda s: s.llm.stream("a", [GREEDY]), "sampling=.* must be SamplingPar"),
    "stream batch": (lambda s: s.llm.stream("a", batch_size=2), "unknown option batch_size"),
    "stream ids text": (lambda s: s.llm.stream_ids("a"), "prompt 0 is 'a': expected a sequence"),
    "stream ids None": (lambda s: s.llm.stream_ids(None), "prompt 0 is None: expected"),
    "stream ids bare": (lambda s: s.bare.stream_ids([1]), "streaming needs a tokenizer"),
    "stream session": (
        lambda s: list(s.llm.stream_ids([1], session="x", **NEW)),
        "session='x' must be a Session",
    ),
    # LLM.plan, strategy
    "plan no rows": (lambda s: s.llm.plan(0), "rows=0 must be at least 1"),
    "plan text": (lambda s: s.llm.plan("9"), f"rows='9' {whole}"),
    "plan batch": (lambda s: s.llm.plan(9, 1.5), f"batch_size=1.5 {whole}"),
    "strategy list": (lambda s: s.llm.strategy([]), r"strategy=\[\] must be a Strategy"),
    # Strategy
    "method": (lambda s: Strategy(None), "method=None must be one of ar, orthrus"),
    "draft length text": (lambda s: Strategy(draft_length="4"), f"draft_length='4' {whole}"),
    "draft length bool": (lambda s: Strategy(draft_length=True), f"draft_length=True {whole}"),
    "tree of a half": (lambda s: Strategy("orthrus-2f", tree_nodes=2.5), f"tree_nodes=2.5 {whole}"),
    "candidates": (lambda s: Strategy(candidates=0), "candidates=0 must be at least 1"),
    "accept": (lambda s: Strategy(accept=None), "accept=None must be 'rejection' or 'coupled'"),
    "draft temperature": (lambda s: Strategy(draft_temperature="1"), "draft_temperature='1' must"),
    "huge tree": (
        lambda s: s.llm.complete([[1]], strategy=Strategy("orthrus-2f", tree_nodes=100_000)),
        "tree_nodes=100000 must be below the model's 256 positions",
    ),
    "endless draft temperature": (
        lambda s: s.llm.complete([[1]], strategy=Strategy(draft_temperature=float("inf"))),
        "draft_temperature=inf must be above 0 and finite",
    ),
    # SamplingParams
    "temperature text": (lambda s: SamplingParams(temperature="1"), "temperature='1' must be a n"),
    "temperature nan": (lambda s: SamplingParams(temperature=float("nan")), "temperature=nan must"),
    "temperature huge": (lambda s: SamplingParams(temperature=HUGE), "temperature=10*.* must be a"),
    "top_k float": (lambda s: SamplingParams(top_k=5.0), f"top_k=5.0 {whole}"),
    "top_k huge": (lambda s: SamplingParams(top_k=HUGE), r"top_k=10*.* must be 0 \(off\) or more"),
    "top_p": (lambda s: SamplingParams(top_p=0), "top_p=0 must be above 0"),
    "min_p": (lambda s: SamplingParams(min_p=1), "min_p=1 must be from 0"),
    "seed float": (lambda s: SamplingParams(seed=1.0), f"seed=1.0 {whole}"),
    "seed negative": (lambda s: SamplingParams(seed=-1), "seed=-1 must be from 0 to 4294967295"),
    "budget bool": (lambda s: SamplingParams(max_new_tokens=True), f"max_new_tokens=True {whole}"),
    "budget None": (lambda s: SamplingParams(max_new_tokens=None), f"max_new_tokens=None {whole}"),
    "budget huge": (
        lambda s: s.llm.complete([[1]], max_new_tokens=HUGE),
        "max_new_tokens=10*.*over the model's 256 positions",
    ),
    "stop text": (lambda s: SamplingParams(stop="x"), "stop='x' must be a sequence of strings"),
    "stop bytes": (lambda s: SamplingParams(stop=[b"x"]), r"stop=\[b'x'\] must be a sequence"),
    "stop empty": (lambda s: SamplingParams(stop=[""]), r"stop=\[''\] must be .* none empty"),
    "stop ids text": (lambda s: SamplingParams(stop_token_ids="2"), "stop_token_ids='2' must be"),
    "logprobs": (lambda s: SamplingParams(logprobs="yes"), "logprobs='yes' must be True or False"),
    "samples": (lambda s: SamplingParams(n=0), "n=0 must be at least 1"),
    # Plan, Request, Capacity, Session
    "plan strategy": (lambda s: Plan("ar"), "strategy='ar' must be a Strategy"),
    "plan of a half row": (lambda s: Plan(batch_size=0.5), f"batch_size=0.5 {whole}"),
    "plan slots": (lambda s: Plan(slots=-1), "slots=-1 must be 0 or more"),
    "capacity slots": (lambda s: Capacity(0, 5), "slots=0 must be at least 1"),
    "capacity sampled": (lambda s: Capacity(64, 5, sampled=1), "sampled=1 must be True or False"),
    "session": (lambda s: Session(slots=None), f"slots=None {whole}"),
    # Engine, Queue
    "open plan": (lambda s: s.engine.open(None, Capacity(64, 5)), "plan=None must be a Plan"),
    "open capacity": (lambda s: s.engine.open(Plan(), 64), "capacity=64 must be a Capacity"),
    "open session": (
        lambda s: s.engine.open(Plan(), Capacity(64, 5), session=1),
        "session=1 must be a Session",
    ),
    "open batch of a session": (
        lambda s: s.engine.open(Plan(batch_size=2), Capacity(64, 5), Session(64)),
        "batch_size=2 must be 1 with a session",
    ),
    "serve nothing": (lambda s: list(s.engine.serve([], Plan())), "requests is empty"),
    "submit ids": (lambda s: s.queue().submit([1, 2]), r"request 0=\[1, 2\] must be a Request"),
    "submit sampling": (lambda s: s.queue().submit(Request([1], None)), "sampling=None must be"),
    "submit sample": (lambda s: s.queue().submit(Request([1], GREEDY, -1)), "sample=-1 must be 0"),
    "submit long": (lambda s: s.queue().submit(Request([1] * 190, GREEDY)), "cache slots, over"),
    "submit budget": (
        lambda s: s.queue().submit(Request([1], SamplingParams(max_new_tokens=65))),
        "max_new_tokens=65 is over this queue's 64",
    ),
    # Conversation
    "talk to nobody": (lambda s: Conversation(None), "model=None must be a loaded LLM"),
    "talk without tokenizer": (lambda s: Conversation(s.bare), "needs a model with its tokenizer"),
    "system": (lambda s: Conversation(s.llm, system=None), "system=None must be a string"),
    "talk slots": (lambda s: Conversation(s.llm, slots=0), "slots=0 must be at least 1"),
    "ask number": (lambda s: Conversation(s.llm).ask(5), "text=5 must be a string"),
    "ask nothing": (lambda s: Conversation(s.llm).ask(""), "text is empty"),
    "ask unknown": (lambda s: Conversation(s.llm).ask("a", tempo=1), "unknown option tempo"),
    "ask surrogate": (lambda s: Conversation(s.llm).ask("\udc80"), "lone surrogate"),
    # load and checkpoints
    "load None": (lambda s: orthrus_jax.load(None), "source=None must be a directory or a hub id"),
    "load bytes": (lambda s: orthrus_jax.load(b"x"), "source=b'x' must be a directory"),
    "load nothing": (lambda s: orthrus_jax.load(""), "the source is empty"),
    "load missing": (lambda s: orthrus_jax.load("/no/such"), "/no/such cannot be loaded"),
    "load zero byte": (lambda s: orthrus_jax.load("a\0b"), "cannot be loaded"),
    "load empty folder": (lambda s: orthrus_jax.load(s.folder), "config.json does not exist"),
    "load mesh": (lambda s: orthrus_jax.load(s.folder, mesh=2), "mesh=2 must be a Mesh"),
    "load dtype": (lambda s: load_checkpoint(saved(s), dtype="int8"), "dtype='int8' is not one of"),
    "load dtype class": (lambda s: load_checkpoint(saved(s), dtype=float), "dtype=<class 'float'>"),
    "save nowhere": (
        lambda s: save_checkpoint(None, s.llm.config, s.llm.params),
        "directory=None must be a path",
    ),
    "save config": (lambda s: save_checkpoint(s.folder / "a", {}, s.llm.params), "config={} must"),
    "save no weights": (
        lambda s: save_checkpoint(s.folder / "a", s.llm.config, None),
        "params=None must be a tree",
    ),
    "save dtype": (
        lambda s: save_checkpoint(s.folder / "a", s.llm.config, s.llm.params, dtype="int8"),
        "dtype='int8' is not one of",
    ),
    "save shards": (
        lambda s: save_checkpoint(s.folder / "a", s.llm.config, s.llm.params, max_shard_bytes=0),
        "max_shard_bytes=0 must be at least 1",
    ),
    "save twice": (
        lambda s: save_checkpoint(saved(s), s.llm.config, s.llm.params),
        "is not empty: name another directory",
    ),
    "target None": (lambda s: check_target(None, overwrite=False), "directory=None must be a path"),
    "config list": (lambda s: config_from_hf([]), r"config.json=\[\] must be an object"),
    "config empty": (lambda s: config_from_hf({}), "model_type=None"),
    "config layers": (lambda s: changed(s, num_hidden_layers=10**6), "num_hidden_layers=1000000"),
    "config no heads": (
        lambda s: changed(s, num_key_value_heads=0),
        "num_key_value_heads=0: expected",
    ),
    "config block": (lambda s: changed(s, block_size=9999), "block_size=9999 is over max_position"),
    "config text": (lambda s: changed(s, vocab_size="9"), "vocab_size='9': expected a whole"),
    "config ends": (lambda s: changed(s, eos_token_ids=[2]), r"eos_token_ids=\[2\]: expected"),
    "choose": (lambda s: planner.choose(None, -1, 1, 32), "rows=-1 must be at least 1"),
}


def saved(subject: Subject) -> pathlib.Path:
    """A checkpoint of the subject's model, written once."""
    path = subject.folder / "saved"
    if not path.exists():
        save_checkpoint(path, subject.llm.config, subject.llm.params)
    return path


def changed(subject: Subject, **fields: Any) -> ModelConfig:
    return dataclasses.replace(subject.llm.config, **fields)


@pytest.mark.parametrize("name", REFUSED)
def test_call_is_refused_with_the_argument_by_name(subject: Subject, name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as raised:
        call(subject)
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 400
    assert not (subject.folder / "a").exists()


def tokens(completions: list[Any]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


EQUAL: dict[str, tuple[Call, Call]] = {  # each pair gives the same
    "no prompts": (lambda s: s.llm.generate([]), lambda s: []),
    "no ids": (lambda s: s.llm.complete([]), lambda s: []),
    "a generator of prompts": (
        lambda s: tokens(s.llm.generate((p for p in ["a", "b"]), **NEW)),
        lambda s: tokens(s.llm.generate(["a", "b"], **NEW)),
    ),
    "a tuple of prompts": (
        lambda s: tokens(s.llm.generate(("a", "b"), **NEW)),
        lambda s: tokens(s.llm.generate(["a", "b"], **NEW)),
    ),
    "ids of numpy": (
        lambda s: tokens(s.llm.complete([np.arange(3, 6)], **NEW)),
        lambda s: tokens(s.llm.complete([range(3, 6)], **NEW)),
    ),
    "a matrix of ids": (
        lambda s: tokens(s.llm.complete(np.array([[3, 4], [5, 6]]), **NEW)),
        lambda s: tokens(s.llm.complete([(3, 4), (5, 6)], **NEW)),
    ),
    "numbers of numpy": (
        lambda s: tokens(s.llm.complete([[3]], max_new_tokens=np.int64(3), top_p=np.float32(1))),
        lambda s: tokens(s.llm.complete([[3]], **NEW)),
    ),
    "fields over sampling": (
        lambda s: tokens(s.llm.complete([[3]], SamplingParams(), **NEW)),
        lambda s: tokens(s.llm.complete([[3]], GREEDY)),
    ),
    "a batch larger than the prompts": (
        lambda s: tokens(s.llm.complete([[3]], batch_size=3, **NEW)),
        lambda s: tokens(s.llm.complete([[3]], **NEW)),
    ),
    "the last position": (
        lambda s: len(s.llm.complete([[3] * 255], max_new_tokens=1)[0].tokens),
        lambda s: 1,
    ),
    "a temperature below all floats": (
        lambda s: tokens(s.llm.complete([[3]], temperature=1e-320, **NEW)),
        lambda s: tokens(s.llm.complete([[3]], **NEW)),
    ),
    "an extra key of a message": (
        lambda s: tokens(s.llm.generate([{**USER, "name": ["x", {"y": None}]}], **NEW)),
        lambda s: tokens(s.llm.generate([USER], **NEW)),
    ),
    "an unknown ticket": (lambda s: s.queue().cancel(99), lambda s: None),
    "a step of an idle queue": (lambda s: s.queue().step(), lambda s: []),
    "a config written and read": (
        lambda s: config_from_hf(config_to_hf(s.llm.config, orthrus=True)),
        lambda s: s.llm.config,
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_edge_case_gives_the_right_result(subject: Subject, name: str) -> None:
    call, expected = EQUAL[name]
    assert call(subject) == expected(subject)


def test_prompt_over_the_positions_leaves_no_program_behind(subject: Subject) -> None:
    before = len(subject.engine.programs.compiled)
    with pytest.raises(UserError):
        subject.llm.complete([[1], [1] * 300])
    assert len(subject.engine.programs.compiled) == before

"""A server that chooses its strategy while it decodes: texts, grammars, figures, no compiling."""

import concurrent.futures
import json
import re
from collections.abc import Iterator

import pytest

from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Auto
from orthrus_jax.tokenizer import decode, encode
from tests.support.engine import hashing, plan_among, restless, table_of, tokenizer
from tests.support.fake_models.hashed import greedy_text
from tests.support.server import Running, running

METHODS = [
    Strategy("orthrus", accept="coupled"),
    Strategy("orthrus-1f", early_blocks=2),
    Strategy("ar"),
]


@pytest.fixture(scope="module")
def auto() -> Iterator[Running]:
    model = hashing.__wrapped__()
    model.contenders = lambda *_: plan_among(METHODS).auto
    restless(model.engine, seed=3)
    with running(model, strategy=Auto()) as server:
        yield server


def text_of(prompt: str, new: int) -> str:
    ids = encode(tokenizer(), prompt, chat=False)
    return decode(tokenizer(), greedy_text(ids, table_of("plain"), new))


def test_texts_are_those_of_ar_and_nothing_compiles(auto) -> None:
    programs = set(auto.service.model.engine.programs.compiled)
    prompts = [f"{i} apples" for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        bodies = list(pool.map(lambda p: auto.complete(p, max_tokens=60).json(), prompts))
    ran = set()
    for prompt, body in zip(prompts, bodies, strict=True):
        assert body["choices"][0]["text"] == text_of(prompt, 60)
        cost = body["orthrus"]
        assert cost["strategy"] == {"mode": "auto"}
        assert sum(part["cycles"] for part in cost["strategies"]) == cost["cycles"]
        ran |= {part.get("cycle", "ar") for part in cost["strategies"]}
    assert ran == {"paper", "one-forward", "ar"}
    assert set(auto.service.model.engine.programs.compiled) == programs


def test_seeded_samples_are_those_of_the_lane_without_drafts(auto) -> None:
    for seed in range(4):
        options = {"temperature": 0.9, "seed": seed, "max_tokens": 40}
        plain = auto.complete("They", model="hash:ar", **options).json()
        assert auto.complete("They", **options).json()["choices"] == plain["choices"]


def test_grammar_waits_for_no_strategy_that_follows_none(auto) -> None:
    """Among requests without one, whose loops go on with the one-forward cycle afterwards."""
    programs = set(auto.service.model.engine.programs.compiled)
    pattern = r"(yes|no), [0-9]{2,4} (apples|trees)!"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        free = [pool.submit(auto.complete, f"tree {i}", max_tokens=60) for i in range(4)]
        held = [
            pool.submit(auto.chat, f"Say {i}", guided_regex=pattern, max_tokens=40)
            for i in range(4)
        ]
        for i, answer in enumerate(free):
            assert answer.result().json()["choices"][0]["text"] == text_of(f"tree {i}", 60)
        for i, answer in enumerate(held):
            text = answer.result().json()["choices"][0]["message"]["content"]
            assert re.fullmatch(pattern, text)
            again = auto.chat(f"Say {i}", model="hash:ar", guided_regex=pattern, max_tokens=40)
            assert again.json()["choices"][0]["message"]["content"] == text
    assert set(auto.service.model.engine.programs.compiled) == programs


def test_stream_counts_the_forwards_of_every_strategy(auto) -> None:
    response = auto.complete(
        "12 apples", max_tokens=60, stream=True, stream_options={"include_cycles": True}
    )
    chunks = [json.loads(part[6:]) for part in response.text.split("\n\n")[:-2]]
    forwards = [chunk["orthrus"]["forwards"] for chunk in chunks]
    assert forwards == sorted(forwards)
    pieces = [piece for chunk in chunks for piece in chunk["orthrus"]["pieces"]]
    assert "".join(text for text, _, _ in pieces) == text_of("12 apples", 60)

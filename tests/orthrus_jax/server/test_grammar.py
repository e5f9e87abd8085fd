"""Grammars: masks of verified rows, and texts equal to AR decoding under the same masks."""

import json
import re

import numpy as np
import pytest

from orthrus_jax.server.grammar import Grammars
from orthrus_jax.server.problems import ApiError
from orthrus_jax.server.schema import GrammarSpec
from orthrus_jax.tokenizer import decode, encode
from tests.support.engine import hashing, table_of, tokenizer
from tests.support.fake_models.hashed import CONFIG, VOCAB, greedy_text

WORDS = -(-VOCAB // 32)
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "maxLength": 12},
        "sure": {"type": "boolean"},
        "parts": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["answer", "sure", "parts"],
    "additionalProperties": False,
}
SPECS = {
    "schema": GrammarSpec("json_schema", json.dumps(SCHEMA), "response_format"),
    "pattern": GrammarSpec("regex", r"(yes|no), [0-9]{2,4} (apples|trees)!", "guided_regex"),
    "any text": GrammarSpec("regex", r"[ -~]{0,30}", "guided_regex"),
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tokenizer(), CONFIG)


def bits(mask: np.ndarray) -> np.ndarray:
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB].astype(bool)


def masked_text(prompt, spec, grammars, budget: int) -> list[int]:
    """Greedy decoding one token after another under a grammar's masks, in plain Python."""
    matcher, ids, table = grammars.compile(spec)(), list(prompt), table_of("plain")
    for _ in range(budget):
        mask = np.full((1, WORDS), 0xFFFFFFFF, np.uint32)
        matcher.fill([], mask)
        allowed = bits(mask[0])
        assert allowed.any()
        ids.append(greedy_text(ids, np.where(allowed, table, -np.inf), 1)[0])
        if matcher.consume(ids[-1:]) is not None:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", SPECS)
def test_masks_after_drafts_are_those_of_one_token_after_another(grammars, name) -> None:
    rng, start = np.random.default_rng(1), grammars.compile(SPECS[name])
    matcher = start()
    for _ in range(60):
        mask = np.full((1, WORDS), 0xFFFFFFFF, np.uint32)
        matcher.fill([], mask)
        choices = bits(mask[0]).nonzero()[0]
        follower, drafts, single = start(), [], []
        follower.consume(consumed := getattr(matcher, "taken", []))
        for _ in range(6):
            one = np.full((1, WORDS), 0xFFFFFFFF, np.uint32)
            follower.fill([], one)
            single.append(one[0])
            allowed = bits(one[0]).nonzero()[0]
            drafts.append(int(rng.choice(allowed)) if rng.random() < 0.8 else 5)
            if drafts[-1] not in allowed or follower.consume(drafts[-1:]) is not None:
                break
        together = np.full((len(drafts) + 1, WORDS), 0xFFFFFFFF, np.uint32)
        matcher.fill(drafts, together)
        np.testing.assert_array_equal(together[: len(single)], single)
        token = int(rng.choice(choices))
        matcher.taken = [*consumed, token]
        if matcher.consume([token]) is not None:
            matcher = start()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("model", ["hash", "hash:ar"])
def test_served_text_is_ar_decodings_under_the_same_masks(server, grammars, name, model) -> None:
    spec = SPECS[name]
    for text in ("12 apples", "trees", "Ein K\u00e4fer", "x"):
        options = {"guided_regex": spec.source}
        if spec.kind == "json_schema":
            schema = {"name": "answer", "schema": SCHEMA}
            options = {"response_format": {"type": "json_schema", "json_schema": schema}}
        body = server.chat(text, model=model, max_tokens=60, **options).json()
        prompt = encode(tokenizer(), text, chat=True)
        tokens = masked_text(prompt, spec, grammars, 60)
        (choice,) = body["choices"]
        assert choice["message"]["content"] == decode(tokenizer(), tokens)
        assert body["usage"]["completion_tokens"] == len(tokens)
        if choice["finish_reason"] == "stop":
            check(spec, choice["message"]["content"])


def check(spec: GrammarSpec, text: str) -> None:
    if spec.kind == "regex":
        assert re.fullmatch(spec.source, text)
    else:
        assert set(json.loads(text)) == {"answer", "sure", "parts"}


def test_json_object_is_json(server) -> None:
    for seed in range(4):
        body = server.chat(
            "an object",
            max_tokens=150,
            temperature=0.7,
            seed=seed,
            response_format={"type": "json_object"},
        ).json()
        (choice,) = body["choices"]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_other_answers_are_the_same_beside_a_grammar(server) -> None:
    import concurrent.futures

    prompts = [f"prompt {i}" for i in range(6)]
    alone = [server.chat(p).json()["choices"][0]["message"]["content"] for p in prompts]
    pattern = SPECS["pattern"].source
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        held = [pool.submit(server.chat, p, guided_regex=pattern) for p in prompts]
        free = [pool.submit(server.chat, p) for p in prompts]
        texts = [f.result().json()["choices"][0]["message"]["content"] for f in free]
        for one in held:
            assert re.fullmatch(pattern, one.result().json()["choices"][0]["message"]["content"])
    assert texts == alone


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "("),
        ("regex", "(?=look)ahead"),
        ("json_schema", '{"type": "nothing"}'),
        ("json_schema", '{"$ref": "file:///etc/passwd"}'),
        ("json_schema", '{"$ref": "http://127.0.0.1:1/x"}'),
    ],
)
def test_grammars_that_cannot_be_followed_are_refused(grammars, kind, source) -> None:
    with pytest.raises(ApiError) as error:
        grammars.compile(GrammarSpec(kind, source, "response_format"))
    assert error.value.status == 400
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"a":1}', True),
        ('{ "a" : 1 }', True),
        ('{\n    "a": 1\n}', True),
        ("{" + " " * 30 + '"a":1}', False),
    ],
)
def test_space_between_the_parts_of_json_has_an_end(grammars, text, fits) -> None:
    """Otherwise a model that likes spaces writes nothing else."""
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
    matcher = grammars.compile(GrammarSpec("json_schema", schema, "response_format"))()
    tokens = tokenizer()(text, add_special_tokens=False)["input_ids"]
    mask = np.zeros((len(tokens) + 1, WORDS), np.uint32)
    matcher.fill(tokens, mask)
    allowed = all(bits(mask[j])[token] for j, token in enumerate(tokens) if mask[j].any())
    assert (allowed and mask[:-1].any(axis=1).all()) == fits


def test_tokenizer_of_an_llm_is_left_as_it_was() -> None:
    before = hashing().tokenizer.backend_tokenizer.to_str()
    Grammars(tokenizer(), CONFIG)
    assert tokenizer().backend_tokenizer.to_str() == before

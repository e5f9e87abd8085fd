"""Streaming: the pieces are the text of generate, and the host reads seldom."""

import jax
import jax.numpy as jnp
import pytest

from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import STREAM_CYCLES
from orthrus_jax.engine import queue as queue_module
from orthrus_jax.llm import LLM
from tests.support.engine import (
    cut_at,
    hashing,
    plain_text_of,
    stop_strings_of,
    table_of,
    tokenizer,
)

STREAMED = [
    {"strategy": "ar"},
    {"strategy": "orthrus"},
    {"strategy": Strategy(draft_length=2)},
    {"strategy": "ar", "temperature": 0.9, "seed": 3},
    {"strategy": Strategy(accept="coupled"), "temperature": 0.9, "seed": 3},
    {"strategy": "orthrus", "temperature": 0.9, "seed": 3, "top_p": 0.9, "min_p": 0.01},
]


def streamed(generator: LLM, prompt: str, **options):
    """The pieces of a stream, and the completion it returned."""
    pieces = []
    stream = generator.stream(prompt, chat=False, **options)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("kind", ["plain", "bytes"])
@pytest.mark.parametrize("options", STREAMED, ids=str)
def test_pieces_equal_the_text_of_generate(kind, options, monkeypatch) -> None:
    generator = hashing()
    monkeypatch.setattr(generator.engine, "params", {"table": jnp.asarray(table_of(kind))})
    for prompt in ("How many?", "The answer"):
        (whole,) = generator.generate([prompt], chat=False, max_new_tokens=60, **options)
        pieces, last = streamed(generator, prompt, max_new_tokens=60, **options)
        assert "".join(pieces) == whole.text == last.text
        assert last.tokens == whole.tokens
        assert last.finish_reason == whole.finish_reason
        assert all(pieces), "an empty piece"
        if options["strategy"] == "ar":
            assert len(pieces) > 4


@pytest.mark.parametrize("options", STREAMED[:2] + STREAMED[-2:], ids=str)
def test_host_reads_once_per_chunk_of_cycles(options, monkeypatch) -> None:
    generator = hashing()
    reads = []
    fetch = queue_module._fetch
    monkeypatch.setattr(queue_module, "_fetch", lambda s: reads.append(s) or fetch(s))
    gets, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: gets.append(x) or get(x))
    for budget in (1, 2, 9, 10, 60):
        reads.clear()
        gets.clear()
        _, last = streamed(generator, "How many?", max_new_tokens=budget, **options)
        assert len(reads) == max(1, -(-last.cycles // STREAM_CYCLES))
        assert len(gets) == len(reads)
        reads.clear()
        generator.generate(["How many?"], chat=False, max_new_tokens=budget, **options)
        assert len(reads) == 1, "nobody looks at the text in between"


@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_nothing_from_a_stop_string_on_is_streamed(mode) -> None:
    generator = hashing()
    prompt = tokenizer()("How many?")["input_ids"]
    ids, text = plain_text_of(prompt)
    stops = [*stop_strings_of(prompt), (text[20:24], "never in it")]
    for stop in stops:
        pieces, last = streamed(generator, "How many?", strategy=mode, max_new_tokens=40, stop=stop)
        expected = cut_at(ids, stop)
        assert ("".join(pieces), last.text) == (expected[1], expected[1])
        assert (last.tokens, last.finish_reason) == (expected[0], expected[2])
        so_far = ""
        for piece in pieces:
            so_far += piece
            assert not any(s in so_far for s in stop)


def test_abandoned_stream_leaves_the_model_usable() -> None:
    generator = hashing()
    stream = generator.stream("How many?", chat=False, strategy="ar", max_new_tokens=60)
    first = next(stream)
    stream.close()
    (whole,) = generator.generate(["How many?"], chat=False, strategy="ar", max_new_tokens=60)
    assert whole.text.startswith(first)
    assert len(first) < len(whole.text)

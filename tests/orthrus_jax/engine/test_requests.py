"""Requests that cannot be served are refused by value and limit, in Python and by the command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import generate
from orthrus_jax.decoding import Strategy
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.llm import LLM
from tests.support.engine import hashing, table_of
from tests.support.fake_models.hashed import CONFIG, RESULTS, VOCAB, K, greedy_text

REFUSED = {
    "temperature": ({"temperature": -0.5}, "temperature=-0.5 must be 0 or more"),
    "top_p": ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
    "min_p": ({"min_p": 1.0}, "min_p=1.0 must be from 0"),
    "top_k": ({"top_k": -1}, "top_k=-1 must be 0"),
    "seed": ({"seed": -1}, "seed=-1 must be from 0 to 4294967295"),
    "positions": ({"max_new_tokens": 511}, "2 tokens; with max_new_tokens=511 .* 512 positions"),
    "min_new_tokens": (
        {"min_new_tokens": 9, "max_new_tokens": 8},
        "min_new_tokens=9 must be from 0 to max_new_tokens=8",
    ),
    "top_k beyond int32": ({"top_k": 1 << 31}, "top_k=2147483648 must be 0 .* to 2147483647"),
    "float top_k": ({"top_k": 5.0}, "top_k=5.0 must be a whole number"),
    "float seed": ({"seed": 1.5}, "seed=1.5 must be a whole number"),
    "bool seed": ({"seed": True}, "seed=True must be a whole number"),
    "bool budget": ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number"),
    "float budget": ({"max_new_tokens": 8.0}, "max_new_tokens=8.0 must be a whole number"),
    "text temperature": ({"temperature": "1"}, "temperature='1' must be a number"),
    "bytes stop": ({"stop": b"end"}, "stop=b'end' must be a sequence of strings"),
    "list of bytes": ({"stop": [b"end"]}, r"stop=\[b'end'\] must be a sequence of strings"),
    "float ids": ({"stop_token_ids": (3.0,)}, r"stop_token_ids=\(3.0,\) must be ids of 0"),
    "bool ids": ({"stop_token_ids": (True,)}, r"stop_token_ids=\(True,\) must be ids of 0"),
    "unknown": ({"temprature": 1.0}, "unknown option temprature: sampling has temperature, "),
    "long block": (
        {"strategy": Strategy(draft_length=K + 1)},
        f"draft_length={K + 1} must be from 2 to {K}",
    ),
    "short block": (
        {"strategy": Strategy(draft_length=1)},
        f"draft_length=1 must be from 2 to {K}",
    ),
    "no block": ({"strategy": Strategy(draft_length=0)}, f"draft_length=0 must be from 2 to {K}"),
    "stop ids": ({"stop_token_ids": (3, VOCAB)}, rf"\[{VOCAB}\] .* vocabulary's {VOCAB}"),
    "negative ids": ({"stop_token_ids": (-1,)}, r"stop_token_ids=\(-1,\) must be ids of 0 or more"),
    "stop": ({"stop": "end"}, "stop='end' must be a sequence of strings"),
    "empty stop": ({"stop": ("",)}, r"stop=\(''?,?\) must be a sequence of strings, none empty"),
    "batch_size": ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    "batch_size below": ({"batch_size": -2}, "batch_size=-2 must be at least 1"),
    "n": ({"n": 4, "temperature": 1.0, "batch_size": 3}, "n=4 is over batch_size=3"),
    "equal samples": ({"n": 2, "batch_size": 2}, "n=2 with temperature=0 would give 2 equal"),
    "accept": (
        {"strategy": Strategy(accept="all")},
        "accept='all' is not one of rejection, coupled",
    ),
    "mode": (
        {"strategy": "fast"},
        "method='fast' is not one of ar, orthrus, orthrus-2f, orthrus-1f",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_refused_with_value_and_limit(model, name) -> None:
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        model.complete([[1, 2]], **options)


def test_stop_strings_and_streams_need_a_tokenizer() -> None:
    bare = LLM(CONFIG, {"table": jnp.asarray(table_of("plain"))})
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        bare.complete([[1, 2]], stop=("x",))
    with pytest.raises(UserError, match="without a tokenizer"):
        next(bare.stream("x"))
    with pytest.raises(UserError, match="without a tokenizer"):
        bare.generate(["x"])


BAD_PROMPTS = {
    "bool": ([1, True], "prompt 1, token 1: True is not an id from 0 to 319"),
    "float": ([1.0], "prompt 1, token 0: 1.0 is not an id"),
    "negative": ([5, 6, -1], "prompt 1, token 2: -1 is not an id"),
    "outside": ([5, VOCAB], "prompt 1, token 1: 320 is not an id"),
    "numpy": (np.array([5, VOCAB]), "prompt 1, token 1: .*320.* is not an id"),
    "text": ("ab", "prompt 1 is 'ab': expected a sequence of token ids"),
    "number": (7, "prompt 1 is 7: expected a sequence of token ids"),
    "empty": ([], "prompt 1 is empty"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompt_ids_are_refused_with_prompt_and_place(model, name) -> None:
    prompt, message = BAD_PROMPTS[name]
    with pytest.raises(UserError, match=message):
        model.complete([[1], prompt])


def test_numpy_ids_are_ids(model) -> None:
    prompt = [5, 6, 7]
    expected = greedy_text(prompt, table_of("plain"), 4)
    for ids in (tuple(prompt), np.array(prompt), [np.int32(i) for i in prompt]):
        (completion,) = model.complete([ids], max_new_tokens=np.int64(4))
        assert completion.tokens == expected


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("options", [{}, {"strategy": "ar"}, {"temperature": 0.9}], ids=str)
def test_logits_that_are_not_finite_end_in_an_error_with_row_and_position(
    options, batch_size
) -> None:
    model = hashing.__wrapped__()
    model.engine.params = {"table": jnp.full((RESULTS, VOCAB), jnp.nan)}
    message = r"request 0 \(row 0\): the logits of answer token 0, at position 3, are not finite"
    with pytest.raises(UserError, match=message):
        model.complete([[1, 2, 3]] * batch_size, **options, batch_size=batch_size, max_new_tokens=5)


def test_refused_request_starts_nothing(model) -> None:
    before = len(model.engine.programs.compiled)
    with pytest.raises(UserError, match="prompt 1 has 500 tokens"):
        model.complete([[1], [2] * 500], max_new_tokens=40)
    assert len(model.engine.programs.compiled) == before


COMMANDS = {
    "--temperature -1": "temperature=-1.0 must be 0 or more",
    "--top-p 0": "top_p=0.0 must be above 0",
    "--min-p 1.5": "min_p=1.5 must be from 0",
    "--max-new-tokens 0": "max_new_tokens=0 must be at least 1",
    "--max-new-tokens 600": "over the model's 512 positions",
    "--min-new-tokens 9 --max-new-tokens 3": "min_new_tokens=9 must be from 0 to max_new_tokens=3",
    "--draft-length 9": f"draft_length=9 must be from 2 to {K}",
    f"--stop-token-id {VOCAB}": f"vocabulary's {VOCAB}",
    "--batch-size 0": "batch_size=0 must be at least 1",
    "--n 3 --temperature 1 --batch-size 2": "n=3 is over batch_size=2",
    "--n 2": "n=2 with temperature=0",
    "--seed -1": "seed=-1 must be from 0",
    "--stop=": "must be a sequence of strings, none empty",
    "--tree-nodes 8": "--tree-nodes 8 needs --cycle two-forward or one-forward",
    "--early-blocks 2": "--early-blocks 2 needs --cycle one-forward",
    "--mode ar --no-pairwise": "--no-pairwise: decoding one token per forward (ar)",
    "--mode ar --cycle two-forward": "--cycle two-forward: decoding one token per forward (ar)",
    "--rows 16 --cycle paper": "--cycle paper beside --rows 16: the planner chooses it",
    "--stream --draft-length 1": f"draft_length=1 must be from 2 to {K}",
}


@pytest.fixture
def command(model, monkeypatch):
    """The command on a model that is already loaded."""
    monkeypatch.setattr(generate, "load", lambda source, **options: model)
    prefix = ["--model", "loaded", "--prompt", "How many?", "--no-chat"]
    return lambda *flags: generate.main([*prefix, *flags])


@pytest.mark.parametrize("flags", COMMANDS)
def test_command_refuses_in_one_line_with_status_2(command, capsys, flags) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: command(*flags.split()))
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert COMMANDS[flags] in line


def test_command_prints_the_samples_and_stream_of_the_api(model, command, capsys) -> None:
    flags = ["--max-new-tokens", "12", "--temperature", "1", "--seed", "4"]
    command(*flags, "--n", "2", "--json", "--logprobs")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    options = {"chat": False, "max_new_tokens": 12, "temperature": 1.0, "seed": 4}
    completions = model.generate(["How many?"], **options, n=2, batch_size=2, logprobs=True)
    assert [line["token_ids"] for line in lines] == [c.tokens for c in completions]
    assert [line["sample"] for line in lines] == [0, 1]
    assert [line["logprobs"] for line in lines] == [c.logprobs for c in completions]
    assert [len(line["logprobs"]) for line in lines] == [12, 12]
    command(*flags, "--stream")
    assert capsys.readouterr().out.startswith(completions[0].text + "\n\n12 tokens | ")

"""The mode that chooses while decoding, as the Python API and the commands offer it."""

import json

import pytest

from orthrus_jax import Auto, KVCacheConfig, chat, cli, generate, serve
from orthrus_jax.checkpoint import save_checkpoint
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import SamplingParams
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from tests.support.configs import tiny_config
from tests.support.engine import TEXTS, hashing, prompts_of
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params

COMMANDS = {"generate": generate, "chat": chat, "serve": serve}
FLAGS = {
    "--cycle": "one-forward",
    "--draft-length": "3",
    "--rows": "16",
    "--early-blocks": "2",
    "--fresh-blocks": "1",
    "--tree-nodes": "4",
}


def parsed(command: str, *flags: str):
    prompt = ("--prompt", "a") if command == "generate" else ()
    return COMMANDS[command]._parser().parse_args(["--model", "m", *prompt, *flags])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_choose_while_decoding_unless_told_otherwise(command) -> None:
    decoding = lambda *flags: cli.decoding_of(parsed(command, *flags))
    assert decoding() == decoding("--mode", "auto") == Auto("coupled")
    assert decoding("--accept", "rejection", "--no-pairwise") == Auto("rejection", False)
    assert decoding("--mode", "orthrus") == Strategy()
    assert decoding("--mode", "ar") == Strategy("ar")
    assert decoding("--draft-length", "3") == Strategy("orthrus", 3)
    assert decoding("--rows", "16") == Strategy()
    assert decoding("--cycle", "one-forward", "--tree-nodes", "4").method == "orthrus-1f"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", FLAGS)
def test_auto_is_refused_beside_a_flag_that_fixes_the_strategy(command, flag) -> None:
    args = parsed(command, "--mode", "auto", flag, FLAGS[flag])
    with pytest.raises(UserError, match=f"^{flag} {FLAGS[flag]} beside --mode auto"):
        cli.decoding_of(args)


def test_api_refuses_two_answers_to_how_to_decode() -> None:
    model = hashing()
    with pytest.raises(UserError, match="mode='ar' beside strategy='orthrus': give one"):
        model.complete([[1, 2]], mode="ar", strategy="orthrus")
    with pytest.raises(UserError, match="mode='fast' must be one of auto, orthrus, ar"):
        model.complete([[1, 2]], mode="fast")
    with pytest.raises(UserError, match="accept='maybe' is not one of"):
        model.complete([[1, 2]], strategy=Auto("maybe"))
    with pytest.raises(UserError, match="pairwise='no' must be True or False"):
        Auto(pairwise="no")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.9}])
def test_default_text_is_that_of_ar(batch, sampling) -> None:
    model, prompts = hashing(), prompts_of(6, seed=60)
    options = {"max_new_tokens": 30, "batch_size": batch, **sampling}
    expected = [c.tokens for c in model.complete(prompts, mode="ar", **options)]
    auto = model.complete(prompts, **options)
    assert [c.tokens for c in auto] == expected
    named = model.complete(prompts, mode="auto", **options)
    assert [c.tokens for c in named] == expected
    for answer in auto:
        assert sum(cycles for _, cycles in answer.strategies) == answer.cycles


def test_fifty_prompt_lengths_compile_one_loop_per_contender() -> None:
    model = hashing.__wrapped__()
    for length in range(1, 51):
        model.complete([[5] * length], max_new_tokens=40)
    loops = len(model.contenders())
    assert loops == 3
    assert 2 <= len(model.engine.programs.compiled) <= 1 + loops


def test_mode_names_the_fixed_loops() -> None:
    model, prompts = hashing(), prompts_of(1, seed=61)
    for mode in ("orthrus", "ar"):
        (answer,) = model.complete(prompts, mode=mode, max_new_tokens=30)
        ((strategy, cycles),) = answer.strategies
        assert (strategy.method, cycles) == (mode, answer.cycles)


def test_model_without_a_trained_view_or_a_mask_decodes_by_ar() -> None:
    config = tiny_config(mask_token_id=None)
    for model in (hashing(), LLM(config, random_params(tiny_config(), 0))):
        untrained = LLM(model.config, model.params, trained=False)
        assert [c.strategy.method for c in untrained.contenders()] == ["ar"]
    assert [c.strategy.method for c in model.contenders()] == ["ar"]
    (answer,) = model.complete([[1, 2, 3]], max_new_tokens=5)
    assert answer.strategies == ((Strategy("ar"), answer.cycles),)


def test_contenders_keep_how_drafts_are_accepted() -> None:
    drafting = [c.strategy for c in hashing().contenders(1, Auto("rejection", False))]
    assert {(s.accept, s.pairwise) for s in drafting if s.method != "ar"} == {("rejection", False)}


def test_contenders_of_a_quantised_cache_are_those_that_fit_its_tail() -> None:
    params, methods = random_params(tiny_config(), 0), {}
    for lag in (0, 4):
        model = LLM(tiny_config(), params, kv_cache=KVCacheConfig(tile=4, lag=lag))
        methods[lag] = {c.strategy.method for c in model.contenders()}
    assert methods[0] == {"ar"}
    assert "orthrus" in methods[4]


def test_command_prints_which_strategies_ran(tmp_path, capsys) -> None:
    config = tiny_config(vocab_size=320, mask_token_id=319, num_hidden_layers=1)
    weights = random_params(config, 3, gain=3.0)
    path = tmp_path / "tiny"
    save_checkpoint(path, config, weights, tokenizer=small_tokenizer(TEXTS, 320))
    texts = {}
    for mode in ([], ["--mode", "ar"]):
        generate.main(["--model", str(path), "--prompt", "12 and 30", "--no-chat", "--json", *mode])
        answer = json.loads(capsys.readouterr().out)
        texts[tuple(mode)] = answer["token_ids"]
        assert sum(part["cycles"] for part in answer["strategies"]) == answer["cycles"]
        assert all(part["mode"] in ("orthrus", "ar") for part in answer["strategies"])
    assert len(set(map(tuple, texts.values()))) == 1


def test_stream_and_complete_agree_in_the_default_mode() -> None:
    model, (prompt,) = hashing(), prompts_of(1, seed=62)
    sampling = SamplingParams(max_new_tokens=40)
    (whole,) = model.complete([prompt], sampling)
    assert "".join(model.stream_ids(prompt, sampling)) == whole.text
    assert len(whole.tokens) == 40

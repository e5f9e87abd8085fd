"""The command and its API: same text in both modes, few compiles, honest counts, plain errors."""

import json
import subprocess
import sys

import jax
import pytest

from orthrus_jax import generate
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import SamplingParams, bucket
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from orthrus_jax.model import Model, params
from tests.support.paths import DATA
from tests.support.tokenizers import small_tokenizer

TEXTS = ["How many apples are 12 and 30?", "They are 42 apples. The answer is \\boxed{42}."] * 20


def config_for(vocab_size, **changes):
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "block_size": 5,
        "mask_token_id": vocab_size - 1,
        "max_position_embeddings": 512,
        "eos_token_ids": (2,),
        "dtype": "float32",
    }
    return ModelConfig(**{**sizes, **changes})


def random_weights(config, scale=8.0):
    tree = params.init(Model(config), jax.random.key(0))
    return jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, tree)


@pytest.fixture(scope="module")
def model():
    tokenizer = small_tokenizer(TEXTS, 400)
    config = config_for(400)
    return LLM(config, random_weights(config), tokenizer)


def test_both_modes_give_the_same_text_and_count_their_forwards(model):
    options = {"max_new_tokens": 40}
    for prompt in ["How many?", "12 and 30", "The answer is"]:
        (ar,) = model.generate([prompt], strategy="ar", **options)
        (orthrus,) = model.generate([prompt], strategy="orthrus", **options)
        assert orthrus.text == ar.text
        assert orthrus.tokens == ar.tokens
        assert ar.forwards == 1 + ar.cycles == len(ar.tokens)
        assert orthrus.forwards == 1 + 2 * orthrus.cycles
        assert len(orthrus.accepted) == orthrus.cycles
        assert ar.acceptance_length == 0.0
        assert ar.tokens_per_forward == 1.0


def test_text_does_not_depend_on_the_batch(model):
    prompts = ["How many?", "12 and 30 apples", "The", "They are 42 apples. How many apples?"] * 2
    alone = [model.generate([p], max_new_tokens=30)[0].tokens for p in prompts]
    for size in (3, 8):
        completions = model.generate(prompts, max_new_tokens=30, batch_size=size)
        assert [c.tokens for c in completions] == alone


def test_every_block_size_gives_the_same_text(model):
    expected = model.generate(["How many?"], strategy="ar", max_new_tokens=30)[0].tokens
    for size in (2, 3, 4, 5):
        strategy = Strategy(draft_length=size)
        (completion,) = model.generate(["How many?"], max_new_tokens=30, strategy=strategy)
        assert completion.tokens == expected


def test_one_string_is_one_prompt(model):
    (completion,) = model.generate("How many?", max_new_tokens=9)
    (listed,) = model.generate(["How many?"], max_new_tokens=9)
    assert completion.tokens == listed.tokens
    assert model.generate([]) == []


def test_chat_messages_are_a_prompt(model):
    from orthrus_jax.tokenizer import encode_messages

    dialogue = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "The answer?"},
    ]
    (expected,) = model.complete([encode_messages(model.tokenizer, dialogue)], max_new_tokens=9)
    (alone,) = model.generate(dialogue, max_new_tokens=9)
    among = model.generate(["How many?", dialogue, dialogue[1:2]], max_new_tokens=9)
    assert alone.tokens == among[1].tokens == expected.tokens
    assert among[0].tokens == among[2].tokens, "a string is a user message"
    assert [c.prompt for c in among] == [0, 1, 2]
    assert "".join(model.stream(dialogue, max_new_tokens=9)) == expected.text


def test_sampling_parameters_may_be_given_per_prompt(model):
    samplings = [
        SamplingParams(max_new_tokens=4),
        SamplingParams(max_new_tokens=6, temperature=0.9, seed=2, n=2),
        SamplingParams(max_new_tokens=5, logprobs=True),
    ]
    prompts = ["How many?", "12 and 30", "The answer"]
    together = model.generate(prompts, samplings, batch_size=2)
    apart = [c for p, s in zip(prompts, samplings, strict=True) for c in model.generate(
        p, s, batch_size=2)]  # fmt: skip
    assert [c.tokens for c in together] == [c.tokens for c in apart]
    assert [(c.prompt, c.sample) for c in together] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    assert [c.logprobs is None for c in together] == [True, True, True, False]
    shorter = model.generate(prompts, samplings, batch_size=2, max_new_tokens=3)
    assert {len(c.tokens) for c in shorter} == {3}


BAD_PROMPTS = {
    "number": (5, "prompt 1 is 5: expected a string, or a list of chat messages"),
    "none": (None, "prompt 1 is None: expected a string"),
    "ids": ([1, 2], r"prompt 1 is \[1, 2\]: expected a string"),
    "no content": ([{"role": "user"}], "prompt 1, message 0: content=None must be a string"),
    "no role": (
        [{"role": "user", "content": "x"}, {"content": "x"}],
        "prompt 1, message 1: role=None must be a string",
    ),
    "empty": ("", "prompt is empty"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_are_refused_by_number(model, name):
    prompt, message = BAD_PROMPTS[name]
    with pytest.raises(UserError, match=message):
        model.generate(["How many?", prompt])


def test_bad_sampling_arguments_are_refused(model):
    with pytest.raises(UserError, match="must be one SamplingParams, or one per prompt: 2"):
        model.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(UserError, match="sampling=3 must be one SamplingParams"):
        model.generate(["a"], 3)
    with pytest.raises(UserError, match="sampling=4 must be SamplingParams"):
        model.generate(["a"], [4])
    with pytest.raises(UserError, match="chat=False takes strings"):
        model.generate([{"role": "user", "content": "x"}], chat=False)


CYCLES = (
    Strategy("ar"),
    Strategy("orthrus"),
    Strategy("orthrus-2f", tree_nodes=5),
    Strategy("orthrus-1f", tree_nodes=5, early_blocks=1, fresh_blocks=1),
)


SETTINGS = {  # and their defaults
    "jax_enable_x64": (True, False),
    "jax_numpy_rank_promotion": ("raise", "allow"),
    "jax_numpy_dtype_promotion": ("strict", "standard"),
}


@pytest.mark.parametrize("strategy", CYCLES, ids=lambda s: s.method)
def test_text_is_the_same_under_other_settings_of_jax(model, strategy):
    options = {"temperature": 0.8, "top_k": 20, "min_new_tokens": 2, "logprobs": True}
    answers = []
    try:
        for other in (False, True):
            for name, values in SETTINGS.items():
                jax.config.update(name, values[not other])
            fresh = LLM(model.config, model.params, model.tokenizer)
            texts = fresh.generate(
                ["How many?", "12 and 30", "The"],
                max_new_tokens=9,
                batch_size=2,
                strategy=strategy,
                **options,
            )
            answers.append([completion.tokens for completion in texts])
    finally:
        for name, values in SETTINGS.items():
            jax.config.update(name, values[1])
    assert answers[0] == answers[1]


def test_fifty_prompt_lengths_compile_once_per_bucket(model):
    fresh = LLM(model.config, model.params, model.tokenizer)
    for length in range(1, 51):
        fresh.complete([[5] * length], strategy="orthrus", max_new_tokens=20)
    assert len(fresh.engine.programs.compiled) == 2  # prefill and the loop, both for one bucket
    compiled = dict(fresh.engine.programs.compiled)
    fresh.complete(
        [[5] * 65], strategy="orthrus", max_new_tokens=20
    )  # the next bucket: another prefill
    assert {key: fresh.engine.programs.compiled[key] for key in compiled} == compiled
    assert 3 <= len(fresh.engine.programs.compiled) <= 4


def test_buckets_hold_their_size_and_waste_less_than_a_quarter():
    sizes = [64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    assert sorted({bucket(n) for n in range(1, 321)}) == sizes
    for n in range(64, 5000):
        assert n <= bucket(n) < 1.25 * n
        assert bucket(bucket(n)) == bucket(n)


def test_budget_is_exact_and_eos_ends_the_answer(model):
    assert len(model.complete([[5, 6]], max_new_tokens=7)[0].tokens) == 7
    tokens = model.complete([[5, 6]], max_new_tokens=30)[0].tokens
    stop = tokens[11]
    ended = LLM(config_for(400, eos_token_ids=(stop,)), model.params, model.tokenizer).complete(
        [[5, 6]], max_new_tokens=30
    )[0]
    assert ended.tokens == tokens[: tokens.index(stop) + 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "fast"}, "method='fast' is not one of ar, orthrus"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 512}, "over the model's 512 positions"),
        ({"strategy": Strategy(draft_length=6)}, "draft_length=6 must be from 2 to 5"),
        ({"strategy": Strategy(draft_length=1)}, "draft_length=1 must be from 2 to 5"),
    ],
)
def test_bad_arguments_are_refused_with_value_and_limit(model, change, message):
    with pytest.raises(UserError, match=message):
        model.complete([[1, 2]], **change)


def test_budget_that_nobody_gave_is_what_the_positions_leave(model):
    (completion,) = model.complete([[3] * 500], min_new_tokens=12)
    assert len(completion.tokens) == 12
    with pytest.raises(UserError, match="with max_new_tokens=256 that is over the model's 512"):
        model.complete([[3] * 500], max_new_tokens=256)


def test_empty_prompts_are_refused(model):
    with pytest.raises(UserError, match="prompt is empty"):
        model.generate([""])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        model.complete([[1], []])


def test_drafting_without_a_mask_token_is_refused(model):
    bare = LLM(config_for(400, mask_token_id=None), model.params, model.tokenizer)
    with pytest.raises(UserError, match="mask_token_id"):
        bare.complete([[1]], strategy="orthrus")
    assert len(bare.complete([[1]], strategy="ar", max_new_tokens=3)[0].tokens) == 3


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    from orthrus_jax.checkpoint import save_checkpoint

    path = tmp_path_factory.mktemp("model") / "orthrus"
    save_checkpoint(path, model.config, model.params, tokenizer=model.tokenizer)
    return path


def test_command_prints_text_and_one_line_of_statistics(model, directory, capsys):
    generate.main(["--model", str(directory), "--prompt", "How many?", "--max-new-tokens", "20"])
    out = capsys.readouterr().out
    expected = model.generate(["How many?"], max_new_tokens=20)[0].text
    assert out.startswith(expected)
    assert "20 tokens | " in out.splitlines()[-1]
    for part in ("tokens/s", "acceptance length", "tokens per forward", "compile"):
        assert part in out.splitlines()[-1]


def test_json_output_has_the_agreed_fields(model, directory, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "How many?"}\n\n{"prompt": "The answer"}\n')
    arguments = ["--model", str(directory), "--prompts", str(file), "--json"]
    generate.main([*arguments, "--max-new-tokens", "9", "--no-chat"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = model.generate(["How many?", "The answer"], max_new_tokens=9, chat=False)
    assert [line["text"] for line in lines] == [c.text for c in expected]
    assert [line["token_ids"] for line in lines] == [c.tokens for c in expected]
    for line in lines:
        assert set(line) == {
            "text",
            "tokens",
            "token_ids",
            "finish_reason",
            "prompt",
            "sample",
            "acceptance_length",
            "tokens_per_forward",
            "cycles",
            "seconds",
            "compile_seconds",
            "strategies",
        }
        assert line["tokens"] == 9


def test_help_says_that_tokens_is_a_number(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert "tokens is the number of its token_ids" in " ".join(capsys.readouterr().out.split())


def test_untrained_view_is_noted_on_standard_error(directory, tmp_path, capsys):
    arguments = ["--prompt", "How many?", "--max-new-tokens", "3"]
    generate.main(["--model", str(directory), *arguments, "--mode", "orthrus"])
    assert "untrained" in capsys.readouterr().err  # random_weights copies the AR attention
    for quiet in ([], ["--mode", "ar"]):
        generate.main(["--model", str(directory), *arguments, *quiet])
        assert "untrained" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", ":1 is not a JSON object"),
        ('{"text": "x"}', ':1 is not a JSON object with a "prompt"'),
        ("", "holds no prompt"),
    ],
)
def test_bad_prompt_files_are_named(directory, tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=message):
        generate.main(["--model", str(directory), "--prompts", str(file)])


def test_logprobs_without_json_are_refused_before_a_model_is_loaded():
    with pytest.raises(UserError, match="--logprobs needs --json"):
        generate.main(["--model", "unread", "--prompt", "x", "--logprobs"])


def test_bad_model_ends_the_command_in_one_line_with_status_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "orthrus_jax.generate", "--model", str(tmp_path), "--prompt", "x"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "config.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_real_qwen3_tokenizer_and_template_work_in_generation():
    if not DATA.exists():
        pytest.skip("../shared is not here")
    from orthrus_jax.tokenizer import encode, load_tokenizer

    tokenizer = load_tokenizer(DATA / "qwen3_tokenizer")
    ids = encode(tokenizer, "What is 2+2?", chat=True)
    assert ids == [
        151644, 872, 198, 3838, 374, 220, 17, 10, 17, 30, 151645, 198, 151644, 77091, 198,
        151667, 271, 151668, 271,
    ]  # fmt: skip
    assert encode(tokenizer, "What is 2+2?", chat=True, thinking=True) == ids[:-4]
    config = config_for(151_936, mask_token_id=151_669, eos_token_ids=(151_645, 151_643))
    model = LLM(config, random_weights(config), tokenizer)
    prompts = ["What is 2+2?", "Name a prime."]
    ar = model.generate(prompts, strategy="ar", max_new_tokens=24)
    orthrus = model.generate(prompts, max_new_tokens=24)
    assert [c.text for c in orthrus] == [c.text for c in ar]
    assert all(c.text for c in ar)

"""Prompts for SmolLM2's view: training rows alone, and questions that the model writes itself."""

import gzip
import importlib
import itertools
import json
import types

import pytest

from orthrus_jax.errors import UserError
from tests.support.paths import DATA
from tests.support.tokenizers import small_tokenizer
from train import smollm2_prompts
from train.distill import DistillConfig


class Writer:
    """A model whose answers are given; the number of a round is its seed."""

    tokenizer = small_tokenizer(["what is the sum of two numbers"] * 9, 300)

    def __init__(self, *rounds: list[str]) -> None:
        self.rounds = rounds

    def complete(self, prompts, *, seed: int, max_new_tokens: int, **_) -> list:
        texts = self.rounds[seed] if seed < len(self.rounds) else []
        long = lambda text: max_new_tokens if text.endswith("...") else 9
        return [types.SimpleNamespace(text=text, tokens=[7] * long(text)) for text in texts]


def test_model_continues_an_opened_user_turn() -> None:
    prefix = smollm2_prompts.opened_turn(Writer())
    assert Writer.tokenizer.decode(prefix) == "<|im_start|>user\n"


def test_own_questions_are_ended_and_differ() -> None:
    good = ["How do I bake bread? ", "What is the capital of Peru?", "Tell me a long story."]
    rounds = [good[0], good[0], "No.", "This one was cut off and so is no question..."], good[1:]
    written = smollm2_prompts.questions_of(Writer(*rounds))
    texts = (text for _, fresh in written for text in fresh)
    assert list(itertools.islice(texts, 3)) == [text.strip() for text in good]
    with pytest.raises(UserError, match="the model writes no questions: give --own 0"):
        next(texts)


def test_killed_run_goes_on_with_the_round_that_it_was_in(tmp_path) -> None:
    rounds = ["The first question?", "The second question?"], ["The third one?"], ["The fourth?..?"]
    part, whole = tmp_path / "own.part.jsonl", Writer(*rounds)
    expected = smollm2_prompts.own_questions(whole, 4, tmp_path / "other.jsonl")

    killed, asked = Writer(*rounds), []

    def complete(*args, seed: int, **options) -> list:
        asked.append(seed)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole.complete(*args, seed=seed, **options)

    killed.complete = complete
    with pytest.raises(KeyboardInterrupt):
        smollm2_prompts.own_questions(killed, 4, part)
    assert smollm2_prompts.own_questions(killed, 4, part) == expected
    assert asked == [0, 1, 1, 2]
    assert len(set(expected)) == 4


def test_training_rows_are_written_apart_from_held_out_ones(tmp_path) -> None:
    questions = [json.dumps({"question": f"q{i}", "answer": "#### 1"}) for i in range(500)]
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress("\n".join(questions).encode()))
    rows = [{"task_id": i, "text": f"t{i}", "test_list": [f"assert {i}"]} for i in range(1, 975)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--gsm8k", str(tmp_path / "g.jsonl.gz"), "--mbpp", str(tmp_path / "m.jsonl")]
    smollm2_prompts.main([*files, "--own", "0", "--out", str(tmp_path / "out")])
    held = {
        path.stem: [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "out").iterdir()
    }
    assert {name: len(prompts) for name, prompts in held.items()} == {
        "gsm8k": 27, "gsm8k_held_out": 473, "mbpp": 374, "mbpp_held_out": 90, "own": 0,
    }  # fmt: skip
    assert held["mbpp"][0] == "t601 For example:\nassert 601"
    assert held["mbpp_held_out"][0].startswith("t511 ")


@pytest.mark.parametrize(
    "text", ["", '{"question": "q"}', '{"answer": 1}', "{", '{"question": 5}', "[]"]
)
def test_files_of_other_rows_are_refused(tmp_path, text: str) -> None:
    (tmp_path / "g.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"g\.jsonl"):
        smollm2_prompts.main(["--gsm8k", str(tmp_path / "g.jsonl"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"missing\.jsonl cannot be read: No such file"):
        smollm2_prompts.gsm8k(str(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_id": "7"}, r'm\.jsonl:2: expected a "task_id", a whole number'),
        ({"text": None}, r'm\.jsonl:2: expected a "text", a text'),
        ({"test_list": "assert"}, r'm\.jsonl:2: expected a "test_list", a list'),
        ({"test_list": []}, r"--mbpp .*m\.jsonl: the task 602 has no test"),
    ],
)
def test_damaged_row_of_mbpp_is_named(tmp_path, change, message: str) -> None:
    rows = [{"task_id": i, "text": f"t{i}", "test_list": ["assert 1"]} for i in (601, 602)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, [rows[0], rows[1] | change])))
    with pytest.raises(UserError, match=message):
        smollm2_prompts.mbpp(str(tmp_path / "m.jsonl"), 601, 974)


def test_model_that_is_not_there_is_refused_before_anything_is_written(tmp_path) -> None:
    (tmp_path / "g.jsonl").write_text('{"question": "q"}\n' * 500)
    rows = [{"task_id": i, "text": "t", "test_list": ["assert 1"]} for i in (511, 601)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--gsm8k", str(tmp_path / "g.jsonl"), "--mbpp", str(tmp_path / "m.jsonl")]
    with pytest.raises(UserError, match="absent cannot be loaded"):
        smollm2_prompts.main(
            [*files, "--model", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_configuration_takes_no_more_prompts_than_there_are() -> None:
    config = importlib.import_module("configs.smollm2").get_config()
    options = DistillConfig.of(config)
    weights = [weight for _, weight in options.sources]
    assert sum(weights) == options.prompts
    assert weights[1] <= 374
    assert all("test" not in name for name, _ in (*options.sources, *config.train.eval_sources))


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_no_test_question_is_among_the_prompts() -> None:
    train = {row["prompt"] for row in smollm2_prompts.gsm8k(str(DATA / "gsm8k_train.jsonl.gz"))}
    test = (DATA / "gsm8k_test_first1000.jsonl").read_text().splitlines()
    assert not train & {json.loads(line)["question"] for line in test}

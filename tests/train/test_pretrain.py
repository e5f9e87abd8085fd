"""A base trained from a file: its tokenizer, its rows, and unusable files."""

import itertools
import json

import pytest

from configs import small
from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import decode
from train import pretrain

ROWS = [
    {"question": f"What are {i} and {i}?", "answer": f"{i + i}\n#### {i + i}"} for i in range(9)
]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"question": "no answer"}]))
    c = small.get_config()
    c.pretrain.data = str(path)
    c.model.vocab_size = 320
    return c


def test_epoch_trains_on_every_row_once_in_its_own_order(config):
    tokenizer = pretrain.train_tokenizer(pretrain.texts(config), config.model.vocab_size)
    endless = pretrain.dialogues(config, tokenizer)
    epochs = [list(itertools.islice(endless, len(ROWS))) for _ in range(2)]
    answers = [[decode(tokenizer, talk.segments[1]) for talk in epoch] for epoch in epochs]
    for epoch in answers:
        assert sorted(epoch) == sorted(row["answer"] for row in ROWS)
    assert answers[0] != answers[1]


def test_tokenizer_is_trained_on_questions_and_answers(config):
    assert pretrain.texts(config)[0] == "What are 0 and 0?\n0\n#### 0"
    assert len(pretrain.texts(config)) == len(ROWS) + 1


def test_file_without_answers_is_refused_with_the_reasons(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "no answer"}\n')
    tokenizer = pretrain.train_tokenizer(["a few words"], 300)
    with pytest.raises(UserError, match=r"rows\.jsonl has no row with .* \(1 no answer\)"):
        next(pretrain.dialogues(config, tokenizer))


def test_missing_file_is_named(config, tmp_path):
    config.pretrain.data = str(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"none\.jsonl is not there"):
        pretrain.texts(config)

"""The log of a training run on resume: what is kept, what is cut off."""

import json

import pytest

from configs import tiny
from orthrus_jax.files import read_jsonl
from train import model_card
from train.log import Log

# str.splitlines splits at all three; JSON does not, and they may stand in a decoded sample.
SAMPLE = "one\u2028two\u2029three\u0085four"


def record(step):
    return {"step": step, "loss": 1 / step, "kl": [0.5, 0.25], "sample": f"{SAMPLE} {step}"}


def records(run):
    return [value for _, value in read_jsonl(run / "train.jsonl")]


@pytest.fixture
def run(tmp_path):
    with Log(tmp_path, 0) as log:
        for step in range(1, 5):
            log.write(record(step))
    return tmp_path


def test_resumed_log_keeps_records_up_to_the_checkpoint(run):
    assert records(run) == [record(step) for step in range(1, 5)]
    with Log(run, 3) as log:
        log.write(record(4) | {"loss": 7.0})
    assert records(run) == [*map(record, range(1, 4)), record(4) | {"loss": 7.0}]
    assert [path.name for path in run.iterdir() if path.is_file()] == ["train.jsonl"]


def test_resumed_log_drops_a_torn_last_line(run):
    with (run / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record(5), ensure_ascii=False)[:-9])
    with Log(run, 9) as log:
        log.write(record(6))
    assert [value["step"] for value in records(run)] == [1, 2, 3, 4, 6]


def test_model_card_reads_the_last_record(run):
    with Log(run, 4) as log:
        log.write(record(5) | {"acceptance_length": 3.25, "tokens_per_forward": 2.125})
    config = tiny.get_config()
    model_card.write(run / "README.md", config, run)
    text = (run / "README.md").read_text(encoding="utf-8")
    assert "training loss at step 5: 0.2000" in text
    assert "acceptance length 3.25 of 7 drafts" in text

"""The training commands end to end on a miniature, and their errors for bad input."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import orthrus_jax
from eval import demo
from orthrus_jax.checkpoint import HEAD_FILE
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine.planner import Calibration, Measurement
from orthrus_jax.errors import UserError
from orthrus_jax.files import read_jsonl
from orthrus_jax.model import REMAT, params
from orthrus_jax.model.pairwise import HEAD
from tests.support.paths import ROOT
from tests.support.training import miniature
from train import distill, head, pretrain
from train import main as train_main
from train.log import Log
from train.objective import objective_of


def records(run):
    return [record for _, record in read_jsonl(run / "train.jsonl")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("demo")
    config = miniature(run)
    pretrain.main(config, overwrite=False)
    train_main.main(config, overwrite=False)
    return run


def test_base_is_a_plain_qwen3_with_tokenizer_and_template(run):
    raw = json.loads((run / "base" / "config.json").read_text())
    assert raw["architectures"] == ["Qwen3ForCausalLM"]
    assert raw["dtype"] == "bfloat16"
    base = orthrus_jax.load(run / "base")
    prompt = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi 12"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n"
    digits = base.tokenizer("Hi 12", add_special_tokens=False)["input_ids"][-2:]
    assert [base.tokenizer.decode([i]) for i in digits] == ["1", "2"]
    assert len(base.tokenizer) <= base.config.mask_token_id  # no text contains MASK's id


def test_export_holds_the_base_unchanged_and_a_trained_view(run):
    base = orthrus_jax.load(run / "base", dtype="float32")
    model = orthrus_jax.load(run / "model")
    assert model.config.block_size == 6
    frozen, diffusion = params.split(model.params)
    untouched, copy = params.split(base.params)
    same = lambda a, b: all(
        bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert same(frozen, untouched)
    assert not same(diffusion, copy)


def test_responses_are_greedy_answers_of_the_base(run):
    base = orthrus_jax.load(run / "base", dtype="float32")
    (shard,) = (run / "responses").glob("responses-*.parquet")
    rows = pq.read_table(shard).to_pylist()
    assert len(rows) == 24
    for row in rows[:4]:
        (answer,) = base.complete([row["prompt_ids"]], strategy="ar", max_new_tokens=24)
        assert row["answer_ids"] == answer.tokens
        assert row["truncated"] == (answer.tokens[-1] not in base.config.eos_token_ids)


def test_log_holds_loss_and_decoded_acceptance(run):
    *log, last = records(run)
    assert [record["step"] for record in log] == [1, 2, 4, 6, 8]
    assert [record["step"] for record in log if "acceptance_length" in record] == [4, 8]
    assert last["step"] == 8
    assert last["plain_acceptance_length"] == log[-1]["acceptance_length"]
    kept = last["pairwise_acceptance_length"] > last["plain_acceptance_length"]
    assert (run / "model" / HEAD_FILE).exists() == kept


def test_head_of_a_finished_run_is_trained_by_its_own_command(run, tmp_path, monkeypatch, capsys):
    """It draws on the run's rows, says what it did, and leaves the model's weights as they are."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "model" / HEAD_FILE).unlink(missing_ok=True)
    config = miniature(copy)
    config.base, config.head.rank = str(run / "base"), 5
    stale = Measurement(Strategy("orthrus", 6, early_blocks=0), 2.0, (1.9, 2.1), 2.0, 1.0, 1.0)
    Calibration((stale,), about={"prompts": 1}, draft_temperature=0.5).save(copy / "model")
    before = (copy / "model" / "model.safetensors").read_bytes()
    score = lambda tree: {"acceptance_length": 1.0 + (HEAD in tree), "tokens_per_forward": 1.0}
    monkeypatch.setattr(head, "held_out", lambda config, setup, frozen: score)
    head.main(config)
    assert "pairwise head written" in capsys.readouterr().out
    model = orthrus_jax.load(copy / "model")
    assert model.params[HEAD]["previous"]["table"].shape == (400, 5)
    assert (copy / "model" / "model.safetensors").read_bytes() == before
    assert "with the pairwise head (rank 5, table" in (copy / "model" / "README.md").read_text()
    assert model.calibration.measurements == ()
    assert model.calibration.draft_temperature == 1.0
    prompt = [[3, 4, 5]]
    with_head, without = (
        model.complete(prompt, strategy=Strategy(pairwise=on), max_new_tokens=12)[0].tokens
        for on in (True, False)
    )
    assert with_head == without


def test_head_of_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no finished training: run train\.main first"):
        head.main(miniature(tmp_path / "absent"))
    config = miniature(tmp_path)
    config.head.kind = "pair"
    with pytest.raises(UserError, match=r"config\.head\.kind='pair' is not one of table, map"):
        head.main(config)
    assert not list(tmp_path.iterdir())


def test_demo_report_has_its_fields_and_an_exact_match_of_one(run, capsys, monkeypatch):
    monkeypatch.setattr(demo, "LARGER", {"hidden_size": 48})  # saves seconds
    demo.main(["--run", str(run), "--prompts", "6", "--repeats", "2"])
    report = json.loads((run / "report.json").read_text())
    assert report["exact_match"] == 1.0
    assert report["accuracy_ar"] == report["accuracy_orthrus"]
    assert report["base_parameters"] > report["trained_parameters"] > 0
    assert set(report["seconds"]) == {*("distill", "pack", "train", "head", "export", "measure")}
    for name in ("acceptance_length", "tokens_per_forward", "tokens_per_forward_pooled"):
        assert report[name] >= 0
    assert report["speedup"] > 0
    assert len(report["acceptance_by_position"]) == report["block_size"] - 1
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "speedup" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("accumulate", "message"),
    [
        (0, r"config\.train\.accumulate=0 must be at least 1"),
        (3, r"does not divide into train\.accumulate=3 "),
    ],
)
def test_micro_batches_that_do_not_divide_are_refused(run, tmp_path, accumulate, message):
    config = miniature(tmp_path)
    config.train.accumulate = accumulate
    with pytest.raises(UserError, match=message):
        train_main.main(config, overwrite=False)
    assert not list(tmp_path.iterdir())  # refused before any work


def test_outputs_are_not_overwritten_by_default(run, capsys):
    config = miniature(run)
    with pytest.raises(UserError, match="base is not empty"):
        pretrain.main(config, overwrite=False)
    model = run / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    train_main.main(config, overwrite=False)
    assert "is finished: its model was trained for 8 steps" in capsys.readouterr().out
    assert model.stat().st_mtime_ns == before


def test_stopped_run_resumes_to_the_same_bytes(run, tmp_path, monkeypatch, capsys):
    config = miniature(tmp_path)
    config.base = str(run / "base")
    write = Log.write

    def write_and_stop(log, record):
        write(log, record)
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write", write_and_stop)
        train_main.main(config, overwrite=False)
    assert "the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "model").exists()
    changed = miniature(tmp_path)
    changed.base, changed.train.anchors = config.base, 5
    with pytest.raises(UserError, match=r"begun with train\.anchors=6, now 5"):
        train_main.main(changed, overwrite=False)
    train_main.main(config, overwrite=False)
    assert "going on from step 5" in capsys.readouterr().out
    weights = [path / "model" / "model.safetensors" for path in (run, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 4, 5, 6, 8, 8]
    assert records(tmp_path)[-1] == records(run)[-1]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "acceptance length" in card
    assert '"anchors": 6' in card


def test_stacked_layers_train_decode_and_export_like_single_ones(run, tmp_path):
    """The same run over stacked layers, which hold each weight once."""
    config = miniature(tmp_path)
    config.base, config.responses = str(run / "base"), str(run / "responses")
    config.train.update(stack_layers=True, remat="full")
    train_main.main(config, overwrite=False)
    ours, theirs = (params.split(orthrus_jax.load(d / "model").params) for d in (tmp_path, run))
    for ours_leaf, theirs_leaf in zip(*map(jax.tree.leaves, (ours[0], theirs[0])), strict=True):
        assert (ours_leaf == theirs_leaf).all()
    for ours_leaf, theirs_leaf in zip(*map(jax.tree.leaves, (ours[1], theirs[1])), strict=True):
        np.testing.assert_allclose(ours_leaf, theirs_leaf, atol=1e-4)
    logs = [records(directory) for directory in (tmp_path, run)]
    # A KL is a difference of log-probabilities of order one: its rounding does not shrink with it.
    for name, tolerance in ("loss", 16 * np.finfo(np.float32).eps), ("acceptance_length", 0):
        measured, expected = ([r[name] for r in log if name in r] for log in logs)
        np.testing.assert_allclose(measured, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "name", ["qwen3_0_6b", "qwen3_1_7b", "qwen3_4b", "qwen3_8b", "small", "tiny"]
)
def test_configurations_are_accepted_by_training(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    objective_of(config.train)
    assert distill.DistillConfig.of(config).prompts > 0
    t = config.train
    assert t.batch_size % t.accumulate == 0
    assert t.remat in REMAT
    if name not in ("small", "tiny"):  # the paper's
        assert (t.batch_size, t.anchors, t.block_size, t.row_length) == (128, 256, 32, 2048)
        assert name.replace("_", "-").replace("qwen3-", "").replace("-", ".", 1).rstrip("b") in (
            config.base.lower()
        )


def test_demo_report_without_training_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished training"):
        demo.main(["--run", str(tmp_path)])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.nope=3", "the configuration has no key 'nope'"),
        ("--config.train.steps=many", "invalid literal for int() with base 10: 'many'"),
        ("--config=missing.py", "No such file or directory: 'missing.py'"),
        ("--bogus", "Unknown command line flag 'bogus'"),
        ("stray", "unexpected argument 'stray'"),
        ("--config.base=nowhere", "nowhere"),
    ],
)
def test_bad_command_line_ends_in_one_line_and_status_2(tmp_path, argument, message):
    process = subprocess.run(
        [sys.executable, "-m", "train.main", argument, f"--config.run={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert process.returncode == 2
    assert message in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("command", ["main", "distill"])
def test_help_exits_with_0(command):
    process = subprocess.run(
        [sys.executable, "-m", f"train.{command}", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert f"`python -m train.{command} --config" in process.stdout
    assert "--config.NAME=VALUE" in process.stdout

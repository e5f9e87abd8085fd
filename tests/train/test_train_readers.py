"""Damaged files for the readers of train/: each is read, or refused with a UserError."""

import json
import pathlib
import shutil

import pytest
from hypothesis import strategies as st

from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import encode_messages
from tests.support.fuzzing import VALUES, both_profiles, check_reader, damaged_json, damaged_lines
from tests.support.tokenizers import small_tokenizer
from tests.support.training import miniature
from train import cli, data, distill, log, recipe, settings
from train.distill_config import DistillConfig
from train.prompts import Mix
from train.responses import Responses, read_responses

TALK = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]
ROWS = [
    {"prompt": "One?", "response": "1", "finish_reason": "stop"},
    {"question": "One?", "answer": "1<|im_end|>", "truncated": True},
    {"messages": TALK[:1], "output": "1"},
    {"messages": [*TALK, *TALK]},
    {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]},
]
CONFIG = """import pathlib
from tests.support.training import miniature

def get_config():
    config = miniature(pathlib.Path("run"))
    config.train.steps = 100
    return config
"""


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(["One? Two? 1 2"], 300)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, tokenizer):
    """A directory of responses, complete, whose shard holds one row."""
    out = tmp_path_factory.mktemp("distilled")
    options = DistillConfig(sources=(("problems", 1),), prompts=1, seed=0)
    job = distill.DistillJob(options, {"weights": "w", "tokenizer": "t", "dtype": "x"}, out, {})
    row = {"prompt": json.dumps(TALK[:1]), "prompt_ids": [5, 6], "answer_ids": [7, 2]}
    row |= {"response": "1", "source": "problems", "truncated": False, "finish_reason": "stop"}
    stats = json.dumps({"sources": {}, "seconds": 0.0, "compile_seconds": 0.0})
    schema = distill.SCHEMA.with_metadata({distill.STATS: stats})
    distill._write_parquet(
        out / options.shard_names()[0], [distill.pa.Table.from_pylist([row], schema)]
    )
    job.write_manifest({"asked": {}, "read": {}, "skipped": {}})
    return out


@both_profiles
def test_prompts_of_a_source(slow, tmp_path, tokenizer):
    encode = lambda messages: encode_messages(tokenizer, messages)
    rows = [{"prompt": "One?"}, {"question": "Two?"}, {"messages": TALK}, ROWS[-1]]
    check_reader(
        lambda path: list(Mix([(str(path), 1)], 2, 0, encode=encode, max_tokens=100)),
        slow=slow,
        path=tmp_path / "prompts.jsonl",
        contents=damaged_lines(rows),
    )


@both_profiles
def test_responses_of_other_engines(slow, tmp_path, tokenizer):
    check_reader(
        lambda path: [dialogue.arrays() for dialogue in Responses(path, tokenizer)],
        slow=slow,
        path=tmp_path / "theirs.jsonl",
        contents=damaged_lines(ROWS),
    )


@both_profiles
def test_manifest_of_responses(slow, tmp_path, tokenizer, distilled):
    shutil.copytree(distilled, tmp_path / "out")
    manifest = json.loads((distilled / "manifest.json").read_text())
    assert len(list(read_responses(distilled, tokenizer))) == 1
    check_reader(
        lambda path: list(read_responses(path.parent, tokenizer)),
        slow=slow,
        path=tmp_path / "out" / "manifest.json",
        contents=damaged_json(manifest),
    )


def test_shard_cut_anywhere_is_refused(tmp_path, tokenizer, distilled):
    shutil.copytree(distilled, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("responses-*")
    whole = shard.read_bytes()
    for size in range(0, len(whole), 37):
        shard.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is damaged"):
            list(read_responses(tmp_path / "out", tokenizer))


@both_profiles
def test_recipe(slow, tmp_path):
    config = miniature(tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    recipe.write(tmp_path, config)
    valid = json.loads((tmp_path / "recipe.json").read_text())
    check_reader(
        lambda path: recipe.progress(path.parent, config, change=False),
        slow=slow,
        path=tmp_path / "recipe.json",
        contents=damaged_json(valid),
    )


@both_profiles
def test_recipe_of_rows(slow, tmp_path):
    talk = [data.TokenizedDialogue([1], [2, 3])]
    fixed = {"length": 8, "pad": 0, "recipe": {"responses": "x"}}
    data.write_rows(tmp_path / "rows", talk, **fixed)
    valid = json.loads((tmp_path / "rows" / "rows.json").read_text())
    check_reader(
        lambda path: data.write_rows(path.parent, talk, **fixed),
        slow=slow,
        path=tmp_path / "rows" / "rows.json",
        contents=damaged_json(valid),
    )


@both_profiles
def test_log_that_a_run_goes_on_with(slow, tmp_path):
    records = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0, "sample": "\u2028"}]
    check_reader(
        lambda path: [record["step"] + 1 for record in log._records(path)],
        slow=slow,
        path=tmp_path / "train.jsonl",
        contents=damaged_lines(records),
    )


def read_config(path: pathlib.Path):
    """What every command does with its configuration before it works."""
    config = cli.load_config(str(path))
    parts = ("run", "base", "seed", "responses", "distributed", "mesh", "train", "pretrain")
    settings.check(config, *parts)
    DistillConfig.of(config)


@st.composite
def assignments(draw) -> bytes:
    """A configuration file that sets some values, existing or not, to anything."""
    config = miniature(pathlib.Path("run"))
    parts = ("train", "distill", "mesh", "pretrain")
    names = [f"{part}.{key}" for part in parts for key in config[part]]
    names += ["seed", "run", "base", "responses", "distributed", "train", "distill", "mesh"]
    name = st.sampled_from(names) | st.sampled_from(["train.x", "x", "distill.x"])
    lines = ["    with config.unlocked(), config.ignore_type():"]
    for _ in range(draw(st.integers(1, 3))):
        part, _, key = draw(name).rpartition(".")
        place = f"config[{part!r}][{key!r}]" if part else f"config[{key!r}]"
        lines.append(f"        {place} = json.loads({json.dumps(draw(VALUES))!r})")
    text = CONFIG.replace("    config.train.steps = 100", "\n".join(lines))
    return ("import json\n" + text).encode()


@st.composite
def damaged_source(draw) -> bytes:
    start = draw(st.integers(0, len(CONFIG)))
    end = draw(st.integers(start, min(len(CONFIG), start + 12)))
    return CONFIG[:start].encode() + draw(st.binary(max_size=4)) + CONFIG[end:].encode()


@both_profiles
def test_configuration_files(slow, tmp_path):
    check_reader(
        read_config,
        slow=slow,
        path=tmp_path / "config.py",
        contents=st.one_of(assignments(), assignments(), damaged_source(), st.binary()),
    )

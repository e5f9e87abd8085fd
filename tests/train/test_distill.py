"""Responses: written by shards, resumed, refused for a changed recipe, read from other engines."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

import orthrus_jax
from orthrus_jax.checkpoint import load_checkpoint, save_checkpoint
from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import decode, encode, encode_messages, load_tokenizer
from tests.support.configs import tiny_config
from tests.support.paths import DATA
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params
from train import distill, hosts
from train.problems import problems
from train.prompts import Mix
from train.responses import read_responses

QUESTIONS = [f"How many is {i} and {'one ' * (i % 7)}more?" for i in range(14)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Qwen3 directory of random weights; a third of its vocabulary ends an answer."""
    texts = [f"{p.question}\n{p.answer}" for p in problems("train", 0, 200)]
    sizes = {"vocab_size": 400, "mask_token_id": 399, "max_position_embeddings": 512}
    config = tiny_config(**sizes, eos_token_ids=(2, 0, *range(250, 380)))
    directory = tmp_path_factory.mktemp("base") / "base"
    tokenizer = small_tokenizer(texts, 400)
    save_checkpoint(directory, config, random_params(config, 0), tokenizer=tokenizer)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "questions.jsonl"
    rows = [{"question": q} for q in QUESTIONS]
    bad = [{"question": ""}, {"question": "much " * 200}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*bad, *rows]))
    return str(path)


def config_of(run, base, source, **changes):
    """Ten prompts of two sources in shards of four."""
    c = ConfigDict()
    c.run, c.base, c.seed = str(run), str(base), 0
    c.distill = ConfigDict()
    c.distill.sources = ((source, 4), ("problems", 1))
    c.distill.prompts, c.distill.shard_size, c.distill.batch_size = 10, 4, 3
    c.distill.max_new_tokens, c.distill.max_prompt_tokens = 12, 200
    for name, value in changes.items():
        c.distill[name] = value
    return c


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, source):
    """An uninterrupted run's responses."""
    return distill.ensure_responses(config_of(tmp_path_factory.mktemp("run"), base, source))


def rows_of(out):
    return [
        row for path in sorted(out.glob("resp*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def test_shards_hold_answers_of_the_base_in_the_order_of_the_mix(whole, base, source):
    assert sorted(path.name for path in whole.iterdir()) == [
        "manifest.json",
        "prompts.parquet",
        *(f"responses-{i:05d}-of-00003.parquet" for i in range(3)),
    ]
    rows = rows_of(whole)
    model = orthrus_jax.load(base)
    mix = Mix(
        [(source, 4), ("problems", 1)],
        10,
        2,
        encode=lambda messages: encode_messages(model.tokenizer, messages),
        max_tokens=200,
    )
    for row, prompt in zip(rows, mix, strict=True):
        assert json.loads(row["prompt"]) == prompt.messages
        assert (row["prompt_ids"], row["source"]) == (prompt.ids, prompt.source)
    for row in rows[:5]:
        (answer,) = model.complete([row["prompt_ids"]], strategy="ar", max_new_tokens=12)
        assert row["answer_ids"] == answer.tokens
        assert row["response"] == answer.text
        assert row["finish_reason"] == answer.finish_reason
    for row in rows:
        assert row["truncated"] == (row["finish_reason"] == "length")
        assert row["truncated"] == (row["answer_ids"][-1] not in model.config.eos_token_ids)
    assert {row["truncated"] for row in rows} == {True, False}


def test_manifest_counts_requested_written_and_skipped_prompts(whole, source):
    manifest = json.loads((whole / "manifest.json").read_text())
    rows = rows_of(whole)
    assert manifest["complete"] is True
    assert manifest["prompts"]["asked"] == {source: 8, "problems": 2}
    assert manifest["prompts"]["skipped"][source] == {"empty prompt": 1, "over 200 tokens": 1}
    assert manifest["written"] == 10
    assert manifest["truncated"] == sum(row["truncated"] for row in rows)
    assert manifest["answer_tokens"] == sum(len(row["answer_ids"]) for row in rows)
    of_source = [row for row in rows if row["source"] == source]
    assert manifest["sources"][source]["written"] == 8
    tokens = sum(len(row["prompt_ids"]) for row in of_source)
    assert manifest["sources"][source]["prompt_tokens"] == tokens
    assert set(manifest["asked"]["model"]) == {"weights", "tokenizer", "dtype"}
    assert manifest["asked"]["temperature"] == 0.0
    assert manifest["seconds"] > 0
    assert manifest["versions"]["jax"]


@pytest.mark.parametrize("torn", [False, True])
def test_killed_run_resumes_with_the_same_answers(tmp_path, monkeypatch, whole, base, source, torn):
    config = config_of(tmp_path, base, source)
    out = tmp_path / "responses"
    answered = distill._answered

    def killed(generator, options, prompts, bar):
        if (out / "responses-00000-of-00003.parquet").exists():
            raise KeyboardInterrupt
        return answered(generator, options, prompts, bar)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "_answered", killed)
        with pytest.raises(KeyboardInterrupt):
            distill.ensure_responses(config)
    first = (out / "responses-00000-of-00003.parquet").read_bytes()
    assert json.loads((out / "manifest.json").read_text())["complete"] is False
    with pytest.raises(UserError, match="lacks shards"):
        read_responses(out, load_tokenizer(base))
    if torn:  # killed while writing the second shard; the last is complete
        (out / "responses-00001-of-00003.parquet.tmp").write_bytes(first[:100])
        last = "responses-00002-of-00003.parquet"
        (out / last).write_bytes((whole / last).read_bytes())
    distill.ensure_responses(config)
    assert (out / "responses-00000-of-00003.parquet").read_bytes() == first
    assert rows_of(out) == rows_of(whole)
    manifest, other = (json.loads((p / "manifest.json").read_text()) for p in (out, whole))
    for name in ("asked", "prompts", "sources", "shards", "complete", "written"):
        assert manifest[name] == other[name]
    assert list(out.glob("*.tmp")) == []


def test_answers_of_a_base_that_is_not_finite_are_not_stored(tmp_path, base, source):
    loaded = load_checkpoint(base)
    table = loaded.params["embed_tokens"]["embedding"] * float("nan")
    broken = loaded.params | {"embed_tokens": {"embedding": table}}
    save_checkpoint(tmp_path / "broken", loaded.config, broken, tokenizer_from=base)
    with pytest.raises(UserError, match="are not finite"):
        distill.ensure_responses(config_of(tmp_path / "run", tmp_path / "broken", source))
    assert not list(tmp_path.rglob("responses-*"))


def test_hosts_share_out_the_shards_and_write_the_same_answers(tmp_path, whole, base, source):
    """The first host has two of three shards; the second host starts before it."""
    recipe = distill.DistillConfig.of(config_of(tmp_path, base, source))
    job = distill.DistillJob(recipe, distill.model_identity(base), tmp_path, {})
    model = orthrus_jax.load(base)
    job.draw(model.tokenizer, model.config)
    job.answer(model, 1, 2)
    assert [path.name[:15] for path in tmp_path.glob("resp*")] == ["responses-00001"]
    job.answer(model, 0, 2)
    job.answer(model, 1, 2)  # nothing is left
    job.write_manifest()
    assert job.missing() == []
    assert rows_of(tmp_path) == rows_of(whole)
    manifest, other = (json.loads((p / "manifest.json").read_text()) for p in (tmp_path, whole))
    for name in ("asked", "prompts", "sources", "shards", "complete", "written"):
        assert manifest[name] == other[name]


def test_file_of_another_host_is_waited_for_and_named_when_missing(monkeypatch):
    looks, slept = iter([False, False, True]), []
    monkeypatch.setattr(hosts.time, "sleep", slept.append)
    hosts.wait_until_visible(lambda: next(looks), "here")
    assert slept == [1, 1]
    with pytest.raises(
        UserError, match=r"prompts\.parquet is not visible here.*disk that all hosts"
    ):
        hosts.wait_until_visible(lambda: False, "prompts.parquet")
    assert sum(slept) == 2 + hosts.SECONDS


def test_finished_run_loads_no_model_and_writes_nothing(whole, base, source, monkeypatch):
    monkeypatch.setattr(distill, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    distill.ensure_responses(config_of(whole.parent, base, source, batch_size=2))
    assert before == {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 13}, "max_new_tokens was 12, now 13"),
        ({"temperature": 0.5}, "temperature was 0.0, now 0.5"),
        ({"mode": "orthrus"}, "mode was 'ar', now 'orthrus'"),
        ({"sources": (("problems", 1),)}, "sources was .*, now "),
        ({"dtype": "bfloat16"}, "model.dtype was 'float32', now 'bfloat16'"),
    ],
)
def test_changed_recipe_is_refused_by_name(whole, base, source, changes, message):
    with pytest.raises(UserError, match=message) as error:
        distill.ensure_responses(config_of(whole.parent, base, source, **changes))
    assert "\n" not in str(error.value)


def test_changed_model_or_seed_is_refused_by_name(whole, base, source, tmp_path):
    config = config_of(whole.parent, base, source)
    config.seed = 5
    with pytest.raises(UserError, match="seed was 2, now 7"):
        distill.ensure_responses(config)
    other = tiny_config(vocab_size=400, mask_token_id=399, max_position_embeddings=512)
    tokenizer = load_tokenizer(base)
    save_checkpoint(tmp_path / "b", other, random_params(other, 1), tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"model\.weights was"):
        distill.ensure_responses(config_of(whole.parent, tmp_path / "b", source))


def test_overwrite_deletes_only_the_files_of_a_run(tmp_path, base, source):
    config = config_of(tmp_path, base, source, prompts=2)
    out = distill.ensure_responses(config)
    (out / "notes.txt").write_text("mine")
    config.distill.max_new_tokens = 5
    distill.ensure_responses(config, overwrite=True)
    assert (out / "notes.txt").exists()
    assert max(len(row["answer_ids"]) for row in rows_of(out)) <= 5


def test_decoding_modes_give_the_same_answers(tmp_path, base, whole, source):
    out = distill.ensure_responses(config_of(tmp_path, base, source, mode="orthrus"))
    assert rows_of(out) == rows_of(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sauces": 1}, "has no sauces"),
        ({"max_new_tokens": 2049}, "from 1 to 2048"),
        ({"prompts": 0}, "prompts=0 must be at least 1"),
        ({"mode": "fast"}, "'fast' is not one of"),
        ({"sources": ()}, r"pairs \(source, weight\)"),
        ({"sources": (("none.parquet", 1),)}, "none.parquet is not there"),
        ({"prompts": 500}, "of the 400 requested"),
    ],
)
def test_bad_recipe_is_refused_in_one_line(tmp_path, base, source, changes, message):
    with pytest.raises(UserError, match=message) as error:
        distill.ensure_responses(config_of(tmp_path, base, source, **changes))
    assert "\n" not in str(error.value)
    assert list(tmp_path.glob("responses/responses-*")) == []


def test_responses_are_read_as_they_were_decoded(whole, base):
    responses = read_responses(whole, load_tokenizer(base))
    for _ in range(2):  # each iteration reads the files again
        talk = [tuple(part.tolist() for part in c.segments) for c in responses]
        assert talk == [(row["prompt_ids"], row["answer_ids"]) for row in rows_of(whole)]
        assert (responses.read, responses.skipped) == (10, {})
    assert responses.identity == read_responses(whole, load_tokenizer(base)).identity


def test_ids_of_another_tokenizer_are_refused(whole, base, tmp_path):
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="ids of another tokenizer"):
        read_responses(whole, load_tokenizer(tmp_path))


TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
]
FOREIGN = [
    {"prompt": "One?", "response": "1"},
    {"question": "One?", "answer": "1<|im_end|>"},
    {"messages": TALK[:1], "output": "1", "finish_reason": "stop"},
    {"prompt": "One?", "response": "1", "truncated": True},
    {"prompt": "One?", "response": "1", "finish_reason": "length"},
    {"messages": TALK[:2]},
    {"messages": [*TALK, {"role": "assistant", "content": "2"}]},
    {"messages": TALK, "response": "2"},
]
BAD = {
    "no answer": {"prompt": "One?"},
    "no prompt": {"response": "1"},
    "empty prompt": {"prompt": "", "response": "1"},
    "empty answer": {"prompt": "One?", "response": " \n"},
    "answer of wrong type": {"prompt": "One?", "response": ["1"]},
    "an answer among the messages, and another in its own column": {
        "messages": TALK[:2],
        "response": "2",
    },
}


def test_responses_of_other_engines_become_the_same_ids(base, tmp_path):
    tokenizer = load_tokenizer(base)
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*FOREIGN, *BAD.values()]) + "{\n")
    responses = read_responses(path, tokenizer)
    talk = [[decode(tokenizer, list(s)) for s in c.segments] for c in responses]
    ids = [c.arrays()[0].tolist() for c in responses]
    end = tokenizer.eos_token_id
    prompt = encode(tokenizer, "One?", chat=True)
    one = tokenizer("1", add_special_tokens=False)["input_ids"]
    for i in (0, 1, 2, 5):
        assert ids[i] == [*prompt, *one, end]
    for i in (3, 4):
        assert ids[i] == [*prompt, *one]
    first, second = ids[6], ids[7]
    assert first == second  # every answer of a dialogue, or only its last, is answer
    assert [len(parts) for parts in talk[6:]] == [4, 2]
    assert responses.read == len(FOREIGN) + len(BAD) + 1
    assert responses.skipped == dict.fromkeys((*BAD, "not JSON"), 1)


def test_parquet_of_another_engine_is_read(base, tmp_path):
    rows = [{"messages": TALK[:1], "response": "1", "model": "x"}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    responses = read_responses(tmp_path, load_tokenizer(base))
    assert len(list(responses)) == 3
    with pytest.raises(UserError, match="is not there"):
        read_responses(tmp_path / "b.parquet", load_tokenizer(base))


@pytest.mark.skipif(not (DATA / "qwen3_tokenizer").is_dir(), reason="needs shared/data")
def test_answer_with_a_thinking_part_gets_the_thinking_prompt(tmp_path):
    tokenizer = load_tokenizer(DATA / "qwen3_tokenizer")
    rows = [{"prompt": "2+2?", "response": "4"}, {"prompt": "2+2?", "response": "<think>\n4"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, thought = read_responses(tmp_path / "x.jsonl", tokenizer)
    prompt = lambda thinking: encode(tokenizer, "2+2?", chat=True, thinking=thinking)
    assert plain.segments[0] == prompt(False)
    assert thought.segments[0] == prompt(True) != prompt(False)

"""Sources, the formats of a row's prompt, and the mix, on files small enough to count."""

import collections
import gzip
import itertools
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orthrus_jax.errors import UserError
from tests.support.paths import DATA
from train.problems import problems
from train.prompts import BUFFER, Mix, Skip, file_rows, parse_source, prompt_of, shares

USER = [{"role": "user", "content": "Hi"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(messages):
    """Replaces a tokenizer: one id per word."""
    return [len(word) for message in messages for word in message["content"].split()]


def mix(sources, total, seed=0, max_tokens=100):
    return Mix(sources, total, seed, encode=words, max_tokens=max_tokens)


@pytest.fixture
def sources(tmp_path):
    """Two files of 40 questions each; every question names its file."""
    return [
        write(tmp_path / f"{name}.jsonl", [{"question": f"{name} {i}"} for i in range(40)])
        for name in ("a", "b")
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi"},
        {"prompt": USER},
        {"question": "Hi", "answer": "Ho"},
        {"problem": "Hi", "messages": [{"role": "user", "content": "another"}]},
        {"messages": [*USER, {"role": "assistant", "content": "Ho"}, *USER]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"input": USER, "output": "Ho", "category": "math"},
        {"prompt": None, "messages": [{"role": "system", "content": " "}, *USER]},
    ],
)
def test_prompt_is_found_in_every_known_column(row):
    assert prompt_of(row) == USER


def test_prompt_keeps_system_messages_and_all_turns_before_the_first_answer():
    prompt = [{"role": "system", "content": "Be brief."}, *USER, *USER]
    assert prompt_of({"messages": [*prompt, {"role": "assistant", "content": "Ho"}]}) == prompt


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("Hi", "not an object"),
        ({"text": "Hi"}, "no prompt"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": " \n"}, "empty prompt"),
        ({"messages": [{"role": "user", "content": "-"}]}, "empty prompt"),
        ({"messages": [{"role": "assistant", "content": "Ho"}, *USER]}, "empty prompt"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "empty prompt"),
        ({"prompt": 3}, "prompt of wrong type"),
        ({"input": "Hi"}, "input of wrong type"),
        ({"messages": ["Hi"]}, "a message of wrong type"),
        ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "a message of wrong type"),
        (
            {"messages": [{"role": "tool", "content": "3"}]},
            "a message by a tool or an unknown role",
        ),
    ],
)
def test_row_without_a_prompt_is_skipped_with_a_reason(row, reason):
    with pytest.raises(Skip) as skip:
        prompt_of(row)
    assert str(skip.value) == reason


def test_file_formats_give_the_same_rows(tmp_path):
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    plain = tmp_path / "plain.jsonl"
    write(plain, rows)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "table.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "uuid": "x"} for row in rows]), table)
    for path in (plain, packed, table):
        assert list(file_rows(path)) == rows
    assert [row["prompt"] for row in parse_source(f"{tmp_path}/p*").rows(0)] == ["one", "two"] * 2
    assert len(list(parse_source(str(tmp_path)).rows(0))) == 6


@pytest.mark.skipif(not (DATA / "gsm8k_train.jsonl.gz").exists(), reason="needs shared/data")
def test_gsm8k_is_a_source():
    prompts = list(itertools.islice(mix([(str(DATA / "gsm8k_train.jsonl.gz"), 1)], 50), 50))
    assert len({prompt.messages[0]["content"] for prompt in prompts}) == 50


def test_weights_become_exact_counts():
    assert shares([1, 1, 1], 600_000) == [200_000] * 3
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([3, 1], 10) == [8, 2]  # 7.5 and 2.5: the first of equal remainders
    assert shares([0.2, 0.1], 3) == [2, 1]
    assert sum(shares([5, 3, 0.7, 1.1], 997)) == 997


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("nan")]])
def test_weights_that_are_not_positive_are_refused(weights):
    with pytest.raises(UserError, match="weights above 0"):
        shares(weights, 3)


def test_mix_has_the_exact_ratio_and_interleaves(sources):
    a, b = sources
    prompts = list(mix([(a, 2), (b, 1)], 30))
    names = [prompt.source for prompt in prompts]
    assert collections.Counter(names) == {a: 20, b: 10}
    assert b in names[:15]
    assert b in names[15:]
    texts = [prompt.messages[0]["content"] for prompt in prompts]
    assert len(set(texts)) == 30
    assert all(prompt.messages[0]["content"][0] == prompt.source[-7] for prompt in prompts)
    assert prompts[0].ids == words(prompts[0].messages)


def test_mix_is_a_function_of_its_seed(sources):
    texts = lambda seed: [p.messages for p in mix([(s, 1) for s in sources], 30, seed)]
    assert texts(3) == texts(3)
    assert texts(3) != texts(4)
    assert texts(3) != sorted(texts(3), key=str)


def test_mix_reads_no_more_than_it_needs(tmp_path):
    path = write(tmp_path / "long.jsonl", ({"prompt": f"p {i}"} for i in range(BUFFER + 5000)))
    mixed = mix([(path, 1)], 100)
    assert len(list(itertools.islice(mixed, 100))) == 100
    assert mixed.read[path] <= BUFFER + 100


def test_bad_rows_are_counted_by_reason_and_source(tmp_path, sources):
    bad = tmp_path / "bad.jsonl"
    good = [{"prompt": f"number {i}"} for i in range(5)]
    write(bad, [*good, {"prompt": ""}, {"prompt": "a b c d e"}, {"text": "x"}, 7])
    with bad.open("ab") as file:
        file.write(b'{"prompt": "cut\n\n\xff\n')
    mixed = mix([(str(bad), 1), (sources[0], 1)], 10, max_tokens=4)
    assert len(list(mixed)) == 10
    assert mixed.skipped[str(bad)] == {
        "empty prompt": 1,
        "over 4 tokens": 1,
        "no prompt": 1,
        "not an object": 1,
        "not JSON": 1,
        "not UTF-8": 1,
    }
    assert mixed.read[str(bad)] == 11
    assert mixed.skipped[sources[0]] == {}


def test_source_with_too_few_prompts_is_refused_with_the_skip_reasons(tmp_path):
    path = write(tmp_path / "few.jsonl", [{"prompt": "one"}, {"prompt": ""}])
    with pytest.raises(UserError) as error:
        list(mix([(path, 1)], 3))
    message = str(error.value)
    assert "has 1 prompts of the 3 requested (skipped: 1 empty prompt)" in message
    assert "\n" not in message


def test_made_problems_are_a_source_in_their_own_order():
    texts = lambda *a: [p.question for p in problems(*a)]
    questions = lambda source: [p.messages[0]["content"] for p in mix([(source, 1)], 5, seed=7)]
    assert questions("problems") == texts("train", 7, 5)
    assert questions("problems?split=held-out&seed=3") == texts("held-out", 3, 5)


def test_hub_source_is_streamed_with_its_options(monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return iter([{"messages": USER}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (prompt,) = mix([("owner/set?split=math&config=main&revision=abc", 1)], 1)
    assert prompt.messages == USER
    options = {"split": "math", "revision": "abc", "streaming": True}
    assert calls == [(("owner/set", "main"), options)]


def test_unreachable_hub_is_reported_in_one_line_with_both_remedies(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as error:
        list(mix([("owner/set", 1)], 1))
    message = str(error.value)
    assert "\n" not in message
    for part in ("owner/set", "no route to host", "go online", "local files", ".parquet"):
        assert part in message


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nowhere"], "no hub id owner/name"),
        (["owner/set?splt=x"], "known: config, split, revision"),
        (["problems?seed=x"], "seed that is no whole number"),
        (["problems?seed"], "seed that is no whole number"),
        (["problems?count=3"], "the option count; known: split, seed"),
        (["a.jsonl?split=x"], "known: none"),
        (["problems", "problems"], "given twice"),
    ],
)
def test_bad_sources_are_refused_before_reading(sources, message):
    with pytest.raises(UserError, match=message):
        mix([(source, 1) for source in sources], 1)


def test_missing_and_damaged_files_are_reported_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.parquet is not there: .*owner/name.*hub"):
        list(mix([(str(tmp_path / "none.parquet"), 1)], 1))
    for name, content in (("x.parquet", b"PAR1 no"), ("x.jsonl.gz", gzip.compress(b"{}")[:-4])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read") as error:
            list(mix([(str(tmp_path / name), 1)], 1))
        assert "\n" not in str(error.value)

"""The audit's command: its table, its exit status, and what it refuses."""

import dataclasses
import json
import shutil

import pytest

from eval import audit as audit_module
from eval import audit_law, lossless
from eval.audit import Options
from eval.lossless import audit
from eval.reference import near_tie
from orthrus_jax.checkpoint import read_config
from orthrus_jax.decoding import speculative
from orthrus_jax.errors import UserError
from tests.support.audits import NAMES, always_accept_equal, audited, tiny_model

slow = pytest.mark.slow  # each of these compiles an audit of its own


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ["What is 7 times 8?", "Tom has 12 apples and buys 30 more. How many has he?"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def arguments(directory, prompts, *more: str) -> list[str]:
    sizes = ["--max-new-tokens", "60", "--seeds", "2", "--batch-size", "4"]
    return ["--model", str(directory), "--prompts", str(prompts), *sizes, *more]


@slow
def test_command_audits_the_demo_base(tiny_base, prompts, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    lossless.main(arguments(tiny_base, prompts, "--dtype", "bfloat16", "--json", str(out)))
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    config = dataclasses.replace(read_config(tiny_base).config, dtype="bfloat16")
    assert text.endswith("\nPASS\n")
    assert result["failures"] == []
    assert result["dtype"] == "bfloat16"
    assert result["near_tie"] == pytest.approx(near_tie(config))
    assert set(result["parts"]) == set(audit_module.PARTS)
    assert result["parts"]["greedy"]["texts"] == 2
    assert result["parts"]["rejection"]["texts"] == 4
    assert f"near-tie: {result['near_tie']:.4g}" in text
    for name in ("Orthrus", "AR, batch 1", "AR, no cache"):
        assert f"| greedy | {name} | 2 | " in text


@slow
def test_command_without_a_verdict_keeps_what_it_measured(
    tiny_base, prompts, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(lossless, "check_enough", lambda requests: None)
    monkeypatch.setattr(audit_law, "LEAST_TOKENS", 10**6)
    out = tmp_path / "out.json"
    parts = ["--parts", "greedy,rejection", "--dtype", "float32", "--json", str(out)]
    with pytest.raises(UserError, match="sampled tokens say nothing of a distribution: raise"):
        lossless.main(arguments(tiny_base, prompts, *parts))
    assert capsys.readouterr().out.endswith("\nPASS of greedy; no verdict on rejection\n")
    assert json.loads(out.read_text())["parts"]["greedy"]["orthrus"]["exact_match"] == 1.0


def test_command_names_the_failure_and_exits_1(
    tiny_base, prompts, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(speculative, "accept_equal", always_accept_equal)
    other, out = tmp_path / "model", tmp_path / "out.json"
    shutil.copytree(tiny_base, other)
    config = json.loads((other / "config.json").read_text())
    config["max_position_embeddings"] = next(NAMES)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        lossless.main(arguments(other, prompts, "--parts", "greedy", "--json", str(out)))
    assert end.value.code == 1
    text, failures = capsys.readouterr().out, json.loads(out.read_text())["failures"]
    first = failures[0]
    assert (first["part"], first["text"], first["why"]) == ("greedy", "orthrus", "one row")
    assert f"greedy: prompt {first['prompt']}, seed 0, position {first['position']}: " in text
    assert f"emitted {first['token']}, AR takes {first['ar_token']}: gap " in text
    assert f"FAIL: {len(failures)} failures" in text


BAD = {
    "no limit": (["--limit", "0"], "--limit 0 must be at least 1"),
    "no seeds": (["--seeds", "0"], "--seeds 0 must be at least 1"),
    "cold": (["--temperature", "0"], "--temperature 0 leaves nothing to sample"),
    "colder": (["--temperature", "-1"], "temperature=-1.0 must be 0 or more"),
    "no such part": (["--parts", "greedy,beam"], "--parts names beam: expected some of greedy"),
    "a negative tie": (["--near-tie", "-1"], "--near-tie -1.0 must be 0 or more"),
    "a tie that is no number": (["--near-tie", "nan"], "--near-tie nan must be 0 or more"),
    "no tokens": (["--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
    "no batch": (["--batch-size", "0"], "batch_size=0 must be at least 1"),
    "no draft": (["--draft-length", "1"], "draft_length=1 must be from 2 to"),
    "too long": (["--max-new-tokens", "4000"], "over the model's"),
    "too few tokens": (
        ["--parts", "rejection", "--max-new-tokens", "3"],
        "raise --seeds, --limit or --max-new-tokens to have at least 100",
    ),
    "a tree without its cycle": (
        ["--tree-nodes", "8"],
        "--tree-nodes 8 needs --cycle two-forward or one-forward",
    ),
    "nowhere to write": (["--json", "no/such/place.json"], "its directory does not exist"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=slow if n == "too few tokens" else ()) for n in BAD]
)
def test_bad_input_is_refused_in_one_line(name: str, tiny_base, prompts) -> None:
    options, message = BAD[name]
    with pytest.raises(UserError) as error:
        lossless.main(arguments(tiny_base, prompts, *options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_base_without_mask_and_file_without_prompts_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no mask_token_id"):
        audited("greedy", model=tiny_model(mask_token_id=None))
    with pytest.raises(UserError, match="no prompt to audit"):
        audit(tiny_model(), [], Options())
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        lossless.main(["--model", "unread", "--prompts", str(empty)])

"""The convert command: a Qwen3 or an Orthrus in, an Orthrus out, and how it fails."""

import json
import pathlib
import subprocess
import sys

import pytest

from orthrus_jax.checkpoint import load_checkpoint, save_checkpoint
from orthrus_jax.convert import main
from orthrus_jax.errors import UserError
from orthrus_jax.llm import load
from orthrus_jax.model import params as params_lib
from tests.support.compare import flat, same_bits
from tests.support.configs import FAMILIES, tiny_config
from tests.support.paths import DATA, ROOT
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params

CONFIG = tiny_config(eos_token_ids=(7, 9), block_size=32)
TREE = random_params(CONFIG, 1)


@pytest.fixture
def base(tmp_path: pathlib.Path) -> pathlib.Path:
    save_checkpoint(tmp_path / "base", CONFIG, params_lib.split(TREE)[0])
    return tmp_path / "base"


def convert(source: pathlib.Path, target: pathlib.Path, *flags: str) -> None:
    main(["--from", str(source), "--to", str(target), *flags], progress=False)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "orthrus_jax.convert", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_qwen3_becomes_an_orthrus_whose_view_is_a_copy(base, tmp_path, capsys) -> None:
    convert(base, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["architectures"], raw["block_size"]) == (["OrthrusLM"], 32)
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.config == CONFIG
    leaves = flat(loaded.params)
    for path, leaf in leaves.items():
        assert same_bits(leaf, flat(TREE)[path.replace("self_attn_diff", "self_attn")]), path
    frozen, diffusion = (params_lib.count(part) for part in params_lib.split(TREE))
    size = (tmp_path / "out" / "model.safetensors").stat().st_size / 1e9
    printed = capsys.readouterr()
    assert printed.out == (
        f"wrote {tmp_path / 'out'}: {frozen:,} frozen parameters, {diffusion:,} in the diffusion "
        f"view (a copy of the AR attention, untrained), {size:.3g} GB, float32\n"
    )
    assert printed.err == ""


def test_orthrus_keeps_its_trained_view_and_changes_dtype(tmp_path, capsys) -> None:
    save_checkpoint(tmp_path / "trained", CONFIG, TREE, dtype="bfloat16")
    convert(tmp_path / "trained", tmp_path / "out", "--dtype", "float32")
    assert "(unchanged)" in capsys.readouterr().out
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.trained
    assert loaded.config.dtype == "float32"
    source = load_checkpoint(tmp_path / "trained", dtype="float32")
    for path, leaf in flat(loaded.params).items():
        assert same_bits(leaf, flat(source.params)[path]), path


def test_checkpoint_can_be_converted_in_place(base: pathlib.Path) -> None:
    (base / "merges.txt").write_text("a b")
    with pytest.raises(UserError, match="is not empty"):
        convert(base, base)
    convert(base, base, "--overwrite", "--dtype", "bfloat16")
    assert load_checkpoint(base).config.dtype == "bfloat16"
    assert (base / "merges.txt").read_text() == "a b"
    assert list(base.parent.iterdir()) == [base]


def test_taken_target_is_refused_before_anything_is_loaded(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("orthrus_jax.checkpoint.load_checkpoint", None)
    with pytest.raises(UserError, match="is not empty"):
        convert(base, base)


def test_tokenizer_files_are_copied(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    if not (DATA / "qwen3_tokenizer").is_dir():
        pytest.skip("no shared data here")
    for path in (DATA / "qwen3_tokenizer").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    convert(base, tmp_path / "out")
    for path in (DATA / "qwen3_tokenizer").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_mask_token_is_chosen_from_the_tokenizer_or_named_and_written(tmp_path) -> None:
    tokenizer = small_tokenizer(["a few words of text"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|spare|>"]})
    rows = len(tokenizer)
    config = tiny_config(vocab_size=rows, mask_token_id=None, **FAMILIES["llama"])
    tree = params_lib.split(random_params(config, 1))[0]
    save_checkpoint(tmp_path / "base", config, tree, tokenizer=tokenizer)
    mask = lambda name: json.loads((tmp_path / name / "config.json").read_text())["mask_token_id"]
    assert mask("base") is None
    convert(tmp_path / "base", tmp_path / "chosen")
    assert mask("chosen") == rows - 1
    convert(tmp_path / "base", tmp_path / "named", "--mask-token", "e")
    assert mask("named") == tokenizer.get_vocab()["e"]
    assert load(tmp_path / "base").config.mask_id == rows - 1
    with pytest.raises(UserError, match="--mask-token 'none' is no token"):
        convert(tmp_path / "base", tmp_path / "out", "--mask-token", "none")
    assert not (tmp_path / "out").exists()


def test_bad_source_ends_in_one_line_and_status_2(tmp_path: pathlib.Path) -> None:
    done = command("--from", str(tmp_path), "--to", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}: {tmp_path / 'config.json'} does not exist")
    assert done.stderr.count("\n") == 1


def test_help_and_bad_flags_do_not_wait_for_jax(capsys) -> None:
    slow = "import sys, orthrus_jax.convert; sys.exit(bool({'jax', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", slow], cwd=ROOT, check=False).returncode == 0
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    assert "--from DIR_OR_ID" in capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        main(["--from", "a", "--to", "b", "--dtype", "int8"])
    assert raised.value.code == 2

"""Writing a checkpoint: whole or not at all, which targets it may replace, tokenizer files."""

import errno
import fcntl
import os
import pathlib
import re

import jax.numpy as jnp
import pytest

from orthrus_jax.checkpoint import check_target, load_checkpoint, save_checkpoint
from orthrus_jax.checkpoint import writer as checkpoint_lib
from orthrus_jax.errors import UserError
from orthrus_jax.model import params as params_lib
from tests.support.configs import tiny_config
from tests.support.weights import random_params

CONFIG = tiny_config(eos_token_ids=(7, 9))
TREE = random_params(CONFIG, 1)
BASE, _ = params_lib.split(TREE)
WEIGHTS = "model.safetensors"


@pytest.fixture
def single(tmp_path: pathlib.Path) -> pathlib.Path:
    """A sound Qwen3 in one file."""
    save_checkpoint(tmp_path / "single", CONFIG, BASE)
    return tmp_path / "single"


def state(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("taken", [False, True], ids=["new", "overwriting"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=repr
)
def test_failed_save_changes_nothing(
    tmp_path: pathlib.Path, monkeypatch, taken: bool, error: BaseException
) -> None:
    target = tmp_path / "out"
    if taken:
        save_checkpoint(target, CONFIG, BASE)
        before = state(target)
    whole = checkpoint_lib._write_shard
    written = []

    def fail_at_the_second(path: pathlib.Path, *args) -> None:
        if written:
            path.write_bytes(b"half")
            raise error
        whole(path, *args)
        written.append(path)

    monkeypatch.setattr(checkpoint_lib, "_write_shard", fail_at_the_second)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        save_checkpoint(target, CONFIG, TREE, overwrite=taken, max_shard_bytes=20_000)
    assert len(written) == 1
    if expected is UserError:
        assert f"{target} could not be written: " in str(raised.value)
        assert "No space left on device" in str(raised.value)
    assert list(tmp_path.iterdir()) == ([target] if taken else [])
    assert not taken or state(target) == before


def test_failed_exchange_puts_the_old_checkpoint_back(tmp_path, monkeypatch) -> None:
    target = tmp_path / "out"
    save_checkpoint(target, CONFIG, BASE)
    before = state(target)
    rename = pathlib.Path.rename

    def fail_for_the_new(self: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(pathlib.Path, "rename", fail_for_the_new)
    with pytest.raises(UserError, match="Input/output error"):
        save_checkpoint(target, CONFIG, TREE, overwrite=True)
    assert list(tmp_path.iterdir()) == [target]
    assert state(target) == before


def test_target_is_replaced_only_with_overwrite(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "deep" / "out"
    save_checkpoint(target, CONFIG, BASE)  # makes its parents
    before = state(target)
    with pytest.raises(UserError, match=f"{re.escape(str(target))} is not empty"):
        save_checkpoint(target, CONFIG, TREE)
    assert state(target) == before
    (target / "stale.safetensors").write_bytes(b"")
    save_checkpoint(target, CONFIG, TREE, overwrite=True)
    assert set(state(target)) == {"config.json", "generation_config.json", WEIGHTS}
    assert load_checkpoint(target).trained
    assert list(target.parent.iterdir()) == [target]


def test_empty_directory_is_used_and_a_link_kept(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_checkpoint(tmp_path / "link", CONFIG, BASE)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / WEIGHTS).exists()
    save_checkpoint(tmp_path / "link", CONFIG, TREE, overwrite=True)
    assert load_checkpoint(tmp_path / "real").trained


def test_other_files_than_a_checkpoint_are_never_overwritten(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no checkpoint"):
        save_checkpoint(tmp_path, CONFIG, BASE, overwrite=True)
    with pytest.raises(UserError, match=r"thesis\.tex is a file"):
        save_checkpoint(tmp_path / "thesis.tex", CONFIG, BASE, overwrite=True)
    with pytest.raises(UserError, match="could not be written"):
        save_checkpoint(tmp_path / "thesis.tex" / "out", CONFIG, BASE)
    assert state(tmp_path) == {"thesis.tex": b"years of work"}


def test_checkpoint_that_appears_meanwhile_is_kept(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "out"

    class Rival:
        """A tokenizer that lets another run finish first."""

        def save_pretrained(self, folder: str) -> None:
            target.mkdir()
            (target / "config.json").write_text("theirs")

    with pytest.raises(UserError, match="is not empty"):
        save_checkpoint(target, CONFIG, BASE, tokenizer=Rival())
    assert state(target) == {"config.json": b"theirs"}
    assert list(tmp_path.iterdir()) == [target]


def test_checkpoint_that_appears_after_the_last_look_is_kept(tmp_path, monkeypatch) -> None:
    target, looks = tmp_path / "out", []

    def look(directory: pathlib.Path, *, overwrite: bool) -> None:
        check_target(directory, overwrite=overwrite)
        looks.append(directory)
        if len(looks) == 2:
            target.mkdir()
            (target / "config.json").write_text("theirs")

    monkeypatch.setattr("orthrus_jax.checkpoint.writer.check_target", look)
    with pytest.raises(UserError, match=r"could not be written: .*not empty"):
        save_checkpoint(target, CONFIG, BASE)
    assert state(target) == {"config.json": b"theirs"}
    assert list(tmp_path.iterdir()) == [target]


def test_tokenizer_files_are_copied_but_not_the_target_of_a_link(
    single: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "modeling.py", "notes.txt"):
        (single / name).write_text(name)
    save_checkpoint(tmp_path / "out", CONFIG, BASE, tokenizer_from=single)
    copied = set(state(tmp_path / "out")) - {"config.json", "generation_config.json", WEIGHTS}
    assert copied == {"tokenizer.json", "merges.txt", "chat_template.jinja"}
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"
    (tmp_path / "secret").write_text("key")
    (single / "vocab.json").symlink_to("../secret")
    with pytest.raises(UserError, match=r"vocab\.json is a link to"):
        save_checkpoint(tmp_path / "leak", CONFIG, BASE, tokenizer_from=single)
    assert not (tmp_path / "leak").exists()


def test_two_tokenizers_are_refused(single: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        save_checkpoint(tmp_path / "o", CONFIG, BASE, tokenizer=object(), tokenizer_from=single)


@pytest.mark.parametrize("dtype", ["int8", "float64", "fp16"])
def test_dtype_that_no_checkpoint_has_is_refused(single: pathlib.Path, dtype: str) -> None:
    with pytest.raises(UserError, match=f"dtype='{dtype}' is not one of"):
        load_checkpoint(single, dtype=dtype)
    with pytest.raises(UserError, match=f"dtype='{dtype}' is not one of"):
        save_checkpoint(single.parent / "out", CONFIG, BASE, dtype=dtype)
    integers = BASE | {"norm": {"weight": jnp.ones(32, jnp.int32)}}
    with pytest.raises(UserError, match="float32 and int32"):
        save_checkpoint(single.parent / "out", CONFIG, integers)
    assert not (single.parent / "out").exists()


def test_what_a_killed_process_left_is_removed_and_a_living_ones_stays(tmp_path) -> None:
    dead, living, old = (
        tmp_path / f".out.{name}" for name in ("0000aaaa.tmp", "0000bbbb.tmp", "0000cccc.old")
    )
    others = [tmp_path / ".other.0000dddd.tmp", tmp_path / ".out.tmp"]
    for directory in (dead, living, old, *others):
        directory.mkdir()
        (directory / "model.safetensors").write_text("a part")
    descriptor = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        save_checkpoint(tmp_path / "out", CONFIG, TREE)
    finally:
        os.close(descriptor)
    assert not dead.exists()
    assert not old.exists()
    assert living.exists()
    assert all(other.exists() for other in others)

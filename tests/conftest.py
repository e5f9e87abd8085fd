"""Fixtures that several test files share."""

import gc
import os
import pathlib
import tarfile
from collections.abc import Iterator

from tests.support import fast_compile
from tests.support.paths import ROOT

# Commands keep compiled programs in the user's home; their tests, which inherit this, do not.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ.setdefault("XLA_FLAGS", fast_compile.FLAGS)

import jax
import pytest

pytest.register_assert_rewrite("tests.support.decoding")  # asserts there say what differs


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_file(request: pytest.FixtureRequest) -> Iterator[None]:
    """Free a test file's compiled programs.

    Each holds dozens of memory maps, and Linux gives a process 65,530: some files on, XLA's CPU
    compiler ended in a segmentation fault on jax 0.7.2.
    """
    yield
    for value in vars(request.module).values():
        getattr(value, "cache_clear", lambda: None)()  # of functools: they hold Generators
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The demo's trained base, unpacked: a Hugging Face directory."""
    packed = ROOT / "assets" / "tiny-base.tar.xz"
    directory = tmp_path_factory.mktemp("assets")
    with tarfile.open(packed) as archive:
        archive.extractall(directory, filter="data")
    return directory / "base"

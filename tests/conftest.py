"""Fixtures that several test files share."""

import gc
import os
import pathlib
import tarfile
from collections.abc import Iterator

from tests.support import fast_compile
from tests.support.paths import DATA, ROOT

# Commands keep compiled programs in the user's home; their tests, which inherit this, do not. Nor
# do the tests' own processes: a cache of every program on disk saved 12 % of the processor's
# seconds when warm and cost 6 % when cold (jax 0.10.2, busy cores, 2026-11-24). Without, cold,
# warm: test_speculative 8.2, 8.3, 6.1; test_engine 37.1, 42.3, 28.0; test_sampling 96, 98, 90.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ.setdefault("XLA_FLAGS", fast_compile.FLAGS)

import jax
import pytest

pytest.register_assert_rewrite("tests.support.decoding")  # asserts there say what differs


MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 30_000  # of the 65,530 that Linux gives a process


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_file(request: pytest.FixtureRequest) -> Iterator[None]:
    """Free a test file's compiled programs.

    Each holds dozens of memory maps: when there are no more, XLA's CPU compiler ends in a
    segmentation fault.
    """
    yield
    for value in vars(request.module).values():
        getattr(value, "cache_clear", lambda: None)()  # of functools: they hold LLMs
    _free_programs()


@pytest.fixture(autouse=True)
def programs_end_before_maps_do() -> Iterator[None]:
    """Free the compiled programs of a file that has very many."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        _free_programs()


def _free_programs() -> None:
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


# Marks by the beginning of a path under tests/, so that no file has to bear them.
MARKS = {
    "laws": ("orthrus_jax/decoding/test_sampling_laws",),
    "quick": (
        "test_imports",
        "test_packaging",
        "test_readme",
        "test_versions",
        "eval/test_benchmarks",
        "eval/test_report",
        "orthrus_jax/checkpoint/test_hf_config",
        "orthrus_jax/checkpoint/test_refusals",
        "orthrus_jax/decoding/test_overlapped",
        "orthrus_jax/decoding/test_speculative",
        "orthrus_jax/decoding/test_tree",
        "orthrus_jax/engine/",
        "orthrus_jax/test_config",
        "orthrus_jax/test_files",
        "orthrus_jax/test_metrics",
        "train/test_data",
        "train/test_problems",
        "train/test_prompts",
    ),
    "ends": (
        "orthrus_jax/attention/",
        "orthrus_jax/checkpoint/",
        "orthrus_jax/decoding/test_compiled",
        "orthrus_jax/decoding/test_exactness",
        "orthrus_jax/decoding/test_overlapped",
        "orthrus_jax/decoding/test_speculative",
        "orthrus_jax/model/",
        "orthrus_jax/test_runtime",
        "orthrus_jax/test_sharding",
        "train/test_checkpoints",
        "train/test_data",
        "train/test_objective",
        "train/test_trainer",
    ),
}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their path."""
    for item in items:
        for mark, beginnings in MARKS.items():
            if item.path.relative_to(ROOT / "tests").as_posix().startswith(beginnings):
                item.add_marker(mark)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped: without ../shared/data a green run has tested less."""
    terminalreporter.write_line(f"skipped: {len(terminalreporter.stats.get('skipped', []))}")
    if not DATA.is_dir():
        terminalreporter.write_line("../shared/data is absent: the tests that read it were skipped")

"""Fixtures of the tests that run benchmarks."""

import contextlib
import functools
from collections.abc import Iterator

import pytest

import orthrus_jax
from eval import plots, report
from tests.support import benchmark_runs


@pytest.fixture(scope="module")
def _load_once() -> Iterator:
    cached = functools.cache(benchmark_runs.load_anew)
    yield cached
    cached.cache_clear()


@pytest.fixture
def cheap_commands(monkeypatch: pytest.MonkeyPatch, _load_once) -> None:
    """A checkpoint is loaded and compiled once per file; test_report tests the plots."""
    monkeypatch.setattr(orthrus_jax, "load", _load_once)
    monkeypatch.setattr(report, "_svg", lambda *given, **more: "<svg></svg>")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small checkpoint."""
    return benchmark_runs.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """96 rows of GSM8K, all different."""
    return benchmark_runs.save_rows(tmp_path_factory.mktemp("data") / "gsm8k.jsonl")


@pytest.fixture(scope="module")
def whole(directory, data, tmp_path_factory: pytest.TempPathFactory):
    """A run that nothing interrupted: its directory and numbers."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, benchmark_runs.gsm8k(directory, data, out)


@pytest.fixture
def axes(monkeypatch):
    """The axes of all figures that are drawn, in order."""
    drawn, figure = [], plots.figure

    @contextlib.contextmanager
    def kept(*given):
        with figure(*given) as row:
            drawn.extend(row)
            yield row

    monkeypatch.setattr(plots, "figure", kept)
    return drawn

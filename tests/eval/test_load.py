"""The load's arrivals and figures, and the command against a server over HashModel."""

import importlib.util
import json
import socket

import pytest

from eval import load
from eval.load_client import Answer, server_of
from orthrus_jax.errors import UserError

served = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("starlette", "uvicorn", "prometheus_client", "httpx"))),
    reason="needs the server's extra",
)


def test_arrivals_are_a_poisson_process_bounded_in_number_and_time() -> None:
    times = load.arrivals(50.0, 4000, 1e6, seed=1)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert len(times) == 4000
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert sum((g - mean) ** 2 for g in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.15)
    assert times == load.arrivals(50.0, 4000, 1e6, seed=1) != load.arrivals(50.0, 4000, 1e6, seed=2)
    cut = load.arrivals(50.0, 4000, 10.0, seed=1)
    assert cut == [t for t in times if t < 10]


def test_figures_count_from_when_a_request_was_due() -> None:
    answers = [
        Answer(0, 10.0, 10.5, 11.0, 1, 13.0, "a", tokens=5, forwards=2, cached=1),
        Answer(1, 11.0, 11.0, 11.5, 1, 12.0, "b", tokens=1, forwards=1),
        Answer(2, 12.0, 12.0, failure="queue"),
    ]
    figures = load.summary(answers, {0: "a", 1: "c"})
    assert (figures["requests"], figures["answered"], figures["failures"]) == (3, 2, {"queue": 1})
    assert figures["tokens_per_second"] == 6 / 3
    assert figures["tokens_per_forward"] == 2
    assert figures["first_token_seconds"] == {"p50": 0.5, "p99": 1.0}
    assert figures["token_seconds"] == {"p50": 0.5, "p99": 0.5}
    assert figures["same_text"] == 0.5
    assert load.summary(answers[2:], {})["tokens_per_second"] is None


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert load.spread(range(1, 101)) == {"p50": 50, "p99": 99}
    assert load.spread([3]) == {"p50": 3, "p99": 3}
    assert load.spread([]) is None


@pytest.mark.parametrize("text", ["http://x", "a=ftp://x", "a=http://", "a=http://x/v1", "=http://x",
                                  "a=http://x:port"])  # fmt: skip
def test_servers_that_are_no_addresses_are_refused(text) -> None:
    with pytest.raises(UserError, match="expected NAME=URL"):
        server_of(text)


def test_server_that_is_not_there_is_refused() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(UserError, match=f"a=http://127.0.0.1:{port}: no models there"):
            load.main(["--server", f"a=http://127.0.0.1:{port}"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rate", "0"], "--rate 0.0"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--json", "/nowhere/x"], "--json"),
    ],
)
def test_flags_without_sense_are_refused(flags, says) -> None:
    with pytest.raises(UserError, match=says):
        load.main(["--server", "a=http://127.0.0.1:1", *flags])


@served
def test_command_reports_two_servers_under_the_same_load(tmp_path, capsys) -> None:
    from orthrus_jax.decoding import Strategy
    from tests.support.engine import hashing
    from tests.support.server import running

    model, report = hashing.__wrapped__(), tmp_path / "load.json"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} apples"}) + "\n" for i in range(7)))
    with running(model) as ours, running(model, strategy=Strategy("ar")) as plain:
        load.main([
            *("--server", f"ar={plain.url}", "--server", f"default={ours.url}"),
            *("--concurrency", "1,4", "--requests", "12", "--max-tokens", "20"),
            *("--prompts", str(prompts), "--json", str(report)),
        ])  # fmt: skip
    result = json.loads(report.read_text())
    assert [(t["server"], t["concurrency"]) for t in result["turns"]] == [
        *(("ar", 1), ("default", 1), ("ar", 4), ("default", 4))
    ]
    for t in result["turns"]:
        assert (t["requests"], t["answered"], t["failures"]) == (12, 12, {})
        assert t["same_text"] == 1
        assert t["tokens"] == 12 * 20
        assert (t["tokens_per_forward"] > 1) == (t["server"] == "default")
        assert t["memory_mib"][-1][1] > 10
        assert 0 < t["first_token_seconds"]["p50"] <= t["answer_seconds"]["p99"]
    assert capsys.readouterr().out.count("12 of 12") == 4


@served
def test_refused_requests_are_counted_and_no_time_of_theirs() -> None:
    import asyncio
    import dataclasses

    from tests.support.engine import hashing
    from tests.support.server import SETTINGS, running

    settings = dataclasses.replace(
        SETTINGS, max_batch=1, max_queue=0, baseline=False, structured=False
    )
    with running(hashing(), settings) as server:
        args = load._parser().parse_args(
            ["--server", f"a={server.url}", "--requests", "30", "--rate", "10000"]
        )
        result = asyncio.run(load.measure([server_of(f"a={server.url}")], ["hello"], args))
    (figures,) = result["turns"]
    assert figures["answered"] + sum(figures["failures"].values()) == 30
    assert all("this server takes 1" in why for why in figures["failures"])
    assert 0 < figures["answered"] < 30
    assert "? times" not in load.table(result)

"""The command as a process: refusals, kill -9 and restart, SIGTERM under load."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures

import httpx
import pytest

from orthrus_jax import serve
from orthrus_jax.errors import UserError
from tests.support.commands import CommandLine, check_refused
from tests.support.paths import ROOT

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Tom has 12 apples."}]}
CHAT |= {"temperature": 0, "max_tokens": 60}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--mode", "ar", "--draft-length", "4"], "--draft-length 4"),
        (["--max-batch", "0"], "--max-batch 0: expected at least 1"),
        (["--request-timeout", "0"], "--request-timeout 0.0: expected seconds above 0"),
        (["--drain-timeout", "inf"], "--drain-timeout inf: expected seconds above 0"),
        (["--served-name", "a:b"], "--served-name 'a:b'"),
        (["--port", "70000"], "--port 70000: expected 0 to 65535"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_a_model_is_loaded(flags, says) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        serve.main(["--model", "nowhere", *flags])


def test_address_in_use_is_refused_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: Address already in use"):
            serve.main(["--model", "nowhere", "--port", str(port)])


@pytest.mark.slow
def test_model_that_is_not_there_is_refused(tmp_path) -> None:
    check_refused(
        CommandLine("orthrus_jax.serve --model {here}/none --port 0", "none"),
        ROOT,
        {"here": tmp_path},
    )


@contextlib.contextmanager
def started(
    base: pathlib.Path, cache: pathlib.Path, *flags: str
) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command, once it is ready, and its address."""
    command = [
        sys.executable,
        "-m",
        "orthrus_jax.serve",
        "--model",
        str(base),
        "--served-name",
        "m",
    ]
    command += ["--port", "0", "--max-context", "256", "--max-batch", "2", "--no-baseline"]
    command += ["--no-structured", "--compile-cache", str(cache), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("ready: "):
                    break
            else:
                raise AssertionError("the server did not start")
            yield process, line.split()[1]
        finally:
            process.kill()


@pytest.mark.slow
def test_killed_server_starts_again_and_says_the_same(tiny_base, tmp_path) -> None:
    texts = []
    for _ in range(2):
        with started(tiny_base, tmp_path) as (process, url):
            response = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60)
            texts.append(response.json()["choices"][0]["message"]["content"])
            with futures.ThreadPoolExecutor(1) as pool:
                cut = pool.submit(
                    httpx.post, f"{url}/v1/chat/completions", json=CHAT | {"max_tokens": 220}
                )
                time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                with pytest.raises(httpx.HTTPError):
                    cut.result()
            assert process.wait() == -signal.SIGKILL
    assert texts[0] == texts[1]
    assert texts[0]


@pytest.mark.slow
@pytest.mark.parametrize("drain", ["60", "0.05"])
def test_sigterm_under_load_ends_every_answer_with_a_word(tiny_base, tmp_path, drain) -> None:
    """Within the deadline whole answers, after it the error object; the process ends."""
    with started(tiny_base, tmp_path, "--drain-timeout", drain) as (process, url):
        client = httpx.Client(base_url=url, timeout=120)
        ask = lambda i: client.post(
            "/v1/chat/completions", json=CHAT | {"max_tokens": 150 + i, "stream": i % 2 == 0}
        )
        with futures.ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(ask, i) for i in range(6)]
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            responses = [answer.result() for answer in answers]
        for response in responses:
            if response.headers["content-type"].startswith("text/event-stream"):
                whole = response.text.endswith("data: [DONE]\n\n")
                assert whole or '"code":"server_stopping"' in response.text
            else:
                assert response.status_code == 200 or (
                    response.json()["error"]["code"] == "server_stopping"
                )
                whole = response.status_code == 200
            assert whole or drain != "60"
        assert process.wait(60) == 128 + signal.SIGTERM, "as all commands of the library end"


@pytest.mark.slow
def test_sigterm_before_the_server_is_ready_ends_it_at_once(tiny_base, tmp_path) -> None:
    command = [sys.executable, "-m", "orthrus_jax.serve", "--model", str(tiny_base), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Waiting for application startup" in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 10

"""What clients are told when something fails, and that no row is lost by it."""

import asyncio
import dataclasses
import json
import socket
import time
from concurrent import futures

import httpx
import pytest

from orthrus_jax.engine import queue as queue_module
from tests.support.engine import hashing
from tests.support.server import SETTINGS, Running, running

PLAIN = dataclasses.replace(SETTINGS, baseline=False, structured=False)
CHAT = {"model": "hash", "messages": [{"role": "user", "content": "x"}], "temperature": 0}


def slow(monkeypatch, seconds: float = 0.2) -> None:
    """Have each step of the engine take a while."""
    fetch = queue_module._fetch

    def slowly(state):
        time.sleep(seconds)
        return fetch(state)

    monkeypatch.setattr(queue_module, "_fetch", slowly)


def raw(
    server: Running, body: bytes, length: int | None = None, buffer: int | None = None
) -> socket.socket:
    """A connection on which a chat's head and this much of its body were sent.

    `buffer` is what the kernel takes for a client that does not read, in bytes.
    """
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.port))
    length = len(body) if length is None else length
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
    return connection


def drain(connection: socket.socket) -> None:
    """Read to the end."""
    while connection.recv(1 << 16):
        pass


def test_failed_step_is_an_error_object_and_the_next_answer_is_right(server, monkeypatch) -> None:
    right = server.chat("next").json()["choices"]

    def fail(state):
        raise RuntimeError("a device failed")

    with monkeypatch.context() as patch:
        patch.setattr(queue_module, "_fetch", fail)
        whole = server.chat("now")
        stream = server.chat("now", stream=True)
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "engine_failed"
    assert "device" not in whole.text
    assert stream.status_code == 200
    (event,) = stream.text.split("\n\n")[:-1]
    assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error"
    assert server.chat("next").json()["choices"] == right
    assert server.http.get("/health").status_code == 200
    server.wait_until_idle()


def test_health_tells_of_steps_that_fail_again_and_again(monkeypatch) -> None:
    def fail(state):
        raise RuntimeError("a device failed")

    with running(hashing(), PLAIN) as server:
        with monkeypatch.context() as patch:
            patch.setattr(queue_module, "_fetch", fail)
            for _ in range(3):
                assert server.chat().status_code == 500
        assert server.http.get("/health").status_code == 503
        assert server.chat().json()["error"]["code"] == "engine_dead"


def test_full_queue_tells_when_to_come_back(monkeypatch) -> None:
    slow(monkeypatch)
    settings = dataclasses.replace(PLAIN, max_batch=1, max_queue=2)
    with running(hashing(), settings) as server:
        with futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: server.chat(f"question {i}"), range(8)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes.count(200) >= 3
        assert set(codes) == {200, 429}
        (refused, *_) = [answer for answer in answers if answer.status_code == 429]
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        server.wait_until_idle()
        assert server.chat().status_code == 200
        over = server.complete(["a", "b", "c", "d"])
        assert over.status_code == 400
        assert "this server takes 3" in over.json()["error"]["message"]


def test_answer_that_takes_too_long_is_cut(monkeypatch) -> None:
    slow(monkeypatch)
    with running(hashing(), dataclasses.replace(PLAIN, request_timeout=0.5)) as server:
        whole = server.chat(max_tokens=200)
        assert whole.status_code == 504
        assert whole.json()["error"]["code"] == "request_timeout"
        stream = server.chat(max_tokens=200, stream=True)
        *pieces, error = stream.text.split("\n\n")[:-1]
        assert pieces, "what was there came"
        assert json.loads(error.removeprefix("data: "))["error"]["type"] == "timeout_error"
        server.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_their_rows(server, monkeypatch, stream) -> None:
    slow(monkeypatch, 0.05)
    body = json.dumps(CHAT | {"max_tokens": 200, "stream": stream}).encode()
    gone = [raw(server, body) for _ in range(6)]
    time.sleep(0.3)
    for connection in gone:
        connection.close()
    begin = time.monotonic()
    server.wait_until_idle(5)
    assert time.monotonic() - begin < 3, "cancelled, not decoded to the end"
    monkeypatch.undo()
    assert server.chat().status_code == 200


def test_body_that_comes_a_byte_at_a_time_is_given_up() -> None:
    with running(hashing(), dataclasses.replace(PLAIN, read_timeout=0.6)) as server:
        with raw(server, b"{", length=1000) as connection:
            for _ in range(20):
                try:
                    connection.sendall(b" ")
                except OSError:
                    break
                time.sleep(0.1)
            assert b" 408 " in connection.recv(100)
        assert server.chat().status_code == 200


def test_client_that_reads_a_byte_at_a_time_holds_no_row(server) -> None:
    body = json.dumps(CHAT | {"max_tokens": 200, "stream": True}).encode()
    with raw(server, body, buffer=4096) as connection:
        begin = time.monotonic()
        for _ in range(5):
            assert connection.recv(1)
            time.sleep(0.05)
        while server.service.load != (0, 0):
            assert time.monotonic() - begin < 30
            time.sleep(0.01)
        assert server.chat().status_code == 200
    server.wait_until_idle()


@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_client_that_reads_a_byte_a_second_is_cut(stream) -> None:
    """Its answers fill all buffers on the way; its rows and its connection are given up."""
    body = CHAT | {"max_tokens": 200, "stream": stream, "temperature": 1, "n": 40, "logprobs": True}
    with running(hashing(), dataclasses.replace(PLAIN, send_timeout=2.0)) as server:
        connections = server.server.server_state.connections
        with raw(server, json.dumps(body).encode(), buffer=4096) as connection:
            for _ in range(3):
                assert connection.recv(1)
                time.sleep(1)
            server.wait_until_idle()
            assert server.chat().status_code == 200
            end = time.monotonic() + 30
            while len(connections) > 1:  # the other is the tests' own
                assert time.monotonic() < end, "the connection is still there"
                time.sleep(0.1)
            with pytest.raises(ConnectionResetError):
                drain(connection)


def test_client_that_does_not_read_is_cut() -> None:
    """The event loop alone is asked: a kernel's buffers would take all of a small answer."""
    from orthrus_jax.server.app import EventStream

    closed = []

    async def events():
        for i in range(100):
            yield str(i)

    async def scenario() -> None:
        stuck = asyncio.Event()
        receive = lambda: stuck.wait()
        settings = dataclasses.replace(SETTINGS, send_timeout=0.1)
        response = EventStream(events(), lambda: closed.append(True), settings)
        await response({"type": "http"}, receive, lambda message: stuck.wait())

    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert closed == [True]


def test_stop_lets_running_answers_end_and_refuses_new_ones(monkeypatch) -> None:
    slow(monkeypatch, 0.1)
    settings = dataclasses.replace(PLAIN, drain_timeout=20.0)
    with running(hashing(), settings) as server, futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.chat, "first", max_tokens=60)
        time.sleep(0.3)
        drain = asyncio.run_coroutine_threadsafe(server.service.drain(), server.server.loop)
        time.sleep(0.1)
        refused = server.chat("late")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_stopping"
        assert server.http.get("/health").status_code == 503
        assert first.result().status_code == 200
        drain.result(10)


def test_stop_ends_answers_at_the_deadline_and_tells_their_clients(monkeypatch) -> None:
    slow(monkeypatch)
    settings = dataclasses.replace(PLAIN, drain_timeout=0.3)
    with running(hashing(), settings) as server, futures.ThreadPoolExecutor(3) as pool:
        whole = pool.submit(server.chat, "whole", max_tokens=200)
        stream = pool.submit(server.chat, "stream", max_tokens=200, stream=True)
        time.sleep(0.6)
        asyncio.run_coroutine_threadsafe(server.service.drain(), server.server.loop).result(10)
        assert whole.result().status_code == 503
        last = stream.result().text.split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_stopping"


def test_compile_failure_ends_the_server() -> None:
    model = hashing.__wrapped__()
    model.engine.programs.run = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory"))
    with pytest.raises(AssertionError, match="did not start"), running(model, PLAIN):
        pass


def test_one_failing_client_does_not_disturb_a_stream(server) -> None:
    expected = server.chat("steady", max_tokens=100).json()["choices"][0]["message"]["content"]
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json=CHAT | {"messages": [{"role": "user", "content": "steady"}], "max_tokens": 100,
                     "stream": True},
        timeout=60,
    ) as response:  # fmt: skip
        text = ""
        for line in response.iter_lines():
            assert server.post("/v1/chat/completions", nonsense=1).status_code == 400
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"]["content"]
    assert text == expected

"""A server in this process, on a real socket of its own."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx

from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Auto
from orthrus_jax.llm import LLM
from orthrus_jax.serve import listening, server_of
from orthrus_jax.server import Service, Settings
from orthrus_jax.tokenizer import decode, encode
from tests.support.engine import table_of, tokenizer
from tests.support.fake_models.hashed import greedy_text

SETTINGS = Settings(name="hash", max_batch=3, max_context=250, max_queue=40, drain_timeout=2.0)


def greedy_answer(text: str, budget: int = 20, *, chat: bool = True) -> str:
    """HashModel's greedy answer, in plain Python."""
    ids = encode(tokenizer(), text, chat=chat)
    return decode(tokenizer(), greedy_text(ids, table_of("plain"), budget))


class Running:
    """A server that runs: its service, its address, a client."""

    def __init__(self, service: Service, bound: socket.socket) -> None:
        self.service = service
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self.server = server_of(service, bound)

    def run(self, bound: socket.socket) -> None:
        """Serve until told to end; a start that fails ends the process, and here the thread."""
        with contextlib.suppress(SystemExit):
            self.server.run([bound])

    def post(self, path: str, **body) -> httpx.Response:
        return self.http.post(path, json=body)

    def chat(self, text: str = "12 apples", **options) -> httpx.Response:
        """A greedy chat of a few tokens, unless `options` say otherwise."""
        messages = [{"role": "user", "content": text}]
        defaults = {"model": "hash", "messages": messages, "temperature": 0, "max_tokens": 20}
        return self.post("/v1/chat/completions", **defaults | options)

    def complete(self, prompt="12 apples", **options) -> httpx.Response:
        defaults = {"model": "hash", "prompt": prompt, "temperature": 0, "max_tokens": 20}
        return self.post("/v1/completions", **defaults | options)

    def wait_until_idle(self, seconds: float = 30) -> None:
        """Wait until no answer runs or waits."""
        end = time.monotonic() + seconds
        while (self.service.load != (0, 0) or self.service.open_answers) and time.monotonic() < end:
            time.sleep(0.01)
        assert (self.service.load, self.service.open_answers) == ((0, 0), 0)


@contextlib.contextmanager
def running(
    model: LLM, settings: Settings = SETTINGS, strategy: Strategy | Auto | None = None
) -> Iterator[Running]:
    """Serve a model on a free port until the block ends."""
    with listening("127.0.0.1", 0, settings.send_timeout) as bound:
        running = Running(Service(model, strategy or Strategy(), settings), bound)
        thread = threading.Thread(target=running.run, args=(bound,), daemon=True)
        thread.start()
        while not running.server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield running
        finally:
            running.http.close()
            running.server.should_exit = running.server.force_exit = True
            thread.join(30)
            assert not thread.is_alive()

"""The load's client: one request on one connection, its stream read as it comes.

Plain asyncio, so that the client takes little of a machine that it may share with the server.
Knows no arrivals and no figures.
"""

import asyncio
import dataclasses
import json
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

from orthrus_jax.errors import UserError

MEMORY = "process_resident_memory_bytes"
LIMIT = 4 << 20  # bytes of one line of a stream


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
      name: in the report.
      url: its address, without a path.
      model: its first model's name.
    """

    name: str
    url: str
    model: str = ""

    @property
    def address(self) -> tuple[str, int]:
        parts = urllib.parse.urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    async def described(self) -> "Server":
        """The same with its model's name.

        Raises:
          UserError: if it does not answer.
        """
        try:
            models = json.loads(await get(self, "/v1/models"))
            return dataclasses.replace(self, model=models["data"][0]["id"])
        except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
            reason = f"{type(error).__name__} {error}".strip()
            raise UserError(
                f"--server {self.name}={self.url}: no models there ({reason})"
            ) from None


def server_of(text: str) -> Server:
    """Parse NAME=URL.

    Raises:
      UserError: for anything else.
    """
    name, equals, url = text.partition("=")
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not name or not equals or not sound or parts.path.strip("/"):
        raise UserError(f"--server {text}: expected NAME=URL, like ar=http://127.0.0.1:8000")
    return Server(name, url.rstrip("/"))


@dataclasses.dataclass
class Answer:
    """One request's fate; times are of the loop's clock, in seconds.

    Attributes:
      number: which request.
      due: when it was to be sent.
      sent: when it was.
      first: when its first text came.
      first_tokens: how many tokens that was.
      end: when its last came.
      failure: why there is none, or not all of it.
    """

    number: int
    due: float
    sent: float = 0.0
    first: float = 0.0
    first_tokens: int = 0
    end: float = 0.0
    text: str = ""
    tokens: int = 0
    forwards: int = 0
    cached: int = 0
    failure: str | None = None


async def ask(
    server: Server, body: dict[str, Any], due: float, number: int, deadline: float | None = None
) -> Answer:
    """Send one request that streams; a failure is the answer's, never an exception."""
    loop = asyncio.get_running_loop()
    answer = Answer(number, due, sent=loop.time())
    try:
        async with asyncio.timeout_at(deadline):
            async for chunk in _stream(server, body):
                _take(answer, chunk, loop.time())
        if not answer.tokens:
            answer.failure = answer.failure or "the stream ended early"
    except TimeoutError:
        answer.failure = "cut: the turn's time was over"
    except (OSError, EOFError, ValueError, KeyError) as error:
        answer.failure = str(error) or type(error).__name__
    answer.end = answer.end or loop.time()
    return answer


def _take(answer: Answer, chunk: dict[str, Any], now: float) -> None:
    if "error" in chunk:
        answer.failure = chunk["error"]["message"]
        return
    for choice in chunk["choices"]:
        answer.text += choice["delta"].get("content") or ""
        if answer.text and not answer.first:
            answer.first, answer.first_tokens = now, chunk["orthrus"]["tokens"]
        answer.end = now
    if chunk.get("usage"):
        answer.tokens = chunk["usage"]["completion_tokens"]
        answer.cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
        answer.forwards = chunk["orthrus"]["forwards"]
        if not answer.first:  # an answer without a character
            answer.first, answer.first_tokens = answer.end, answer.tokens


async def get(server: Server, path: str) -> bytes:
    """The body of a GET.

    Raises:
      OSError, EOFError, ValueError: if there is none.
    """
    reader, writer = await asyncio.open_connection(*server.address, limit=LIMIT)
    try:
        writer.write(_head("GET", path, server))
        return await _body(reader)
    finally:
        writer.close()


async def memory_mib(server: Server) -> float | None:
    """The server's resident memory, as its /metrics says; None where it does not."""
    try:
        lines = (await get(server, "/metrics")).decode().splitlines()
    except (OSError, EOFError, ValueError):
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{MEMORY} ")]
    return float(values[0]) / 2**20 if values else None


async def _stream(server: Server, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The objects of an answer's events; a refusal is one object too."""
    reader, writer = await asyncio.open_connection(*server.address, limit=LIMIT)
    try:
        data = json.dumps(body).encode()
        writer.write(_head("POST", "/v1/chat/completions", server, len(data)) + data)
        headers = await _headers(reader)
        if not headers["content-type"].startswith("text/event-stream"):
            yield json.loads(await _rest(reader, headers))
            return
        text = b""
        async for part in _chunks(reader):
            *events, text = (text + part).split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                yield json.loads(data)
    finally:
        writer.close()


def _head(method: str, path: str, server: Server, length: int | None = None) -> bytes:
    host, port = server.address
    lines = [f"{method} {path} HTTP/1.1", f"host: {host}:{port}", "connection: close"]
    if length is not None:
        lines += ["content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


async def _headers(reader: asyncio.StreamReader) -> dict[str, str]:
    """The response's headers, by name in lower case."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = [line.partition(":") for line in lines[1:] if line]
    return {name.lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader) -> bytes:
    return await _rest(reader, await _headers(reader))


async def _rest(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return b"".join([part async for part in _chunks(reader)])


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The parts of a chunked body."""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]

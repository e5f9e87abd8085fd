"""The ASGI application: routes, whole answers and streams, what a client that leaves costs.

Decides the form of responses. What is let in and when it has ended is service.py's business.
"""

import asyncio
import contextlib
import json
import logging
import pathlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from orthrus_jax.server.gate import Gate, error_response, read_body
from orthrus_jax.server.problems import ApiError
from orthrus_jax.server.replies import VERSION, Reply, Timing
from orthrus_jax.server.schema import (
    ChatRequest,
    CompletionRequest,
    chat_request,
    completion_request,
    parse_json,
)
from orthrus_jax.server.service import Service
from orthrus_jax.server.worker import Call, News

logger = logging.getLogger("orthrus_jax.server")
T = TypeVar("T")
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def create_app(service: Service) -> Starlette:
    """The application of a service; its start-up compiles, its shutdown ends the threads."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    endpoints = Endpoints(service)
    failed = lambda request, error: error_response(error)
    return Starlette(
        routes=[
            Route("/", endpoints.page),
            Route("/health", endpoints.health),
            Route("/version", endpoints.version),
            Route("/metrics", endpoints.metrics),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
        ],
        middleware=[Middleware(Gate, settings=service.settings, figures=service.figures)],
        exception_handlers={ApiError: failed, HTTPException: _http_failed, Exception: _crashed},
        lifespan=lifespan,
    )


class Endpoints:
    """One method per route."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())
        self._html = pathlib.Path(__file__).with_name("page.html").read_text("utf-8")

    async def page(self, request: Request) -> Response:
        """The page: chat, and the race."""
        return HTMLResponse(self._html, headers={"content-security-policy": PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        """200 while requests are served, else 503."""
        healthy = self._service.healthy
        return JSONResponse({"status": "ok" if healthy else "unhealthy"}, 200 if healthy else 503)

    async def version(self, request: Request) -> Response:
        """The software's version."""
        return JSONResponse({"version": VERSION})

    async def metrics(self, request: Request) -> Response:
        """The figures, for Prometheus."""
        text = self._service.figures.text(*self._service.load)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The models: this one, and the same without drafts."""
        data = [self._model(name) for name in self._service.plans]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["name"]
        self._service.find_model(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        settings = self._service.settings
        head = {"id": name, "object": "model", "created": self._created, "owned_by": "orthrus_jax"}
        return {**head, "max_model_len": settings.max_context}

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat_request)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, completion_request)

    async def _answer(
        self, http: Request, parse: Callable[[Any], ChatRequest | CompletionRequest]
    ) -> Response:
        service, began = self._service, time.monotonic()
        parsed = parse(parse_json(await read_body(http, service.settings)))
        options = parsed.options
        prepared = await service.prepare(parsed)
        reply = Reply(
            isinstance(parsed, ChatRequest),
            options.model,
            service.plans[options.model],
            prepared.requests,
            service.model.tokenizer,
            options.include_cycles,
        )
        call, timing = service.open_call(prepared), Timing(began)
        if options.stream:
            chunks = self._stream(call, reply, timing, options.include_usage)
            return EventStream(chunks, lambda: service.close_call(call), service.settings)
        whole = await _unless_gone(http, self._whole(call, reply, timing))
        return JSONResponse(whole)

    async def _whole(self, call: Call, reply: Reply, timing: Timing) -> dict[str, Any]:
        async with contextlib.aclosing(self._service.news(call)) as news:
            async for one in news:
                self._note(call, reply, timing, one)
        return reply.whole()

    async def _stream(
        self, call: Call, reply: Reply, timing: Timing, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        """The data of a stream's events; a failure is an error object in place of the rest."""
        try:
            async with contextlib.aclosing(self._service.news(call)) as news:
                async for one in news:
                    self._note(call, reply, timing, one)
                    assert one.event is not None
                    chunk = reply.chunk(one.choice, one.event, one.seconds)
                    if chunk is not None:
                        yield _json(chunk)
        except ApiError as error:
            yield _json(error.body())
            return
        if include_usage:
            yield _json(reply.usage_chunk())
        yield "[DONE]"

    def _note(self, call: Call, reply: Reply, timing: Timing, news: News) -> None:
        """Keep a completion, count it, log it."""
        now = time.monotonic()
        assert news.event is not None
        if news.event.tokens:
            timing.first.setdefault(news.choice, now - timing.began)
        completion = news.event.completion
        if completion is None:
            return
        reply.completions[news.choice] = completion
        request, seconds = call.requests[news.choice], now - timing.began
        first = timing.first.get(news.choice)
        self._service.figures.answered(completion, len(request.prompt), first, seconds)
        line = f"{reply.id} choice {news.choice}: {len(request.prompt)} tokens read, {completion}"
        logger.info("%s | %s", line, completion.finish_reason)
        if self._service.settings.log_prompts:
            prompt = self._service.model.tokenizer.decode(request.prompt)
            logger.info("%s prompt %r answer %r", reply.id, prompt, completion.text)


class EventStream(Response):
    """Server-sent events. The answer is cancelled when the client leaves or does not read."""

    def __init__(
        self, events: AsyncGenerator[str, None], close: Callable[[], None], settings: Any
    ) -> None:
        """Hold events until the response is sent.

        Args:
          events: data of each.
          close: called in the end, whatever happened.
          settings: `send_timeout` is what a client may take for one event.
        """
        super().__init__(media_type="text/event-stream")
        self._events, self._close, self._settings = events, close, settings
        self.raw_headers = [h for h in self.raw_headers if h[0] != b"content-length"]
        self.raw_headers.append((b"x-accel-buffering", b"no"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        try:
            await _first_of(self._send_all(send), _gone(receive))
        except (TimeoutError, OSError):
            logger.info("a stream was cut: its client does not read")
        finally:
            await self._events.aclose()
            self._close()

    async def _send_all(self, send: Send) -> None:
        async def sent(message: dict[str, Any]) -> None:
            async with asyncio.timeout(self._settings.send_timeout):
                await send(message)

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await sent(start)
        async for data in self._events:
            body = f"data: {data}\n\n".encode()
            await sent({"type": "http.response.body", "body": body, "more_body": True})
        await sent({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result, unless the client leaves before.

    Raises:
      ApiError: when it has; nobody reads it.
    """
    result = await _first_of(work, _gone(http.receive))
    if result is None:
        raise ApiError(499, "the client went away")
    return result


async def _first_of(work: Coroutine[Any, Any, T], other: Awaitable[None]) -> T | None:
    """The result of `work`, or None if `other` ends first; whichever is late is cancelled."""
    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(other))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _http_failed(request: Request, error: Exception) -> Response:
    """What starlette refuses by itself: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    response = error_response(ApiError(error.status_code, f"{error.detail}: {request.url.path}"))
    response.headers.update(error.headers or {})
    return response


def _crashed(request: Request, error: Exception) -> Response:
    """A bug. It is logged by the server; the client learns nothing of it."""
    return error_response(ApiError(500, "the server failed", code="internal_error"))

"""What every request passes first: the Host header, the key, the body's limits.

Plain ASGI, so that a response that streams is not buffered. Knows no endpoint's body.
"""

import asyncio
import hmac
import ipaddress
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orthrus_jax.server.figures import Figures
from orthrus_jax.server.problems import ApiError
from orthrus_jax.server.settings import Settings

OPEN = ("/", "/health")  # paths without a key: neither reads a prompt
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"referrer-policy": b"no-referrer",
}


class Gate:
    """Middleware: refuses before an endpoint is reached, counts responses, adds headers."""

    def __init__(self, app: ASGIApp, settings: Settings, figures: Figures) -> None:
        self._app, self._settings, self._figures = app, settings, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._figures.responded(_path_label(scope), message["status"])
                kept = [pair for pair in message["headers"] if pair[0] not in HEADERS]
                message["headers"] = [*kept, *HEADERS.items()]
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error_response(error)(scope, receive, sending)
            return
        await self._app(scope, receive, sending)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._settings.hosts and _host(headers.get("host", "")) not in self._settings.hosts:
            raise ApiError(403, "the Host header names another host", code="wrong_host")
        if self._settings.api_key and scope["path"] not in OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            expected = self._settings.api_key.encode()
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), expected):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._settings.max_body:
            raise _too_large(self._settings)


async def read_body(request: Request, settings: Settings) -> bytes:
    """The body of a JSON request.

    Raises:
      ApiError: for another type of content, a body over the limit, or one that comes too slowly.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also what keeps pages of other sites out: they cannot send it
        raise ApiError(415, f"content-type {kind[:40]!r}: expected application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.read_timeout):
            async for part in request.stream():
                size += len(part)
                if size > settings.max_body:
                    raise _too_large(settings)
                parts.append(part)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not come within {settings.read_timeout:g} seconds"
        ) from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    return b"".join(parts)


def error_response(error: ApiError) -> JSONResponse:
    """The response to a refused or failed request."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):  # what is left of the body is not read
        headers["connection"] = "close"
    return JSONResponse(error.body(), error.status, headers)


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _too_large(settings: Settings) -> ApiError:
    return ApiError(413, f"the body is over {settings.max_body} bytes", code="body_too_large")


def _host(header: str) -> str:
    """A Host header without its port."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdecimal() else header).lower()


def _path_label(scope: MutableMapping[str, Any]) -> str:
    """A path for the figures: routes only, so that clients cannot make up series."""
    route = scope.get("route")
    return getattr(route, "path", "other")

"""The protocol's error object, and the statuses that this server gives. Knows no engine."""

from typing import Any


class ApiError(Exception):
    """A refusal or a failure, as a client reads it.

    Attributes:
      status: the HTTP status.
      message: one line.
      param: the field that is wrong, or None.
      code: a word for programs, or None.
      retry_after: seconds after which to come back, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        # A wrong value that the message shows may be no Unicode text.
        self.message, self.param = _text(message), param and _text(param)
        self.status, self.code, self.retry_after = status, code, retry_after

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def _text(value: str) -> str:
    return value.encode(errors="replace").decode()


TYPES = {  # of error objects, by status; every other is an invalid_request_error
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that the client must change."""
    return ApiError(400, message, param, code)


def stopping() -> ApiError:
    """What clients are told while the server stops."""
    return ApiError(503, "the server is stopping", code="server_stopping", retry_after=5)


def step_failed() -> ApiError:
    """What clients are told whose answer was running when a step of the engine failed."""
    return ApiError(500, "the engine failed while it wrote this answer", code="engine_failed")


def out_of_time(seconds: float) -> ApiError:
    """What a client is told whose answer took too long."""
    return ApiError(504, f"the answer took over {seconds:g} seconds", code="request_timeout")

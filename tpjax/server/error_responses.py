"""Errors as the OpenAI API gives them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from tpjax.errors import ContextLengthError, RequestError, TpjaxError

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(TpjaxError):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        message: for the client.
        param: which parameter is wrong.
        code: for programs.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What the answer holds."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400."""
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    """Status 500, and nothing about the inside; the log has the trace."""
    return ApiError(500, "an internal error occurred; the server's log has it", code="internal_error")


def from_request_error(error: RequestError, params: Collection[str]) -> ApiError:
    """The library's complaint as the API's; its message begins with the parameter where one is wrong."""
    message = str(error)
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    if message.startswith("the prompt "):
        return bad_request(message, "messages" if "messages" in params else "prompt", code)
    named = re.match(r"\w+", message)
    return bad_request(message, named[0] if named and named[0] in params else None, code)

"""Error responses of the OpenAI API: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from tpjax.errors import ContextLengthError, RequestError, TpjaxError
from tpjax.server.json_types import JsonObject

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
MAX_MESSAGE_CHARS, MAX_PARAM_CHARS = 4096, 200  # messages and parameters may quote the client


class ApiError(TpjaxError):
    """An error that is sent to the client.

    Attributes:
        status: HTTP status.
        message: text for the client.
        param: name of the parameter that is wrong.
        code: identifier for programs.
        headers: HTTP headers of the response.
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

    def body(self) -> JsonObject:
        """Returns the body of the response."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message, param = self.message[:MAX_MESSAGE_CHARS], self.param and self.param[:MAX_PARAM_CHARS]
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns an error of status 400."""
    return ApiError(400, message, param=param, code=code)


def over_context(what: str, context: int) -> str:
    """Returns a message about what is longer than the context, in OpenAI's words, which clients look for."""
    return f"{what}: this model's maximum context length is {context} tokens"


def internal_error() -> ApiError:
    """Returns an error of status 500 without details; the log has the trace."""
    return ApiError(500, "an internal error occurred; the server's log has it", code="internal_error")


def from_request_error(error: RequestError, params: Collection[str]) -> ApiError:
    """Converts the library's error to the API's; its message may start with the wrong parameter."""
    message = str(error)
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    if message.startswith("the prompt "):
        return bad_request(message, "messages" if "messages" in params else "prompt", code)
    named = re.match(r"\w+", message)
    return bad_request(message, named[0] if named and named[0] in params else None, code)

"""Sends every exception of a route as an error of the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tpjax.errors import RequestError
from tpjax.server.error_responses import ApiError, bad_request, internal_error
from tpjax.server.json_bodies import JsonResponse
from tpjax.server.json_types import Json, JsonObject

_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
# For the OpenAPI schema of each route.
RESPONSES: dict[int | str, JsonObject] = {
    status: {"description": text, "content": {"application/json": {"schema": _SCHEMA}}}
    for status, text in (
        (400, "The request is wrong."),
        (401, "The API key is missing or wrong."),
        (404, "There is no such model."),
        (408, "The body did not come in time."),
        (413, "The body is too large."),
        (429, "The queue is full."),
        (500, "The generation failed."),
        (503, "The model is loading, or the server stops."),
    )
}

# Paths of other APIs that clients use unless told otherwise -> what is missing, and what there is instead.
_MISSING = {
    "/v1/responses": "the Responses API is not supported: use /v1/chat/completions",
    "/v1/messages": "Anthropic's API is not supported: use /v1/chat/completions",
    "/v1/embeddings": "embeddings are not supported: the model writes text",
}


def add_exception_handlers(app: FastAPI) -> None:
    """Makes an application send every exception as an error of the API."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JsonResponse(error.body(), error.status, error.headers)


async def _request_error(_: Request, error: Exception) -> Response:
    return await _api_error(_, bad_request(str(error)))


async def _validation_error(_: Request, error: Exception) -> Response:
    """Reports the first thing that is wrong, in one line."""
    assert isinstance(error, RequestValidationError)
    # For a union of types, pydantic reports an error per type; the type that was meant has another complaint
    # than the wrong type.
    errors = error.errors()
    same = [one for one in errors if one["loc"][1:2] == errors[0]["loc"][1:2]]
    first = next((one for one in same if not _wrong_type(one)), errors[0])
    where = _path(first["loc"][1:], error.body, missing=first["type"] == "missing")
    param = where[0] if where else None
    if not where and first["type"] in ("missing", "model_attributes_type"):
        message = "the body is empty, no JSON object, or not sent as application/json"
    elif first["type"] == "extra_forbidden":
        message = f"{'.'.join(where)[:200]} is not a known parameter"
    else:
        message = f"{'.'.join(where)[:200] or 'body'}: {first['msg']}"
    return await _api_error(_, bad_request(message, param))


def _wrong_type(error: JsonObject) -> bool:
    """Returns whether an error says that a value has the wrong type; an object is none of some texts."""
    kind: str = error["type"]
    return kind.endswith("_type") or (kind == "literal_error" and isinstance(error.get("input"), dict | list))


def _path(loc: Sequence[str | int], value: Json, *, missing: bool) -> list[str]:
    """Returns where in a body an error is, without the names that pydantic has for the types of a union.

    Args:
        loc: location of the error in pydantic's form.
        value: the body.
        missing: the last part is a field that the body lacks.
    """
    path = []
    for part in loc:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            if not missing or part != loc[-1]:
                continue  # the name of a type
        path.append(str(part))
    return path


async def _http_error(request: Request, error: Exception) -> Response:
    """Reports a body that cannot be read, or a path or method that no route has."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path[:200]}: {_why(request, message)}"
    headers = dict(error.headers or {})
    return await _api_error(request, ApiError(error.status_code, message, headers=headers))


def _why(request: Request, message: str) -> str:
    """Returns what to do where a path or method has no route."""
    path = request.url.path
    if path in _MISSING:
        return _MISSING[path]
    # a client's base URL without /v1, or one that has it where the client adds its own
    meant = "/v1/" + path.rsplit("/v1/")[-1].lstrip("/")
    if meant != path and meant in (getattr(route, "path", None) for route in request.app.routes):
        return f"{message}; {meant} is meant: the client's base URL is wrong"
    return f"{message}; /openapi.json lists what this server has"


async def _unexpected_error(_: Request, error: Exception) -> Response:
    return await _api_error(_, internal_error())  # Starlette raises it again: the middleware logs it

"""Sends every exception of a route as an error of the OpenAI API."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tpjax.errors import RequestError
from tpjax.server.error_responses import ApiError, bad_request, internal_error
from tpjax.server.json_bodies import JsonResponse
from tpjax.server.json_types import JsonObject

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
    first = next((one for one in same if not one["type"].endswith("_type")), errors[0])
    where = [str(part) for part in first["loc"] if part != "body"]
    param = where[0] if where else None
    if not where and first["type"] in ("missing", "model_attributes_type"):
        message = "the body is empty, no JSON object, or not sent as application/json"
    elif first["type"] == "extra_forbidden":
        message = f"{'.'.join(where)[:200]} is not a known parameter"
    else:
        message = f"{'.'.join(where)[:200] or 'body'}: {first['msg']}"
    return await _api_error(_, bad_request(message, param))


async def _http_error(request: Request, error: Exception) -> Response:
    """Reports a body that cannot be read, or a path or method that no route has."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        place = f"{request.method} {request.url.path[:200]}"
        message = f"{place}: {message}; /openapi.json lists what this server has"
    headers = dict(error.headers or {})
    return await _api_error(request, ApiError(error.status_code, message, headers=headers))


async def _unexpected_error(_: Request, error: Exception) -> Response:
    return await _api_error(_, internal_error())  # Starlette raises it again: the middleware logs it

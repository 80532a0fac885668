"""Reads request bodies as strict JSON, limited to what can be validated in a moment; writes responses."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticKnownError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tpjax.server.json_types import Json, json_bytes, strict_json

# Most objects, lists and field names of a body. Each takes the event loop a microsecond or more to validate,
# and each may be an error; 4 MB hold over a million. Numbers and strings cost little.
MAX_PARTS = 1 << 16


class StrictJsonRequest(Request):
    """Reads JSON strictly: no NaN, no lone surrogates, no ten thousand nested brackets."""

    async def body(self) -> bytes:
        """Returns the first byte: FastAPI only asks whether there is a body, and would keep all of it."""
        if not hasattr(self, "_raw"):
            self._raw = await super().body()
            self._body = self._raw[:1]
        return self._body

    async def json(self) -> Json:
        """Returns the decoded body.

        Raises:
            HTTPException: 400, the body is not valid JSON, or has too many parts.
        """
        if not hasattr(self, "_json"):
            await self.body()
            raw, self._raw = self._raw, b""
            if (count := parts(raw)) > MAX_PARTS:
                raise HTTPException(400, f"the body has {count} objects, lists and fields, over {MAX_PARTS}")
            try:
                self._json = strict_json(raw)
            except ValueError as error:
                raise HTTPException(400, f"the body is not valid JSON: {error}") from error
        return self._json


class JsonResponse(JSONResponse):
    """A response whose strings may have surrogates."""

    def render(self, content: Json) -> bytes:
        """Encodes the response."""
        return json_bytes(content)


class StrictJsonRoute(APIRoute):
    """A route whose requests are :class:`StrictJsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns the route's handler, called with a strict request."""
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            if self.body_field is not None:
                request.app.state.service.admit(1)  # before the body is decoded
            return await inner(StrictJsonRequest(request.scope, request.receive))

        return handler


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for value in schema.values():
            _fail_fast(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            _fail_fast(value)


class FailFastModel(BaseModel):
    """A model that reports only the first wrong item of a list, which may hold a million."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Returns the core schema with pydantic's ``FailFast`` on each of its lists."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


class Body(FailFastModel):
    """Base of the bodies and of objects in them. Strict: no strings for numbers, no unknown fields.

    Of unknown fields, of which there may be tens of thousands, only the first is reported.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Json) -> Json:
        known = _names(cls)
        for name in value if isinstance(value, dict) else ():
            if name not in known:
                error = InitErrorDetails(type="extra_forbidden", loc=(name,), input=None)
                raise ValidationError.from_exception_data(cls.__name__, [error])
        return value


@cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items())


def at_most(entries: int) -> BeforeValidator:
    """Returns a validator of a dictionary's length, before its entries: each may be an error."""

    def check(value: Json) -> Json:
        if isinstance(value, dict) and len(value) > entries:
            about = {"field_type": "Dictionary", "max_length": entries, "actual_length": len(value)}
            raise PydanticKnownError("too_long", about)
        return value

    return BeforeValidator(check)


def parts(body: bytes) -> int:
    """Counts the objects, lists and fields of a JSON text; exactly if there may be over ``MAX_PARTS``."""
    most = _marks(body)
    if most <= MAX_PARTS:
        return most
    # strings are between an odd quote and the next; an escaped quote is no quote
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
    return _marks(b"".join(bare[::2]))


def _marks(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{") + text.count(b":")

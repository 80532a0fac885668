"""Reads the bodies of requests: strict JSON, and no more of it than can be checked in a moment."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, from_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

# Objects, lists and names of fields. Each costs the event loop's thread a microsecond or more to read and
# check, and each may be an error of its own; 4 MB hold over a million. Numbers and texts cost little.
MAX_PARTS = 1 << 16


class StrictJsonRequest(Request):
    """Reads JSON strictly: no NaN, no lone surrogate, no ten thousand brackets."""

    async def body(self) -> bytes:
        """The first byte: FastAPI asks whether there is any, and would keep the rest while it answers."""
        if not hasattr(self, "_raw"):
            self._raw = await super().body()
            self._body = self._raw[:1]
        return self._body

    async def json(self) -> Any:
        """The body.

        Raises:
            HTTPException: 400; it is not valid JSON, or has too many parts.
        """
        if not hasattr(self, "_json"):
            await self.body()
            raw, self._raw = self._raw, b""
            if (count := parts(raw)) > MAX_PARTS:
                raise HTTPException(400, f"the body has {count} objects, lists and fields, over {MAX_PARTS}")
            try:
                self._json = from_json(raw, allow_inf_nan=False)
            except ValueError as error:
                raise HTTPException(400, f"the body is not valid JSON: {error}") from error
        return self._json


class StrictJsonRoute(APIRoute):
    """Reads bodies as :class:`StrictJsonRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler, given such a request."""
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            if self.body_field is not None:
                request.app.state.service.admit(1)  # before anything is made of it
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
    """Stops at the first wrong item of a list: a million wrong ones would be a million errors."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema, with pydantic's ``FailFast`` on each of its lists."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


def parts(body: bytes) -> int:
    """Counts the objects, lists and fields of a JSON text; exactly where it may have over ``MAX_PARTS``."""
    most = _marks(body)
    if most <= MAX_PARTS:
        return most
    # what is between an even quote and the next is no string; an escaped quote is none
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
    return _marks(b"".join(bare[::2]))


def _marks(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{") + text.count(b":")

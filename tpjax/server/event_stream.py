"""Sends responses: JSON or server-sent events, for as long as the client is connected."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tpjax.server.error_responses import ApiError, internal_error
from tpjax.server.json_types import Json
from tpjax.server.responses import GenerationResponse, event
from tpjax.server.service import Service, Stream

T = TypeVar("T")

log = logging.getLogger(__name__)


class _ClientDisconnected(Exception):
    """The client closed the connection."""


class EventStream(Response):
    """Sends server-sent events until the response ends or the client disconnects.

    An error after the first event ends the stream with an ``error`` event and without ``[DONE]``.

    Args:
        service: told when the client stops reading.
        stream: the generations of the request.
        first: the first event.
        rest: the events after it.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, stream: Stream, first: bytes, rest: AsyncIterator[bytes]) -> None:
        self._service, self._stream = service, stream
        self._first, self._rest = first, rest
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response over ASGI; ends early if the client disconnects."""
        writer = asyncio.ensure_future(self._write(send))
        try:
            await _first_of(writer, asyncio.ensure_future(_disconnected(receive)))
        finally:
            self._service.close(self._stream)
        if not writer.cancelled():
            writer.result()

    async def _write(self, send: Send) -> None:
        async def data(body: bytes, more_body: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more_body})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await data(self._first)
            async for one in self._rest:
                await data(one)
            await data(b"data: [DONE]\n\n", more_body=False)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("an unexpected error in a stream")
                error = internal_error()
            await data(event(error.body(), "error"), more_body=False)


async def generation(
    service: Service, request: Request, begin: Coroutine[Json, Json, GenerationResponse], streamed: bool
) -> Response:
    """Runs a generation and returns its response; cancels it if the client disconnects.

    Args:
        service: runs the generation.
        request: the HTTP request.
        begin: checks the request and submits it.
        streamed: respond with server-sent events instead of one JSON object.

    Raises:
        ApiError: the request is invalid, or the generation failed before its first token.
    """
    response: GenerationResponse | None = None

    async def work() -> Json:
        nonlocal response
        response = await begin
        if not streamed:
            return await response.complete()
        events = response.events()
        # An error before the first token still gets its status: the response starts with that token.
        return await anext(events), events

    handed_over = False
    try:
        result = await _while_connected(request, work())
        if not streamed:
            return Response(result, media_type="application/json")
        assert response is not None
        handed_over = True
        return EventStream(service, response.stream, *result)
    except _ClientDisconnected:
        return Response(status_code=499)  # nobody reads it; the log shows it
    finally:
        if response is not None and not handed_over:
            service.close(response.stream)


async def without_engine(
    service: Service, request: Request, work: Coroutine[Json, Json, Response]
) -> Response:
    """Runs work that needs no engine, in a place of the queue; cancels it if the client disconnects.

    Raises:
        ApiError: 429, the queue is full; or what the work raises.
    """
    with service.preparing(1):
        return await while_connected(request, work)


async def while_connected(request: Request, work: Coroutine[Json, Json, Response]) -> Response:
    """Runs work in no place of the queue; cancels it if the client disconnects."""
    try:
        return await _while_connected(request, work)
    except _ClientDisconnected:
        return Response(status_code=499)


async def _while_connected(request: Request, work: Coroutine[Json, Json, T]) -> T:
    """Returns the result of some work; cancels it if the client disconnects first."""
    task = asyncio.ensure_future(work)
    await _first_of(task, asyncio.ensure_future(_disconnected(request.receive)))
    if task.cancelled():
        raise _ClientDisconnected
    return task.result()


async def _first_of(*tasks: asyncio.Future[Json]) -> None:
    """Waits for the first of some tasks and cancels the others."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""The outermost middleware: request id and log line, API key, body size, and unexpected exceptions."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from base64 import b64decode
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpjax.errors import RequestError
from tpjax.sandbox import release_memory
from tpjax.server import admission_budget
from tpjax.server.admission_budget import FREE_BYTES, AdmissionBudget, Reservation
from tpjax.server.error_responses import ApiError, bad_request, internal_error
from tpjax.server.json_types import json_bytes
from tpjax.server.logs import request_id

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
MAX_PREPARED_BODIES = 4  # of the largest size, prepared at once over all requests
BODY_LIMIT_S = 30.0
# What a client may still send after its request was refused: closing at once would reset the connection and
# lose the response.
LINGER_BYTES = 256 << 20
LINGER_S, LINGER_IDLE_S = 30.0, 5.0
MAX_LOGGED_PATH = 256  # characters
OPEN_PATHS = ("/health", "/ping", "/ready", "/metrics")  # probes and scrapers have no key
# The web page and its files: the same for everybody, and nothing in them is the model's. It asks for the key.
PAGE_PATH = re.compile(r"/|/page/[a-z]+\.(css|js)")
POLLED_PATHS = (*OPEN_PATHS, "/stats")  # requested every second or so: logged at debug level if successful
_CONTROLS = (*range(32), 127)  # that no header's value has
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


class ServerMiddleware:
    """The outermost layer of the application.

    Args:
        app: the application.
        api_keys: keys that are accepted; needed on every path but ``OPEN_PATHS`` and ``PAGE_PATH``. None of
            them: no key is needed.
        max_body_bytes: largest body; a larger one gets status 413.
        protect_metrics: ``/metrics`` needs a key too.

    Raises:
        RequestError: a key is none that a client could send.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: tuple[str, ...] = (),
        max_body_bytes: int = MAX_BODY_BYTES,
        protect_metrics: bool = False,
    ) -> None:
        check_keys(api_keys)
        self._app = app
        self._open = set(OPEN_PATHS) - ({"/metrics"} if protect_metrics else set())
        self._keys = [key.encode("utf-8", "surrogateescape") for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._budget = AdmissionBudget(MAX_PREPARED_BODIES * max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a connection over ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        own = headers.get("x-request-id", "")
        ident = own if _ID.fullmatch(own) else uuid.uuid4().hex
        token = request_id.set(ident)
        reserved = Reservation(self._budget)
        reserved_token = admission_budget.reservation.set(reserved)
        start, status, complete, unread = time.perf_counter(), 0, False, True

        async def incoming() -> Message:
            nonlocal unread
            message = await receive()
            unread = bool(message.get("more_body"))
            return message

        async def tagged(message: Message) -> None:
            nonlocal status, complete
            complete = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", ident.encode())]
            await send(message)

        try:
            try:
                _check_framing(scope["headers"])
                is_open = scope["path"] in self._open or PAGE_PATH.fullmatch(scope["path"]) is not None
                if not is_open:
                    self._check_key(headers)
                # what needs no key takes no body, and may not reserve room for one
                most = min(FREE_BYTES, self._max_body_bytes) if is_open else self._max_body_bytes
                body = await self._body(incoming, headers, reserved, most)
            except ApiError as error:
                framed = "content-length" in headers or "transfer-encoding" in headers
                await _refuse(error, receive if framed and unread else None, tagged)
            else:
                if body is not None:
                    replayed = _replayed(body, receive)
                    del body
                    await self._app(scope, replayed, tagged)
        except ApiError as error:
            await send_error(error, tagged)
        except Exception:
            log.exception("an unexpected error")
            if not status:
                await send_error(internal_error(), tagged)
            elif not complete:
                raise  # the response has started: the connection can only be closed
        finally:
            ms = round((time.perf_counter() - start) * 1000, 1)
            path = scope["path"][:MAX_LOGGED_PATH]
            fields = {"method": scope["method"], "path": path, "status": status, "ms": ms}
            level = logging.DEBUG if scope["path"] in POLLED_PATHS and status == 200 else logging.INFO
            log.log(level, "request", extra={"fields": fields})
            reserved.release()
            if reserved.most and not self._budget.used:  # the last large request has been served
                asyncio.get_running_loop().run_in_executor(None, release_memory)
            admission_budget.reservation.reset(reserved_token)
            request_id.reset(token)

    def _check_key(self, headers: dict[str, str]) -> None:
        if not self._keys:
            return
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip().encode("latin-1")
        if kind.lower() == "basic":  # of a client that knows a user and a password: the password is the key
            try:
                given = b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                given = b""
        # compares every key, each in constant time
        if not sum(hmac.compare_digest(given, key) for key in self._keys):
            raise ApiError(
                401,
                "the API key is missing or wrong",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Bearer realm="tpjax"'},
            )

    async def _body(
        self, receive: Receive, headers: dict[str, str], reserved: Reservation, most: int
    ) -> bytes | None:
        """Receives the whole body and reserves its bytes; returns ``None`` if the client has disconnected.

        Args:
            receive: receives its parts.
            headers: of the request.
            reserved: counts its bytes.
            most: bytes of the longest.

        Raises:
            ApiError: 408, 413 or 429; the rest of the body has not been received.
        """
        length = headers.get("content-length", "")
        too_large = ApiError(
            413,
            f"the body is over {most} bytes",
            code="request_too_large",
        )
        if length.isdigit():
            if len(length) > 18 or int(length) > most:
                raise too_large
            reserved.grow(int(length))
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_LIMIT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    reserved.grow(len(body))
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {BODY_LIMIT_S:g} s") from error


def check_keys(api_keys: Sequence[str]) -> None:
    """Checks that clients could send these keys.

    Raises:
        RequestError: one is empty, as that of a variable that is not set, or no header could have it.
    """
    for key in api_keys:
        if not key.strip():
            raise RequestError("an API key is empty")
        if key != key.strip() or not set(map(ord, key)).isdisjoint(_CONTROLS):
            raise RequestError(
                "an API key has white space at an end, or a control character: no client sends that"
            )


def _replayed(body: bytes, receive: Receive) -> Receive:
    bodies = [body]
    del body  # passed on once, and not kept while the response is generated

    async def replay() -> Message:
        if not bodies:
            return await receive()
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    return replay


def _check_framing(headers: list[tuple[bytes, bytes]]) -> None:
    """Refuses a body of ambiguous length, which a proxy may read as another request (request smuggling)."""
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if lengths and codings:
        raise bad_request("the request has both Content-Length and Transfer-Encoding")
    if codings not in ([], [b"chunked"]):
        raise ApiError(501, f"Transfer-Encoding {b', '.join(codings)[:80]!r} is not supported: use chunked")
    if len(set(lengths)) > 1:
        raise bad_request("the request has two different Content-Length")
    contents = [value.strip().lower() for name, value in headers if name == b"content-encoding"]
    if set(contents) - {b"", b"identity"}:
        named = b", ".join(contents)[:80].decode("latin-1")
        raise ApiError(415, f"Content-Encoding {named!r} is not supported: send the body as it is")


async def send_error(error: ApiError, send: Send, *, more_body: bool = False) -> None:
    """Sends an error response."""
    body = json_bytes(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


async def _refuse(error: ApiError, receive: Receive | None, send: Send) -> None:
    """Sends an error response; if a body is left to ``receive``, reads on for a while and closes."""
    if receive is None:
        await send_error(error, send)
        return
    error.headers["Connection"] = "close"
    await send_error(error, send, more_body=True)
    left = LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while left > 0:
                async with asyncio.timeout(LINGER_IDLE_S):
                    message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):  # the end of the body, or of the connection
                    break
    await send({"type": "http.response.body", "body": b""})

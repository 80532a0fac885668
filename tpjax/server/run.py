"""The server process: socket, signals, idle connections, draining and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from tpjax.distributed import num_processes, report_end, shut_down, when_asked_to_end
from tpjax.errors import ConfigError
from tpjax.server.app import create_app
from tpjax.server.logs import log_to_stderr
from tpjax.server.middleware import MAX_BODY_BYTES, ServerMiddleware
from tpjax.server.service import Service

if TYPE_CHECKING:
    from tpjax.llm import LLM

log = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 15.0
# Seconds that a connection stays open between two requests: longer than clients keep one, or one would
# send a request just as the server closes. httpx keeps them 5 s (uvicorn's default), aiohttp 15, load
# balancers 60.
KEEP_ALIVE_S = 75


@dataclass(frozen=True)
class Options:
    """Options of the server.

    Attributes:
        model: name of the model in the API.
        host: address to listen on.
        port: port to listen on; 0: any free one.
        api_keys: keys that clients may use; none: no key is needed.
        protect_metrics: ``/metrics`` needs a key too.
        allow_origins: origins whose pages may use the server from a browser; ``*``: any.
        max_queue: most choices that may wait for a slot.
        max_body_bytes: largest body of a request.
        drain_s: seconds that running requests have to finish after SIGTERM.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    protect_metrics: bool = False
    allow_origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = MAX_BODY_BYTES
    drain_s: float = 30.0


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's connection with an idle timeout.

    uvicorn waits for ever for the head of a request, and for ever for a client to read: idle connections
    would use up the sockets, and unread responses would hold places in the queue. Between two requests
    uvicorn's own timer runs.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts to check the connection every ``IDLE_TIMEOUT_S``."""
        super().connection_made(transport)
        self._check_idle(None)

    def _check_idle(self, before: object) -> None:
        """Aborts the connection if nothing has changed since the last check and the client should act."""
        if self.transport.is_closing() and not self.transport.get_write_buffer_size():
            return
        unread = self.transport.get_write_buffer_size()
        # data unsets the timer: a head has begun
        begun = self.cycle is None or (self.cycle.response_complete and self.timeout_keep_alive_task is None)
        now = (self.cycle, begun, unread)
        if now == before and (unread or now[1]):
            self.transport.abort()
        else:
            self.loop.call_later(IDLE_TIMEOUT_S, self._check_idle, now)


class Server(uvicorn.Server):
    """uvicorn with draining: the first signal lets running requests finish, the second exits at once."""

    def __init__(
        self, service: Service, options: Options, on_start: Callable[[], None] = lambda: None
    ) -> None:
        self.service = service
        self._on_start = on_start
        self._drain_s = options.drain_s
        self._signals = 0
        self._drain: asyncio.Task[None] | None = None
        app: ASGIApp = ServerMiddleware(
            create_app(service),
            options.api_keys,
            options.max_body_bytes,
            options.protect_metrics,
        )
        if options.allow_origins:
            # outside the key check: a preflight request has no key, and a browser reads no error without
            # these headers
            app = CORSMiddleware(
                app,
                allow_origins=options.allow_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            )
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                http=Connection,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=5,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()

        def finish() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self.finish)

        when_asked_to_end(finish)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles SIGINT and SIGTERM."""
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + sig)
        asyncio.get_running_loop().call_soon_threadsafe(self.finish)

    def finish(self) -> None:
        """Drains, then shuts down; a second call does nothing."""
        if self._drain is not None:
            return
        log.info("draining: running requests have %g s", self._drain_s)
        self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        await self.service.drain(self._drain_s)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket.

    Raises:
        ConfigError: the port is in use, or the address is not one of this machine's.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror or error}"
        raise ConfigError(f"port {port} of {host} {why}") from error
    return sock


def serve(load: Callable[[], LLM], options: Options, announce: Callable[[str], None]) -> None:
    """Serves until a signal stops the server.

    Args:
        load: loads the model; called once the server listens.
        options: options of the server.
        announce: called with a line that has the address and the state, once the server listens, and again
            when the model is ready.

    Raises:
        ConfigError: the port is in use.
        Exception: the exception that loading the model, or the engine, failed with.
    """
    sock = listen(options.host, options.port)
    log_to_stderr()
    service = Service(
        load,
        options.model,
        options.max_queue,
        warm_up=True,
        on_ready=lambda: announce(
            f"{options.model} is ready at {url}"
            + (f" ({service.compiling} compiles in the background)" if service.compiling else "")
        ),
        on_failure=lambda: server.finish(),
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{sock.getsockname()[1]}"
    server = Server(service, options, lambda: announce(f"{url} listens; {options.model} loads"))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    server.run(sockets=[sock])
    if service.error is not None:
        raise service.error
    if not service.loaded and num_processes() > 1:  # the others load, or compile what this one asked for
        report_end("process 0 was asked to end: all end")
        os._exit(0)
    shut_down()
    if not service.loaded or service.compiling:
        os._exit(0)  # a thread is in the compiler: the interpreter could not finalise

"""The server's process: the socket, the signals, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from tpjax.errors import ConfigError
from tpjax.server.app import create_app
from tpjax.server.middleware import MAX_BODY_BYTES, ServerMiddleware, log_as_json_lines
from tpjax.server.service import Service

if TYPE_CHECKING:
    from tpjax.llm import LLM

log = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Options:
    """How to serve.

    Attributes:
        model: name of the model in the API.
        host: address to listen on.
        port: 0 takes a free one.
        api_keys: any of them opens the server; none: it is open to all who reach it.
        protect_metrics: ``/metrics`` asks for a key too.
        allow_origins: origins whose pages may use the server from a browser; ``*``: any.
        max_queue: choices that may wait for a slot.
        max_body_bytes: of a request.
        drain_s: what running requests get to finish after SIGTERM.
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
    """uvicorn's side of a connection, with an end to its patience.

    uvicorn waits for ever for a request's head, and for ever for a client to read: connections that cost a
    client nothing would use up the sockets, and what it does not read would hold places in the queue.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begins to look at it every ``IDLE_TIMEOUT_S``."""
        super().connection_made(transport)
        self._look(None)

    def _look(self, before: object) -> None:
        """Cuts it if nothing has moved since the last look and the next move is the client's."""
        if self.transport.is_closing() and not self.transport.get_write_buffer_size():
            return
        unread = self.transport.get_write_buffer_size()
        now = (self.cycle, self.cycle is None or self.cycle.response_complete, unread)
        if now == before and (unread or now[1]):
            self.transport.abort()
        else:
            self.loop.call_later(IDLE_TIMEOUT_S, self._look, now)


class Server(uvicorn.Server):
    """uvicorn, with a drain: the first signal lets running requests finish, the second ends all at once."""

    def __init__(
        self, service: Service, options: Options, on_start: Callable[[], None] = lambda: None
    ) -> None:
        self.service = service
        self._on_start = on_start
        self._drain_s = options.drain_s
        self._signals = 0
        self._drain: asyncio.Task[None] | None = None
        app: Any = ServerMiddleware(
            create_app(service),  # type: ignore[arg-type]
            options.api_keys,
            options.max_body_bytes,
            options.protect_metrics,
        )
        if options.allow_origins:
            # outside of the keys: a browser asks leave without one, and reads no error without these headers
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
                timeout_graceful_shutdown=5,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT and SIGTERM come here."""
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + sig)
        asyncio.get_running_loop().call_soon_threadsafe(self.finish)

    def finish(self) -> None:
        """Drains, then ends."""
        log.info("draining: running requests have %g s", self._drain_s)
        self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        await self.service.drain(self._drain_s)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
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
    """Serves until a signal says to stop.

    Args:
        load: makes the model; called once the server listens.
        options: how.
        announce: told the address, once the server listens, and that the model is ready.

    Raises:
        ConfigError: the port is taken.
        Exception: what loading the model, or the engine, failed with.
    """
    sock = listen(options.host, options.port)
    log_as_json_lines()
    service = Service(
        load,
        options.model,
        options.max_queue,
        on_ready=lambda: announce(f"{options.model} is ready"),
        on_failure=lambda: server.finish(),
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{sock.getsockname()[1]}"
    server = Server(service, options, lambda: announce(url))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    server.run(sockets=[sock])
    if service.error is not None:
        raise service.error
    if not service.loaded:
        os._exit(0)  # the thread that loads is in the compiler: the interpreter could not end under it

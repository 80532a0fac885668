"""Connections between process 0 and the others: frames over TCP, between ends that have proved a secret.

A frame is a kind, a length, and bytes; nothing in it is ever executed or unpickled. Plain sockets and no
message library: on the loopback interface a small frame takes 0.017 ms there and back, over pyzmq 0.047 ms,
and a frame of 1.4 MB 0.6 ms where pyzmq with its encryption takes 1.8 ms (medians of 60 on two cores). The
bytes are not encrypted, as those of the collectives between the same machines are not: the network between
them has to be private.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from tpjax.errors import DistributedError, LostProcessError

SECRET_BYTES = 32
MAX_FRAME_BYTES = 1 << 30
_HEAD = struct.Struct("<BI")
_PROOF_TIMEOUT_S = 5.0
_MOST_BUFFERS = 1000  # of one call: Linux takes 1,024

Buffer: TypeAlias = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a frame is.

    The first group goes to the followers, the second to process 0, ``BEAT`` both ways.
    """

    DECISIONS = 1  # JSON: what process 0 has chosen for all
    REFUSED = 2  # text: why all end
    COMPILE = 3  # JSON: number and key of a program
    DISPATCH = 4  # number of a program, and its host arguments
    ALLOCATE = 5  # allocate the device state
    RESET = 6  # free it
    EXPLAIN = 7  # describe the stages of this process
    STOP = 8  # nothing follows

    HELLO = 9  # JSON: what this process would run
    COMPILED = 10  # JSON: number of a program, and the error if there was one
    FAILED = 11  # text: why this process cannot go on
    LEAVING = 12  # the answer to STOP
    EXPLAINED = 13  # JSON: what EXPLAIN asked for, and the error if there was one

    BEAT = 14


class Frame(NamedTuple):
    """A received frame."""

    kind: Kind
    body: memoryview


class Connection:
    """One end of a connection; any thread may send, one receives.

    Args:
        sock: a connected socket whose other end has proved the secret.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._lock = threading.Lock()
        self._head = bytearray(_HEAD.size)

    def send(self, kind: Kind, parts: Sequence[Buffer] = ()) -> None:
        """Sends a frame; waits while the other end does not read.

        Raises:
            OSError: the other end is gone.
            DistributedError: it is larger than a frame may be.
        """
        body = [memoryview(part).cast("B") for part in parts if len(part)]
        size = sum(map(len, body))
        if size > MAX_FRAME_BYTES:
            raise DistributedError(f"a message of {size} bytes is over {MAX_FRAME_BYTES}")
        with self._lock:
            self._send_all([memoryview(_HEAD.pack(kind, size)), *body])

    def _send_all(self, views: list[memoryview]) -> None:
        while views:
            sent = self._sock.sendmsg(views[:_MOST_BUFFERS])
            done = 0
            while done < len(views) and sent >= len(views[done]):
                sent -= len(views[done])
                done += 1
            del views[:done]
            if sent:
                views[0] = views[0][sent:]

    def receive(self) -> Frame | None:
        """Returns the next frame; ``None``: the other end has closed.

        Raises:
            OSError: the connection broke.
            DistributedError: a frame is not of this protocol.
        """
        if not _receive_into(self._sock, memoryview(self._head)):
            return None
        kind, size = _HEAD.unpack(self._head)
        if size > MAX_FRAME_BYTES or kind not in Kind.__members__.values():
            raise DistributedError(f"a message of kind {kind} and {size} bytes is not of this protocol")
        body = memoryview(bytearray(size))
        return Frame(Kind(kind), body) if _receive_into(self._sock, body) else None

    def close(self) -> None:
        """Closes the connection; a thread that receives from it gets ``None``."""
        with contextlib.suppress(OSError):  # the other end was first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def listen(host: str) -> socket.socket:
    """Returns a socket that listens on a free port of one address.

    Raises:
        DistributedError: the address is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise DistributedError(f"process 0 cannot listen on {host}: {error.strerror or error}") from error


def accept(sock: socket.socket, secret: bytes) -> Connection | None:
    """Accepts a connection; ``None`` if its other end does not prove the secret.

    Raises:
        TimeoutError: nobody connected in the socket's time.
    """
    other, _ = sock.accept()
    try:
        other.settimeout(_PROOF_TIMEOUT_S)
        nonce = secrets.token_bytes(SECRET_BYTES)
        other.sendall(nonce)
        answer = _receive(other, 2 * SECRET_BYTES)
        other_nonce, proof = answer[:SECRET_BYTES], answer[SECRET_BYTES:]
        if not hmac.compare_digest(proof, _proof(secret, b"follower", nonce, other_nonce)):
            raise DistributedError("wrong proof")
        other.sendall(_proof(secret, b"leader", nonce, other_nonce))
    except (OSError, DistributedError):
        other.close()
        return None
    return Connection(other)


def connect(host: str, port: int, secret: bytes) -> Connection:
    """Connects to process 0.

    Raises:
        LostProcessError: it cannot be reached, or does not prove the secret.
    """
    try:
        sock = socket.create_connection((host, port), timeout=_PROOF_TIMEOUT_S)
    except OSError as error:
        why = f"process 0 cannot be reached at {host}, port {port}: {error.strerror or error}"
        raise LostProcessError(f"{why}; are all ports between the machines open?") from error
    try:
        nonce, own = _receive(sock, SECRET_BYTES), secrets.token_bytes(SECRET_BYTES)
        sock.sendall(own + _proof(secret, b"follower", nonce, own))
        if not hmac.compare_digest(_receive(sock, SECRET_BYTES), _proof(secret, b"leader", nonce, own)):
            raise DistributedError("wrong proof")
    except (OSError, DistributedError) as error:
        sock.close()
        raise LostProcessError(f"what listens at {host}, port {port}, is not process 0 of these") from error
    return Connection(sock)


def _proof(secret: bytes, role: bytes, leaders: bytes, followers: bytes) -> bytes:
    """Returns what only one that knows the secret can answer; the role keeps it from being reflected."""
    return hmac.digest(secret, role + leaders + followers, "sha256")


def _receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    if not _receive_into(sock, memoryview(data)):
        raise DistributedError("the connection was closed")
    return bytes(data)


def _receive_into(sock: socket.socket, view: memoryview) -> bool:
    """Fills a buffer; returns False if the other end closes first."""
    got = 0
    while got < len(view):
        count = sock.recv_into(view[got:], len(view) - got, socket.MSG_WAITALL)
        if not count:
            return False
        got += count
    return True

"""What process 0 and its followers have in common: how they meet, and how each knows that the other lives.

A process that ends closes its connections, which the other end sees at once. One that hangs or is stopped
does not: so both ends send a beat a second, and one that has not been heard of for ``SILENCE_S`` counts as
lost. JAX has a heartbeat of its own, but it takes 100 s, and ends every process before anybody could be told.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jax

from tpjax._version import __version__
from tpjax.runtime.channel import Connection, Kind

BEAT_S = 1.0
SILENCE_S = 15.0
FOLLOWER_SILENCE_S = 20.0  # process 0 finds out first, and can say which process is lost
EXIT_LOST = 1

_meetings = itertools.count()  # models that this process has loaded: all load the same, in the same order

Facts = Mapping[str, Any]


def next_place() -> str:
    """Returns the name under which process 0 publishes where it listens for the next model."""
    return f"tpjax/place/{next(_meetings)}"


def to_json(value: Any) -> bytes:
    """Encodes plain data."""
    return json.dumps(value, separators=(",", ":")).encode()


def from_json(body: memoryview) -> Any:
    """Decodes plain data.

    Raises:
        ValueError: it is not JSON.
    """
    return json.loads(bytes(body))


# Settings of JAX that decide what a program computes.
_SETTINGS = (
    *("jax_enable_x64", "jax_default_matmul_precision", "jax_disable_jit", "jax_debug_nans"),
    *("jax_use_shardy_partitioner", "jax_threefry_partitionable", "jax_default_prng_impl"),
)
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OWN_FLAGS = ("--xla_force_host_platform_device_count", "--xla_dump_")  # that each process may choose


def surroundings() -> dict[str, Any]:
    """Returns what besides the model decides what programs are compiled: versions, code, flags, settings."""
    device = jax.local_devices()[0]
    return {
        "version": __version__,
        "code": _digest_of_code(),
        "jax": jax.__version__,
        "python": platform.python_version_tuple()[:2],
        "device": device.device_kind,
        "compiler": " ".join(device.client.platform_version.split()),
        **flags(" ".join(os.environ.get(name, "") for name in _FLAGS)),
        **{name: str(getattr(jax.config, name, None)) for name in _SETTINGS},
    }


def flags(text: str) -> dict[str, str]:
    """Returns the values of the flags in a text that have to be the same in all processes.

    Of a flag that is repeated the last counts. One with a path is of its machine.
    """
    given = dict(word.partition("=")[::2] for word in text.split())
    return {
        name: value for name, value in given.items() if not name.startswith(_OWN_FLAGS) and "/" not in value
    }


@cache
def _digest_of_code() -> str:
    """Returns a digest of tpjax's source: two checkouts may have one version."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def differences(own: Facts, others: Facts, process: int) -> list[str]:
    """Returns in what another process differs from process 0."""
    return [
        f"{name} is {others.get(name)!r} in process {process} and {own.get(name)!r} in process 0"
        for name in {**own, **others}
        if own.get(name) != others.get(name)
    ]


def leave(message: str, status: int = EXIT_LOST) -> NoReturn:
    """Ends this process at once: a thread may be in a collective that never returns."""
    with contextlib.suppress(OSError):  # nobody may read it
        print(f"tpjax: error: {message}", file=sys.stderr, flush=True)
    os._exit(status)


class Pulse:
    """Sends beats over a connection, and calls back when the other end falls silent.

    Args:
        connection: the connection.
        silence_s: seconds without a frame after which the other end counts as lost.
        on_silence: called once, on the pulse's thread.

    Attributes:
        heard: time of the last frame, as ``time.monotonic`` has it; whoever receives frames sets it.
    """

    def __init__(self, connection: Connection, silence_s: float, on_silence: Callable[[], None]) -> None:
        self.heard = time.monotonic()
        self._connection = connection
        self._silence_s = silence_s
        self._on_silence = on_silence
        self._stopped = threading.Event()
        # two threads: a beat to an end that reads nothing may have to wait
        for target, name in ((self._beat, "beat"), (self._listen, "pulse")):
            threading.Thread(target=target, name=f"tpjax-{name}", daemon=True).start()

    def stop(self) -> None:
        """Sends and expects no more beats."""
        self._stopped.set()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_S):
            try:
                self._connection.send(Kind.BEAT)
            except OSError:  # whoever receives sees it too
                return

    def _listen(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(BEAT_S):
            now = time.monotonic()
            if now - before > 3 * BEAT_S:
                # it is this process that was stopped, or had no time: frames wait to be read
                self.heard = now
            before = now
            if now - self.heard > self._silence_s:
                self._on_silence()
                return

"""What goes from process 0 to the others: frames, between ends that know a secret, and arguments."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import WAIT_S

from tpjax.attention import XLA, Backend
from tpjax.errors import DistributedError
from tpjax.runtime.channel import Connection, Kind, accept, connect, listen
from tpjax.runtime.leader import _Acknowledgements
from tpjax.runtime.memory import DeviceMemory
from tpjax.runtime.processes import differences
from tpjax.runtime.replay_codec import DispatchDecoder, DispatchEncoder
from tpjax.runtime.role import Role

SECRET = b"s" * 32


def accepted(secret: bytes, client: Any) -> tuple[Connection | None, Any]:
    """What process 0 accepts, and what the client got, which connects on a thread."""
    found: list[Any] = []
    with listen("127.0.0.1") as sock:
        sock.settimeout(WAIT_S)

        def run() -> None:
            try:
                found.append(client(sock.getsockname()[1]))
            except DistributedError as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        connection = accept(sock, secret)
        thread.join(WAIT_S)
        if connection is None:
            return None, found[0]
        return connection, found[0]


@pytest.fixture
def pair() -> Any:
    leader, follower = accepted(SECRET, lambda port: connect("127.0.0.1", port, SECRET))
    assert leader is not None
    yield leader, follower
    leader.close()
    follower.close()


def test_frames_arrive_whole_and_in_order(pair: tuple[Connection, Connection]) -> None:
    """A large one is written in parts while the other end reads."""
    leader, follower = pair
    large = np.random.default_rng(0).bytes(3_000_000)
    many = [bytes([i % 256]) * i for i in range(1500)]  # more buffers than one call takes

    def send() -> None:
        leader.send(Kind.DISPATCH, [b"ab", memoryview(large), np.arange(3, dtype=np.int32).data])
        leader.send(Kind.COMPILE, many)
        leader.send(Kind.STOP)
        leader.close()

    thread = threading.Thread(target=send)
    thread.start()
    first = follower.receive()
    assert first is not None and first.kind == Kind.DISPATCH
    assert bytes(first.body) == b"ab" + large + np.arange(3, dtype=np.int32).tobytes()
    second = follower.receive()
    assert second is not None and second.kind == Kind.COMPILE and bytes(second.body) == b"".join(many)
    stop = follower.receive()
    assert stop is not None and (stop.kind, len(stop.body)) == (Kind.STOP, 0)
    assert follower.receive() is None
    thread.join(WAIT_S)


def test_a_client_without_the_secret_is_turned_away() -> None:
    connection, error = accepted(SECRET, lambda port: connect("127.0.0.1", port, b"x" * 32))
    assert connection is None
    assert "is not process 0 of these" in str(error)


def test_a_client_that_reflects_the_challenge_is_turned_away() -> None:
    def reflect(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            nonce = sock.recv(32, socket.MSG_WAITALL)
            sock.sendall(nonce + nonce)
            return sock.recv(32)

    assert accepted(SECRET, reflect) == (None, b"")


def test_process_0_has_to_prove_the_secret_too() -> None:
    with listen("127.0.0.1") as sock:

        def pretend() -> None:
            other, _ = sock.accept()
            with other:
                other.sendall(b"n" * 32)
                other.recv(64, socket.MSG_WAITALL)
                other.sendall(b"p" * 32)

        threading.Thread(target=pretend, daemon=True).start()
        with pytest.raises(DistributedError, match="is not process 0 of these"):
            connect("127.0.0.1", sock.getsockname()[1], SECRET)


def test_what_is_no_frame_is_refused(pair: tuple[Connection, Connection]) -> None:
    leader, follower = pair
    leader._sock.sendall(b"\xc8" + (5).to_bytes(4, "little") + b"hello")
    with pytest.raises(DistributedError, match="kind 200 and 5 bytes is not of this protocol"):
        follower.receive()


def test_listening_at_another_machine_s_address_is_an_error() -> None:
    with pytest.raises(DistributedError, match=r"process 0 cannot listen on 192\.0\.2\.1"):
        listen("192.0.2.1")


def arrays(random: np.random.Generator, step: int) -> tuple[Any, ...]:
    """Arguments of every shape and dtype there is, of which some, all or none change."""
    tables = np.arange(4 * 600, dtype=np.int32).reshape(4, 600)
    tables[step % 4, step] = -step
    states = np.random.default_rng(1).integers(0, 2**32, (6, 300), dtype=np.uint32)
    masks = states[random.integers(0, 6, 5)]
    if step % 5 == 4:
        masks = random.integers(0, 2**32, (5, 300), dtype=np.uint32)
    return (
        (tables, masks),
        np.int32(step),
        random.normal(size=(3, 2)).astype(np.float32),
        np.arange(7) % 3 == step % 3,  # bytes that are no whole words
        np.zeros((0, 4), np.int32),
    )


def encoded(encoder: DispatchEncoder, *calls: tuple[Any, ...]) -> memoryview:
    """The arguments of dispatches as they arrive."""
    return memoryview(b"".join(bytes(part) for part in encoder.encode(calls)))


def test_arguments_are_decoded_as_they_were() -> None:
    """One dispatch or several at once; also with rows that are sent by number and were replaced meanwhile."""
    random, encoder, sizes = np.random.default_rng(0), DispatchEncoder(), []
    decoder = DispatchDecoder(arrays(random, 0))
    for step in range(300):
        given = [arrays(random, step + i) for i in range(1 if step % 3 else random.integers(1, 5))]
        body = encoded(encoder, *given)
        sizes.append(len(body) / len(given))
        for one_call, other_call in zip(given, decoder.decode(body), strict=True):
            leaves = (*one_call[0], *one_call[1:]), (*other_call[0], *other_call[1:])
            for one, other in zip(*leaves, strict=True):
                assert np.asarray(one).dtype == other.dtype
                np.testing.assert_array_equal(one, other)
    assert sizes[0] > 4 * (2400 + 1500) and sizes[298] < 200


def test_arrays_of_one_dispatch_are_not_those_of_the_next() -> None:
    """A program may still read them, also if every row is one that was sent before."""
    encoder, rows = DispatchEncoder(), np.arange(800, dtype=np.uint32).reshape(2, 400)
    decoder = DispatchDecoder((rows,))
    first = [decoder.decode(encoded(encoder, (rows,), (rows,))) for _ in range(2)][-1]
    before = [arguments[0].copy() for arguments in first]
    decoder.decode(encoded(encoder, (rows + np.uint32(1),), (rows[::-1].copy(),)))
    for arguments, kept in zip(first, before, strict=True):
        np.testing.assert_array_equal(arguments[0], kept)


def test_equal_sums_are_not_taken_for_equal_rows() -> None:
    encoder, zeros = DispatchEncoder(), np.zeros((2, 400), np.uint32)
    decoder = DispatchDecoder((zeros,))
    one, two = zeros + np.uint32(1), zeros + np.uint32(1)
    two[:, 0], two[:, 2] = 0, 2
    for rows in (zeros, one, two, one, two, zeros):
        ((found,),) = decoder.decode(encoded(encoder, (rows.copy(),)))
        np.testing.assert_array_equal(found, rows)


def test_arguments_of_another_program_are_refused() -> None:
    body = encoded(DispatchEncoder(), (np.zeros(8, np.int32),))
    with pytest.raises(ValueError, match="a dispatch has 40 bytes, but its program takes 24"):
        DispatchDecoder((np.zeros(4, np.int32),)).decode(body)


def test_rows_that_were_never_sent_are_refused() -> None:
    rows = np.zeros((2, 400), np.uint32)
    body = bytearray(encoded(DispatchEncoder(), (rows,), (rows,)))
    body[8:12] = (256).to_bytes(4, "little")  # the number of the first row
    with pytest.raises(ValueError, match="rows 0 to 256 of 256 are kept"):
        DispatchDecoder((rows,)).decode(memoryview(body))


def test_differences_are_named_with_both_values() -> None:
    own, others = {"version": "1", "max_slots": 8, "dtype": "auto"}, {"version": "2", "max_slots": 8}
    assert differences(own, others, 3) == [
        "version is '2' in process 3 and '1' in process 0",
        "dtype is None in process 3 and 'auto' in process 0",
    ]


def test_process_0_chooses_the_kernels_and_the_least_memory_of_all() -> None:
    """The others do not even look: a self-test times a chip, and another chip could find otherwise."""
    sent: list[Any] = []
    each = [asdict(DeviceMemory(free, platform="gpu")) for free in (9, 5)]
    leader: Any = SimpleNamespace(gathered=lambda name: [*each, None], decide=sent.append)
    chosen = [XLA, Backend("gpu", "found right")]
    assert Role(leader=leader).decide(lambda: chosen) == (DeviceMemory(5, platform="gpu"), chosen)
    follower: Any = SimpleNamespace(decisions=lambda: json.loads(json.dumps(sent[0])))
    found = Role(DeviceMemory(7), follower=follower).decide(lambda: pytest.fail("a follower has chosen"))
    assert found == (DeviceMemory(5, platform="gpu"), chosen)


def test_a_program_waits_until_every_process_has_it() -> None:
    waiting = _Acknowledgements({1, 2})
    thread = threading.Thread(target=waiting.wait, args=("decode",))
    thread.start()
    waiting.add(2, None)
    thread.join(0.1)
    assert thread.is_alive()
    waiting.add(1, None)
    thread.join(WAIT_S)
    assert not thread.is_alive()
    failed = _Acknowledgements({1, 2})
    failed.add(2, "no room")
    why = "decode could not be compiled everywhere: process 2: no room"
    with pytest.raises(DistributedError, match=why):
        failed.wait("decode")

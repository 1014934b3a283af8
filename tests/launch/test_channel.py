"""Channels: what is sent arrives, in whatever pieces; what is broken is an error and never a wait."""

import fcntl
import math
import os
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.launch.channel import MAX_MESSAGE, Channel, ChannelClosed

pytestmark = pytest.mark.timeout(120)

INTEGERS = st.integers(-(2**63), 2**64 - 1)
SCALARS = st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.text() | st.binary() | INTEGERS
MESSAGES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=30)


class Interrupted(Exception):
    pass


def frame(message: object) -> bytes:
    body: bytes = msgpack.packb(message)
    return struct.pack("!I", len(body)) + body


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the bare other end."""
    near, far = socket.socketpair()
    channel = Channel(near)
    yield channel, far
    channel.close()
    far.close()


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    near, far = map(Channel, socket.socketpair())
    yield near, far
    near.close()
    far.close()


@given(messages=st.lists(MESSAGES, max_size=4))
def test_messages_arrive_as_they_were(messages: list[Any]) -> None:
    near, far = map(Channel, socket.socketpair())
    for message in messages:
        near.send(message)
    near.close()
    assert repr([far.receive() for _ in messages]) == repr(messages)  # 1, 1.0 and True are three things
    with pytest.raises(ChannelClosed):
        far.receive()
    far.close()


@given(message=MESSAGES)
def test_the_bytes_are_a_length_and_msgpack(message: Any) -> None:
    near, far = socket.socketpair()
    channel = Channel(near)
    far.sendall(frame(message))
    arrived = channel.receive()
    channel.send(arrived)
    assert far.recv(1 << 20) == frame(message)
    channel.close()
    far.close()


def test_nan_and_tuples(channels: tuple[Channel, Channel]) -> None:
    near, far = channels
    near.send((math.nan, (1, ())))
    first, second = far.receive()
    assert math.isnan(first) and second == [1, []]


def test_a_message_in_single_bytes(ends: tuple[Channel, socket.socket]) -> None:
    channel, far = ends
    message = {"tokens": [1, 2, 3], 7: b"\0" * 40}

    def write() -> None:
        for byte in frame(message):
            far.sendall(bytes([byte]))
            time.sleep(0.001)

    writer = threading.Thread(target=write)
    writer.start()
    assert channel.receive() == message
    writer.join()


def test_messages_that_arrive_together(ends: tuple[Channel, socket.socket]) -> None:
    channel, far = ends
    far.sendall(b"".join(map(frame, ["a", {}, [None]])))
    assert [channel.receive() for _ in range(3)] == ["a", {}, [None]]


def test_more_than_a_socket_holds(channels: tuple[Channel, Channel]) -> None:
    near, far = channels
    data = os.urandom(1 << 20) * 20
    writer = threading.Thread(target=near.send, args=({"data": data},))
    writer.start()
    assert far.receive() == {"data": data}
    writer.join()


def test_several_threads_send(channels: tuple[Channel, Channel]) -> None:
    near, far = channels
    body = bytes(50_000)

    def write(thread: int) -> None:
        for number in range(30):
            near.send([thread, number, body])

    writers = [threading.Thread(target=write, args=(thread,)) for thread in range(8)]
    for writer in writers:
        writer.start()
    arrived = [far.receive() for _ in range(8 * 30)]
    for writer in writers:
        writer.join()
    assert all(message[2] == body for message in arrived)
    for thread in range(8):
        assert [n for t, n, _ in arrived if t == thread] == list(range(30))


def test_what_is_too_long_is_not_sent() -> None:
    near, far = socket.socketpair()
    channel = Channel(near, limit=16)
    channel.send(bytes(14))
    with pytest.raises(ValueError, match="a message of 17 bytes is above the channel's limit of 16"):
        channel.send(bytes(15))
    channel.send("after")
    assert far.recv(100) == frame(bytes(14)) + frame("after")
    channel.close()
    far.close()


@pytest.mark.parametrize("head", [struct.pack("!I", MAX_MESSAGE + 1), b"GET / HTTP/1.1\r\n"])
def test_what_is_too_long_is_not_received(ends: tuple[Channel, socket.socket], head: bytes) -> None:
    channel, far = ends
    far.sendall(head)
    with pytest.raises(ValueError, match=f"above the channel's limit of {MAX_MESSAGE}; closed"):
        channel.receive()
    assert channel.fileno() == -1
    with pytest.raises(ChannelClosed):
        channel.receive()


@pytest.mark.parametrize(
    ("message", "error"),
    [(object(), TypeError), ({"a": {1, 2}}, TypeError), (2**64, OverflowError), ("\ud800", ValueError)],
)
def test_what_is_not_plain_data(
    channels: tuple[Channel, Channel], message: object, error: type[Exception]
) -> None:
    near, far = channels
    with pytest.raises(error):
        near.send(message)
    near.send("after")
    assert far.receive() == "after"


@pytest.mark.parametrize("body", [b"\xc1", b"\x92\x01", b"\x01\x02", b"\xa1\xff", b""])
def test_what_is_no_message(ends: tuple[Channel, socket.socket], body: bytes) -> None:
    channel, far = ends
    far.sendall(struct.pack("!I", len(body)) + body + frame("after"))
    with pytest.raises(ValueError):
        channel.receive()
    assert channel.receive() == "after"


@pytest.mark.parametrize("length", range(len(frame("abc"))))
def test_the_other_end_closes_in_the_middle(ends: tuple[Channel, socket.socket], length: int) -> None:
    channel, far = ends
    far.sendall(frame("whole") + frame("abc")[:length])
    far.close()
    assert channel.receive() == "whole"
    with pytest.raises(ChannelClosed, match="in the middle" if length else "was closed$"):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.receive()


def test_the_other_end_closes_without_reading(ends: tuple[Channel, socket.socket]) -> None:
    """That is a reset. What came before it is not lost, also where sending fails first."""
    channel, far = ends
    far.sendall(frame("last words"))
    channel.send("unread")
    far.close()
    with pytest.raises(ChannelClosed):
        channel.send("more")
    assert channel.receive() == "last words"
    with pytest.raises(ChannelClosed):
        channel.receive()


def test_tcp_and_its_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        channel = Channel(listener.accept()[0])
    far.sendall(frame([1]) + frame("half")[:3])
    assert channel.receive() == [1]
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    with pytest.raises(ChannelClosed):
        channel.receive()
    channel.close()


def test_closed_here(channels: tuple[Channel, Channel]) -> None:
    near, far = channels
    near.close()
    near.close()
    assert near.fileno() == -1
    with pytest.raises(ChannelClosed):
        near.send(1)
    with pytest.raises(ChannelClosed):
        near.receive()
    with pytest.raises(ChannelClosed):
        far.receive()


def test_close_wakes_who_receives(channels: tuple[Channel, Channel]) -> None:
    near, _ = channels
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(ChannelClosed):
            near.receive()
        ended.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    time.sleep(0.05)
    near.close()
    assert ended.wait(60)
    reader.join()


@pytest.mark.parametrize("length", [0, 2, 6])
def test_an_exception_from_a_signal(ends: tuple[Channel, socket.socket], length: int) -> None:
    """Between two messages it does no harm, in one it ends the channel."""
    channel, far = ends

    def interrupt() -> None:
        while struct.unpack("i", fcntl.ioctl(far, termios.TIOCOUTQ, bytes(4)))[0]:
            time.sleep(0.01)  # not read yet
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)

    def handle(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handle)
    far.sendall(frame("abc")[:length])
    with pytest.raises(Interrupted):
        threading.Thread(target=interrupt).start()
        channel.receive()
    signal.signal(signal.SIGUSR1, before)
    if length:
        assert channel.fileno() == -1
    else:
        far.sendall(frame("abc"))
        assert channel.receive() == "abc"


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_descriptors(channels: tuple[Channel, Channel], count: int) -> None:
    near, far = channels
    read, write = os.pipe()
    near.send(count, [write] * count)
    near.send("after")
    os.close(write)
    found = far.receive_descriptors(far.receive())
    assert far.receive() == "after"
    assert len(set(found)) == count and not any(map(os.get_inheritable, found))
    for descriptor in found:
        os.write(descriptor, b"x")
        os.close(descriptor)
    assert os.read(read, 1000) == b"x" * count and os.read(read, 1) == b""
    os.close(read)


def test_a_copy_given_up_does_not_end_the_connection(channels: tuple[Channel, Channel]) -> None:
    near, far = channels
    copy = Channel(socket.socket(fileno=os.dup(near.fileno())))
    os.close(copy.detach())
    near.send("still here")
    assert copy.fileno() == -1 and far.receive() == "still here"

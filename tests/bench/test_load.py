"""The load generator sends what it says, counts replies however they are cut, and notices wrong ones."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from types import SimpleNamespace
from typing import cast

import pytest
from bench.client import (
    CHUNK,
    CHUNK_DATA,
    CHUNK_ERROR,
    CHUNK_HOLE,
    CHUNK_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE,
    SIMPLE_MAGIC,
    Connection,
    ServerError,
)
from bench.load import BLOCK, PAYLOAD, RING, Ring, Workload, counter, drive
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.nbd_server import TinyServer

READS = Workload(write=False, block=BLOCK, depth=4, sequential=False, size=1 << 20)
WRITES = Workload(write=True, block=2 * BLOCK, depth=3, sequential=False, size=1 << 20)


def sent_by(ring: Ring, first: int, count: int, size: int) -> bytes:
    """What ``send`` puts on a socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(10)
        ring.send(cast(Connection, SimpleNamespace(socket=ours)), first, count)
        data = b""
        while len(data) < size:
            data += theirs.recv(size)
        return data


def replies(data: bytes, cuts: list[int]) -> Connection:
    """A connection on which ``data`` arrives cut at ``cuts``."""
    edges = [0, *sorted({cut % len(data) for cut in cuts} - {0}), len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(edges)]

    def recv_into(view: memoryview) -> int:
        if not parts:
            return 0
        part = parts.pop(0)
        if len(part) > len(view):
            parts.insert(0, part[len(view) :])
        part = part[: len(view)]
        view[: len(part)] = part
        return len(part)

    return cast(Connection, SimpleNamespace(socket=SimpleNamespace(recv_into=recv_into)))


def count_all(work: Workload, data: bytes, cuts: list[int]) -> int:
    connection, count, total = replies(data, cuts), counter(work), 0
    while True:
        try:
            total += count.receive(connection)
        except ServerError as error:
            if "closed" in str(error):
                return total
            raise


def test_requests_are_those_of_the_workload_and_cookies_in_flight_differ() -> None:
    ring, offsets = Ring(WRITES), WRITES.offsets()
    each = REQUEST.size + WRITES.block
    first = RING - 2  # across the end of what is prepared
    data = sent_by(ring, first, 3, 3 * each)
    cookies = set()
    for i in range(3):
        magic, flags, kind, cookie, offset, length = REQUEST.unpack_from(data, i * each)
        assert (magic, flags, kind, length) == (REQUEST_MAGIC, 0, 1, WRITES.block)
        assert offset == offsets[(first + i) % RING]
        assert data[i * each + REQUEST.size : (i + 1) * each] == PAYLOAD * 2
        cookies.add(cookie)
    assert len(cookies) == 3
    assert len(sent_by(Ring(READS), 0, 4, 4 * REQUEST.size)) == 4 * REQUEST.size


def test_offsets_lie_inside_the_disk_and_lanes_differ() -> None:
    lanes = [Workload(False, 1 << 20, 2, True, 10 << 20, lane=lane, lanes=4).offsets() for lane in range(4)]
    assert [offsets[0] >> 20 for offsets in lanes] == [0, 2, 5, 7]
    assert all(0 <= offset <= 9 << 20 for offsets in lanes for offset in offsets)
    assert (
        Workload(False, 4096, 1, False, 1 << 20, lane=0).offsets()
        != Workload(False, 4096, 1, False, 1 << 20, lane=1).offsets()
    )


@given(st.lists(st.integers(0, 1 << 20), max_size=12))
def test_simple_replies_are_counted_however_they_are_cut(cuts: list[int]) -> None:
    data = b"".join(SIMPLE.pack(SIMPLE_MAGIC, 0, i) + os.urandom(BLOCK) for i in range(5))
    assert count_all(READS, data, cuts) == 5
    data = b"".join(SIMPLE.pack(SIMPLE_MAGIC, 0, i) for i in range(9))
    assert count_all(WRITES, data, cuts) == 9


@given(st.lists(st.integers(0, 1 << 20), max_size=12))
def test_structured_replies_are_counted_however_they_are_cut(cuts: list[int]) -> None:
    data = b""
    for cookie in range(4):
        payload = struct.pack(">Q", 0) + os.urandom(3000)
        hole = struct.pack(">QI", 3000, 1096)
        data += CHUNK.pack(CHUNK_MAGIC, 0, CHUNK_DATA, cookie, len(payload)) + payload
        data += CHUNK.pack(CHUNK_MAGIC, 1, CHUNK_HOLE, cookie, len(hole)) + hole
        data += SIMPLE.pack(SIMPLE_MAGIC, 0, 77)  # of a request that is not a read
    work = Workload(write=False, block=BLOCK, depth=4, sequential=False, size=1 << 20, structured=True)
    assert count_all(work, data, cuts) == 8


@pytest.mark.parametrize("cuts", [[], [4], [7], [8], [16 + BLOCK + 5], [16 + BLOCK + 7, 16 + BLOCK + 8]])
def test_an_error_or_something_else_than_a_reply_is_noticed(cuts: list[int]) -> None:
    good = SIMPLE.pack(SIMPLE_MAGIC, 0, 1) + bytes(BLOCK)
    for bad in (SIMPLE.pack(SIMPLE_MAGIC, 5, 2) + bytes(BLOCK), b"garbage!" * 514):
        with pytest.raises(ServerError):
            count_all(READS, good + bad, cuts)


def test_errors_in_structured_replies_are_noticed() -> None:
    work = Workload(write=False, block=BLOCK, depth=4, sequential=False, size=1 << 20, structured=True)
    for bad in (
        CHUNK.pack(CHUNK_MAGIC, 1, CHUNK_ERROR | 1, 0, 6) + struct.pack(">IH", 5, 0),
        SIMPLE.pack(SIMPLE_MAGIC, 5, 0),
        b"garbage!" * 4,
    ):
        with pytest.raises(ServerError):
            count_all(work, bad, [])


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("write", [False, True])
def test_driving_a_server(sock_dir: str, write: bool, structured: bool, one_by_one: bool) -> None:
    work = Workload(write, BLOCK, 4, False, 1 << 20, structured=structured, one_by_one=one_by_one)
    path = os.path.join(sock_dir, "s")
    with TinyServer(path, bytearray(work.size)) as server:
        connection = Connection(path, structured=structured)
        assert connection.size == work.size and connection.structured == structured
        now = time.monotonic()
        outcome = drive(connection, Ring(work), work, now + 0.02, now + 0.1)
        connection.close()
    assert 0 <= outcome.done <= outcome.issued == len(server.cookies)
    assert server.cookies == [i % RING for i in range(outcome.issued)]
    touched = set(work.offsets()[: outcome.issued])
    for offset in range(0, work.size, BLOCK):
        wanted = PAYLOAD if write and offset in touched else bytes(BLOCK)
        assert server.disk[offset : offset + BLOCK] == wanted


def test_a_failed_request_ends_the_measurement(sock_dir: str) -> None:
    path = os.path.join(sock_dir, "s")
    with TinyServer(path, bytearray(READS.size), fail_at=30):
        connection = Connection(path)
        now = time.monotonic()
        with pytest.raises(ServerError):
            drive(connection, Ring(READS), READS, now, now + 60)
        connection.close()

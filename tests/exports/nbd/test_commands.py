"""Each command and flag of the transmission phase, over a real socket, with simple and structured replies."""

from __future__ import annotations

import errno
import os

import pytest

from tests.exports.nbd.client import (
    CACHE,
    DF,
    FAST_ZERO,
    FLUSH,
    FUA,
    MIB,
    NO_HOLE,
    READ,
    REQ_ONE,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Client,
    Medium,
    serving_medium,
)

BOTH = pytest.mark.parametrize("structured", [False, True])
NAMES = {READ: "read", WRITE: "write", FLUSH: "flush", TRIM: "trim", CACHE: "cache", ZEROES: "zeroes", STATUS: "status"}


@BOTH
def test_reads_and_writes_of_all_lengths(sock_dir: str, structured: bool) -> None:
    medium = Medium(5 * MIB)
    model = bytearray(5 * MIB)
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=structured) as client:
        assert client.size == 5 * MIB
        for offset, length in ((0, 1), (511, 2), (4096, 4096), (65530, 70000), (MIB, 3 * MIB), (5 * MIB - 1, 1)):
            data = os.urandom(length)
            model[offset : offset + length] = data
            assert client.write(offset, data) == 0
            assert client.read(offset, length) == data
        assert client.read(0, 5 * MIB) == model == medium.data


@BOTH
def test_requests_sent_ahead_are_all_answered_in_batches(sock_dir: str, structured: bool) -> None:
    medium = Medium(MIB)
    medium.data[:] = os.urandom(MIB)
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=structured) as client:
        wanted = {client.send(READ, 4096 * i, 512): i for i in range(200)}  # replies fit in the socket
        for _ in range(200):
            cookie, reply = client.receive()
            at = 4096 * wanted.pop(cookie)
            assert reply.data == medium.data[at : at + 512]
        # A read behind a write in the same buffer sees it, and the last of several writes stands.
        client.send(WRITE, 0, 4, b"1111")
        client.send(WRITE, 2, 4, b"2222")
        read = client.send(READ, 0, 8)
        client.send(WRITE, 0, 4, b"3333")
        found = dict(client.receive() for _ in range(4))
        assert found[read].data[:6] == b"112222"
        assert client.read(0, 6) == b"333322"


@BOTH
@pytest.mark.parametrize("kind", [READ, WRITE, TRIM, CACHE, ZEROES, STATUS], ids=NAMES.get)
@pytest.mark.parametrize(
    "offset, length", [(MIB - 4, 8), (MIB, 1), (MIB - 4, 70000), (1 << 62, 512), ((1 << 64) - 1, 0xFFFF)]
)
def test_beyond_the_end(sock_dir: str, structured: bool, kind: int, offset: int, length: int) -> None:
    medium = Medium(MIB)
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=structured) as client:
        reply = client.ask(kind, offset, length, bytes(length) if kind == WRITE else b"")
        assert reply.error == (errno.ENOSPC if kind in (WRITE, ZEROES) else errno.EINVAL)
        assert client.read(0, 512) == bytes(512)  # and the connection lives
    assert medium.calls in ([], [("flush",)])


@BOTH
def test_a_batch_with_one_bad_request_serves_the_good_ones(sock_dir: str, structured: bool) -> None:
    medium = Medium(MIB)
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=structured) as client:
        ahead = [client.send(WRITE, at, 4, b"good") for at in (0, MIB - 2, 8)]
        errors = dict(client.receive() for _ in ahead)
        assert [errors[cookie].error for cookie in ahead] == [0, errno.ENOSPC, 0]
        ahead = [client.send(READ, at, 4) for at in (0, MIB - 2, 8)]
        found = dict(client.receive() for _ in ahead)
        assert [(found[cookie].error, found[cookie].data) for cookie in (ahead[0], ahead[2])] == [(0, b"good")] * 2
        assert found[ahead[1]].error == errno.EINVAL
    assert medium.data[MIB - 2 :] == b"\0\0"


@BOTH
@pytest.mark.parametrize("kind", [READ, WRITE, FLUSH, TRIM, CACHE, ZEROES], ids=NAMES.get)
def test_requests_of_nothing(sock_dir: str, structured: bool, kind: int) -> None:
    with serving_medium(Medium(MIB), sock_dir) as served, Client(served.path, structured=structured) as client:
        assert client.ask(kind, 0, 0).error == 0
        assert client.read(0, 4) == bytes(4)


@BOTH
@pytest.mark.parametrize(
    "kind, flags",
    [
        *((READ, 2), (READ, 32), (READ, 0x8000), (WRITE, DF), (WRITE, NO_HOLE | FUA), (WRITE, 0x100), (FLUSH, 2)),
        *((TRIM, 2), (CACHE, DF), (ZEROES, DF), (ZEROES, 32), (STATUS, DF), (STATUS, 16)),
        *((8, 0), (77, 0), (0xFFFF, 0xFFFF)),
    ],
)
def test_unknown_commands_and_flags(sock_dir: str, structured: bool, kind: int, flags: int) -> None:
    medium = Medium(MIB)
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=structured) as client:
        good = client.send(WRITE, 0, 4, b"good")
        bad = client.send(kind, 0, 512, bytes(range(256)) * 2 if kind == WRITE else b"", flags)
        found = dict(client.receive() for _ in range(2))
        assert (found[good].error, found[bad].error) == (0, errno.EINVAL)
        assert client.read(0, 8) == b"good\0\0\0\0"


@BOTH
def test_do_not_fragment(sock_dir: str, structured: bool) -> None:
    medium = Medium(4 * MIB)
    medium.data[MIB : MIB + 3] = b"abc"
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=structured) as client:
        assert bool(client.flags & 0x80) == structured
        for length in (512, 65536, 3 * MIB):
            reply = client.ask(READ, MIB - 4, length, flags=DF)
            if structured:
                assert reply.chunks == (1,)
                assert reply.data == medium.data[MIB - 4 : MIB - 4 + length]
            else:
                assert reply.error == errno.EINVAL


def test_structured_reads_tell_holes(sock_dir: str) -> None:
    medium = Medium(MIB)
    medium.data[200000:200003] = b"abc"
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=True) as client:
        reply = client.ask(READ, 0, MIB)
        assert reply.data == medium.data
        assert reply.chunks[0] == reply.chunks[-1] == 2 and 1 in reply.chunks
        assert client.ask(READ, MIB // 2, MIB // 2).chunks == (2,)


@BOTH
def test_status_needs_its_context(sock_dir: str, structured: bool) -> None:
    medium = Medium(MIB)
    medium.data[8192:8193] = b"x"
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=structured) as client:
        reply = client.ask(STATUS, 4096, 65536)
        if not structured:
            assert (reply.error, reply.chunks) == (errno.EINVAL, ())
            return
        assert reply.extents == ((4096, 3), (4096, 0), (57344, 3))
        assert client.ask(STATUS, 4096, 65536, flags=REQ_ONE).extents == ((4096, 3),)
        assert client.ask(STATUS, 9000, 100).extents == ((100, 0),)
        assert client.ask(STATUS, 0, 0).error == errno.EINVAL


def test_status_is_bounded(sock_dir: str) -> None:
    medium = Medium(40 * MIB)
    for at in range(0, 40 * MIB, 8192):
        medium.data[at] = 1
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=True) as client:
        reply = client.ask(STATUS, 0, 40 * MIB)
        assert reply.extents == ((4096, 0), (4096, 3)) * 2048


def test_flush_and_fua_reach_the_storage(sock_dir: str) -> None:
    medium = Medium(MIB)
    medium.fast_zeros = True
    with serving_medium(medium, sock_dir) as served, Client(served.path) as client:
        assert client.write(0, b"data") == 0
        assert medium.calls == [("writev", [(0, 4)])]
        assert client.ask(FLUSH, 0, 0).error == 0
        assert client.write(4, b"data", FUA) == 0
        assert client.ask(TRIM, 0, 4096, flags=FUA).error == 0
        assert client.ask(ZEROES, 0, 4096, flags=FUA).error == 0
        assert client.ask(READ, 0, 4, flags=FUA).error == 0
        assert client.ask(CACHE, 0, 4).error == 0
        what = [call[0] for call in medium.calls]
        assert what == ["writev", "flush", "writev", "flush", "discard", "flush", "write_zeros", "flush"]


def test_flags_of_write_zeroes_and_long_ranges(sock_dir: str) -> None:
    medium = Medium(160 * MIB)
    medium.fast_zeros = True
    with serving_medium(medium, sock_dir) as served, Client(served.path) as client:
        client.ask(ZEROES, 0, 4096)
        client.ask(ZEROES, 0, 4096, flags=NO_HOLE)
        client.ask(ZEROES, 0, 150 * MIB, flags=FAST_ZERO)
        assert [call[3:] for call in medium.calls] == [(True, False), (False, False), (True, True)]
        medium.calls.clear()
        # In pieces, cut at multiples of 64 MiB, that cover the range exactly.
        assert client.ask(TRIM, MIB, 150 * MIB).error == 0
        assert medium.calls == [
            ("discard", MIB, 63 * MIB),
            ("discard", 64 * MIB, 64 * MIB),
            ("discard", 128 * MIB, 23 * MIB),
        ]


def test_zeroes_without_support_are_written_unless_fast(sock_dir: str) -> None:
    medium = Medium(MIB)
    medium.data[:] = b"x" * MIB
    with serving_medium(medium, sock_dir) as served, Client(served.path) as client:
        assert client.ask(ZEROES, 4096, 8192, flags=FAST_ZERO).error == 95  # ENOTSUP
        assert medium.data == b"x" * MIB
        assert client.ask(ZEROES, 4096, 8192).error == 0
        assert medium.data == b"x" * 4096 + bytes(8192) + b"x" * (MIB - 12288)


@BOTH
@pytest.mark.parametrize("medium_too", [False, True])
def test_read_only(sock_dir: str, structured: bool, medium_too: bool) -> None:
    from diskwright.exports.nbd import NbdExport

    medium = Medium(MIB)
    with serving_medium(medium, sock_dir, read_only=medium_too) as served:
        served.server.add_export(NbdExport("ro", served.disk, read_only=True))
        with Client(served.path, "ro", structured=structured) as client:
            assert client.flags & 2 and not client.flags & 0x48
            for kind in (WRITE, TRIM, ZEROES):
                assert client.ask(kind, 0, 512, bytes(512) if kind == WRITE else b"").error == errno.EPERM
            assert client.write(0, bytes(3 * MIB)[:MIB]) == errno.EPERM
            assert client.ask(FLUSH, 0, 0).error == 0
            assert client.read(0, MIB) == bytes(MIB)
    assert ("flush",) not in medium.calls or not medium_too


@BOTH
@pytest.mark.parametrize("number, wire", [(errno.EIO, 5), (errno.ENOSPC, 28), (errno.EDQUOT, 28), (errno.ELOOP, 5)])
def test_failures_of_the_storage(sock_dir: str, structured: bool, number: int, wire: int) -> None:
    medium = Medium(MIB)
    medium.data[:] = b"x" * MIB  # else structured replies tell of holes, without reading
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=structured) as client:
        medium.fail_writes = medium.fail_reads = medium.fail_flush = number
        assert client.write(0, b"data") == wire
        assert client.ask(READ, 0, 512).error == wire
        assert client.ask(READ, 0, MIB).error == wire
        assert client.ask(FLUSH, 0, 0).error == wire
        ahead = [client.send(READ, 512 * i, 512) for i in range(3)] + [
            client.send(WRITE, 0, 4, b"data") for _ in range(3)
        ]
        found = dict(client.receive() for _ in ahead)
        assert [found[cookie].error for cookie in ahead] == [wire] * 6
        medium.fail_writes = medium.fail_reads = 0
        assert client.write(0, b"data", FUA) == wire  # written, but not durable: no success
        medium.fail_flush = 0
        assert client.write(0, b"data", FUA) == 0
        assert client.read(0, 4) == b"data"


@BOTH
def test_cold_reads_let_others_pass(sock_dir: str, structured: bool) -> None:
    medium = Medium(MIB)
    medium.data[:] = os.urandom(MIB)
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=structured) as client:
        medium.cold = True
        medium.go.clear()
        cold = client.send(READ, 4096, 4096)
        assert medium.waiting.acquire(timeout=60)
        medium.cold = False
        warm = client.send(READ, 8192, 512)
        cookie, reply = client.receive()
        assert cookie == warm and reply.data == medium.data[8192:8704]
        medium.go.set()
        cookie, reply = client.receive()
        assert cookie == cold and reply.data == medium.data[4096:8192]
        medium.cold = True
        wanted = {client.send(READ, 512 * i, 512): 512 * i for i in range(100)}  # more than may be away
        for _ in range(100):
            cookie, reply = client.receive()
            at = wanted.pop(cookie)
            assert reply.data == medium.data[at : at + 512]

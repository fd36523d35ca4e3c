"""The load generator of one connection: keeps a number of requests in flight and counts the replies.

It shares the machine with the server it measures, so it is made to cost next to nothing for a request: requests are
built before the clock runs, all that may be sent goes out in one system call, and replies are counted by their bytes.
It still notices a wrong one: every reply's magic and error field are looked at, by a stride through the buffer.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Final, Protocol

from bench.client import (
    CHUNK,
    CHUNK_DONE,
    CHUNK_ERROR,
    CHUNK_MAGIC,
    READ,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE,
    SIMPLE_MAGIC,
    WRITE,
    Connection,
    ServerError,
    ServerGone,
)

MAX_DEPTH: Final = 256
RING: Final = 1 << 16
"""Requests prepared: more than fit in flight, so that cookies in flight differ, and enough to spread over the disk."""
BUFFER: Final = 256 << 10
"""Bytes received at once: what a unix socket holds, and small enough to stay in a CPU's second-level cache."""

BLOCK: Final = 4096
PAYLOAD: Final = random.Random("diskwright").randbytes(BLOCK)
"""What every write writes, over and over: a check can tell it from what was there before."""


@dataclass(frozen=True)
class Workload:
    """What one connection does. ``size`` and ``block`` in bytes; ``lane`` of ``lanes`` connections. ``one_by_one``
    sends each request with a system call of its own."""

    write: bool
    block: int
    depth: int
    sequential: bool
    size: int
    lane: int = 0
    lanes: int = 1
    seed: int = 0
    structured: bool = False
    one_by_one: bool = False

    def offsets(self) -> list[int]:
        """Where the first RING requests go, in bytes; the one after goes where the first went."""
        blocks = self.size // self.block
        if self.sequential:
            start = blocks * self.lane // self.lanes
            return [(start + i) % blocks * self.block for i in range(RING)]
        pick = random.Random(f"{self.seed}/{self.lane}").randrange
        return [pick(blocks) * self.block for _ in range(RING)]


@dataclass(frozen=True)
class Outcome:
    """``done`` requests in ``seconds`` of the measured window, ``busy`` CPU seconds of the generator in it.
    ``issued`` counts all requests ever sent on this connection, warm-up and the last ones in flight included."""

    done: int
    seconds: float
    busy: float
    issued: int


class Ring:
    """Requests ready to be sent, by number; the number is the cookie. ``depth`` more follow than are in use, so that
    a batch never has to be cut at the end."""

    def __init__(self, work: Workload) -> None:
        if not 0 < work.depth <= MAX_DEPTH:
            raise ValueError(f"queue depth {work.depth} is not between 1 and {MAX_DEPTH}")
        kind = WRITE if work.write else READ
        offsets = work.offsets()
        offsets += offsets[: work.depth]
        pack = REQUEST.pack
        heads = [pack(REQUEST_MAGIC, 0, kind, i, offset, work.block) for i, offset in enumerate(offsets)]
        self._heads = memoryview(b"".join(heads))
        self._vector: list[memoryview] = []
        if work.write:
            payload = memoryview(PAYLOAD * (work.block // BLOCK))
            for i in range(len(offsets)):
                self._vector += (self._heads[i * REQUEST.size : (i + 1) * REQUEST.size], payload)
        self._bytes = REQUEST.size + (work.block if work.write else 0)

    def send(self, connection: Connection, first: int, count: int) -> None:
        """Sends ``count`` requests from number ``first`` on, in one system call."""
        if not self._vector:
            connection.socket.sendall(self._heads[first * REQUEST.size : (first + count) * REQUEST.size])
            return
        parts = self._vector[2 * first : 2 * (first + count)]
        sent = connection.socket.sendmsg(parts)
        if sent < count * self._bytes:  # a signal came in between
            connection.socket.sendall(b"".join(parts)[sent:])


class Counter(Protocol):
    """Counts replies as they arrive."""

    def receive(self, connection: Connection) -> int:
        """Waits for bytes and returns how many replies they complete. Raises ServerError for a wrong one."""


class SimpleCounter:
    """Replies that all have the same length: simple ones."""

    def __init__(self, work: Workload) -> None:
        self._stride = SIMPLE.size + (0 if work.write else work.block)
        self._part = 0  # bytes of an unfinished reply
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)

    def receive(self, connection: Connection) -> int:
        got = connection.socket.recv_into(self._view)
        if not got:
            raise ServerGone("the server closed the connection")
        stride, part = self._stride, self._part
        # The last byte of each magic, and of each error: numbers of errors in NBD are below 256.
        magics = self._buffer[(3 - part) % stride : got : stride]
        errors = self._buffer[(7 - part) % stride : got : stride]
        if magics.count(SIMPLE_MAGIC & 255) != len(magics) or errors.count(0) != len(errors):
            raise ServerError("a reply with an error, or no reply at all")
        done, self._part = divmod(part + got, stride)
        return done


class ChunkCounter:
    """Structured replies, each of any number of chunks, and simple ones among them."""

    def __init__(self) -> None:
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._have = 0  # bytes of an unfinished header, at the buffer's begin
        self._skip = 0  # bytes of payload still to come

    def receive(self, connection: Connection) -> int:
        got = connection.socket.recv_into(self._view[self._have :])
        if not got:
            raise ServerGone("the server closed the connection")
        end, at, done = self._have + got, self._skip, 0
        buffer, unpack = self._buffer, CHUNK.unpack_from
        while end - at >= CHUNK.size:
            magic, flags, kind, _, length = unpack(buffer, at)
            if magic != CHUNK_MAGIC:
                at = self._simple(at)
                done += 1
                continue
            if kind & CHUNK_ERROR:
                raise ServerError(f"a reply with an error, of type {kind}")
            done += flags & CHUNK_DONE
            at += CHUNK.size + length
        if end - at == SIMPLE.size and int.from_bytes(buffer[at : at + 4], "big") == SIMPLE_MAGIC:
            at = self._simple(at)  # shorter than a chunk's header, so the loop left it
            done += 1
        if at >= end:
            self._skip, self._have = at - end, 0
        else:
            self._have, self._skip = end - at, 0
            buffer[: end - at] = buffer[at:end]
        return done

    def _simple(self, at: int) -> int:
        magic, error, _ = SIMPLE.unpack_from(self._buffer, at)
        if magic != SIMPLE_MAGIC or error:
            raise ServerError(f"a reply with magic 0x{magic:08x} and error {error}")
        return at + SIMPLE.size


def counter(work: Workload) -> Counter:
    """The counter for this workload's replies."""
    return ChunkCounter() if work.structured else SimpleCounter(work)


def drive(connection: Connection, ring: Ring, work: Workload, start: float, end: float) -> Outcome:
    """Keeps ``work.depth`` requests in flight until ``end``, then waits for the last replies.

    What is counted is what completes between ``start`` and ``end``, both times of time.monotonic(); before ``start`` it
    warms up.
    """
    count = counter(work)
    clock, send, depth = time.monotonic, ring.send, work.depth
    done = flying = next_one = issued = 0
    began, done_then, busy_then = 0.0, 0, 0.0
    measuring, border = False, start
    while True:
        now = clock()
        if now >= border:
            if measuring:
                break
            measuring, border = True, end
            began, done_then, busy_then = now, done, time.process_time()
        fresh = depth - flying
        if fresh:
            if work.one_by_one:
                for number in range(next_one, next_one + fresh):
                    send(connection, number, 1)
            else:
                send(connection, next_one, fresh)
            issued += fresh
            next_one += fresh
            if next_one >= RING:
                next_one -= RING
            flying = depth
        finished = count.receive(connection)
        flying -= finished
        done += finished
        if flying < 0:
            raise ServerError("more replies than requests")
    outcome = Outcome(done - done_then, now - began, time.process_time() - busy_then, issued)
    while flying > 0:
        flying -= count.receive(connection)
    return outcome

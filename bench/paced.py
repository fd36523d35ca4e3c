"""A steady load: 4 KiB writes at random places at a fixed rate, as a busy guest makes them, with their latencies."""

from __future__ import annotations

import random
import select
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Final

from bench.client import (
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE,
    SIMPLE_MAGIC,
    WRITE,
    Connection,
    ServerError,
    ServerGone,
    connect_when_there,
)
from bench.load import BLOCK, PAYLOAD

MAX_FLYING: Final = 64
"""Writes under way at most; when the server is that far behind, the next ones wait, and their wait counts."""
START_PATIENCE: Final = 30.0
"""Seconds to wait for somebody to listen."""
LONGEST: Final = 600.0
"""Seconds after which the load ends by itself: nobody has told it to, so nobody is there."""


@dataclass(frozen=True)
class Paced:
    """``rate`` writes a second over the first ``size`` bytes of ``export``. ``may_close``: the server may go first."""

    rate: float
    size: int
    export: str = ""
    seed: int = 0
    may_close: bool = False


@dataclass(frozen=True)
class PacedOutcome:
    """Each write that was answered: when it was due (time.monotonic()) and how many seconds later it was done."""

    due: list[float]
    latency: list[float]

    def within(self, start: float, end: float) -> tuple[float, float, float]:
        """(writes per second, 99th percentile and largest latency in seconds) of the writes due in a window, which
        begins with the first write at the earliest."""
        start = max(start, min(self.due, default=start))
        found = [late for due, late in zip(self.due, self.latency, strict=True) if start <= due < end]
        if len(found) < 2 or end <= start:
            return 0.0, 0.0, 0.0
        return len(found) / (end - start), statistics.quantiles(found, n=100, method="inclusive")[98], max(found)


def drive_paced(pipe: Pipe, path: str, paced: Paced) -> None:
    """Writes until ``stop`` comes through the pipe; answers with a PacedOutcome.

    Latency counts from when a write was due, not from when it could be sent: a server that stands still for a second is
    late for every write of that second.
    """
    connection = connect_when_there(path, seconds=START_PATIENCE, export=paced.export)
    try:
        pipe.send((True, "connected"))
        outcome = _drive(pipe, connection, paced)
    finally:
        connection.close()
    pipe.send((True, outcome))


def _drive(pipe: Pipe, connection: Connection, paced: Paced) -> PacedOutcome:
    pick, blocks = random.Random(paced.seed).randrange, paced.size // BLOCK
    began = time.monotonic()
    result = PacedOutcome([], [])
    flying: dict[int, float] = {}
    sent, received, told = 0, b"", False
    try:
        while True:
            now = time.monotonic()
            if now - began > LONGEST:
                raise ServerError(f"nobody stopped the load in {LONGEST:g} s")
            wanted = 0 if told else int((now - began) * paced.rate) - sent
            requests: list[bytes] = []
            for number in range(sent, sent + min(wanted, MAX_FLYING - len(flying))):
                flying[number] = began + number / paced.rate
                requests += (REQUEST.pack(REQUEST_MAGIC, 0, WRITE, number, pick(blocks) * BLOCK, BLOCK), PAYLOAD)
            if requests:
                connection.socket.sendall(b"".join(requests))
                sent += len(requests) // 2
            if told and not flying:
                return result
            readable, _, _ = select.select([connection.socket.fileno(), pipe.fileno()], [], [], 0.001)
            if pipe.fileno() in readable:
                pipe.recv()
                told = True
            if connection.socket.fileno() in readable:
                received = _take(received + connection.socket.recv(1 << 16), flying, result)
    except (ConnectionError, ServerGone):
        if not paced.may_close:
            raise
    if not told:
        pipe.recv()  # the word to stop is still to come
    return result


def _take(data: bytes, flying: dict[int, float], result: PacedOutcome) -> bytes:
    """Notes the replies in ``data`` and returns what is left of it."""
    if not data:
        raise ServerGone("the server closed the connection")
    now = time.monotonic()
    whole = len(data) - len(data) % SIMPLE.size
    for magic, error, cookie in SIMPLE.iter_unpack(data[:whole]):
        if magic != SIMPLE_MAGIC or error or cookie not in flying:
            raise ServerError(f"a write was answered with magic 0x{magic:08x}, error {error}, cookie {cookie}")
        due = flying.pop(cookie)
        result.due.append(due)
        result.latency.append(now - due)
    return data[whole:]

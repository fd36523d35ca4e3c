"""Reading or writing a disk in even steps, with a number of requests at once: for measuring how fast that goes."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from diskwright.core.node import Node

MAX_WORKERS = 64
"""Threads that send requests: a greater depth keeps no more of them under way, which no device below is short of."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is to be sent. ``offset``, ``size`` and ``step`` are bytes; ``step`` 0 means ``size``.

    ``pattern`` is the byte that is written, or None to read. ``flush_interval`` asks for a flush whenever the requests
    that are left are a multiple of it (0: never); with ``drain`` all others have ended before it.
    """

    count: int
    depth: int
    offset: int
    size: int
    step: int
    pattern: int | None = None
    flush_interval: int = 0
    drain: bool = True


class Bench:
    """One run. Offsets wrap around at the disk's end; a request that reaches beyond it fails."""

    def __init__(self, node: Node, load: Load) -> None:
        self._node, self._load = node, load
        self._state = threading.Condition()
        self._left, self._busy, self._flushing = load.count, 0, False
        self._next = load.offset
        self._error: BaseException | None = None

    def run(self) -> None:
        """Sends everything. Raises the error of the first request that failed."""
        workers = max(1, min(self._load.depth, self._load.count, MAX_WORKERS))
        threads = [threading.Thread(target=self._work, name=f"bench-{number}") for number in range(1, workers)]
        for thread in threads:
            thread.start()
        self._work()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        load = self._load
        buffer = memoryview(bytearray(load.size) if load.pattern is None else bytes([load.pattern]) * load.size)
        try:
            while (taken := self._take()) is not None:
                offset, due = taken
                if load.pattern is None:
                    self._node.readv([(offset, buffer)])
                else:
                    self._node.writev([(offset, buffer)])
                if self._done(due):
                    self._flush()
        except BaseException as error:
            with self._state:
                self._error = self._error or error
                self._left = 0
                self._state.notify_all()

    def _take(self) -> tuple[int, bool] | None:
        """The next request's offset, and whether a flush is due behind it; None when there are no more. Waits while a
        flush has to be waited for."""
        with self._state:
            while self._flushing and self._error is None:
                self._state.wait()
            if not self._left or self._error is not None:
                return None
            load, offset = self._load, self._next
            if offset + load.size > self._node.size:
                raise OSError(5, "Input/output error")
            self._next = (offset + (load.step or load.size)) % self._node.size if self._node.size else 0
            self._left -= 1
            self._busy += 1
            due = bool(load.flush_interval) and self._left % load.flush_interval == 0
            self._flushing = self._flushing or (due and load.drain)
            return offset, due

    def _done(self, due: bool) -> bool:
        """Counts a request as ended; whether a flush is this thread's to send now."""
        with self._state:
            self._busy -= 1
            return self._busy == 0 if self._flushing else due

    def _flush(self) -> None:
        self._node.flush()
        with self._state:
            self._flushing = False
            self._state.notify_all()

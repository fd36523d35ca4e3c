"""Bench: which requests are sent, when it flushes, and how it ends."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from diskwright.engine.bench import Bench, Load


class Recorder:
    """A node that writes down what it is asked; two requests at once are noticed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.events: list[tuple[str, int]] = []
        self.busy = self.most = 0
        self.busy_at_flush: list[int] = []
        self._lock = threading.Lock()
        self.barrier: threading.Barrier | None = None

    def _request(self, what: str, segments: Any) -> None:
        with self._lock:
            self.busy += 1
            self.most = max(self.most, self.busy)
            self.events.append((what, segments[0][0]))
        if self.barrier is not None:
            self.barrier.wait(10)
        if what == "write":
            assert bytes(segments[0][1]) == b"\x07" * len(segments[0][1])
        with self._lock:
            self.busy -= 1

    def readv(self, segments: Any) -> None:
        self._request("read", segments)

    def writev(self, segments: Any) -> None:
        self._request("write", segments)

    def flush(self) -> None:
        with self._lock:
            self.busy_at_flush.append(self.busy)
            self.events.append(("flush", 0))


def bench(node: Recorder, **load: Any) -> None:
    Bench(node, Load(**{"count": 4, "depth": 1, "offset": 0, "size": 512, "step": 0, **load})).run()  # type: ignore[arg-type]


def test_offsets_step_and_wrap_around() -> None:
    node = Recorder(2048)
    bench(node, count=6)
    assert node.events == [("read", at) for at in (0, 512, 1024, 1536, 0, 512)]
    node = Recorder(4096)
    bench(node, offset=512, step=1024)
    assert [at for _, at in node.events] == [512, 1536, 2560, 3584]


def test_a_request_beyond_the_end_fails() -> None:
    node = Recorder(1024)
    with pytest.raises(OSError, match="Input/output error"):
        bench(node, size=768)
    assert node.events == [("read", 0)]


def test_as_many_at_once_as_asked_for() -> None:
    node = Recorder(1 << 20)
    node.barrier = threading.Barrier(3)  # passes three together, and never two
    bench(node, count=9, depth=3)
    assert node.most == 3 and len(node.events) == 9


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("depth", [1, 4])
def test_flushes(drain: bool, depth: int) -> None:
    node = Recorder(1 << 20)
    bench(node, count=20, depth=depth, pattern=7, flush_interval=5, drain=drain)
    assert sum(what == "write" for what, _ in node.events) == 20
    assert sum(what == "flush" for what, _ in node.events) == 4
    if drain:
        assert node.busy_at_flush == [0] * 4


def test_the_first_error_ends_it() -> None:
    class Failing(Recorder):
        def readv(self, segments: Any) -> None:
            if segments[0][0] == 1024:
                raise OSError(5, "it broke")
            super().readv(segments)

    node = Failing(1 << 20)
    with pytest.raises(OSError, match="it broke"):
        bench(node, count=1000, depth=4)
    assert len(node.events) < 1000


def test_nothing_to_send() -> None:
    node = Recorder(1 << 20)
    bench(node, count=0)
    assert node.events == []

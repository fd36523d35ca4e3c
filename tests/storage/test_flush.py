"""Flushes from several threads: shared where that is safe, and never told to be fine when one was not."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.conformance.storage_suite import write
from tests.storage.conftest import Opener


class Medium:
    """fdatasync under control: it waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.error = 0, False
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr(os, "fdatasync", self.fdatasync)

    def fdatasync(self, fd: int) -> None:
        self.calls += 1
        failing = self.error
        self.error = False  # the kernel tells one caller only
        self.entered.release()
        assert self.go.acquire(timeout=20)
        if failing:
            raise OSError(5, "Input/output error")


class Flusher(threading.Thread):
    def __init__(self, flush: object) -> None:
        super().__init__(daemon=True)
        self.flush, self.error = flush, None
        self.start()

    def run(self) -> None:
        try:
            self.flush()  # type: ignore[operator]
        except OSError as error:
            self.error = error  # type: ignore[assignment]


@pytest.fixture
def medium(monkeypatch: pytest.MonkeyPatch) -> Medium:
    return Medium(monkeypatch)


def waiting(flushers: list[Flusher]) -> None:
    """Long enough for threads just started to have come to the lock; if one has not, it makes a flush of its own."""
    threading.Event().wait(0.2)
    assert all(flusher.is_alive() for flusher in flushers)


def test_a_flush_under_way_does_not_count_for_a_later_caller(tmp_path: Path, opened: Opener, medium: Medium) -> None:
    (tmp_path / "file").write_bytes(b"x")
    storage = opened(tmp_path / "file")
    first = Flusher(storage.flush)
    assert medium.entered.acquire(timeout=20)
    write(storage, 0, b"y")  # after the first flush has begun: it may well not be part of it
    second = Flusher(storage.flush)
    waiting([second])
    medium.go.release()
    first.join(20)
    assert medium.entered.acquire(timeout=20), "the second caller was told a flush that began before its write"
    medium.go.release()
    second.join(20)
    assert medium.calls == 2


def test_callers_that_wait_together_share_one_flush(tmp_path: Path, opened: Opener, medium: Medium) -> None:
    (tmp_path / "file").write_bytes(b"x")
    storage = opened(tmp_path / "file")
    first = Flusher(storage.flush)
    assert medium.entered.acquire(timeout=20)
    others = [Flusher(storage.flush) for _ in range(6)]
    waiting(others)
    for _ in range(8):
        medium.go.release()
    for flusher in [first, *others]:
        flusher.join(20)
        assert not flusher.is_alive() and flusher.error is None
    assert medium.calls == 2


def test_a_failure_told_to_one_caller_reaches_those_that_wait(tmp_path: Path, opened: Opener, medium: Medium) -> None:
    (tmp_path / "file").write_bytes(b"x")
    storage = opened(tmp_path / "file")
    medium.error = True
    first = Flusher(storage.flush)
    assert medium.entered.acquire(timeout=20)
    others = [Flusher(storage.flush) for _ in range(3)]
    waiting(others)
    for _ in range(8):
        medium.go.release()
    for flusher in [first, *others]:
        flusher.join(20)
        assert flusher.error is not None and flusher.error.errno == 5

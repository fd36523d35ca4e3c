"""Runs of segments, and transfers that the kernel cuts short."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.storage.posix.transfer import Cursor, read_segments, runs, write_run
from tests.conformance.storage_suite import noise


def segments_of(pairs: list[tuple[int, int]]) -> list[tuple[int, memoryview]]:
    return [(offset, memoryview(bytearray(length))) for offset, length in pairs]


def test_runs_join_only_what_adjoins_in_order() -> None:
    segments = segments_of([(0, 10), (10, 5), (20, 5), (15, 5), (20, 1), (21, 1)])
    joined = [(start, [len(b) for b in buffers]) for start, buffers in runs(segments)]
    assert joined == [(0, [10, 5]), (20, [5]), (15, [5, 1, 1])]
    assert list(runs([])) == []


@given(st.data(), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=12))
def test_runs_lose_and_reorder_nothing(data: st.DataObject, pairs: list[tuple[int, int]]) -> None:
    segments = segments_of(pairs)
    flat = [(start, b) for start, buffers in runs(segments) for b in buffers]
    assert [id(b) for _, b in flat] == [id(b) for _, b in segments]
    for start, buffers in runs(segments):
        at = start
        for buffer in buffers:
            assert next(o for o, b in segments if b is buffer) == at
            at += len(buffer)


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_transfers_cut_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    preadv, pwritev = os.preadv, os.pwritev

    def short(buffers: list[memoryview]) -> list[memoryview]:
        return [buffers[0][:most]]

    monkeypatch.setattr(os, "preadv", lambda fd, b, o, f=0: preadv(fd, short(b), o, f))
    monkeypatch.setattr(os, "pwritev", lambda fd, b, o, f=0: pwritev(fd, short(b), o, f))
    with path.open("r+b") as file:
        data = memoryview(noise(500))
        write_run(file.fileno(), 3, [data[:10], data[10:11], data[11:]])
        assert path.read_bytes() == bytes(3) + data
        got = memoryview(bytearray(b"\xee" * 700))
        places = [(3, got[:10]), (13, got[10:400]), (403, got[400:600]), (603, got[600:]), (0, got[:3])]
        read_segments(file.fileno(), places)
        assert got == bytes(3) + data[3:] + bytes(200)


def test_what_adjoins_is_one_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(10000))
    calls: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        calls.append((offset, len(buffers)))
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    with path.open("rb") as file:
        read_segments(file.fileno(), segments_of([(0, 10), (10, 5), (20, 5), (15, 5), (20, 1), (21, 1), (90, 1)]))
    assert calls == [(0, 2), (20, 1), (15, 3), (90, 1)]


def test_a_write_of_nothing_is_no_endless_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="wrote nothing"):
        write_run(1, 0, [memoryview(b"x")])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.lists(st.integers(1, 12), max_size=20))
def test_cursors_move_all_bytes_in_order(lengths: list[int], steps: list[int]) -> None:
    total = sum(lengths)
    data = noise(total)
    cuts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    taker = Cursor([memoryview(data)[a:b] for a, b in itertools.pairwise(cuts)])
    into = bytearray(total)
    putter = Cursor([memoryview(into)[a:b] for a, b in itertools.pairwise(cuts)])
    done = 0
    for step in [*steps, total]:
        piece = memoryview(bytearray(min(step, total - done)))
        taker.take(piece)
        assert piece == data[done : done + len(piece)]
        putter.put(piece)
        done += len(piece)
    assert into == data

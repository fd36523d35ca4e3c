"""Extents of files: holes, file systems that do not know any, and files that change meanwhile."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest

from diskwright.core.driver import runs_of
from diskwright.extents import DATA, ZERO
from diskwright.storage.posix import holes
from tests.conformance.storage_suite import noise
from tests.storage.conftest import Opener

MIB = 1 << 20


def checkerboard(path: Path, squares: int, square: int) -> None:
    with path.open("wb") as file:
        for i in range(0, squares, 2):
            os.pwrite(file.fileno(), noise(square, i), i * square)
        file.truncate(squares * square)


def test_a_checkerboard(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "file"
    checkerboard(path, 64, 65536)
    storage = opened(path)
    storage.flush()
    runs = list(storage.extents(0, 4 * MIB))
    assert [(r.offset, r.length, r.kind) for r in runs] == [
        (i * 65536, 65536, DATA if i % 2 == 0 else ZERO) for i in range(64)
    ]
    assert runs == runs_of(storage.extent_at, 0, 4 * MIB)
    assert storage.extent_at(70000, 10) == (70000, 10, ZERO, 70000, 0, 0)
    assert storage.extent_at(131072 + 5, 10 * MIB)[:3] == (131077, 65531, DATA)


def test_reserved_space_counts_as_zeros(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    storage = opened(path)
    storage.truncate(MIB, preallocation="falloc")
    if storage.extent_at(0, MIB).kind == DATA:
        pytest.skip("this file system reports reserved space as data")
    assert list(storage.extents(0, MIB)) == [(0, MIB, ZERO, 0, 0, 0)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_knows_no_holes(
    tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.lseek

    def lseek(fd: int, offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(number, os.strerror(number))
        return real(fd, offset, whence)

    path = tmp_path / "file"
    checkerboard(path, 4, 65536)
    storage = opened(path)
    monkeypatch.setattr(os, "lseek", lseek)
    assert [r[:3] for r in storage.extents(0, 300000)] == [(0, 262144, DATA), (262144, 300000 - 262144, ZERO)]
    assert storage.extent_at(5, 1000)[:3] == (5, 1000, DATA)
    assert storage.extent_at(262144, 1000)[:3] == (262144, 1000, ZERO)


def test_a_medium_that_fails_is_no_hole(tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def lseek(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "file"
    path.write_bytes(b"x")
    storage = opened(path)
    monkeypatch.setattr(os, "lseek", lseek)
    for ask in (storage.extent_at, storage.extents):
        with pytest.raises(OSError) as caught:
            ask(0, 1)
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("new_size", [0, 100000])
def test_a_file_cut_off_between_two_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_size: int) -> None:
    """Whatever is answered covers the range once, and calls nothing zero that then holds data."""
    path = tmp_path / "file"
    path.write_bytes(noise(MIB))
    real = os.lseek

    def lseek(fd: int, offset: int, whence: int) -> int:
        answer = real(fd, offset, whence)
        if whence == os.SEEK_DATA:
            os.truncate(path, new_size)
        return answer

    monkeypatch.setattr(os, "lseek", lseek)
    with path.open("rb") as file:
        runs = list(holes.runs(file.fileno(), 200000, 300000))
    assert all(run.length > 0 for run in runs)
    assert runs[0].offset == 200000 and sum(r.length for r in runs) == 300000
    assert all(a.end == b.offset for a, b in itertools.pairwise(runs))

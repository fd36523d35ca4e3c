"""Cache modes: how the file is opened, and when it is flushed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diskwright.core.driver import FilePlace
from diskwright.storage.file import FileStorage
from tests.conformance.storage_suite import noise, read, write
from tests.storage.conftest import Opener


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(noise(1 << 20))
    return path


def flags(storage: FileStorage) -> int:
    for line in Path(f"/proc/self/fdinfo/{storage._fd}").read_text().splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8)
    raise AssertionError("no flags")


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("cache", ["none", "writeback", "writethrough", "directsync", "unsafe"])
def test_how_the_file_is_opened(image: Path, opened: Opener, cache: str, writable: bool) -> None:
    storage = opened(image, cache=cache, writable=writable)
    assert bool(flags(storage) & os.O_DIRECT) is (cache in ("none", "directsync"))
    assert flags(storage) & os.O_ACCMODE == (os.O_RDWR if writable else os.O_RDONLY)
    assert flags(storage) & os.O_CLOEXEC
    assert not flags(storage) & os.O_NONBLOCK
    assert read(storage, 0, 1 << 20) == noise(1 << 20)


@pytest.mark.parametrize(
    ("cache", "after_each", "when_asked"),
    [("none", 0, 1), ("writeback", 0, 1), ("writethrough", 1, 1), ("directsync", 1, 1), ("unsafe", 0, 0)],
)
def test_when_it_is_flushed(
    image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch, cache: str, after_each: int, when_asked: int
) -> None:
    calls: list[int] = []
    real = os.fdatasync
    storage = opened(image, cache=cache)

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    source = os.open(image, os.O_RDONLY)
    try:
        changes: list[Callable[[], None]] = [
            lambda: write(storage, 0, noise(4096)),
            lambda: storage.writev([(i * 8192, memoryview(noise(4096))) for i in range(5)]),
            lambda: storage.write_zeros(0, 4096, unmap=False, fast=False),
            lambda: storage.write_zeros(0, 4096, unmap=True, fast=False),
            lambda: storage.copy_from(8192, FilePlace(source, 65536, 4096)),
            lambda: storage.truncate(2 << 20),
        ]
        for change in changes:
            calls.clear()
            change()
            assert len(calls) == after_each
    finally:
        os.close(source)
    calls.clear()
    storage.flush()
    assert len(calls) == when_asked


def test_nothing_is_flushed_for_a_reader(image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def fdatasync(fd: int) -> None:
        raise AssertionError("flushed")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    opened(image, writable=False).flush()


def test_an_unsafe_flush_cannot_fail(image: Path, opened: Opener) -> None:
    storage = opened(image, cache="unsafe")
    write(storage, 0, b"x")
    full = os.open("/dev/full", os.O_RDWR)
    try:
        os.dup2(full, storage._fd, inheritable=False)
    finally:
        os.close(full)
    storage.flush()


def test_a_write_through_write_that_does_not_reach_the_medium_fails(
    image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fdatasync(fd: int) -> None:
        raise OSError(5, "Input/output error")

    storage = opened(image, cache="writethrough")
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(OSError) as caught:
        write(storage, 0, b"x")
    assert caught.value.errno == 5 and caught.value.filename == str(image)


def test_a_file_system_that_cannot_tell_what_is_cached_reads_all_the_same(
    image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diskwright.storage.posix import base

    storage, asked = opened(image), []
    real = os.preadv

    def preadv(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        asked.append(flags)
        if flags:
            raise OSError(95, "Operation not supported")
        return real(fd, buffers, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(base, "preadv", preadv)
    for _ in range(2):
        buffer = bytearray(100)
        storage.readv([(5, memoryview(buffer))], nowait=True)
        assert buffer == noise(1 << 20)[5:105]
    assert asked == [os.RWF_NOWAIT, 0, 0]  # asked once, and never again


def test_a_read_that_would_wait_for_the_medium_says_so(image: Path, opened: Opener) -> None:
    storage = opened(image)
    storage.flush()
    os.posix_fadvise(storage._fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(1 << 20)
    try:
        storage.readv([(0, memoryview(buffer))], nowait=True)
    except BlockingIOError as error:
        assert error.filename == str(image)
    else:
        pytest.skip("the pages stayed in the cache, or the file system cannot tell")
    storage.readv([(0, memoryview(buffer))])
    assert buffer == noise(1 << 20)
    storage.readv([(0, memoryview(buffer))], nowait=True)
    assert buffer == noise(1 << 20)

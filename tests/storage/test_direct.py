"""O_DIRECT: alignment, the end of the file, and threads that share a block."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest

from diskwright.storage.file import FileOptions, FileStorage
from diskwright.storage.posix import syscalls
from diskwright.storage.posix.direct import BOUNCE, MAX_IDLE, DirectIO, discover_alignment
from diskwright.storage.posix.ranges import Ranges
from tests.conformance.storage_suite import noise, read, together, write
from tests.storage.conftest import Opener

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(noise(MIB))
    return path


def odd_memory(length: int, skew: int) -> memoryview:
    """Memory that begins ``skew`` bytes into a page."""
    return memoryview(mmap.mmap(-1, length + 4096))[skew : skew + length]


@pytest.mark.parametrize("skew", [0, 1, 16, 511, 512])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 4096), (1, 4096), (512, 511), (4095, 2), (512, 512), (777, 200000), (0, 3 * MIB)]
)
def test_any_offset_length_and_memory(image: Path, opened: Opener, offset: int, length: int, skew: int) -> None:
    storage, content = opened(image, cache="none"), bytearray(noise(MIB))
    buffer = odd_memory(length, skew)
    storage.readv([(offset, buffer)])
    inside = content[offset : offset + length]
    assert buffer == inside + bytes(length - len(inside))
    buffer[:] = noise(length, 9)
    storage.writev([(offset, buffer)])
    content.extend(bytes(max(0, offset + length - len(content))))
    content[offset : offset + length] = noise(length, 9)
    storage.flush()
    assert image.read_bytes() == content


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4095, 4097, 100001])
def test_the_end_stays_exactly_where_it_is(tmp_path: Path, opened: Opener, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(size))
    storage, content = opened(path, cache="none"), bytearray(noise(size))
    for start, length in ((0, size), (max(0, size - 100), min(100, size)), (size // 2, size - size // 2)):
        write(storage, start, noise(length, 3))
        content[start : start + length] = noise(length, 3)
        assert path.stat().st_size == size
        assert read(storage, 0, size + 5000) == content + bytes(5000)
        assert path.read_bytes() == content


def test_appending_odd_lengths(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    storage, content = opened(path, cache="none"), bytearray()
    for i in range(120):
        piece = noise(1 + 97 * i % 1500, i)
        write(storage, len(content), piece)
        content += piece
        assert path.stat().st_size == len(content)
    assert path.read_bytes() == content


def test_readers_in_the_page_cache_and_past_it_agree(image: Path, opened: Opener) -> None:
    past, through = opened(image, cache="none"), opened(image)
    for i in range(40):
        write(past, i * 1000, noise(1000, i))
        assert read(through, i * 1000, 1000) == noise(1000, i)
        write(through, i * 1000 + 500, noise(100, i + 1))
        assert read(past, i * 1000 + 500, 100) == noise(100, i + 1)


@pytest.mark.parametrize("piece", [100, 256, 700])
def test_threads_in_one_block_at_once(tmp_path: Path, opened: Opener, piece: int) -> None:
    """Each writes only its own bytes, over and over; every other byte of the block is somebody else's."""
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * KIB))
    storage = opened(path, cache="none")

    def hammer(worker: int) -> None:
        for turn in range(40):
            write(storage, worker * piece, noise(piece, worker * 1000 + turn))
            assert read(storage, worker * piece, piece) == noise(piece, worker * 1000 + turn)

    together(hammer, 8)
    assert path.read_bytes()[: 8 * piece] == b"".join(noise(piece, worker * 1000 + 39) for worker in range(8))


def test_whole_blocks_beside_parts_of_them(tmp_path: Path, opened: Opener) -> None:
    """A write of part of a block must not bring back what a write of the whole block has just replaced."""
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * KIB))
    storage = opened(path, cache="none")
    block = memoryview(mmap.mmap(-1, 4096))

    def work(worker: int) -> None:
        for turn in range(300):
            if worker == 0:
                block[:] = bytes([1 + turn % 255]) * 4096
                storage.writev([(4096, block)])
                assert read(storage, 4096, 4096) == block
            else:
                # Up to the block from both sides and into its neighbours' bytes only.
                write(storage, 4096 - 100 * worker, bytes([turn % 255]) * 50)
                write(storage, 8192 + 100 * worker, bytes([turn % 255]) * 50)

    together(work, 4)


def test_a_part_of_a_block_waits_for_the_whole_block(image: Path) -> None:
    ranges, order = Ranges(), []
    with ranges.hold(0, 4096, exclusive=False):
        started = threading.Event()

        def part() -> None:
            started.set()
            with ranges.hold(512, 1024, exclusive=True):
                order.append("part")

        thread = threading.Thread(target=part)
        thread.start()
        started.wait(10)
        with ranges.hold(8192, 9000, exclusive=True):  # elsewhere nobody waits
            order.append("elsewhere")
        order.append("whole")
    thread.join(10)
    assert order == ["elsewhere", "whole", "part"]


def test_exclusive_holders_never_overlap() -> None:
    ranges, inside, worst = Ranges(), [0] * 8, []

    def work(worker: int) -> None:
        for turn in range(200):
            start = (worker + turn) % 7
            with ranges.hold(start * 10, start * 10 + 20, exclusive=True):
                for cell in (start, start + 1):
                    inside[cell] += 1
                worst.append(max(inside))
                for cell in (start, start + 1):
                    inside[cell] -= 1

    together(work, 6)
    assert max(worst) == 1
    assert not ranges._held


def test_zeroing_waits_for_parts_of_blocks(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(64 * KIB))
    storage = opened(path, cache="none")

    def work(worker: int) -> None:
        for turn in range(100):
            if worker == 0:
                storage.write_zeros(1000, 1000, unmap=bool(turn % 2), fast=False)
                assert read(storage, 1000, 1000) == bytes(1000)
            else:
                write(storage, 2000 + 100 * worker, noise(100, turn))
                write(storage, 900 - 100 * worker, noise(100, turn))

    together(work, 4)


def test_alignment_is_what_the_kernel_states(image: Path, opened: Opener) -> None:
    storage = opened(image, cache="none")
    with image.open("rb") as file:
        stated = syscalls.direct_alignment(file.fileno())
    assert storage.alignment == (stated or storage.alignment)
    assert opened(image).alignment == 1


def test_alignment_is_found_by_trying_where_nobody_states_it(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "direct_alignment", lambda fd: None)
    fd = os.open(image, os.O_RDONLY | os.O_DIRECT)
    try:
        found = discover_alignment(fd, block=False)
        assert found in (512, 1024, 2048, 4096)
        assert os.preadv(fd, [memoryview(mmap.mmap(-1, 4096))[:found]], found) == found
        if found > 512:
            with pytest.raises(OSError):
                os.preadv(fd, [memoryview(mmap.mmap(-1, 4096))[: found // 2]], found // 2)
    finally:
        os.close(fd)
    (tmp_path / "empty").write_bytes(b"")
    fd = os.open(tmp_path / "empty", os.O_RDONLY | os.O_DIRECT)
    try:
        assert discover_alignment(fd, block=False) == 4096
    finally:
        os.close(fd)


@pytest.mark.parametrize("alignment", [512, 4096, 65536])
def test_other_alignments(image: Path, alignment: int) -> None:
    """A file system may want more than this one does."""
    content = bytearray(noise(MIB))
    fd, cached = os.open(image, os.O_RDWR | os.O_DIRECT), os.open(image, os.O_WRONLY)
    try:
        io = DirectIO(fd, alignment, cached)
        for offset, length in ((1, 1), (65535, 2), (65536, 65536), (70000, 200000), (MIB - 3, 10), (0, 300000)):
            io.writev([(offset, memoryview(noise(length, offset)))])
            content.extend(bytes(max(0, offset + length - len(content))))
            content[offset : offset + length] = noise(length, offset)
            buffer = bytearray(length + 7)
            io.readv([(offset, memoryview(buffer))])
            assert buffer[:length] == noise(length, offset)
        assert image.read_bytes() == content
        io.close()
    finally:
        os.close(fd)


def test_aligned_requests_are_not_copied(image: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = opened(image, cache="none")

    def take(self: DirectIO) -> memoryview:
        raise AssertionError("copied")

    monkeypatch.setattr(DirectIO, "_take", take)
    buffer = odd_memory(64 * KIB, 0)
    storage.readv([(4096, buffer)])
    assert buffer == noise(MIB)[4096 : 4096 + 64 * KIB]
    storage.writev([(0, buffer[:4096]), (4096, buffer[4096:8192])])


def test_few_buffers_are_kept(image: Path, opened: Opener) -> None:
    storage = opened(image, cache="none")

    def some(worker: int) -> None:
        for i in range(20):
            assert len(read(storage, worker + i, 1000)) == 1000

    together(some, 8)
    assert storage._direct is not None
    assert len(storage._direct._idle) <= MAX_IDLE
    assert all(len(buffer) == BOUNCE for buffer in storage._direct._idle)


def test_many_buffers_in_one_request(image: Path, opened: Opener) -> None:
    storage = opened(image, cache="none")
    memory = odd_memory(1500 * 512, 0)
    storage.readv([(i * 512, memory[i * 512 : i * 512 + 512]) for i in range(1500)])
    assert memory == noise(MIB)[: 1500 * 512]
    memory[:] = noise(1500 * 512, 2)
    storage.writev([(i * 512, memory[i * 512 : i * 512 + 512]) for i in range(1500)])
    assert image.read_bytes()[: 1500 * 512] == noise(1500 * 512, 2)


def test_a_direct_read_always_waits_so_nowait_never_does_it(image: Path, opened: Opener) -> None:
    with pytest.raises(BlockingIOError):
        opened(image, cache="none").readv([(0, memoryview(bytearray(4096)))], nowait=True)


def test_a_file_system_without_direct_io_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument", path)
        return real(path, flags, *rest)  # type: ignore[arg-type]

    path = tmp_path / "file"
    path.write_bytes(b"x")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="does not support O_DIRECT") as caught:
        FileStorage.open(FileOptions(filename=str(path), cache="none"), writable=True)
    assert caught.value.filename == str(path)


def test_a_read_that_meets_the_file_growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read ended inside a block because the file did then; by the time the size is asked for it does not."""
    path = tmp_path / "file"
    path.write_bytes(noise(100))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    real = os.preadv
    grown: list[int] = []

    def preadv(fd: int, buffers: object, offset: int) -> int:
        got = real(fd, buffers, offset)  # type: ignore[arg-type]
        if not grown:
            grown.append(path.write_bytes(noise(9000)))
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    try:
        buffer = bytearray(5000)
        DirectIO(fd, 512, -1).readv([(0, memoryview(buffer))])
        assert buffer == noise(9000)[:5000]
    finally:
        os.close(fd)

"""No space, limits on file sizes, and file systems that lack an operation."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diskwright.core.driver import FilePlace
from diskwright.storage.posix import syscalls
from diskwright.storage.posix.syscalls import FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from tests.conformance.storage_suite import noise, read, write
from tests.storage.conftest import Opener

MIB = 1 << 20


def test_a_full_file_system_is_an_error_with_the_files_name(small_disk: Path, opened: Opener) -> None:
    path = small_disk / "file"
    path.write_bytes(b"")
    storage = opened(path)
    with pytest.raises(OSError) as caught:
        write(storage, 0, noise(8 * MIB))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    storage.truncate(0)
    with pytest.raises(OSError) as caught:
        storage.writev([(i * MIB, memoryview(noise(MIB))) for i in range(8)])
    assert caught.value.errno == errno.ENOSPC
    # What it could write, it wrote; and it works on once there is room.
    storage.truncate(0)
    write(storage, 0, noise(2 * MIB))
    assert read(storage, 0, 2 * MIB) == noise(2 * MIB)


def test_zeros_that_do_not_fit(small_disk: Path, opened: Opener) -> None:
    path = small_disk / "file"
    path.write_bytes(b"")
    storage = opened(path)
    storage.truncate(64 * MIB)
    with pytest.raises(OSError) as caught:
        storage.write_zeros(0, 64 * MIB, unmap=False, fast=False)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    storage.write_zeros(0, 64 * MIB, unmap=True, fast=True)  # holes always fit


def test_zeros_that_are_not_to_be_unmapped_keep_their_space(small_disk: Path, opened: Opener) -> None:
    """tmpfs has no zeroing, so the space is given back and taken anew."""
    path = small_disk / "file"
    path.write_bytes(noise(2 * MIB))
    storage, before = opened(path), path.stat().st_blocks
    for _ in range(2):
        storage.write_zeros(MIB, MIB, unmap=False, fast=True)
        assert read(storage, 0, 2 * MIB) == noise(2 * MIB)[:MIB] + bytes(MIB)
        assert path.stat().st_blocks == before


def test_zeros_beyond_the_end_take_no_space(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    storage = opened(path)
    storage.write_zeros(0, MIB, unmap=True, fast=True)
    storage.write_zeros(3 * MIB, MIB, unmap=True, fast=True)
    storage.flush()
    assert path.stat().st_size == 4 * MIB and path.stat().st_blocks == 0


def test_a_copy_that_does_not_fit_is_no_reason_to_try_another_way(small_disk: Path, opened: Opener) -> None:
    source, target = small_disk / "source", small_disk / "target"
    source.write_bytes(noise(3 * MIB))
    target.write_bytes(b"")
    with source.open("rb") as file, pytest.raises(OSError) as caught:
        opened(target).copy_from(0, FilePlace(file.fileno(), 0, 3 * MIB))
    if caught.value.errno == errno.ENOTSUP:
        pytest.skip("the kernel does not copy on this file system")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(target)


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_limit_on_file_sizes_cuts_writes_short(tmp_path: Path, cache: str) -> None:
    """The kernel writes up to the limit and refuses the rest: both must be seen."""
    script = (
        "import errno, resource, sys\n"
        "from diskwright.storage.file import FileOptions, FileStorage\n"
        "open(sys.argv[1], 'wb').close()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "storage = FileStorage.open(FileOptions(filename=sys.argv[1], cache=sys.argv[2]), writable=True)\n"
        "data = memoryview(bytes([7]) * (3 << 20))\n"
        "for segments in [[(1000, data)], [(1000, data[:700000]), (701000, data)]]:\n"
        "    try:\n"
        "        storage.writev(segments)\n"
        "    except OSError as error:\n"
        "        assert error.errno == errno.EFBIG and error.filename == sys.argv[1], error\n"
        "    else:\n"
        "        raise SystemExit('the write claims to be complete')\n"
        "print(storage.size)\n"
    )
    path = tmp_path / "file"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), cache],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    size = int(done.stdout)
    assert 1000 < size <= MIB
    assert path.read_bytes() == bytes(1000) + b"\7" * (size - 1000)


LACKING = [
    {FALLOC_ZERO_RANGE},
    {FALLOC_PUNCH_HOLE},
    {FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE},
    {FALLOC_ZERO_RANGE, 0},
    {FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, 0},
]


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("lacking", LACKING, ids=str)
def test_file_systems_that_lack_an_operation(
    tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch, lacking: set[int], unmap: bool
) -> None:
    """Zeroing takes another way, or says so with every byte as it was."""
    real = syscalls.fallocate

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        if (mode & (FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE)) in lacking:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        real(fd, mode, offset, length)

    monkeypatch.setattr(syscalls, "fallocate", fallocate)
    path = tmp_path / "file"
    path.write_bytes(noise(MIB))
    storage = opened(path)
    has_punch, has_zero, has_space = (mode not in lacking for mode in (FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, 0))
    possible = has_zero or (has_punch and (unmap or has_space))
    for _ in range(2):  # the second time it knows
        content = bytearray(read(storage, 0, MIB))
        try:
            storage.write_zeros(5000, 100000, unmap=unmap, fast=True)
            content[5000:105000] = bytes(100000)
            assert possible
        except OSError as error:
            assert error.errno == errno.ENOTSUP and error.filename == str(path)
            assert not possible
        assert read(storage, 0, MIB) == content
        storage.discard(200000, 50000)
        assert read(storage, 0, 200000) == content[:200000] and read(storage, 250000, 1000) == content[250000:251000]


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
def test_preallocation_where_nothing_can_be_reserved_writes_zeros(
    tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch, preallocation: str
) -> None:
    def fallocate(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(syscalls, "fallocate", fallocate)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    storage = opened(path)
    storage.truncate(3 * MIB + 1, preallocation=preallocation)
    storage.flush()
    assert path.read_bytes() == b"x" + bytes(3 * MIB)
    assert path.stat().st_blocks * 512 >= 3 * MIB


def test_discard_gives_space_back_unless_told_not_to(tmp_path: Path, opened: Opener) -> None:
    for option, expected in (("unmap", True), ("ignore", False)):
        path = tmp_path / option
        path.write_bytes(noise(4 * MIB))
        storage = opened(path, discard=option)
        storage.flush()
        before = path.stat().st_blocks
        storage.discard(MIB, 2 * MIB)
        assert (path.stat().st_blocks < before) is expected
        storage.write_zeros(MIB, 2 * MIB, unmap=True, fast=False)
        assert (path.stat().st_blocks < before) is expected
        assert read(storage, 0, 4 * MIB) == noise(4 * MIB)[:MIB] + bytes(2 * MIB) + noise(4 * MIB)[3 * MIB :]


def test_other_failures_of_fallocate_are_not_taken_for_a_lack(
    tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(syscalls, "fallocate", fallocate)
    (tmp_path / "file").write_bytes(noise(4096))
    storage = opened(tmp_path / "file")
    for unmap in (False, True):
        with pytest.raises(OSError) as caught:
            storage.write_zeros(0, 4096, unmap=unmap, fast=False)
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError) as caught:
        storage.discard(0, 4096)
    assert caught.value.errno == errno.EIO

"""Creating files: sizes and space as qemu-img makes them, and what is left when it fails."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from diskwright.errors import OptionError
from diskwright.storage.file import HostDeviceStorage
from diskwright.storage.posix import syscalls
from tests.storage.conftest import Opener, create

SIZES = [0, 1, 1000, 4096, 1048577, 10 << 20]


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="no qemu-img")
@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
@pytest.mark.parametrize("size", SIZES)
def test_makes_files_like_qemu_img(tmp_path: Path, size: int, preallocation: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    create(ours, size=size, preallocation=preallocation)
    options = f"preallocation={preallocation}"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", "-o", options, str(theirs), str(size)], check=True)
    assert ours.read_bytes() == theirs.read_bytes()
    mine, other = ours.stat(), theirs.stat()
    assert mine.st_mode == other.st_mode
    if preallocation == "off":
        assert mine.st_blocks == 0  # qemu-img always takes a first block, for a probe we have no need of
    else:
        assert mine.st_blocks == other.st_blocks


def no_fallocate(*_: int) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100000)
    create(path, size=1024)
    assert path.read_bytes() == bytes(1024)


def test_nocow_is_a_wish(tmp_path: Path) -> None:
    create(tmp_path / "file", size=1024, nocow=True)
    assert (tmp_path / "file").stat().st_size == 1024


def test_a_failure_leaves_no_new_file(small_disk: Path) -> None:
    with pytest.raises(OSError) as caught:
        create(small_disk / "file", size=64 << 20, preallocation="full")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(small_disk / "file")
    assert list(small_disk.iterdir()) == []


def test_a_failure_keeps_the_name_of_an_old_file(small_disk: Path) -> None:
    (small_disk / "file").write_bytes(b"old")
    with pytest.raises(OSError):
        create(small_disk / "file", size=64 << 20, preallocation="falloc")
    assert (small_disk / "file").exists()


def test_no_host_device_is_made_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        create(tmp_path / "file", HostDeviceStorage, size=1024)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionError):
        create(tmp_path / "file", size=1024, preallocation="metadata")


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        create(tmp_path / "none" / "file", size=1024)
    assert caught.value.filename == str(tmp_path / "none" / "file")


@pytest.mark.parametrize("can_reserve", [True, False])
@pytest.mark.parametrize("preallocation", ["falloc", "full"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_preallocation_that_fails_gives_everything_back(
    small_disk: Path,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
    preallocation: str,
    cache: str,
    can_reserve: bool,
) -> None:
    if not can_reserve:  # then it fails in the middle of writing zeros
        monkeypatch.setattr(syscalls, "fallocate", no_fallocate)
    path = small_disk / "file"
    path.write_bytes(b"x" * 5000)
    storage = opened(path, cache=cache)
    free = os.statvfs(small_disk).f_bfree
    with pytest.raises(OSError) as caught:
        storage.truncate(64 << 20, preallocation=preallocation)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert storage.size == 5000
    assert path.read_bytes() == b"x" * 5000
    assert os.statvfs(small_disk).f_bfree == free

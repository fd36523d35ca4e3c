"""Block devices, by way of loop devices."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from diskwright.core.driver import Storage
from diskwright.errors import OptionError
from diskwright.extents import DATA
from diskwright.storage.file import FileOptions, FileStorage, HostDeviceStorage
from tests.conformance.storage_suite import StorageConformance, noise, read, write
from tests.storage.conftest import Opener, create

MIB = 1 << 20

Attach = Callable[..., str]


class TestLoopDevice(StorageConformance):
    cache: ClassVar[str] = "writeback"
    sector: ClassVar[int] = 512
    can_grow = can_truncate = any_size = has_holes = can_copy = False
    model_examples = 5

    @pytest.fixture(autouse=True)
    def _with_devices(self, _keep_house: None, attach: Attach) -> None:
        self.attach, self.made = attach, 0

    def make(self, size: int) -> Storage:
        self.made += 1
        path = self.home / f"backing{self.made}"
        with path.open("wb") as file:
            file.truncate(size)
        device = self.attach(path, f"--sector-size={self.sector}")
        return HostDeviceStorage.open(FileOptions(filename=device, cache=self.cache), writable=True)


class TestLoopDeviceDirect(TestLoopDevice):
    cache = "none"
    has_place = False


class TestLoopDeviceOf4kSectors(TestLoopDevice):
    sector = 4096


class TestLoopDeviceOf4kSectorsDirect(TestLoopDevice):
    cache = "none"
    sector = 4096
    has_place = False

    def test_knows_its_sectors(self) -> None:
        assert self.fresh().alignment == 4096


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_bytes(noise(4 * MIB))
    return path


def test_the_file_driver_takes_a_device_too(backing: Path, attach: Attach, opened: Opener) -> None:
    storage = opened(attach(backing))
    assert storage.size == 4 * MIB
    assert not storage.zero_init
    assert read(storage, 12345, 54321) == noise(4 * MIB)[12345:][:54321]
    assert [run.kind for run in storage.extents(0, 4 * MIB)] == [DATA]


def test_what_is_written_reaches_the_device(backing: Path, attach: Attach, opened: Opener) -> None:
    storage = opened(attach(backing), device=True)
    write(storage, 777, noise(100000, 2))
    storage.write_zeros(2 * MIB + 5, MIB, unmap=True, fast=False)
    storage.flush()
    content = bytearray(noise(4 * MIB))
    content[777:100777] = noise(100000, 2)
    content[2 * MIB + 5 : 3 * MIB + 5] = bytes(MIB)
    assert backing.read_bytes() == content


def test_discarded_sectors_are_given_back(backing: Path, attach: Attach, opened: Opener) -> None:
    storage = opened(attach(backing), device=True)
    before = backing.stat().st_blocks
    storage.discard(MIB + 1, 2 * MIB)
    storage.flush()
    assert before - backing.stat().st_blocks >= (2 * MIB - 8192) // 512
    assert read(storage, MIB, 1) == noise(4 * MIB)[MIB : MIB + 1]
    assert read(storage, 3 * MIB + 1, 1000) == noise(4 * MIB)[3 * MIB + 1 :][:1000]


def test_unmapped_zeros_give_space_back_and_others_do_not(backing: Path, attach: Attach, opened: Opener) -> None:
    storage = opened(attach(backing), device=True)
    before = backing.stat().st_blocks
    storage.write_zeros(0, MIB, unmap=False, fast=False)
    storage.flush()
    assert backing.stat().st_blocks == before
    storage.write_zeros(MIB, MIB, unmap=True, fast=True)
    assert before - backing.stat().st_blocks >= MIB // 512
    assert read(storage, 0, 2 * MIB) == bytes(2 * MIB)


def test_fast_zeros_that_keep_space_are_refused_unchanged(backing: Path, attach: Attach, opened: Opener) -> None:
    storage = opened(attach(backing), device=True)
    with pytest.raises(OSError) as caught:
        storage.write_zeros(0, MIB, unmap=False, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    assert read(storage, 0, MIB) == noise(4 * MIB)[:MIB]


def test_zeros_beyond_the_end_do_not_fit(backing: Path, attach: Attach, opened: Opener) -> None:
    storage = opened(attach(backing), device=True)
    with pytest.raises(OSError) as caught:
        storage.write_zeros(4 * MIB - 512, 1024, unmap=True, fast=False)
    assert caught.value.errno == errno.ENOSPC
    assert read(storage, 4 * MIB - 512, 512) == noise(4 * MIB)[-512:]


def test_creating_on_a_device_wipes_its_beginning(backing: Path, attach: Attach) -> None:
    device = attach(backing)
    create(device, HostDeviceStorage, size=MIB)
    content = backing.read_bytes()
    assert len(content) == 4 * MIB and content[:65536] == bytes(65536) and content[MIB:] == noise(4 * MIB)[MIB:]
    assert os.path.exists(device)


def test_a_device_too_small_is_left_as_it_is(backing: Path, attach: Attach) -> None:
    device = attach(backing)
    for driver in (FileStorage, HostDeviceStorage):
        with pytest.raises(OSError) as caught:
            create(device, driver, size=5 * MIB)
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == device
        with pytest.raises(OptionError):
            create(device, driver, size=MIB, preallocation="full")
    assert backing.read_bytes() == noise(4 * MIB)
    assert os.path.exists(device)


def test_a_device_keeps_its_size(backing: Path, attach: Attach, opened: Opener) -> None:
    storage = opened(attach(backing), device=True)
    storage.truncate(4 * MIB)
    for size in (MIB, 8 * MIB):
        with pytest.raises(OSError) as caught:
            storage.truncate(size)
        assert caught.value.errno == errno.ENOTSUP


def test_a_write_the_medium_lost_fails_this_flush_and_all_later_ones(
    small_disk: Path, attach: Attach, opened: Opener
) -> None:
    """The device is larger than what is behind it, so cached writes fail when they are written back."""
    path = small_disk / "backing"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    storage = opened(attach(path), device=True)
    write(storage, 0, noise(8 * MIB))
    with pytest.raises(OSError) as first:
        storage.flush()
    write(storage, 0, noise(4096))
    os.fdatasync(storage._fd)  # the kernel has told it once and takes the matter for settled
    with pytest.raises(OSError) as second:
        storage.flush()
    assert first.value.errno == second.value.errno

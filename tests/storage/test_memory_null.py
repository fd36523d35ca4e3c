"""Storages without a medium."""

from __future__ import annotations

import os
import time

import pytest

from diskwright.core import options as opts
from diskwright.core import registry
from diskwright.core.driver import Storage
from diskwright.errors import OptionError
from diskwright.extents import DATA, ZERO
from diskwright.storage.memory import MemoryOptions, MemoryStorage
from diskwright.storage.null import NullAioStorage, NullOptions, NullStorage
from tests.conformance.storage_suite import noise, read, write


def test_drivers_are_found_by_their_names() -> None:
    for name in ("file", "host_device", "memory", "null-co", "null-aio"):
        driver = registry.find(name)
        assert issubclass(driver, Storage) and driver.name == name


def test_memory_takes_no_more_than_what_is_written() -> None:
    storage = MemoryStorage.open(MemoryOptions(size=1 << 40), writable=True)
    try:
        assert storage.size == 1 << 40
        assert storage.allocated_size() == 0
        write(storage, 1 << 39, noise(100000))
        assert 100000 <= (storage.allocated_size() or 0) <= 200000
        storage.write_zeros(0, 1 << 40, unmap=False, fast=True)
        assert storage.allocated_size() == 0
    finally:
        storage.close()


def test_memory_is_given_back_when_closed() -> None:
    before = os.listdir("/proc/self/fd")
    storage = MemoryStorage.open(MemoryOptions(), writable=True)
    write(storage, 0, b"x")
    storage.close()
    assert os.listdir("/proc/self/fd") == before


def test_memory_of_an_impossible_size() -> None:
    with pytest.raises(OptionError, match="cannot be had"):
        MemoryStorage.open(MemoryOptions(size=1 << 63), writable=True)


def test_memory_names() -> None:
    assert (
        opts.parse(MemoryStorage.options, MemoryStorage.parse_filename("memory:64M"), owner="memory").size == 64 << 20
    )
    assert opts.parse(MemoryStorage.options, MemoryStorage.parse_filename("memory:"), owner="memory").size == 0


def test_null_names() -> None:
    assert NullStorage.parse_filename("null-co://") == {}
    assert NullAioStorage.parse_filename("null-aio:") == {}
    with pytest.raises(OptionError, match="null-co://"):
        NullStorage.parse_filename("null-co://x")


def test_null_says_it_is_zeros_only_when_it_promised() -> None:
    for promise, kind in ((True, ZERO), (False, DATA)):
        storage = NullStorage.open(NullOptions(size=1000, read_zeroes=promise), writable=True)
        assert storage.extent_at(0, 1000).kind == kind
        assert storage.zero_init is promise
        write(storage, 0, b"gone")
        assert read(storage, 0, 4) == bytes(4)


def test_null_takes_its_time() -> None:
    storage = NullStorage.open(NullOptions(latency_ns=20_000_000), writable=True)
    assert storage.size == 1 << 30
    for request in (
        lambda: read(storage, 0, 1),
        lambda: write(storage, 0, b"x"),
        storage.flush,
        lambda: storage.write_zeros(0, 1, unmap=False, fast=True),
        lambda: storage.discard(0, 1),
    ):
        before = time.monotonic()
        request()
        assert time.monotonic() - before >= 0.02
    with pytest.raises(BlockingIOError):
        storage.readv([(0, memoryview(bytearray(1)))], nowait=True)
    with pytest.raises(OptionError):
        NullOptions(latency_ns=-1)

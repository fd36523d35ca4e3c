"""The storages of this package, held to the suite."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import ClassVar

import pytest

from diskwright.core import options as opts
from diskwright.core.driver import Storage
from diskwright.storage.file import FileStorage
from diskwright.storage.memory import MemoryStorage
from diskwright.storage.null import NullAioStorage, NullStorage
from tests.conformance.storage_suite import SIZE, StorageConformance


class FileConformance(StorageConformance):
    cache: ClassVar[str] = "writeback"
    options: ClassVar[dict[str, object]] = {}
    _numbers: ClassVar[Iterator[int]] = count()

    def make(self, size: int) -> Storage:
        path = self.home / f"image{next(self._numbers)}"
        with path.open("wb") as file:
            file.truncate(size)
        values = {"filename": str(path), "cache": self.cache, **self.options}
        return FileStorage.open(opts.parse(FileStorage.options, values, owner="file"), writable=True)

    @contextmanager
    def failing_flush(self, storage: Storage) -> Iterator[None]:
        """The descriptor is that of a device which cannot be synchronised, for a while."""
        assert isinstance(storage, FileStorage)
        keep, full = os.dup(storage._fd), os.open("/dev/full", os.O_RDWR)
        try:
            os.dup2(full, storage._fd, inheritable=False)
            yield
        finally:
            os.dup2(keep, storage._fd, inheritable=False)
            os.close(keep)
            os.close(full)


class TestFile(FileConformance):
    pass


class TestFileWriteThrough(FileConformance):
    cache = "writethrough"
    model_examples = 15


class TestFileUnsafe(FileConformance):
    cache = "unsafe"
    model_examples = 15

    def test_after_a_failed_flush_every_flush_fails(self) -> None:
        storage = self.fresh()
        with self.failing_flush(storage):
            storage.flush()  # which does nothing, and so cannot fail


class TestFileDirect(FileConformance):
    cache = "none"
    has_place = False
    model_examples = 25


class TestFileDirectSync(FileConformance):
    cache = "directsync"
    has_place = False
    model_examples = 8


class TestFileKeepingSpace(FileConformance):
    """``discard=ignore``: nothing is ever given back."""

    options = {"discard": "ignore"}
    model_examples = 15

    def test_unmapped_zeros_take_no_space(self) -> None:
        storage, _ = self.filled()
        storage.flush()
        before = storage.allocated_size()
        storage.write_zeros(0, SIZE, unmap=True, fast=False)
        storage.discard(0, SIZE)
        storage.flush()
        assert storage.allocated_size() == before


class TestFileInMemory(FileConformance):
    """A file system without RWF_NOWAIT and FALLOC_FL_ZERO_RANGE."""

    @pytest.fixture(autouse=True)
    def _on_tmpfs(self, _keep_house: None) -> Iterator[None]:
        if not os.path.isdir("/dev/shm"):
            pytest.skip("no /dev/shm")
        self.home = Path(tempfile.mkdtemp(prefix="diskwright-", dir="/dev/shm"))
        yield
        shutil.rmtree(self.home)


class TestMemory(StorageConformance):
    can_copy = False  # the kernel copies only within one file system

    def make(self, size: int) -> Storage:
        return MemoryStorage.open(opts.parse(MemoryStorage.options, {"size": size}, owner="memory"), writable=True)


class TestNull(StorageConformance):
    keeps_data = can_grow = can_truncate = has_holes = has_place = can_copy = False

    def make(self, size: int) -> Storage:
        return NullStorage.open(opts.parse(NullStorage.options, {"size": size}, owner="null-co"), writable=True)


class TestNullAio(StorageConformance):
    keeps_data = can_grow = can_truncate = has_place = can_copy = False

    def make(self, size: int) -> Storage:
        values = {"size": size, "read-zeroes": True}
        return NullAioStorage.open(opts.parse(NullAioStorage.options, values, owner="null-aio"), writable=True)

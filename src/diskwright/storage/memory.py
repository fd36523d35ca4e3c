"""Bytes in memory (``memory``): sparse, growable, gone when closed.

They lie in an anonymous file of the kernel's, so that holes, sendfile and copies within the kernel work
as they do with a file on disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, Self

from diskwright.core.options import SIZE, option
from diskwright.errors import OptionError
from diskwright.storage.posix.base import DescriptorStorage
from diskwright.storage.posix.space import FileSpace


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    size: int = option(SIZE, "size in bytes; all zeros at first, and growing with writes beyond it", default=0)


class MemoryStorage(DescriptorStorage):
    """Memory takes what has been written, in pages. Nothing is ever durable, so a flush does nothing."""

    name: ClassVar[str] = "memory"
    options: ClassVar[type] = MemoryOptions
    prefixes: ClassVar[tuple[str, ...]] = ("memory",)
    zero_init = True

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, object]:
        """``memory:`` is empty, ``memory:64M`` has a size."""
        size = filename.partition(":")[2]
        return {"size": size} if size else {}

    @classmethod
    def open(cls, options: MemoryOptions, *, writable: bool) -> Self:
        fd = os.memfd_create("diskwright", os.MFD_CLOEXEC)
        storage = cls(fd, "memory:", writable=writable)
        # Pages taken out and pages of zeros differ in nothing a user could notice.
        storage._space = FileSpace(fd, storage._grow, keep=False)
        try:
            storage.truncate(options.size)
        except OSError as error:
            storage.close()
            raise OptionError(f"Memory of {options.size} bytes cannot be had: {error.strerror}") from error
        return storage

    def reopened(self, options: MemoryOptions, *, writable: bool) -> Self:
        self._writable = writable  # it is kept nowhere else
        return self

    def flush(self) -> None:
        return


DRIVERS = (MemoryStorage,)

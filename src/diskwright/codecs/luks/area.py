"""Area: the bytes a LUKS header and its key slots lie in."""

from __future__ import annotations

from typing import Protocol

from diskwright.errors import CorruptImage


class _Bytes(Protocol):
    """What an area is cut out of: a node of the block graph, say."""

    def pread(self, offset: int, length: int) -> bytes: ...
    def pwrite(self, offset: int, data: bytes) -> None: ...
    def flush(self) -> None: ...


class Area:
    """``size`` bytes of ``below`` from ``offset`` on. ``path`` is for messages."""

    def __init__(self, below: _Bytes, path: str, size: int, offset: int = 0) -> None:
        self._below, self.path, self.size, self.offset = below, path, size, offset

    def read(self, offset: int, length: int, field: str) -> bytes:
        """``length`` bytes of the item called ``field``. Raises CorruptImage when they are not all there."""
        if offset < 0 or offset + length > self.size:
            raise CorruptImage(
                self.path,
                f"place of {field}",
                offset,
                None,
                f"{length} bytes there end beyond the end, {self.size}",
            )
        return self._below.pread(self.offset + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        assert offset >= 0 and offset + len(data) <= self.size
        self._below.pwrite(self.offset + offset, data)

    def flush(self) -> None:
        self._below.flush()

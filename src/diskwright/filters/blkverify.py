"""blkverify: holds an image to a raw copy of it. Writes go to both; a read that they answer differently is the end."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import ClassVar, NoReturn

from diskwright.core.driver import Filter, OpenContext, Role, Segments, not_supported
from diskwright.core.node import Node
from diskwright.errors import FatalError, OptionError


class BlkVerify(Filter):
    """``child`` is the raw copy, whose word counts; ``test`` is the image. After the first difference every request
    is refused with the error that told of it."""

    name = "blkverify"
    prefixes: ClassVar[tuple[str, ...]] = ("blkverify",)
    roles = (Role("raw"), Role("test", image=True))

    def __init__(self, child: Node, test: Node) -> None:
        self.child, self.test = child, test
        self._size = test.size  # who asks for it need not hold the children open
        self._found: str | None = None

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, object]:
        """``blkverify:RAW:IMAGE``; without the prefix it is the image's."""
        if not filename.startswith("blkverify:"):
            return {"test": {"filename": filename}}
        raw, colon, image = filename.removeprefix("blkverify:").partition(":")
        if not colon:
            raise OptionError("blkverify requires raw copy and original image path")
        return {"raw": {"filename": raw}, "test": {"filename": image}}

    @classmethod
    def open(cls, context: OpenContext, options: object) -> BlkVerify:
        return cls(context.file, context.children["test"])

    @property
    def size(self) -> int:
        return self._size

    @property
    def alignment(self) -> int:
        return max(self.child.alignment, self.test.alignment)

    def readv(self, segments: Segments, *, nowait: bool) -> None:
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "Two children are read")
        for offset, buffer in segments:
            other = memoryview(bytearray(len(buffer)))
            self._both(
                "read", offset, len(buffer),
                lambda: self.child.readv([(offset, buffer)]),  # noqa: B023 - called at once
                lambda: self.test.readv([(offset, other)]),  # noqa: B023
            )  # fmt: skip
            if bytes(buffer) != bytes(other):  # memoryviews compare one item at a time
                at = offset + first_difference(buffer, other)
                self._stop(f"read offset={offset} bytes={len(buffer)} contents mismatch at offset {at}")

    def writev(self, segments: Segments) -> None:
        for segment in segments:
            offset, buffer = segment
            self._both(
                "write", offset, len(buffer),
                lambda: self.child.writev([segment]),  # noqa: B023
                lambda: self.test.writev([segment]),  # noqa: B023
            )  # fmt: skip
            self._size = max(self._size, offset + len(buffer))

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self._both(
            "write", offset, length,
            lambda: self.child.write_zeros(offset, length, unmap=unmap),
            lambda: self.test.write_zeros(offset, length, unmap=unmap),
        )  # fmt: skip
        self._size = max(self._size, offset + length)

    def discard(self, offset: int, length: int) -> None:
        """Nothing: what a discard leaves to read may differ between the two, and rightly so."""

    def flush(self) -> None:
        self._both("flush", 0, 0, self.child.flush, self.test.flush)

    def resize(self, size: int, *, preallocation: str) -> None:
        raise not_supported("Filter 'blkverify' cannot resize")

    def write_compressed(self, segments: Segments, turn: Callable[[], None] | None) -> None:
        raise not_supported("Filter 'blkverify' cannot write compressed")

    def transparent(self) -> bool:
        return False

    def _both(self, what: str, offset: int, length: int, raw: Callable[[], None], test: Callable[[], None]) -> None:
        """One request to both. When both fail alike, so does it; to fail otherwise is a difference."""
        if self._found is not None:
            raise FatalError(self._found)
        errors: list[OSError | None] = []
        for action in (raw, test):
            try:
                action()
                errors.append(None)
            except OSError as error:
                errors.append(error)
        theirs, ours = errors
        if (theirs and theirs.errno) != (ours and ours.errno):
            numbers = [-(error.errno or errno.EIO) if error else 0 for error in errors]
            self._stop(
                f"{what} offset={offset} bytes={length} return value mismatch {numbers[1]} != {numbers[0]}",
            )
        if theirs is not None:
            raise theirs

    def _stop(self, text: str) -> NoReturn:
        self._found = f"blkverify: {text}"
        raise FatalError(self._found)


def first_difference(one: memoryview, other: memoryview) -> int:
    """The index of the first byte in which two different buffers of one length differ."""
    import numpy as np

    return int(np.argmax(np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)))


DRIVERS = (BlkVerify,)

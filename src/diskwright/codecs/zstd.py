"""Decoding zstd frames straight into a buffer, by the system's libzstd.

Python's zstd modules make a context for each frame, which takes as long as decoding 64 KiB, and return what they
decode as an object that has to be copied. Here each thread has one context, and other threads run while it decodes.
Nearly every system has the library; where it is missing, users have Python's modules left.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any, Final

_LIBRARY: Final = "libzstd.so.1"

_MAGIC: Final = b"\x28\xb5\x2f\xfd"
"""RFC 8878, section 3.1.1. The library may know older formats too, which nobody should be able to make us read."""


class FrameDecoder:
    """Thread-safe."""

    def __init__(self) -> None:
        """Raises OSError or AttributeError when there is no such library, or it lacks something."""
        import ctypes

        # Finding the end of a frame takes less than letting another thread run would.
        measure, library = ctypes.PyDLL(_LIBRARY), ctypes.CDLL(_LIBRARY)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._measure = _typed(measure.ZSTD_findFrameCompressedSize, size, pointer, size)
        self._decode = _typed(library.ZSTD_decompressDCtx, size, pointer, pointer, size, pointer, size)
        self._make = _typed(library.ZSTD_createDCtx, pointer)
        self._free = _typed(library.ZSTD_freeDCtx, size, pointer)
        self._start_of = ctypes.c_char.from_buffer
        self._address = ctypes.addressof
        self._mine = threading.local()

    def fill(self, into: memoryview, raw: memoryview) -> bool:
        """Whether the frames that ``raw`` begins with gave all of ``into``, and no more. Both are writable (which only
        shows that they are memory of ours). What is in ``into`` after False means nothing."""
        try:
            context = self._mine.context
        except AttributeError:
            context = self._mine.context = _Context(self._make(), self._free)
        if not context.pointer or not len(raw) or not len(into):
            return False
        keep = self._start_of(raw), self._start_of(into)  # as long as these live the addresses are good
        source, target = map(self._address, keep)
        at = done = 0
        while done < len(into):
            if bytes(raw[at : at + len(_MAGIC)]) != _MAGIC:
                return False
            length = self._measure(source + at, len(raw) - at)
            if length > len(raw) - at:  # as all errors are
                return False
            got = self._decode(context.pointer, target + done, len(into) - done, source + at, length)
            if got > len(into) - done:
                return False
            at, done = at + length, done + got
        return True


class _Context:
    """A thread's context, given back when the thread ends."""

    def __init__(self, pointer: int | None, free: Any) -> None:
        self.pointer, self._free = pointer, free

    def __del__(self) -> None:
        if self.pointer:
            self._free(self.pointer)


@cache
def frame_decoder() -> FrameDecoder | None:
    """The one there is, None where the library is missing."""
    try:
        return FrameDecoder()
    except (ImportError, OSError, AttributeError):
        return None


def _typed(function: Any, result: Any, *arguments: Any) -> Any:
    function.restype, function.argtypes = result, arguments
    return function

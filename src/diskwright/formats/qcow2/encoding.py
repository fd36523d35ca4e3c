"""Making compressed clusters: raw deflate with a window of 4 KiB, or one zstd frame (section Cluster mapping).

QEMU inflates with a window of 4 KiB (-12), so nothing may be used here whose window is fixed at more, as libdeflate's
is. ISA-L keeps to the window it is given; a test decodes every cluster of a file system with one of 4 KiB.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from diskwright.errors import OptionError, UnsupportedFeature

WINDOW_BITS: Final = 12

MAX_LEVEL: Final = {"zlib": 9, "zstd": 19}
DEFAULT_LEVEL: Final = {"zlib": 3, "zstd": 1}
"""The quickest that does not waste much space."""

_ISAL_LEVELS: Final = {1: 0, 2: 3, 3: 3}
"""zlib levels for which ISA-L is used, where it is installed, and what it calls them: ten times as fast as zlib, for
images some hundredths larger. From 4 on they are zlib's; 6 gives the sizes of qemu-img. ISA-L's levels 1 and 2 are left
out: with several threads one cluster in thousands comes out a byte longer or shorter, and the same source should give
the same image every time."""

_MEMORY_LEVEL: Final = 9
"""zlib's largest; 64 KiB more memory for slightly smaller output."""

_DEFLATED: Final = 8

Encode = Callable[[memoryview], bytes]


class Encoder:
    """Compresses clusters of one image. Thread-safe; lets other threads run while it compresses."""

    def __init__(self, path: str, compression: str, cluster_size: int, level: int | None) -> None:
        """Raises OptionError for a level that the method does not have."""
        most = MAX_LEVEL[compression]
        if level is not None and not 1 <= level <= most:
            raise OptionError(f"compression-level must be 1 to {most} for {compression}, not {level}")
        self._path, self._compression, self._cluster_size = path, compression, cluster_size
        self._level = DEFAULT_LEVEL[compression] if level is None else level
        self._encode: Encode | None = None

    def encode(self, data: memoryview) -> bytes | None:
        """See ``Format.encode``."""
        if self._encode is None:
            self._encode = self._zlib() if self._compression == "zlib" else self._zstd()
        stored = self._encode(data)
        return stored if len(stored) < self._cluster_size else None

    def _zlib(self) -> Encode:
        if self._level in _ISAL_LEVELS:
            try:
                from isal import igzip_lib
            except ImportError:
                pass
            else:
                return lambda data, level=_ISAL_LEVELS[self._level]: igzip_lib.compress(  # type: ignore[misc]
                    data, level, igzip_lib.COMP_DEFLATE, igzip_lib.MEM_LEVEL_DEFAULT, WINDOW_BITS
                )
        import zlib

        def deflated(data: memoryview) -> bytes:
            stream = zlib.compressobj(self._level, _DEFLATED, -WINDOW_BITS, _MEMORY_LEVEL)
            return stream.compress(data) + stream.flush()

        return deflated

    def _zstd(self) -> Encode:
        library = _zstd_library(self._path)
        # Making a context takes longer than compressing a cluster, and a context serves one thread at a time.
        mine = threading.local()
        whole = library.ZstdCompressor.FLUSH_FRAME

        def compressed(data: memoryview) -> bytes:
            try:
                context = mine.context
            except AttributeError:
                context = mine.context = library.ZstdCompressor(level=self._level)
            return bytes(context.compress(data, whole))

        return compressed


def _zstd_library(path: str) -> Any:
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UnsupportedFeature(f"{path}: has zstd clusters, and no zstd library is installed") from None
    return zstd

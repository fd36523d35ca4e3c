"""Compressed clusters: raw deflate or zstd streams that give exactly one cluster (section Cluster mapping).

The stored length is in whole sectors, so a stream is followed by up to 511 bytes of something else.
"""

from __future__ import annotations

import threading
from typing import Any, Final

from diskwright.codecs.zstd import frame_decoder
from diskwright.errors import CorruptImage, UnsupportedFeature
from diskwright.extents import Extent
from diskwright.units import MiB

_KEPT_BYTES: Final = 4 * MiB
"""Decoded clusters kept, so that reading one in small pieces does not decode it for each."""
_KEPT_MOST: Final = 8

_DEFLATE_WINDOW: Final = -15
"""Images are written with a window of 4 KiB (-12). With the largest window those decode to the same bytes, and so
do images of writers that did not keep to that."""


class Decoder:
    """Decodes the compressed clusters of one image. Thread-safe."""

    def __init__(self, path: str, compression: str, cluster_size: int) -> None:
        self._path, self._compression, self._cluster_size = path, compression, cluster_size
        self._most = max(1, min(_KEPT_MOST, _KEPT_BYTES // cluster_size))
        self._kept: dict[int, tuple[bytes, bytes]] = {}  # file offset -> raw, decoded; the oldest first
        self._lock = threading.Lock()
        self._decoder: Any = None
        self._fill = self._directly if compression == "zstd" else None
        """Decodes a whole cluster to where it belongs; False when ``_cluster`` has to, or to say what is wrong."""

    def decode(self, extent: Extent, raw: memoryview, into: memoryview) -> None:
        """See ``Format.decode``."""
        if len(into) == self._cluster_size:  # nothing of it is left to be asked for
            if not (self._fill is not None and self._fill(into, raw)):
                into[:] = self._cluster(extent, raw)
            return
        kept = self._kept.get(extent.file_offset)
        # Comparing is much cheaper than decoding, and needs no rule for when a place has been used anew.
        if kept is None or kept[0] != raw:
            kept = bytes(raw), self._cluster(extent, raw)
            with self._lock:
                self._kept.pop(extent.file_offset, None)
                while len(self._kept) >= self._most:
                    del self._kept[next(iter(self._kept))]
                self._kept[extent.file_offset] = kept
        inside = extent.offset & (self._cluster_size - 1)
        into[:] = memoryview(kept[1])[inside : inside + len(into)]

    def _cluster(self, extent: Extent, raw: memoryview) -> bytes:
        try:
            data = self._inflate(raw) if self._compression == "zlib" else self._unzstd(raw)
        except UnsupportedFeature:
            raise
        except Exception as error:  # each library has an error of its own
            raise self._corrupt(extent, f"it does not decode: {error}") from error
        if len(data) != self._cluster_size:
            raise self._corrupt(extent, f"it decodes to {len(data)} bytes, not to a cluster of {self._cluster_size}")
        return data

    def _corrupt(self, extent: Extent, why: str) -> CorruptImage:
        at = extent.offset - extent.offset % self._cluster_size
        return CorruptImage(
            self._path, f"compressed cluster of guest offset {at:#x}", f"{extent.stored} bytes", extent.file_offset, why
        )

    def _directly(self, into: memoryview, raw: memoryview) -> bool:
        direct = frame_decoder()
        if direct is None:
            self._fill = None
            return False
        return not raw.readonly and direct.fill(into, raw)

    def _inflate(self, raw: memoryview) -> bytes:
        if self._decoder is None:
            try:
                from isal import isal_zlib as library
            except ImportError:
                import zlib as library  # type: ignore[no-redef]
            self._decoder = library.decompressobj
        # At most a cluster comes out, whatever the stream would give.
        return bytes(self._decoder(_DEFLATE_WINDOW).decompress(raw, self._cluster_size))

    def _unzstd(self, raw: memoryview) -> bytes:
        if self._decoder is None:
            self._decoder = _zstd_decompressor(self._path)
        frame = self._decoder()
        piece = frame.decompress(raw, self._cluster_size)
        if len(piece) == self._cluster_size:
            return bytes(piece)
        out = bytearray()
        while len(out) < self._cluster_size and len(raw):
            # A writer may have split a cluster into frames; each has its own decompressor.
            frame = self._decoder()
            piece = frame.decompress(raw, self._cluster_size - len(out))
            out += piece
            while not frame.eof and piece and len(out) < self._cluster_size:
                piece = frame.decompress(b"", self._cluster_size - len(out))
                out += piece
            if not frame.eof:
                break
            raw = memoryview(frame.unused_data)
        return bytes(out)


def _zstd_decompressor(path: str) -> Any:
    try:
        from compression.zstd import ZstdDecompressor
    except ImportError:
        try:
            from backports.zstd import ZstdDecompressor
        except ImportError:
            raise UnsupportedFeature(f"{path}: has zstd clusters, and no zstd library is installed") from None
    return ZstdDecompressor

"""qcow2: the driver. What it does is in the modules beside it; here they are put together."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from diskwright.core.driver import CheckReport, Format, Info, OpenContext, Reservation, not_supported
from diskwright.core.leases import Leases
from diskwright.core.node import Node
from diskwright.errors import CorruptImage, ImageError, UnsupportedFeature
from diskwright.extents import Extent, Extents
from diskwright.formats.qcow2 import header as fields
from diskwright.formats.qcow2.compressed import Decoder
from diskwright.formats.qcow2.header import Header, read_header
from diskwright.formats.qcow2.layout import MAGIC
from diskwright.formats.qcow2.mapping import Mapping
from diskwright.formats.qcow2.options import Qcow2CreateOptions, Qcow2Options
from diskwright.formats.qcow2.refcounts import Refcounts
from diskwright.formats.qcow2.writing import Writer

if TYPE_CHECKING:
    from diskwright.formats.qcow2.encryption import Encryption


class Qcow2(Format):
    """A qcow2 image, version 2 or 3.

    Read: every cluster size, zero and compressed clusters, images with internal snapshots or bitmaps.
    Written: all of that except images with persistent bitmaps. Not opened at all: images
    with an external data file, and those with extended L2 entries.
    """

    name = "qcow2"
    options = Qcow2Options
    create_options = Qcow2CreateOptions
    has_backing = True
    suffixes = (".qcow2", ".qcow")

    def __init__(self, file: Node, header: Header, options: Qcow2Options, leases: Leases | None) -> None:
        """With ``leases`` it is to be written to."""
        self.children = (file,)
        self._options, self._leases = options, leases
        self.writer: Writer | None = None
        self.encryption: Encryption | None = None
        self._set_up(header)

    def _set_up(self, header: Header) -> None:
        """Everything that follows from the header."""
        file, options = self.children[0], self._options
        self.header = header
        self.size, self.backing = header.size, header.backing
        self.cluster_size = 1 << header.cluster_bits
        # A writer needs half of it: a quarter for refcounts, another for places it knows it may write to.
        self.mapping = Mapping(file, header, options.cache_size // (1 if self._leases is None else 2))
        self._decoder = Decoder(file.filename, header.compression, self.cluster_size)
        # The look-ups go straight to where they are answered: they are the hot path.
        self.extent_at = self.mapping.extent_at  # type: ignore[method-assign]
        self.extents = self.mapping.extents  # type: ignore[method-assign]
        self.decode = self._decoder.decode  # type: ignore[method-assign]

    @property
    def writable(self) -> bool:
        return self._leases is not None

    # -- opening ---------------------------------------------------------------------------------

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        if head[:4] != MAGIC or len(head) < 8:
            return 0
        # Later versions too: to read one as raw would be worse than to refuse it.
        return 100 if struct.unpack_from(">I", head, 4)[0] >= 2 else 0

    @classmethod
    def open(cls, context: OpenContext, options: Qcow2Options) -> Qcow2:
        """See ``Format.open``. An image marked dirty is repaired when it is opened for writing."""
        header = read_header(context.file)
        image = cls(context.file, header, options, context.leases if context.writable else None)
        if header.crypt_method or options.encrypt_format is not None:
            from diskwright.formats.qcow2.encryption import open_encryption

            open_encryption(image, options, context.secrets, io=context.io)
        if context.writable:
            image._begin_writing()
        return image

    def _begin_writing(self) -> None:
        header, path, options = self.header, self.children[0].filename, self._options
        if header.autoclear_features & fields.BITMAPS and header.extension(fields.EXT_BITMAPS) is not None:
            raise UnsupportedFeature(f"{path}: has persistent dirty bitmaps, which cannot be kept up to date here")
        if header.incompatible_features & fields.CORRUPT and not options.repair:
            raise ImageError(f"{path}: is marked corrupt; open it read-only, or repair it before writing to it")
        if not header.refcount_table_clusters and not options.repair:
            raise CorruptImage(path, "refcount_table_clusters", 0, 56, "there are no refcounts; repair the image")
        self._clear_autoclear()
        if header.incompatible_features & fields.DIRTY and not options.repair:
            from diskwright.formats.qcow2.repair import mend

            report = mend(self.children[0], "all")
            if report.corruptions or report.check_errors:
                raise ImageError(f"{path}: is marked dirty, and its refcounts could not be repaired; check it first")
            self._set_up(read_header(self.children[0]))
        self._start_writer()

    def _start_writer(self) -> None:
        assert self._leases is not None
        file, header, cache = self.children[0], self.header, self._options.cache_size
        refcounts = Refcounts(file, header, cache // 4)
        self.writer = Writer(file, header, self.mapping, refcounts, self._leases, cache // 4)
        if not self._options.repair:
            self.in_place = self.writer.in_place  # type: ignore[method-assign]

    def reload(self) -> None:
        """Forgets what is cached and begins again from what is in the file. Nothing may wait to be written."""
        self._set_up(read_header(self.children[0]))
        if self.writer is not None:
            self._start_writer()

    def _clear_autoclear(self) -> None:
        """Whoever writes without knowing what a bit stands for has to clear it first."""
        header = self.header
        if header.autoclear_features:
            header.autoclear_features = 0
            self.children[0].pwrite(fields.AT_AUTOCLEAR, bytes(8))
            self.children[0].flush()

    # -- the map ---------------------------------------------------------------------------------
    def extent_at(self, offset: int, length: int) -> Extent:
        return self.mapping.extent_at(offset, length)

    def extents(self, offset: int, length: int) -> Extents:
        return self.mapping.extents(offset, length)

    def decode(self, extent: Extent, raw: memoryview, into: memoryview) -> None:
        self._decoder.decode(extent, raw, into)

    def reserve(self, offset: int, length: int) -> Reservation:
        return self._writing().reserve(offset, length)

    def zero(self, offset: int, length: int, *, unmap: bool) -> tuple[int, int]:
        return self._writing().zero(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._writing().discard(offset, length)

    def flush(self) -> None:
        if self.writer is None:
            self.children[0].flush()
        else:
            self.writer.checkpoint()

    def _writing(self) -> Writer:
        if self.writer is None or self._options.repair:
            why = "read-only" if self.writer is None else "for repair only"
            raise ImageError(f"{self.children[0].filename}: is open {why}")
        return self.writer

    # -- the whole -------------------------------------------------------------------------------

    @classmethod
    def create(cls, file: Node, options: Qcow2CreateOptions) -> None:
        from diskwright.formats.qcow2.create import create

        create(file, options)

    def resize(self, size: int, *, preallocation: str = "off") -> None:
        from diskwright.formats.qcow2.resize import resize

        if self.encryption is not None and preallocation != "off":
            # What is taken in advance would not read as zeros: those have to be written, encrypted.
            raise not_supported("Growing an encrypted image with preallocation")
        resize(self, size, preallocation)

    def check(self, repair: str) -> CheckReport:
        from diskwright.formats.qcow2.check import check

        return check(self, repair)

    def info(self) -> Info:
        header = self.header
        specific: dict[str, object] = {"compat": "1.1" if header.version >= 3 else "0.10"}
        specific["compression-type"] = header.compression
        if header.version >= 3:
            specific["lazy-refcounts"] = bool(header.compatible_features & fields.LAZY_REFCOUNTS)
        specific["refcount-bits"] = 1 << header.refcount_order
        if self.encryption is not None:
            specific["encrypt"] = self.encryption.info()
        if header.version >= 3:
            specific["corrupt"] = bool(header.incompatible_features & fields.CORRUPT)
            specific["extended-l2"] = bool(header.incompatible_features & fields.EXTENDED_L2)
        return Info(
            cluster_size=self.cluster_size,
            encrypted=self.encryption is not None or None,
            dirty=bool(header.incompatible_features & fields.DIRTY),
            specific=specific,
        )

    def zero_init(self) -> bool:
        if self.backing is not None:
            return False
        # Preallocated clusters show what the storage held before, where that is not zeros; encrypted, they show noise.
        return (self.children[0].zero_init and self.encryption is None) or not any(self.mapping.l1)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


DRIVERS: tuple[Any, ...] = (Qcow2,)

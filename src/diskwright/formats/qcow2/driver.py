"""qcow2: the driver. What it does is in the modules beside it; here they are put together."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from diskwright.core.driver import (
    CheckReport,
    CompactReport,
    Format,
    Info,
    MeasuredSource,
    Measurement,
    OpenContext,
    Part,
    Progress,
    Reservation,
)
from diskwright.core.leases import Leases
from diskwright.core.node import Node
from diskwright.core.snapshots import SnapshotInfo, Snapshots, VmState, find, find_any
from diskwright.errors import CorruptImage, ImageError, OptionError, UnsupportedFeature
from diskwright.extents import Extent, Extents
from diskwright.formats.qcow2 import header as fields
from diskwright.formats.qcow2.bitmap_store import Qcow2Bitmaps
from diskwright.formats.qcow2.bitmaps import Entry, describe, read_entries
from diskwright.formats.qcow2.caches import Cleaner, budgets, check_options
from diskwright.formats.qcow2.compressed import Decoder
from diskwright.formats.qcow2.encoding import Encoder
from diskwright.formats.qcow2.header import Header, read_header
from diskwright.formats.qcow2.layout import MAGIC
from diskwright.formats.qcow2.options import Qcow2AmendOptions, Qcow2CreateOptions, Qcow2Options
from diskwright.formats.qcow2.ordering import Cause
from diskwright.formats.qcow2.packing import PackingWriter
from diskwright.formats.qcow2.refcounts import Refcounts
from diskwright.formats.qcow2.snapshots import load_snapshots, view
from diskwright.formats.qcow2.subclusters import SubclusterMapping, open_mapping

DATA_FILE_ROLE: Final = "data-file"

if TYPE_CHECKING:
    from diskwright.core.inspection import Inspection
    from diskwright.formats.qcow2.encryption import Encryption


class Qcow2(Format, Snapshots):
    """A qcow2 image, version 2 or 3.

    Read and written: every cluster size, subclusters, zero and compressed clusters, external data files, encryption,
    internal snapshots, persistent bitmaps; but images with both a data file and snapshots are only read.
    """

    name = "qcow2"
    options = Qcow2Options
    create_options = Qcow2CreateOptions
    amend_options = Qcow2AmendOptions
    has_backing = True
    holes = "if many"
    compresses = True
    suffixes = (".qcow2", ".qcow")
    roles = (DATA_FILE_ROLE,)

    def __init__(
        self,
        file: Node,
        header: Header,
        options: Qcow2Options,
        leases: Leases | None,
        data_file: Node | None = None,
    ) -> None:
        """With ``leases`` it is to be written to."""
        self.children = (file,) if data_file is None else (file, data_file)
        self.data_child = len(self.children) - 1
        self._options, self._leases = options, leases
        # What is stored in a data file is the guest's bytes as they are.
        self.compresses = header.data_file is None
        self.writer: PackingWriter | None = None
        self._cleaner: Cleaner | None = None
        self.unsettled = b""
        """Fields of the header that have to be in the file before anything else is written, because a write of them
        failed; see ``switch``."""
        self.bitmap_store: Qcow2Bitmaps | None = None
        self.encryption: Encryption | None = None
        self._set_up(header)

    def _set_up(self, header: Header) -> None:
        """Everything that follows from the header."""
        file, options = self.children[0], self._options
        self.header = header
        self.size, self.backing = header.size, header.backing
        self.cluster_size = 1 << header.cluster_bits
        self.zeroes_by_discard = header.version < 3
        check_options(options, self.cluster_size)
        if options.discard_no_unref and header.version < 3:
            raise OptionError("discard-no-unref is only supported since qcow2 version 3")
        if options.repair:
            return  # nothing is looked up: tables may be damaged, and are looked at by check alone
        self._budgets = budgets(options, writable=self._leases is not None)
        self.mapping = open_mapping(file, header, self._budgets.l2)
        missing = header.geometry.l1_entries(header.size) - len(self.mapping.l1)
        if missing > 0:  # only a snapshot's table can be shorter than its disk
            self.mapping.l1.extend([0] * missing)
        self._decoder = Decoder(file.filename, header.compression, self.cluster_size)
        self._encoder = Encoder(file.filename, header.compression, self.cluster_size, options.compression_level)
        if header.data_file is not None and not self.data_child:
            return  # opened to look at its metadata; look-ups go to the methods below, which say so
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
    def inspect(cls, file: Node) -> Inspection:
        from diskwright.formats.qcow2.inspect import inspect

        return inspect(file)

    @classmethod
    def open(cls, context: OpenContext, options: Qcow2Options) -> Qcow2:
        """See ``Format.open``. An image marked dirty is repaired when it is opened for writing."""
        header = read_header(context.file)
        if options.shows_snapshot:
            image = cls._open_snapshot(context, options, header)
        else:
            data_file = None if options.repair else _open_data_file(context, header)
            image = cls(context.file, header, options, context.leases if context.writable else None, data_file)
        if header.crypt_method or options.encrypt_format is not None:
            from diskwright.formats.qcow2.encryption import open_encryption

            open_encryption(image, options, context.secrets, io=context.guest_data)
        if options.shows_snapshot:
            return image
        if context.writable and not options.repair:
            image._begin_writing()
        if not options.repair:
            image.bitmap_store = Qcow2Bitmaps(image)
        if options.cache_clean_interval:
            image._cleaner = Cleaner(options.cache_clean_interval, image.clean_caches)
        return image

    @classmethod
    def _open_snapshot(cls, context: OpenContext, options: Qcow2Options, header: Header) -> Qcow2:
        if context.writable:
            raise ImageError(f"{context.file.filename}: a snapshot can only be opened read-only")
        table = load_snapshots(context.file, header)
        infos = [snapshot.info(header) for snapshot in table]
        wanted = infos if options.snapshot is None else [find_any(infos, options.snapshot)]
        info = find(wanted, id=options.snapshot_id, name=options.snapshot_name)
        return cls(context.file, view(context.file, header, table[infos.index(info)]), options, None)

    def _begin_writing(self) -> None:
        header, path = self.header, self.children[0].filename
        if header.data_file is not None and header.nb_snapshots:
            raise UnsupportedFeature(f"{path}: has snapshots, whose data the external data file holds only once")
        if header.incompatible_features & fields.CORRUPT:
            raise ImageError(f"{path}: is marked corrupt; open it read-only, or repair it before writing to it")
        if not header.refcount_table_clusters:
            raise CorruptImage(path, "refcount_table_clusters", 0, 56, "there are no refcounts; repair the image")
        self._clear_autoclear()
        if header.incompatible_features & fields.DIRTY:
            from diskwright.formats.qcow2.repair import mend

            report = mend(self.children[0], "all")
            if report.corruptions or report.check_errors:
                raise ImageError(f"{path}: is marked dirty, and its refcounts could not be repaired; check it first")
            self._set_up(read_header(self.children[0]))
        self.start_writer()

    def start_writer(self) -> None:
        """Makes the writing side, for the header as it is. Raises CorruptImage or LimitExceeded."""
        assert self._leases is not None
        file, header, mapping, options = self.children[0], self.header, self.mapping, self._options
        refcounts = Refcounts(file, header, self._budgets.refcounts)
        places = self._budgets.places
        if isinstance(mapping, SubclusterMapping):
            from diskwright.formats.qcow2.subwriting import SubclusterWriter

            data_file = self.children[1] if self.data_child else None
            self.writer = SubclusterWriter(file, header, mapping, refcounts, self._leases, places, data_file)
        else:
            self.writer = PackingWriter(file, header, mapping, refcounts, self._leases, places)
        passed = {
            Cause.REQUEST: options.pass_discard_request,
            Cause.SNAPSHOT: options.pass_discard_snapshot,
            Cause.OTHER: options.pass_discard_other,
            Cause.ALWAYS: True,
        }
        self.writer.told = frozenset(cause for cause, passes in passed.items() if passes)
        self.writer.keeps_places = options.discard_no_unref
        if self.bitmap_store is not None:
            self.bitmap_store.protect(self.writer)
        self.in_place = self.writer.in_place  # type: ignore[method-assign]

    def reload(self) -> None:
        """Forgets what is cached and begins again from what is in the file. Nothing may wait to be written."""
        self._set_up(read_header(self.children[0]))
        if self.writer is not None:
            self.start_writer()

    def switch(self, new: bytes, old: bytes) -> None:
        """Puts ``new`` in place of ``old`` in the header, from the field ``size`` on, and goes on with what the image
        is then. When that fails nobody knows which of the two is on the medium; so nothing is written to the image
        before ``settle`` has made sure of ``old``."""
        assert self.writer is not None
        self.__dict__.pop("in_place", None)
        self.unsettled = old
        self.writer.write_header(fields.AT_SIZE, new)
        self.unsettled = new
        self.reload()
        self.unsettled = b""

    def settle(self) -> None:
        """Ends the uncertainty after a failed ``switch``. Raises OSError when that fails too."""
        if self.unsettled:
            assert self.writer is not None
            self.writer.write_header(fields.AT_SIZE, self.unsettled)
            self.reload()
            self.unsettled = b""

    def _clear_autoclear(self) -> None:
        """Whoever writes without knowing what a bit stands for has to clear it first."""
        header = self.header
        kept = fields.RAW_DATA_FILE if header.raw_data_file else 0
        if header.extension(fields.EXT_BITMAPS) is not None:
            kept |= header.autoclear_features & fields.BITMAPS
        if header.autoclear_features != kept:
            header.autoclear_features = kept
            self.children[0].pwrite(fields.AT_AUTOCLEAR, struct.pack(">Q", kept))
            self.children[0].flush()

    @property
    def can_repair(self) -> bool:
        """Whether it is open for writing, to a guest's or to check's."""
        return self._leases is not None

    # -- the map ---------------------------------------------------------------------------------
    def extent_at(self, offset: int, length: int) -> Extent:
        raise self._without_data()

    def extents(self, offset: int, length: int) -> Extents:
        raise self._without_data()

    def _without_data(self) -> ImageError:
        why = "is open for repair only" if self._options.repair else "was opened without its external data file"
        return ImageError(f"{self.children[0].filename}: {why}")

    def decode(self, extent: Extent, raw: memoryview, into: memoryview) -> None:
        self._decoder.decode(extent, raw, into)

    def reserve(self, offset: int, length: int) -> Reservation:
        try:
            return self._writing().reserve(offset, length)
        except CorruptImage:
            self._mark_corrupt()
            raise

    def encode(self, data: memoryview, offset: int) -> bytes | None:
        return self._encoder.encode(data)

    def reserve_stored(self, units: Sequence[tuple[int, int]]) -> Reservation:
        try:
            return self._writing().reserve_stored(units)
        except CorruptImage:
            self._mark_corrupt()
            raise

    def zero(self, offset: int, length: int, *, unmap: bool) -> tuple[int, int]:
        try:
            return self._writing().zero(offset, length, unmap=unmap)
        except CorruptImage:
            self._mark_corrupt()
            raise

    def discard(self, offset: int, length: int) -> None:
        try:
            self._writing().discard(offset, length)
        except CorruptImage:
            self._mark_corrupt()
            raise

    def _mark_corrupt(self) -> None:
        """From now on, and whoever opens it, the image is not written to before it has been repaired: where one
        table is wrong nobody knows what else a write would damage. Version 2 has no bit to say so for later."""
        header = self.header
        if header.incompatible_features & fields.CORRUPT:
            return
        header.incompatible_features |= fields.CORRUPT
        self.__dict__.pop("in_place", None)
        if header.version >= 3:
            try:
                self.children[0].pwrite(fields.AT_INCOMPATIBLE, struct.pack(">Q", header.incompatible_features))
            except OSError:
                pass  # what is wrong is told anyway

    def flush(self) -> None:
        if self.writer is None:
            self.children[0].flush()
        else:
            self.settle()
            self.writer.checkpoint()

    def _writing(self) -> PackingWriter:
        if self._options.repair:
            raise self._without_data()
        if self.writer is None:
            raise ImageError(f"{self.children[0].filename}: is open read-only")
        if self.header.incompatible_features & fields.CORRUPT:
            raise ImageError(f"{self.children[0].filename}: was found corrupt; repair it before writing to it")
        self.settle()
        return self.writer

    # -- the whole -------------------------------------------------------------------------------

    @classmethod
    def create(cls, file: Node, options: Qcow2CreateOptions) -> None:
        from diskwright.formats.qcow2.create import create

        create(file, options)

    @classmethod
    def create_parts(cls, options: Qcow2CreateOptions, filename: str) -> tuple[Part, ...]:
        if options.data_file is None:
            return ()
        return (Part(DATA_FILE_ROLE, options.data_file),)

    @classmethod
    def create_from(cls, file: Node, options: Qcow2CreateOptions, parts: Mapping[str, Node]) -> None:
        from diskwright.formats.qcow2.create import create

        create(file, options, parts.get(DATA_FILE_ROLE))

    @classmethod
    def measure(cls, options: Qcow2CreateOptions, source: MeasuredSource | None) -> Measurement:
        from diskwright.formats.qcow2.measure import measure

        return measure(options, source)

    def stored_bitmaps(self) -> Sequence[tuple[int, str]] | None:
        if self.header.version < 3:
            return None
        return [(1 << e.granularity_bits, e.name.decode(errors="surrogateescape")) for e in self._bitmap_entries()]

    def amend(
        self,
        options: Qcow2AmendOptions,
        *,
        resize: Callable[[int], None],
        force: bool = False,
        progress: Progress | None = None,
    ) -> None:
        from diskwright.formats.qcow2.amend import amend

        self.settle()
        amend(self, options, resize, progress, force=force)

    def resize(self, size: int, *, preallocation: str = "off", conceal: Callable[[], None] | None = None) -> None:
        from diskwright.formats.qcow2.resize import resize

        self.settle()
        if self.bitmap_store is not None and self.writer is not None:
            self.bitmap_store.before_resize(size)
        resize(self, size, preallocation, conceal)

    def change_backing(self, filename: str | None, format: str | None) -> None:
        from diskwright.formats.qcow2.rename import change_backing

        self.settle()
        change_backing(self, filename, format)

    def make_empty(self) -> None:
        from diskwright.formats.qcow2.resize import make_empty

        self.settle()
        make_empty(self)

    def compact(self, **options: Any) -> CompactReport:
        from diskwright.formats.qcow2.compact import compact

        return compact(self, **options)

    def check(self, repair: str) -> CheckReport:
        from diskwright.formats.qcow2.check import check

        self.settle()
        return check(self, repair)

    def info(self) -> Info:
        header = self.header
        specific: dict[str, object] = {"compat": "1.1" if header.version >= 3 else "0.10"}
        specific["compression-type"] = header.compression
        if header.version >= 3:
            specific["lazy-refcounts"] = bool(header.compatible_features & fields.LAZY_REFCOUNTS)
            if stored := self._bitmap_entries():
                specific["bitmaps"] = [describe(entry) for entry in stored]
        specific["refcount-bits"] = 1 << header.refcount_order
        if header.data_file is not None:
            if header.data_file:
                specific["data-file"] = header.data_file
            specific["data-file-raw"] = header.raw_data_file
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

    def _bitmap_entries(self) -> list[Entry]:
        if self.bitmap_store is None:
            return read_entries(self.children[0], self.header)
        return self.bitmap_store.entries()

    # -- snapshots -------------------------------------------------------------------------------

    def snapshots(self) -> list[SnapshotInfo]:
        """See ``Snapshots.snapshots``. Raises CorruptImage, LimitExceeded."""
        header = read_header(self.children[0])
        return [snapshot.info(header) for snapshot in load_snapshots(self.children[0], header)]

    def create_snapshot(self, name: str, *, vm_state: VmState | None = None) -> SnapshotInfo:
        from diskwright.formats.qcow2.changes import create

        self.settle()
        return create(self, name, vm_state)

    def apply_snapshot(self, id: str) -> None:
        from diskwright.formats.qcow2.changes import apply

        self.settle()
        if self.bitmap_store is not None and self.bitmap_store.entries():
            # What they recorded would not be true of the disk that comes back.
            raise ImageError("Device has active dirty bitmaps")
        apply(self, id)

    def delete_snapshot(self, id: str) -> None:
        from diskwright.formats.qcow2.changes import delete

        self.settle()
        delete(self, id)

    def load_vm_state(self, id: str, into: BinaryIO) -> int:
        from diskwright.formats.qcow2.vmstate import load

        file = self.children[0]
        header = read_header(file)
        table = load_snapshots(file, header)
        infos = [snapshot.info(header) for snapshot in table]
        info = find(infos, id=id)
        shown = Qcow2(file, view(file, header, table[infos.index(info)]), self._options, None)
        return load(shown, info, into)

    def vm_state_range(self) -> tuple[int, int]:
        from diskwright.formats.qcow2.vmstate import span

        return span(self)

    def make_vm_state_room(self, end: int) -> None:
        from diskwright.formats.qcow2.vmstate import make_room

        make_room(self, self._writing(), end)

    def zero_init(self) -> bool:
        if self.backing is not None:
            return False
        # Preallocated clusters show what the storage held before, where that is not zeros; encrypted, they show noise.
        blank = self.children[self.data_child].zero_init and self.encryption is None
        return blank or not (self._options.repair or any(self.mapping.l1))

    def clean_caches(self) -> None:
        """Gives up cached tables that have not been used since the call before this one."""
        self.mapping.l2.age()
        if self.writer is not None:
            self.writer.clean_caches()

    def close(self) -> None:
        if self._cleaner is not None:
            self._cleaner.stop()
        if self.writer is not None:
            self.settle()
            try:
                if self.bitmap_store is not None:
                    self.bitmap_store.store()
            finally:
                self.writer.close()


def _open_data_file(context: OpenContext, header: Header) -> Node | None:
    """The external data file; None when there is none, or when no guest data is wanted. What the user says it is
    comes before what the image names. Raises ImageError when nobody names it."""
    path, name = context.file.filename, header.data_file
    given = DATA_FILE_ROLE in context.given
    if name is None:
        if given:
            raise OptionError("'data-file' can only be set for images with an external data file")
        return None
    if not context.guest_data:
        return None
    if not name and not given:
        raise ImageError("'data-file' is required for this image")
    data_file = context.open_reference(DATA_FILE_ROLE, name, None)
    if data_file is context.file or os.path.realpath(data_file.filename) == os.path.realpath(path):
        raise CorruptImage(path, "external data file name", name, None, "that is the image itself")
    return data_file


DRIVERS: tuple[Any, ...] = (Qcow2,)

"""vmdk: the driver. A disk is its descriptor and its extents, one after the other; each extent is a map of its own.

Each time an image is opened and written to it gets another CID, before its contents change, so that a child that was
made of it notices.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.driver import (
    BackingHint,
    CheckReport,
    Format,
    Info,
    MeasuredSource,
    Measurement,
    OpenContext,
    Reservation,
)
from diskwright.core.driver import Part as File
from diskwright.core.gate import resolve
from diskwright.core.options import BOOL, INT, option
from diskwright.errors import ImageError, UnsupportedFeature
from diskwright.extents import DATA, Extent, Extents
from diskwright.formats.vmdk import create as creation
from diskwright.formats.vmdk import descriptor, opening
from diskwright.formats.vmdk.header import COWD, MAGIC
from diskwright.formats.vmdk.sparse import Sparse
from diskwright.units import SECTOR, KiB

if TYPE_CHECKING:
    from diskwright.core.node import Node
    from diskwright.formats.vmdk.part import Part


@dataclass(frozen=True, kw_only=True)
class VmdkOptions:
    repair: bool = option(BOOL, "open an image whose grain directory is damaged, to repair it", default=False)
    compression_level: int | None = option(INT, "of new streamOptimized grains, 1 to 9", default=None)


class Vmdk(Format):
    """One open VMDK image."""

    name = "vmdk"
    options = VmdkOptions
    create_options = creation.VmdkCreateOptions
    suffixes = (".vmdk",)
    has_backing = True
    consults_backing = True
    compresses = True
    """Not every image does."""

    def __init__(self, children: Sequence[Node], place: descriptor.Place, about: descriptor.Descriptor,
                 parts: Sequence[tuple[Part, int]]) -> None:  # fmt: skip
        """``parts`` are the extents, in their order, each with the index of its file among the children."""
        self.children = tuple(children)
        self.roles = tuple(f"extents.{i}" for i in range(len(children) - 1))  # type: ignore[misc]
        self.path = self.children[0].filename
        self.descriptor, self._place = about, place
        self.parts = tuple(part for part, _ in parts)
        self._child = [child for _, child in parts]
        *self._starts, self.size = accumulate((part.size for part in self.parts), initial=0)
        self.cluster_size = max((part.cluster_size for part in self.parts), default=1)
        self.holes = self.parts[0].holes if len(self.parts) == 1 else "never"  # who looks, looks in one file
        if about.has_parent and about.parent_hint:
            self.backing = BackingHint(about.parent_hint, "vmdk")
        self._lock = threading.Lock()
        self._changed = False
        self._parent: Node | None = None
        for part in self.parts:
            part.before_change = self._renew_cid
        self.compresses = False
        if len(parts) == 1:
            self._be(self.parts[0], self._child[0])

    def _be(self, part: Part, child: int) -> None:
        """The disk is one extent: who asks the one may as well ask the other."""
        self.data_child = child
        self.in_place = part.in_place  # type: ignore[method-assign]
        self.compresses = self.packs = self.only_compressed = part.only_compressed
        if child == getattr(part, "child", 0):
            for name in ("extent_at", "extents", "reserve", "zero", "discard", "decode", "encode", "reserve_stored"):
                setattr(self, name, getattr(part, name))

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 100 if head.startswith((MAGIC, COWD)) or descriptor.is_descriptor(head[: 2 * KiB]) else 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> Vmdk:
        return cls(*opening.open_image(context, options.compression_level, repair=options.repair))

    # -- the map -----------------------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        at = bisect_right(self._starts, offset) - 1
        part, start = self.parts[at], self._starts[at]
        inside = offset - start
        run = part.extent_at(inside, min(length, part.size - inside))
        return Extent(offset, run.length, run.kind, run.file_offset, self._child[at], run.stored)

    def extents(self, offset: int, length: int) -> Extents:
        import numpy as np

        found, end = [], offset + length
        while offset < end:
            at = bisect_right(self._starts, offset) - 1
            part, start = self.parts[at], self._starts[at]
            runs = part.extents(offset - start, min(end - start, part.size) - (offset - start)).shift(start)
            child = np.full(len(runs), self._child[at], np.int16)
            found.append(Extents(runs.offset, runs.length, runs.kind, runs.file_offset, child, runs.stored))
            offset = start + part.size
        return Extents.join(found)

    def decode(self, extent: Extent, raw: memoryview, into: memoryview) -> None:
        at = bisect_right(self._starts, extent.offset) - 1
        self.parts[at].decode(extent._replace(offset=extent.offset - self._starts[at]), raw, into)

    def reserve(self, offset: int, length: int) -> Reservation:
        at = bisect_right(self._starts, offset) - 1
        part, start = self.parts[at], self._starts[at]
        made = part.reserve(offset - start, min(length, part.size - (offset - start)))
        return _Moved(made, start, self._child[at])

    def zero(self, offset: int, length: int, *, unmap: bool) -> tuple[int, int]:
        """See ``Format.zero``. What has a place in a file is zeroed there, when that is quick: ``in_place`` cannot tell
        in which of many files that is."""
        at = bisect_right(self._starts, offset) - 1
        part, start = self.parts[at], self._starts[at]
        inside = min(length, part.size - (offset - start))
        begin, covered = part.zero(offset - start, inside, unmap=unmap)
        if covered:
            return begin + start, covered
        run = part.extent_at(offset - start, inside)
        if run.kind == DATA and part.in_place(run.offset, run.length) == run.file_offset:
            try:
                self.children[self._child[at]].write_zeros(run.file_offset, run.length, unmap=unmap, fast=True)
            except OSError:
                return offset, 0  # written out, it will tell what is wrong
            return offset, run.length
        return offset, 0

    def discard(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            at = bisect_right(self._starts, offset) - 1
            part, start = self.parts[at], self._starts[at]
            inside = min(end - start, part.size) - (offset - start)
            part.discard(offset - start, inside)
            offset += inside

    def flush(self) -> None:
        for part in self.parts:
            part.flush()
        if not self.parts or self.children[0] not in self.parts[0].children:
            self.children[0].flush()

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def zero_init(self) -> bool:
        return all(part.zero_init() for part in self.parts)

    # -- the descriptor ----------------------------------------------------------------------------

    def _renew_cid(self) -> None:
        """Before anything else changes, and durably."""
        with self._lock:
            if not self._changed:
                self._describe(descriptor.with_cid(self.descriptor.text, creation.new_cid()))
                self._changed = True

    def _describe(self, text: bytes) -> None:
        self._place.replace(self.descriptor.text, text)
        self.descriptor = descriptor.parse(self.path, text)

    def accept_backing(self, backing: Node) -> None:
        """See ``Format.accept_backing``: a parent has the CID that this image remembers."""
        wanted, found = self.descriptor.parent_cid, creation.cid_of(backing)
        if found is None:
            raise ImageError(f"{self.path}: its parent '{backing.filename}' must be a vmdk image")
        if not self.descriptor.has_parent:
            raise ImageError(f"{self.path}: says that it has no parent, so '{backing.filename}' cannot be it")
        if found != wanted:
            raise ImageError(
                f"{self.path}: its parent '{backing.filename}' has the CID {found:08x}, not {wanted:08x} as when this "
                "image was made: it has changed since, or is another image"
            )

        self._parent = backing

    def change_backing(self, filename: str | None, format: str | None) -> None:
        """See ``Format.change_backing``. The new parent is looked into for its CID. Raises ImageError, OSError."""
        text = self.descriptor.text
        if filename is None:
            text = descriptor.with_parent(text, None)
        else:
            creation.check_texts(filename)
            text = descriptor.with_parent(text, (creation.cid_of_file(resolve(filename, self.path), format), filename))
        self.flush()
        self._describe(text)
        self.backing = None if filename is None else BackingHint(filename, "vmdk")

    def make_empty(self) -> None:
        """See ``Format.make_empty``. The parent has been written to, so it has another CID, which is noted here."""
        if not all(isinstance(part, Sparse) for part in self.parts):
            super().make_empty()
        if self._parent is not None and self.descriptor.parent_hint:
            parent = (creation.cid_of(self._parent) or descriptor.NO_PARENT, self.descriptor.parent_hint)
            self._describe(descriptor.with_parent(self.descriptor.text, parent))
        for part in self.parts:
            part.make_empty()

    # -- the rest ----------------------------------------------------------------------------------

    def resize(self, size: int, *, preallocation: str = "off", conceal: Callable[[], None] | None = None) -> None:
        from diskwright.formats.vmdk.resize import described, growing

        if preallocation != "off":
            raise UnsupportedFeature(f"Unsupported preallocation mode '{preallocation}'")
        if size < self.size:
            raise UnsupportedFeature("Shrinking images is currently not supported")
        if size == self.size:
            return
        if not self.parts:
            raise UnsupportedFeature("A disk without extents cannot grow")
        part, old = self.parts[-1], self.size
        finish = growing(part, self.descriptor.create_type, size - self._starts[-1])
        self.size = size
        if conceal is not None:
            conceal()
        finish()
        self._describe(described(self.descriptor.text, old, size, part.size // SECTOR))

    @classmethod
    def measure(cls, options: creation.VmdkCreateOptions, source: MeasuredSource | None) -> Measurement:
        from diskwright.formats.vmdk.measure import measured

        return measured(options, source)

    def check(self, repair: str) -> CheckReport:
        from diskwright.formats.vmdk.check import check

        return check(self.parts, repair)

    def info(self) -> Info:
        about, embedded = self.descriptor, self._place.room is not None
        extents = []
        for part, child in zip(self.parts, self._child, strict=True):
            row: dict[str, object] = {"compressed": True} if part.compressed else {}
            row |= {"virtual-size": part.size, "filename": self.children[child].filename if child >= 0 else ""}
            if part.cluster_size > 1:
                row["cluster-size"] = part.cluster_size
            extents.append({**row, "format": "" if embedded else part.kind})
        data = {
            "cid": about.cid, "parent-cid": about.parent_cid, "create-type": about.create_type, "extents": extents,
        }  # fmt: skip
        size = self.cluster_size if self.cluster_size > 1 else None
        return Info(cluster_size=size, dirty=False, specific=data)

    @classmethod
    def create_parts(cls, options: creation.VmdkCreateOptions, filename: str) -> tuple[File, ...]:
        return creation.parts(options, filename)

    @classmethod
    def create(cls, file: Node, options: creation.VmdkCreateOptions) -> None:
        creation.create(file, options, {})

    @classmethod
    def create_from(cls, file: Node, options: creation.VmdkCreateOptions, parts: Mapping[str, Node]) -> None:
        creation.create(file, options, parts)


class _Moved(Reservation):
    """A reservation of an extent that begins at ``start`` of the disk and lies in ``child``."""

    def __init__(self, inner: Reservation, start: int, child: int) -> None:
        self._inner = inner
        self.zeroed = inner.zeroed
        self.extents = [run._replace(offset=run.offset + start, child=child) for run in inner.extents]
        self.fills = [run._replace(offset=run.offset + start, child=child) for run in inner.fills]

    def publish(self) -> None:
        self._inner.publish()

    def abort(self) -> None:
        self._inner.abort()


DRIVERS: Final[tuple[Any, ...]] = (Vmdk,)

"""vmdk: opening an image: its descriptor, and the file of each extent that it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from diskwright.core.gate import resolve
from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.formats.vmdk import cowd, sesparse
from diskwright.formats.vmdk.descriptor import Descriptor, ExtentLine, Place, is_descriptor, parse
from diskwright.formats.vmdk.header import COMPRESSED, COWD, MAX_TABLES, Header, read_header
from diskwright.formats.vmdk.part import Flat, Part, Zeros
from diskwright.formats.vmdk.sparse import Sparse
from diskwright.formats.vmdk.stream import ONCE, Compressed, Stream
from diskwright.units import SECTOR, KiB

if TYPE_CHECKING:
    from diskwright.core.driver import OpenContext
    from diskwright.core.node import Node

FLAT: Final = ("FLAT", "VMFS")
_SPARSE: Final = ("SPARSE", "VMFSSPARSE", "SESPARSE")
_DEVICES: Final = {
    "VMFSRDM": "a raw device mapping", "VMFSPASSTHROUGHRAWDEVICEMAP": "a raw device mapping",
    "VMFSRAW": "a raw device", "VMFSRAWDEVICEMAP": "a raw device mapping",
}  # fmt: skip

Parts = list[tuple[Part, int]]


def open_image(context: OpenContext, level: int | None, *, repair: bool) -> tuple[list[Node], Place, Descriptor, Parts]:
    """What ``Vmdk`` is made of. Raises CorruptImage, UnsupportedFeature, LimitExceeded."""
    file = context.file
    head = file.pread(0, min(file.size, 2 * KiB)) if file.size else b""
    if is_descriptor(head):
        place = Place(file, 0, None)
        about = parse(file.filename, place.read())
        _check_parent(context, about)
        children, parts = _Opener(context, about, repair=repair).open()
        return children, place, about, parts
    if head.startswith(COWD):
        raise UnsupportedFeature(f"{file.filename}: is one extent of a disk; open the disk's descriptor")
    header = read_header(file, repair=repair)
    if not header.descriptor_size:
        raise UnsupportedFeature(f"{file.filename}: is one extent of a disk; open the disk's descriptor")
    place = Place(file, header.descriptor_offset * SECTOR, header.descriptor_size * SECTOR)
    text = place.read()
    if not text.strip(b"\0"):
        raise UnsupportedFeature(f"{file.filename}: is one extent of a disk; open the disk's descriptor")
    about = parse(file.filename, text)
    _check_parent(context, about)
    kinds = [line.kind for line in about.extents]
    if kinds not in ([], ["SPARSE"]) or bool(kinds) != bool(header.capacity):
        raise CorruptImage(
            file.filename, "the extents", kinds or "missing", None, "there must be one, and it must be SPARSE"
        )
    size = header.capacity * SECTOR
    if context.writable and header.flags & COMPRESSED and context.guest_data and not repair:
        return [file], place, about, [(Stream(file, header, size, level), 0)]
    return [file], place, about, [(_sparse(file, header, size), 0)]


def _sparse(file: Node, header: Header, size: int) -> Sparse:
    return (Compressed if header.flags & COMPRESSED else Sparse)(file, header, size)


def _check_parent(context: OpenContext, about: Descriptor) -> None:
    if about.has_parent and not about.parent_hint and "backing" not in context.given:
        raise CorruptImage(
            context.file.filename, "parentFileNameHint", "missing", None,
            f"it has a parent (parentCID {about.parent_cid:08x}) and does not say which; name it yourself",
        )  # fmt: skip


class _Opener:
    """Opens the extents of a descriptor."""

    def __init__(self, context: OpenContext, about: Descriptor, *, repair: bool) -> None:
        self._context, self._about, self._repair = context, about, repair
        self._path = context.file.filename
        self._children: list[Node] = [context.file]
        self._by_name: dict[str, int] = {}
        self._tables = 0

    def open(self) -> tuple[list[Node], Parts]:
        """The children and, with the index of the child each is in, the parts."""
        for line in self._about.extents:  # before any file is opened
            self._check(line)
        parts = [self._part(line) for line in self._about.extents]
        if self._context.writable:
            self._check_overlaps(parts)
        return self._children, parts

    def _check(self, line: ExtentLine) -> None:
        what = _DEVICES.get(line.kind.upper())
        if what is not None:
            raise UnsupportedFeature(f"{self._path}: an extent is {what} ({line.kind}), which is not supported")
        if line.kind not in (*FLAT, "ZERO", *_SPARSE):
            raise UnsupportedFeature(f"{self._path}: an extent is of the type {line.kind[:40]!r}, which is not known")
        if line.kind == "SESPARSE" and self._context.writable:
            raise UnsupportedFeature("No write support for seSparse images available")
        if line.access != "RW" and self._context.writable:
            raise UnsupportedFeature(
                f"{self._path}: the extent '{line.filename}' is {line.access}; the disk can only be read"
            )

    def _part(self, line: ExtentLine) -> tuple[Part, int]:
        size = line.sectors * SECTOR
        if line.kind == "ZERO":
            return Zeros(size), -1
        child = self._child(line.filename, alone=line.kind not in FLAT)
        file = self._children[child]
        if line.kind in FLAT:
            return Flat(file, line.kind, line.offset * SECTOR, size, child), child
        return self._sparse(file, size, line.kind), child

    def _sparse(self, file: Node, size: int, kind: str) -> Part:
        if kind == "VMFSSPARSE":
            cowd_header = cowd.read_header(file)
            self._count(file, size, cowd_header.num_sectors, cowd_header.num_gd_entries)
            return cowd.Cowd(file, cowd_header, size)
        if kind == "SESPARSE":
            se_header = sesparse.read_header(file)
            self._count(file, size, se_header.capacity, se_header.tables)
            return sesparse.SeSparse(file, se_header, size)
        header = read_header(file, repair=self._repair)
        self._count(file, size, header.capacity, header.tables)
        if header.flags & COMPRESSED and self._context.writable:
            raise UnsupportedFeature(f"{file.filename}: {ONCE}; convert it into a new image instead")
        return _sparse(file, header, size)

    def _count(self, file: Node, size: int, capacity: int, tables: int) -> None:
        """Holds an extent to the descriptor, and all of them together to the limit."""
        self._tables += tables
        if self._tables > MAX_TABLES:
            raise LimitExceeded(f"{self._path}: its extents have more than {MAX_TABLES} grain tables together")
        if capacity * SECTOR < size:
            raise CorruptImage(
                file.filename, "capacity", capacity, None, f"the descriptor has {size // SECTOR} sectors for it"
            )

    def _child(self, filename: str, *, alone: bool) -> int:
        """The index of the child that ``filename`` is; ``alone``: no other extent may be in it."""
        name = resolve(filename, self._path)
        at = self._by_name.get(name)
        if at is not None and not alone:
            return at
        if at is not None or name == self._path:
            raise CorruptImage(self._path, "extent", repr(filename), None, "the file has something else in it already")
        at = len(self._children)
        self._children.append(self._context.open_reference(f"extents.{at - 1}", filename, None))
        self._by_name[name] = at
        return at

    def _check_overlaps(self, parts: Parts) -> None:
        end: dict[int, int] = {}
        flat = [(child, part.start, part.size) for part, child in parts if isinstance(part, Flat)]
        for child, start, size in sorted(flat):
            if start < end.get(child, 0):
                raise CorruptImage(self._path, "extents", "damaged", None, "two of them overlap; it can only be read")
            end[child] = start + size

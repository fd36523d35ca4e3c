"""ova, ovf: the drivers. They read one disk of a package: a VMDK image in the archive, or beside the descriptor.

``convert`` writes packages (``engine/package.py``); what is in one does not change afterwards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.chunkmap import refuse_writing
from diskwright.core.driver import CheckReport, Format, Info, OpenContext
from diskwright.core.node import format_of
from diskwright.core.options import BOOL, INT, SIZE, STR, OneOf, option
from diskwright.errors import CorruptImage, ImageError, OptionError, UnsupportedFeature
from diskwright.extents import UNALLOCATED, ZERO, Extent, Extents
from diskwright.formats.ova import archive, envelope
from diskwright.units import MiB

if TYPE_CHECKING:
    from diskwright.core.node import Node

_SPARSE: Final = b"KDMV"
_DIGEST: Final = re.compile(
    rb"^[ \t]*(SHA(?:1|256|512))[ \t]*\(([^\r\n]*)\)[ \t]*=[ \t]*([0-9a-fA-F]{40,128})[ \t\r]*$", re.M
)
_MAX_MANIFEST: Final = 1 << 20
_STEP: Final = 4 * MiB
_HEAD: Final = 4096


@dataclass(frozen=True, kw_only=True)
class OvaOptions:
    disk: str = option(STR, "which disk: its number, from 0, or its id", default="0")


@dataclass(frozen=True, kw_only=True)
class OvaCreateOptions:
    size: int = option(SIZE, "virtual disk size")
    name: str = option(STR, "the machine's name; by default that of the file", default="")
    adapter_type: str = option(OneOf("lsilogic", "buslogic", "ide"), "what the disk is attached to", default="lsilogic")
    cpus: int = option(INT, "number of processors", default=1)
    memory: int = option(SIZE, "the machine's memory in bytes", default=1024 * MiB)
    hardware: str = option(STR, "virtual hardware", default="vmx-07")
    manifest: bool = option(BOOL, "with a manifest of SHA-256 digests", default=True)


class _Package(Format):
    """One disk of an open package. It is an image of its own, open as a child; this maps what that maps, moved to where
    it lies."""

    options = OvaOptions
    create_options = OvaCreateOptions

    def __init__(
        self, children: tuple[Node, ...], data_child: int, start: int, found: envelope.Envelope,
        which: envelope.DiskReference,
    ) -> None:  # fmt: skip
        """The last of ``children`` is the disk; its image begins at ``start`` of the child ``data_child``. Raises
        UnsupportedFeature for a disk that is only part of one."""
        self.children, self.data_child, self._start = children, data_child, start
        self.disk = children[-1]
        self._form = format_of(self.disk)
        self.path, self.size, self.cluster_size = children[0].filename, self.disk.size, self.disk.cluster_size
        self._envelope, self._which = found, which
        if self._form.backing is not None:
            raise UnsupportedFeature(f"{self.path}: the disk '{which.id}' has a parent, which is not supported")

    # -- the map -----------------------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        run = self._form.extent_at(offset, length)
        if run.file_offset < 0:
            return Extent(offset, run.length, ZERO if run.kind == UNALLOCATED else run.kind)
        return run._replace(file_offset=run.file_offset + self._start, child=self.data_child)

    def extents(self, offset: int, length: int) -> Extents:
        import numpy as np

        runs = self._form.extents(offset, length)
        kind = np.where(runs.kind == UNALLOCATED, np.uint8(ZERO), runs.kind).astype(np.uint8)
        there = runs.file_offset >= 0
        place = np.where(there, runs.file_offset + self._start, -1)
        child = np.where(there, self.data_child, 0).astype(np.int16)
        return Extents(runs.offset, runs.length, kind, place, child, runs.stored).merge()

    def decode(self, extent: Extent, raw: memoryview, into: memoryview) -> None:
        self._form.decode(extent._replace(file_offset=extent.file_offset - self._start, child=0), raw, into)

    # -- the rest ----------------------------------------------------------------------------------

    def info(self) -> Info:
        disks = [
            {"id": disk.id, "file": self._envelope.files[disk.file].href if disk.file in self._envelope.files else "",
             "capacity": disk.capacity if disk.capacity is not None else 0}
            for disk in self._envelope.disks
        ]  # fmt: skip
        inner = self.disk
        data: dict[str, object] = {"disk": self._which.id, "disk-format": inner.driver_name, "disks": disks}
        return Info(cluster_size=inner.cluster_size, specific=data)


class Ova(_Package):
    """An open archive."""

    name = "ova"
    roles = ("image",)
    suffixes = (".ova",)

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 100 if archive.is_archive(head) else 0

    @classmethod
    def open(cls, context: OpenContext, options: OvaOptions) -> Ova:
        refuse_writing(context)
        file = context.file
        members = archive.members(file)
        if not members or not members[0].name.lower().endswith(".ovf"):
            raise CorruptImage(file.filename, "the first file", "no OVF descriptor", 0)
        by_name = {member.name: member for member in members}
        found = envelope.parse(file.filename, _text(file, members[0]))
        which, href = _chosen(file.filename, found, options.disk)
        member = by_name.get(href) or by_name.get(_path_of(href))
        if member is None:
            raise CorruptImage(
                file.filename, f"file of '{which.id}'", repr(href[:100]), None, "it is not in the archive"
            )
        if file.pread(member.offset, min(len(_SPARSE), member.size)) != _SPARSE:
            raise UnsupportedFeature(f"{file.filename}: the disk '{which.id}' is no VMDK image in one file")
        window = {"driver": "raw", "offset": member.offset, "size": member.size, "file": file.name}
        disk = context.open_within("image", {"driver": "vmdk", "file": window})
        package = cls((file, disk), 0, member.offset, found, which)
        package.members = members
        return package

    members: list[archive.Member]

    def check(self, repair: str) -> CheckReport:
        """The manifest's digests, and what the disk itself can check."""
        report = self._form.check("off")
        manifest = next((member for member in self.members if member.name.lower().endswith(".mf")), None)
        if manifest is not None:
            if manifest.size > _MAX_MANIFEST:
                raise CorruptImage(self.path, "manifest", manifest.size, manifest.offset, "too long to be one")
            by_name = {member.name: member for member in self.members}
            _check_digests(report, self.children[0], self.children[0].pread(manifest.offset, manifest.size), by_name)
        return report


class Ovf(_Package):
    """An open descriptor, with its files beside it."""

    name = "ovf"
    roles = ("disk-file", "image")
    suffixes = (".ovf",)

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
        return 90 if start.startswith(b"<") and b"Envelope" in head and b"schemas.dmtf.org/ovf" in head else 0

    @classmethod
    def open(cls, context: OpenContext, options: OvaOptions) -> Ovf:
        refuse_writing(context)
        file = context.file
        found = envelope.parse(file.filename, _text(file, archive.Member("", 0, file.size)))
        which, href = _chosen(file.filename, found, options.disk)
        if not href:
            raise CorruptImage(file.filename, f"file of '{which.id}'", "missing", None)
        below = context.open_reference("disk-file", _path_of(href), None)
        if below.pread(0, min(len(_SPARSE), below.size)) != _SPARSE:
            raise UnsupportedFeature(f"{below.filename}: is no VMDK image in one file")
        disk = context.open_within("image", {"driver": "vmdk", "file": below.name})
        return cls((file, below, disk), 1, 0, found, which)


def _path_of(href: str) -> str:
    """The path a relative reference stands for."""
    from urllib.parse import unquote

    return unquote(href.removeprefix("./"), errors="surrogateescape")


def _text(file: Node, member: archive.Member) -> bytes:
    if member.size > envelope.MAX_TEXT:
        raise CorruptImage(file.filename, "length of the OVF descriptor", member.size, None, "too long to be one")
    return file.pread(member.offset, member.size)


def _chosen(path: str, found: envelope.Envelope, wanted: str) -> tuple[envelope.DiskReference, str]:
    """The disk that was asked for, and its file's name. Raises OptionError, ImageError, UnsupportedFeature."""
    disks = found.disks
    if not disks:
        raise ImageError(f"{path}: has no disk")
    which = next((disk for disk in disks if disk.id == wanted), None)
    if which is None and wanted.isdecimal() and int(wanted) < len(disks):
        which = disks[int(wanted)]
    if which is None:
        raise OptionError(f"{path}: has no disk '{wanted}'; it has {', '.join(disk.id for disk in disks[:20])}")
    if which.file is None:
        raise UnsupportedFeature(f"{path}: the disk '{which.id}' begins empty, without a file")
    reference = found.files.get(which.file)
    if reference is None:
        raise CorruptImage(path, f"fileRef of '{which.id}'", repr(which.file[:100]), None, "there is no such file")
    if reference.chunked or reference.compression not in ("", "identity"):
        raise UnsupportedFeature(
            f"{path}: the file '{reference.href}' is compressed or in chunks, which is not supported"
        )
    return which, reference.href


def _check_digests(report: CheckReport, file: Node, text: bytes, by_name: dict[str, archive.Member]) -> None:
    import hashlib

    for method, raw_name, digest in _DIGEST.findall(text):
        name = raw_name.decode("utf-8", "surrogateescape")
        member = by_name.get(name)
        if member is None:
            report.corruptions += 1
            report.say(f"ERROR: the manifest tells of '{name}', which is not in the archive")
            continue
        sum_ = hashlib.new(method.decode().lower())
        for at in range(0, member.size, _STEP):
            sum_.update(file.pread(member.offset + at, min(_STEP, member.size - at)))
        if sum_.hexdigest() != digest.decode().lower():
            report.corruptions += 1
            report.say(f"ERROR: '{name}' has another {method.decode()} digest than the manifest says")


DRIVERS: Final[tuple[Any, ...]] = (Ova, Ovf)

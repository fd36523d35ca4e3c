"""vmdk: making a new image, of any kind, byte for byte as qemu-img does where nothing is random."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from diskwright.core.driver import Part
from diskwright.core.options import BOOL, SIZE, STR, OneOf, option
from diskwright.errors import LimitExceeded, OptionError
from diskwright.formats.vmdk import descriptor
from diskwright.formats.vmdk.descriptor import MAX_EXTENTS
from diskwright.formats.vmdk.header import TABLE_ENTRIES, plan, plan_stream
from diskwright.formats.vmdk.stream import tail
from diskwright.units import SECTOR, GiB, align_up

if TYPE_CHECKING:
    from diskwright.core.node import Node

_TABLE: Final = TABLE_ENTRIES * 4
SPLIT: Final = 2 * GiB
"""Bytes of the disk in one file, when it is split."""


class _Word(OneOf):
    """As ``OneOf``, but a wrong one is noticed later, as with qemu-img, which says this in other words."""

    def parse(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise OptionError(f"Option '{name}' needs a string, not {value!r}")
        return value


_ADAPTERS: Final = _Word("ide", "lsilogic", "buslogic", "legacyESX")
_KINDS: Final = _Word(
    "monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"
)


@dataclass(frozen=True, kw_only=True)
class VmdkCreateOptions:
    size: int = option(SIZE, "virtual disk size")
    adapter_type: str = option(_ADAPTERS, "adapter type", default="ide")
    backing_file: str | None = option(STR, "file name of a parent", default=None)
    backing_fmt: str | None = option(STR, "must be vmdk if it is given", default=None)
    compat6: bool = option(BOOL, "hardware version 6", default=False)
    hwversion: str = option(STR, "hardware version", default="undefined")
    toolsversion: str = option(STR, "version of VMware's guest tools", default="2147483647")
    subformat: str = option(_KINDS, "kind of image", default="monolithicSparse")
    zeroed_grain: bool = option(BOOL, "grains of zeros take no space", default=False)

    @property
    def flat(self) -> bool:
        return self.subformat.endswith("Flat")

    @property
    def split(self) -> bool:
        """Whether there are files beside the descriptor."""
        return self.subformat not in ("monolithicSparse", "streamOptimized")

    @property
    def step(self) -> int:
        """Bytes of the disk in one file."""
        return SPLIT if self.subformat.startswith("twoGb") else max(align_up(self.size, SECTOR), SECTOR)


def new_cid() -> int:
    return int.from_bytes(os.urandom(4), "little") & 0xFFFFFFFE


def cid_of(node: Node) -> int | None:
    """The CID of an image; None when it is no VMDK."""
    from diskwright.core.node import FormatNode, below_filters

    node = below_filters(node)
    about = getattr(node.format, "descriptor", None) if isinstance(node, FormatNode) else None
    return about.cid if isinstance(about, descriptor.Descriptor) else None


def cid_of_file(filename: str, format: str | None) -> int:
    """The CID of the image ``filename``. Raises ImageError when it is no VMDK, OSError."""
    from diskwright.core.graph import Graph

    graph = Graph()
    try:
        cid = cid_of(graph.open(filename, driver=format, force_share=True, backing=False, guest_data=False))
    finally:
        graph.close()
    if cid is None:
        raise OptionError("backing_file must be a vmdk image")
    return cid


def parts(options: VmdkCreateOptions, filename: str) -> tuple[Part, ...]:
    """The files beside the descriptor ``filename``, in their order. Raises LimitExceeded."""
    _check_words(options)
    if not options.split:
        return ()
    size = align_up(options.size, SECTOR)
    count = -(-size // options.step)
    if count > MAX_EXTENTS:
        raise LimitExceeded(f"vmdk: a disk of {size} bytes would need {count} extents; at most {MAX_EXTENTS}")
    stem, ending = os.path.splitext(os.path.basename(filename))
    if options.subformat == "monolithicFlat":
        return tuple(Part("extents.0", f"{stem}-flat{ending}") for _ in range(count))
    letter = "f" if options.flat else "s"
    return tuple(Part(f"extents.{i}", f"{stem}-{letter}{i + 1:03d}{ending}") for i in range(count))


def lengths(options: VmdkCreateOptions) -> list[int]:
    """Bytes of the disk in each of its extents."""
    size = align_up(options.size, SECTOR)
    return [min(options.step, size - start) for start in range(0, size, options.step)]


def create(file: Node, options: VmdkCreateOptions, files: Mapping[str, Node]) -> None:
    """See ``Format.create_from``. Raises OptionError, LimitExceeded."""
    _check_words(options)
    parent = _parent(options, files)
    name = os.path.basename(file.filename)
    names = [os.path.basename(part.filename) for part in parts(options, file.filename)]
    _check(options, name, *names, "" if parent is None else parent[1])
    size = align_up(options.size, SECTOR)
    if not options.split:
        text = _text(options, [f'RW {size // SECTOR} SPARSE "{name}"'], parent)
        if options.subformat == "streamOptimized":
            _stream(file, size, text)
        else:
            _sparse(file, size, text, zeroed_grain=options.zeroed_grain)
        return
    lines = []
    for i, (part, length) in enumerate(zip(names, lengths(options), strict=True)):
        extent = files[f"extents.{i}"]
        if options.flat:
            extent.resize(length)
            lines.append(f'RW {length // SECTOR} FLAT "{part}" 0')
        else:
            _sparse(extent, length, b"", zeroed_grain=options.zeroed_grain)
            lines.append(f'RW {length // SECTOR} SPARSE "{part}"')
    file.writev([(0, memoryview(_text(options, lines, parent)))])


def _parent(options: VmdkCreateOptions, files: Mapping[str, Node]) -> tuple[int, str] | None:
    """CID and name of the backing file."""
    if options.backing_file is None:
        return None
    if options.flat:
        raise OptionError("Flat image can't have backing file")
    cid = cid_of(files["backing"]) if "backing" in files else None
    if cid is None:
        raise OptionError("backing_file must be a vmdk image")
    return cid, options.backing_file


def _check_words(options: VmdkCreateOptions) -> None:
    for kind, word in ((_KINDS, options.subformat), (_ADAPTERS, options.adapter_type)):
        if word not in kind.words:
            raise OptionError(f"invalid parameter value: {word}")


def _check(options: VmdkCreateOptions, *names: str) -> None:
    if options.compat6 and options.hwversion != "undefined":
        raise OptionError("compat6 cannot be enabled with hwversion set")
    if options.flat and options.zeroed_grain:
        raise OptionError("Flat image can't enable zeroed grain")
    check_texts(*names, options.hwversion, options.toolsversion)


def check_texts(*texts: str) -> None:
    """Raises OptionError when one of them cannot be in a descriptor."""
    for text in texts:
        if any(mark in text for mark in '"\r\n\0'):
            raise OptionError(f"{text!r} has a character that a VMDK descriptor cannot hold")


def _text(options: VmdkCreateOptions, lines: list[str], parent: tuple[int, str] | None) -> bytes:
    hardware = "6" if options.compat6 else "4" if options.hwversion == "undefined" else options.hwversion
    return descriptor.new(
        options.subformat, lines, align_up(options.size, SECTOR) // SECTOR, cid=new_cid(), parent=parent,
        adapter=options.adapter_type, hwversion=hardware, tools=options.toolsversion,
    )  # fmt: skip


def _sparse(file: Node, size: int, text: bytes, *, zeroed_grain: bool) -> None:
    """Makes a sparse extent of ``size`` bytes with the descriptor ``text``."""
    header = plan(size, zeroed_grain=zeroed_grain)
    room = header.descriptor_size * SECTOR
    if len(text) > room:
        raise LimitExceeded(f"vmdk: a descriptor of {len(text)} bytes does not fit into {room}")
    file.resize(header.over_head * SECTOR)
    if text:
        file.writev([(SECTOR, memoryview(text))])
    for at in (header.rgd_offset, header.gd_offset):
        file.writev([(at * SECTOR, memoryview(_directory(at, header.tables)))])
    file.writev([(0, memoryview(header.encode()))])


def _stream(file: Node, size: int, text: bytes) -> None:
    """Makes an extent that is written in one pass: complete, with nothing in it. Grains of zeros are left out whether
    ``zeroed_grain`` was asked for or not."""
    header = plan_stream(size)
    room = header.descriptor_size * SECTOR
    if len(text) > room:
        raise LimitExceeded(f"vmdk: a descriptor of {len(text)} bytes does not fit into {room}")
    start = header.over_head * SECTOR
    head = (header.encode() + text).ljust(start, b"\0")
    file.writev([(0, memoryview(head + tail(header, bytes(4 * header.tables), start)))])


def _directory(at: int, tables: int) -> bytes:
    import numpy as np

    first = at + -(-tables * 4 // SECTOR)
    return (np.arange(tables, dtype="<u4") * (_TABLE // SECTOR) + first).astype("<u4").tobytes() or bytes(SECTOR)

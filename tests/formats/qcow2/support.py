"""What the tests of qcow2 share: images in memory, with every write on record, and QEMU as a witness."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diskwright.core.disk import Disk
from diskwright.core.driver import OpenContext, Segments, Storage
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, Node, StorageNode
from diskwright.core.permissions import READER, WRITER
from diskwright.formats.qcow2 import Qcow2
from diskwright.formats.qcow2.header import Header, read_header
from diskwright.formats.qcow2.layout import OFFSET_MASK
from diskwright.formats.qcow2.options import Qcow2CreateOptions, Qcow2Options
from tests.peers import find

LONG = os.environ.get("DISKWRIGHT_LONG", "") not in ("", "0")
"""Whether this is a longer campaign: random tests then go through many more cases."""

Change = tuple[str, int, bytes]
"""``("write", offset, data)``, ``("size", size, b"")`` or ``("flush", 0, b"")``."""


class Tape(Storage):
    """Bytes in memory and a record of everything that changed them. ``fail`` counts down to an error."""

    name = "tape"
    zero_init = True

    def __init__(self, data: bytes = b"", filename: str = "tape") -> None:
        self.data = bytearray(data)
        self.filename = filename
        self.changes: list[Change] = []
        self.log: list[tuple[Tape, Change]] = []
        """All changes; tapes may share one, which then has them in their order."""
        self.fail = -1

    @classmethod
    def open(cls, options: Any, *, writable: bool) -> Tape:
        return cls()

    @property
    def size(self) -> int:
        return len(self.data)

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        for offset, buffer in segments:
            buffer[:] = bytes(self.data[offset : offset + len(buffer)]).ljust(len(buffer), b"\0")

    def _record(self, change: Change) -> None:
        if self.fail == 0:
            raise OSError(5, "the tape is torn")
        self.fail -= 1
        self.changes.append(change)
        self.log.append((self, change))
        apply(self.data, change)

    def writev(self, segments: Segments) -> None:
        for offset, buffer in segments:
            self._record(("write", offset, bytes(buffer)))

    def flush(self) -> None:
        self._record(("flush", 0, b""))

    def discard(self, offset: int, length: int) -> None:
        inside = min(length, len(self.data) - offset)
        if inside > 0:
            self._record(("write", offset, bytes(inside)))

    def truncate(self, size: int, *, preallocation: str = "off") -> None:
        self._record(("size", size, b""))


def apply(data: bytearray, change: Change) -> None:
    kind, offset, piece = change
    if kind == "size":
        del data[offset:]
        data.extend(bytes(offset - len(data)))
    elif kind == "write":
        if offset + len(piece) > len(data):
            data.extend(bytes(offset + len(piece) - len(data)))
        data[offset : offset + len(piece)] = piece


def created(*, data: Tape | None = None, **options: Any) -> bytes:
    """The bytes of a new image. ``data``, its data file, is filled."""
    tape = Tape()
    parts = {} if data is None else {"data-file": StorageNode("data", data, True)}
    Qcow2.create_from(StorageNode("new", tape, True), Qcow2CreateOptions(**options), parts)
    return bytes(tape.data)


class Image:
    """A qcow2 image on a tape, open in a graph of its own."""

    def __init__(
        self,
        tape: Tape,
        *,
        writable: bool = True,
        backing: Node | None = None,
        data: Tape | None = None,
        **options: Any,
    ) -> None:
        self.graph = Graph()
        self.tape = tape
        file = StorageNode("file", tape, writable)
        self.graph.adopt(file)
        opener = _no_references
        if data is not None:
            beside = StorageNode("data", data, writable)
            self.graph.adopt(beside)
            opener = lambda role, filename, driver: beside  # noqa: E731
        context = OpenContext(file, self.graph.leases, opener, writable)
        self.format = Qcow2.open(context, Qcow2Options(**options))
        self.node = FormatNode("image", self.format, writable)
        self.node.backing = backing
        self.graph.adopt(self.node)
        self.disk: Disk = self.graph.disk(self.node, WRITER if writable else READER)

    def close(self) -> None:
        self.graph.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _no_references(role: str, filename: str, driver: str | None) -> Node:
    raise AssertionError(f"nothing should be opened, least of all {filename}")


def contents(data: bytes, *, beside: bytes | None = None, **options: Any) -> bytes:
    """What a guest reads from an image given as bytes, ``beside`` being its data file."""
    data_file = None if beside is None else Tape(beside, "data")
    with Image(Tape(data), writable=False, data=data_file, **options) as image:
        return image.disk.pread(0, image.disk.size)


def checked(data: bytes) -> Any:
    """The report of our own check on an image given as bytes."""
    with Image(Tape(data), writable=False) as image:
        return image.format.check("off")


def sound(data: bytes, beside: bytes | None = None) -> None:
    """QEMU finds nothing wrong with an image given as bytes, whose data file is called ``d``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        path.write_bytes(data)
        if beside is not None:
            (Path(folder) / "d").write_bytes(beside)
        command = [find("qemu-img"), "check", path.name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# -- looking into images ---------------------------------------------------------------------------------


def header_of(data: bytes) -> Header:
    return read_header(StorageNode("n", Tape(data), False))


def entries(data: bytes, offset: int, count: int) -> list[int]:
    return list(struct.unpack_from(f">{count}Q", data, offset))


def l1_of(data: bytes) -> list[int]:
    header = header_of(data)
    return entries(data, header.l1_table_offset, header.l1_size)


def l2_entry_place(data: bytes, guest_offset: int) -> int:
    """Where in the file the L2 entry of a guest offset lies."""
    g = header_of(data).geometry
    cluster = guest_offset >> g.cluster_bits
    table = l1_of(data)[cluster >> g.l2_bits] & OFFSET_MASK
    assert table, "no L2 table there"
    return table + (cluster & ((1 << g.l2_bits) - 1)) * 8


def l2_entry(data: bytes, guest_offset: int) -> int:
    return entries(data, l2_entry_place(data, guest_offset), 1)[0]


def poked(data: bytes, offset: int, value: int, width: int = 8) -> bytes:
    """A copy with a big-endian number of ``width`` bytes changed."""
    changed = bytearray(data)
    changed[offset : offset + width] = value.to_bytes(width, "big")
    return bytes(changed)


# -- QEMU ------------------------------------------------------------------------------------------------


def qemu(*arguments: object, folder: Path | None = None) -> str:
    """Runs one of QEMU's tools to its end, in ``folder``. It fails the test when it fails."""
    command = [find(str(arguments[0])), *map(str, arguments[1:])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_check(path: Path) -> Mapping[str, int]:
    """The numbers of ``qemu-img check``; those it leaves out are 0."""
    done = subprocess.run(
        [find("qemu-img"), "check", "--output=json", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = json.loads(done.stdout)
    names = (
        "corruptions", "leaks", "check-errors", "total-clusters", "allocated-clusters", "fragmented-clusters",
        "compressed-clusters", "image-end-offset",
    )  # fmt: skip
    return {name: found.get(name, 0) for name in names}


def our_check(report: Any) -> Mapping[str, int]:
    """A report of ours in the same shape."""
    return {
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "check-errors": report.check_errors,
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters,
        "image-end-offset": report.image_end_offset,
    }

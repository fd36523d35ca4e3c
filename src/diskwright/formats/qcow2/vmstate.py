"""The state of a machine, kept with a snapshot: guest clusters behind the disk's end, from the first L2 table on that
the disk does not need (section Snapshots)."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Final

from diskwright.errors import CorruptImage, ImageError, LimitExceeded
from diskwright.extents import DATA, SPECIAL
from diskwright.formats.qcow2.layout import MAX_L1_BYTES
from diskwright.formats.qcow2.resize import grow_l1
from diskwright.units import MiB

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.snapshots import SnapshotInfo, VmState
    from diskwright.formats.qcow2.changes import Change
    from diskwright.formats.qcow2.driver import Qcow2
    from diskwright.formats.qcow2.writing import Writer

_AT_ONCE: Final = 4 * MiB
"""Bytes of the state held at a time."""


def store(change: Change, state: VmState, disk_entries: int) -> NDArray[np.uint64]:
    """Writes a machine's state to clusters of its own, with L2 tables; returns the L1 entries that name these.

    Raises ImageError when the data ends too early, LimitExceeded.
    """
    import numpy as np

    from diskwright.formats.qcow2.trees import big_endian_words

    g = change.g
    per_table = 1 << g.l2_bits
    tables = g.l1_entries(state.size)
    if (disk_entries + tables) * 8 > MAX_L1_BYTES:
        raise LimitExceeded(f"{change.file.filename}: a machine's state of {state.size} bytes is too long for it")
    places: list[NDArray[np.int64]] = []
    left = state.size
    while left:
        data = _read(state.data, min(left, _AT_ONCE))
        hosts = change.counts.take(g.clusters(len(data)))
        places.append(hosts)
        left -= len(data)
        padded = memoryview(data.ljust(len(hosts) << g.cluster_bits, b"\0"))
        size = g.cluster_size
        change.write(
            [(host << g.cluster_bits, padded[i * size : (i + 1) * size]) for i, host in enumerate(hosts.tolist())]
        )
    found = change.counts.take(tables)
    hosts = np.concatenate(places) if places else np.zeros(0, np.int64)
    words = np.zeros((per_table * tables, (g.cluster_size >> 3) >> g.l2_bits), np.uint64)
    words[: len(hosts), 0] = hosts << g.cluster_bits
    words[: len(hosts), 1:] = 0xFFFF_FFFF  # extended L2 entries: all subclusters are there
    for i, host in enumerate(found.tolist()):
        rows = words[i * per_table : (i + 1) * per_table]
        change.write([(host << g.cluster_bits, big_endian_words(rows.reshape(-1)))])
    return (found << g.cluster_bits).astype(np.uint64)


def _read(source: BinaryIO, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = source.read(length - len(data))
        if not more:
            raise ImageError("The machine's state ends before the length that was stated")
        data += more
    return data


def load(image: Qcow2, info: SnapshotInfo, into: BinaryIO) -> int:
    """Writes a machine's state to ``into``; returns its length. ``image`` is open as that snapshot.

    Raises CorruptImage when the snapshot's L1 table does not reach that far.
    """
    g, file, mapping = image.header.geometry, image.children[0], image.mapping
    start = g.l1_entries(info.disk_size) << (g.cluster_bits + g.l2_bits)
    if g.l1_entries(start + info.vm_state_size) > len(mapping.l1):
        what = f"VM state size of snapshot {info.id!r}"
        raise CorruptImage(file.filename, what, info.vm_state_size, None, "its L1 table does not reach that far")
    at, end = start, start + info.vm_state_size
    while at < end:
        run = image.extent_at(at, min(end - at, _AT_ONCE))
        buffer = memoryview(bytearray(run.length))
        if run.kind == DATA:
            file.readv([(run.file_offset, buffer)])
        elif run.kind == SPECIAL:
            image.decode(run, memoryview(bytearray(file.pread(run.file_offset, run.stored))), buffer)
        into.write(buffer)
        at += run.length
    return info.vm_state_size


def span(image: Qcow2) -> tuple[int, int]:
    """See ``Snapshots.vm_state_range``."""
    g = image.header.geometry
    shift = g.cluster_bits + g.l2_bits
    return g.l1_entries(image.header.size) << shift, len(image.mapping.l1) << shift


def make_room(image: Qcow2, writer: Writer, end: int) -> None:
    """See ``Snapshots.make_vm_state_room``."""
    entries = writer.geometry.l1_entries(end)
    if entries * 8 > MAX_L1_BYTES:
        raise LimitExceeded(f"{image.children[0].filename}: a machine's state up to offset {end} is too long for it")
    if entries > len(writer.map.l1):
        grow_l1(writer, entries)

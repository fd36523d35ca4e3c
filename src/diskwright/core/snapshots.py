"""Internal snapshots: states of a disk that are kept within its own image or storage.

A driver that has them, be it a format or a storage, also derives from ``Snapshots``. ``keeper`` finds it for a node.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from diskwright.core.driver import not_supported
from diskwright.errors import SnapshotNotFound
from diskwright.extents import UNALLOCATED, ZERO

if TYPE_CHECKING:
    from diskwright.core.node import FormatNode, Node


@dataclass(frozen=True)
class SnapshotInfo:
    """One snapshot. Ids are unique within an image; names need not be."""

    id: str
    name: str
    date_sec: int
    """When it was made, in seconds since 1970 UTC, and ``date_nsec`` nanoseconds."""
    date_nsec: int
    vm_clock_nsec: int
    """How long the machine had run, in nanoseconds."""
    vm_state_size: int
    """Bytes of the machine's own state (memory, devices) kept with it; 0 when there is none."""
    icount: int | None
    """Instructions the machine had executed; None when nobody counted."""
    disk_size: int
    """The disk's size at that time, in bytes."""


@dataclass(frozen=True)
class VmState:
    """What a machine adds to a snapshot: ``size`` bytes that are read from ``data``, and its clocks."""

    data: BinaryIO
    size: int
    clock_nsec: int = 0
    icount: int | None = None


class Snapshots(ABC):
    """What a driver with internal snapshots can do.

    All but ``snapshots`` are called with no other request in flight. Each either happens as a whole or not at all, also
    when it fails or the machine stops in the midst of it, and is durable when it returns.
    """

    @abstractmethod
    def snapshots(self) -> list[SnapshotInfo]:
        """All there are, in the order they are kept."""

    @abstractmethod
    def create_snapshot(self, name: str, *, vm_state: VmState | None = None) -> SnapshotInfo:
        """Keeps the disk's present state. Raises LimitExceeded when there is no room for one more."""

    @abstractmethod
    def apply_snapshot(self, id: str) -> None:
        """The disk becomes what it was, in size too. What it is now is lost, unless a snapshot has it."""

    @abstractmethod
    def delete_snapshot(self, id: str) -> None:
        """Gives up a snapshot and the space only it uses."""

    def load_vm_state(self, id: str, into: BinaryIO) -> int:
        """Writes the machine's state to ``into``; returns its length in bytes."""
        raise not_supported("Machine states are not kept here")

    def vm_state_range(self) -> tuple[int, int]:
        """Where the state of a machine that is about to be kept lies: from which guest offset on, behind the disk's
        end, and up to which anything may be mapped so far."""
        raise not_supported("Machine states are not kept here")

    def make_vm_state_room(self, end: int) -> None:
        """From now on guest offsets of the state below ``end`` can be written to. Raises LimitExceeded."""
        raise not_supported("Machine states are not kept here")


def find(snapshots: Iterable[SnapshotInfo], *, id: str | None = None, name: str | None = None) -> SnapshotInfo:
    """The first snapshot with this id and this name, as far as they are given. Raises SnapshotNotFound."""
    for each in snapshots:
        if (id is None or each.id == id) and (name is None or each.name == name):
            return each
    raise SnapshotNotFound("Can't find snapshot")


def find_any(snapshots: Sequence[SnapshotInfo], wanted: str) -> SnapshotInfo:
    """The snapshot with ``wanted`` for its id, else the first with that name. Raises SnapshotNotFound."""
    try:
        return find(snapshots, id=wanted)
    except SnapshotNotFound:
        return find(snapshots, name=wanted)


def keeper(node: Node) -> Snapshots | None:
    """Who keeps the snapshots of the disk ``node``: its format, or the storage below a format that only passes bytes
    through; None when nobody can."""
    from diskwright.core.node import FormatNode, StorageNode, below_filters

    while True:
        node = below_filters(node)
        if isinstance(node, StorageNode):
            return node.storage if isinstance(node.storage, Snapshots) else None
        if not isinstance(node, FormatNode):
            return None
        if isinstance(node.format, Snapshots):
            return node.format
        if node.format.linear != 0:
            return None
        node = node.format.children[0]


def _keeper(node: Node) -> Snapshots:
    found = keeper(node)
    if found is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    return found


def list_of(node: Node) -> list[SnapshotInfo]:
    """The snapshots of a disk; none where there cannot be any."""
    found = keeper(node)
    return found.snapshots() if found is not None else []


def create(node: Node, name: str, *, vm_state: VmState | None = None) -> SnapshotInfo:
    """See ``Snapshots.create_snapshot``. Raises OSError with ENOTSUP where there are no snapshots."""
    return _keeper(node).create_snapshot(name, vm_state=vm_state)


def apply(node: Node, id: str) -> None:
    """See ``Snapshots.apply_snapshot``. For who follows the disk's changes, all of it has changed."""
    from diskwright.core.node import below_filters

    _keeper(node).apply_snapshot(id)
    for each in {node, below_filters(node)}:
        for bitmap in each.bitmaps:
            bitmap.resize(each.size)
            if each.size:
                bitmap.set(0, each.size)


def delete(node: Node, id: str) -> None:
    """See ``Snapshots.delete_snapshot``."""
    _keeper(node).delete_snapshot(id)


def read_vm_state(node: Node, offset: int, into: memoryview) -> None:
    """Reads the machine's state that is not yet kept with a snapshot, from ``offset`` bytes of it on. What nobody wrote
    reads as zeros. Raises OSError with ENOTSUP where there is none."""
    image, form = _with_vm_state(node)
    start, end = form.vm_state_range()
    from diskwright.core.node import fill_zeros

    done = 0
    while done < len(into):
        at, left = start + offset + done, len(into) - done
        run = image.format.extent_at(at, min(left, end - at)) if at < end else None
        length = left if run is None else run.length
        part = into[done : done + length]
        if run is None or run.kind in (UNALLOCATED, ZERO):
            fill_zeros(part)  # a backing image as long as that has something else there
        else:
            image.format.children[0].announce("vmstate_load")
            image.readv([(at, part)])
        done += length


def write_vm_state(node: Node, offset: int, data: memoryview) -> None:
    """Writes to the machine's state that is not yet kept with a snapshot, ``offset`` bytes from its beginning. No other
    request may be in flight. Raises OSError with ENOTSUP where there is none, LimitExceeded."""
    image, form = _with_vm_state(node)
    start, _ = form.vm_state_range()
    form.make_vm_state_room(start + offset + len(data))
    unit, done = image.cluster_size, 0
    while done < len(data):
        at, left = start + offset + done, len(data) - done
        inside = at % unit
        if not inside and left >= unit:
            length = left - left % unit
            image.write_beyond_end([(at, data[done : done + length])])
        else:
            # Whole clusters, as there is nothing to fill the rest of one from.
            length = min(left, unit - inside)
            whole = memoryview(bytearray(unit))
            read_vm_state(node, at - inside - start, whole)
            whole[inside : inside + length] = data[done : done + length]
            image.write_beyond_end([(at - inside, whole)])
        done += length


def _with_vm_state(node: Node) -> tuple[FormatNode, Snapshots]:
    from diskwright.core.node import FormatNode, below_filters

    image = below_filters(node)
    # Where guest data lies in another file than its map, that file is a disk's and nothing else.
    if not isinstance(image, FormatNode) or not isinstance(image.format, Snapshots) or image.format.data_child:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    return image, image.format

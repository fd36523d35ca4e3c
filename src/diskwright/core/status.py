"""Status: what a guest range holds, seen through the whole backing chain.

Where ``Node.extents`` tells what one layer says, this follows UNALLOCATED runs into backing nodes and straight-line
formats (raw) into their files, whose holes read as zeros. ``spans`` answers in columns, ``status`` one run at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from diskwright.core.node import FormatNode, Node, StorageNode, below_filters, looked_through
from diskwright.errors import DiskwrightError
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, ZERO, Extents
from diskwright.units import MiB

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.int64]

IS_ZERO: Final = 1
HAS_DATA: Final = 2
IS_PRESENT: Final = 4
IS_COMPRESSED: Final = 8
IS_BEYOND: Final = 16
"""Bits of ``Spans.flags``; see ``Status`` for the first four. The last: beyond the end of a short backing image."""

_SAID: Final = {
    DATA: HAS_DATA | IS_PRESENT,
    ZERO: IS_ZERO | IS_PRESENT,
    UNALLOCATED: IS_ZERO,
    SPECIAL: HAS_DATA | IS_PRESENT | IS_COMPRESSED,
}
"""What each kind of extent means where nothing lies below."""

_ALONG: Final = 4 * MiB
"""Bytes between two ranges of a lower layer that are asked for along: one more question costs more."""


class Status(NamedTuple):
    """One run of guest bytes. Lengths and offsets in bytes.

    ``zero``         reads as zeros
    ``data``         bytes are stored for it (a hole in a raw file: no; a compressed cluster: yes)
    ``present``      some layer down to the base says what it is
    ``depth``        how many backing steps down that layer is; filters do not count
    ``node``         that layer's node
    ``file_offset``  where the bytes lie verbatim in the layer's file, or -1; beyond the end of a short backing image,
                     where the layer above has space ready for them, or -1
    ``compressed``   the layer has to decode them
    """

    offset: int
    length: int
    zero: bool
    data: bool
    present: bool
    depth: int
    node: Node
    file_offset: int = -1
    compressed: bool = False

    @property
    def end(self) -> int:
        return self.offset + self.length


class Spans:
    """Runs as parallel columns, in order and without gaps. ``layers`` has the node of each ``depth``; the other columns
    are what ``Status`` says of the fields of their names, with four of them as bits of ``flags``. Not changed after it
    is made; every operation returns a new one."""

    __slots__ = ("depth", "file_offset", "flags", "length", "offset")

    def __init__(
        self, offset: Bytes, length: Bytes, flags: NDArray[np.uint8], depth: NDArray[np.int16], file_offset: Bytes
    ) -> None:
        self.offset, self.length, self.flags, self.depth = offset, length, flags, depth
        self.file_offset = file_offset

    def __len__(self) -> int:
        return len(self.offset)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Spans:
        """Those rows."""
        return Spans(self.offset[rows], self.length[rows], self.flags[rows], self.depth[rows], self.file_offset[rows])

    def cut(self, start: Bytes, end: Bytes) -> Spans:
        """What lies within ranges ``[start, end)``, which ascend and do not overlap."""
        import numpy as np

        ends = self.offset + self.length
        first = np.searchsorted(ends, start, "right")
        count = np.searchsorted(self.offset, end, "left") - first
        which = np.repeat(np.arange(len(start)), count)
        row = np.arange(len(which)) + np.repeat(first - (np.cumsum(count) - count), count)
        offset = np.maximum(self.offset[row], start[which])
        return Spans(
            offset,
            np.minimum(ends[row], end[which]) - offset,
            self.flags[row],
            self.depth[row],
            _moved(self.file_offset[row], offset - self.offset[row]),
        )

    def merge(self) -> Spans:
        """Neighbours that say the same as one."""
        import numpy as np

        if len(self) < 2:
            return self
        place = self.file_offset
        goes_on = _moved(place[:-1], self.length[:-1]) == place[1:]
        goes_on &= self.flags[1:] == self.flags[:-1]
        goes_on &= self.depth[1:] == self.depth[:-1]
        if not goes_on.any():
            return self
        heads = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(~goes_on) + 1))
        last = int(self.offset[-1] + self.length[-1])
        offset = self.offset[heads]
        return Spans(offset, np.diff(offset, append=last), self.flags[heads], self.depth[heads], place[heads])


def join(parts: list[Spans]) -> Spans:
    """All rows, one part after the other."""
    import numpy as np

    return Spans(
        np.concatenate([p.offset for p in parts]),
        np.concatenate([p.length for p in parts]),
        np.concatenate([p.flags for p in parts]),
        np.concatenate([p.depth for p in parts]),
        np.concatenate([p.file_offset for p in parts]),
    )


def layers(node: Node) -> list[Node]:
    """The nodes of each depth, from ``node`` on; filters do not count."""
    found = [below_filters(node)]
    while (backing := found[-1].backing) is not None:
        found.append(below_filters(backing))
    return found


def status(node: Node, offset: int, length: int, *, base: Node | None = None) -> list[Status]:
    """The runs of a range of ``node``, merged, in order and without gaps. Not deeper than above ``base``:
    what only ``base`` or something below it has is shown as not present.

    At most ``extents.WINDOW`` bytes at a time: the caller walks longer ranges with ``extents.windows``.
    """
    found, nodes = spans(node, offset, length, base=base), layers(node)
    found.flags &= ~IS_BEYOND & 0xFF
    found = found.merge()
    columns = (found.offset, found.length, found.flags, found.depth, found.file_offset)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        Status(
            start, size, flags & IS_ZERO != 0, flags & HAS_DATA != 0, flags & IS_PRESENT != 0, depth, nodes[depth],
            place, flags & IS_COMPRESSED != 0,
        )
        for start, size, flags, depth, place in rows
    ]  # fmt: skip


def spans(node: Node, offset: int, length: int, *, base: Node | None = None) -> Spans:
    """The same in columns, not merged, and with what lies beyond the end of a short backing image told apart."""
    return _spans(looked_through(node, offset, length), offset, length, 0, base and below_filters(base))


def _spans(node: Node, offset: int, length: int, depth: int, base: Node | None) -> Spans:
    import numpy as np

    runs = node.extents(offset, length)
    flags = np.array([_SAID[kind] for kind in range(len(_SAID))], np.uint8)[runs.kind]
    own = Spans(runs.offset, runs.length, flags, np.full(len(runs), depth, np.int16), _own_places(node, runs))
    silent = runs.kind == UNALLOCATED
    if isinstance(node, FormatNode):
        if not node.format.has_backing:
            # Where there are no backing files at all, what is not there is said to be zeros by the image itself.
            flags[silent] |= IS_PRESENT
        if node.format.linear is not None:
            straight = runs.kind == DATA
            return _replaced(own, straight, _file_of(node, depth, own, straight)) if straight.any() else own
    backing = node.backing and below_filters(node.backing)
    if backing is None or backing is base or not silent.any():
        return own
    return _replaced(own, silent, _below(backing, own.take(silent), depth + 1, base))


def _own_places(node: Node, runs: Extents) -> Bytes:
    """Where a layer has bytes as they are, or space for them."""
    import numpy as np

    ciphered = isinstance(node, FormatNode) and node.format.cipher is not None
    elsewhere = runs.kind == SPECIAL
    if ciphered:
        elsewhere |= runs.kind == DATA
    return np.where(elsewhere, -1, runs.file_offset) if elsewhere.any() else runs.file_offset


def _replaced(spans: Spans, where: NDArray[np.bool_], other: Spans) -> Spans:
    """``spans`` with ``other``, which is about the same ranges, for those of its rows."""
    import numpy as np

    if where.all():
        return other
    found = join([spans.take(~where), other])
    return found.take(np.argsort(found.offset, kind="stable"))


def _below(backing: Node, silent: Spans, depth: int, base: Node | None) -> Spans:
    """Runs that the layer above ``backing`` says nothing of; it may have space ready for them."""
    import numpy as np

    size = backing.size
    end = silent.offset + silent.length
    beyond = end > size
    if not beyond.any():
        return _asked(backing, silent.offset, end, depth, base)
    # Beyond a short backing image's end its zeros count as said by that image.
    start = np.maximum(silent.offset, size)
    past = Spans(
        start,
        end - start,
        np.full(len(start), IS_ZERO | IS_PRESENT | IS_BEYOND, np.uint8),
        np.full(len(start), depth, np.int16),
        _moved(silent.file_offset, start - silent.offset),
    ).take(beyond)
    inside = silent.offset < size
    if not inside.any():
        return past
    return join([_asked(backing, silent.offset[inside], np.minimum(end[inside], size), depth, base), past])


def _asked(node: Node, start: Bytes, end: Bytes, depth: int, base: Node | None) -> Spans:
    """What ``node`` has in ranges ``[start, end)``. Those near each other are asked for together."""
    import numpy as np

    apart = np.flatnonzero(start[1:] - end[:-1] > _ALONG) + 1
    parts: list[Spans] = []
    for first, last in _pairs(apart, len(start)):
        low, high = int(start[first]), int(end[last - 1])
        try:
            found = _spans(node, low, high - low, depth, base)
        except (OSError, DiskwrightError):
            if last - first == 1:
                raise
            # What is damaged may lie where nobody has asked.
            each = zip(start[first:last].tolist(), end[first:last].tolist(), strict=True)
            parts.extend(_spans(node, low, high - low, depth, base) for low, high in each)
        else:
            parts.append(found if last - first == 1 else found.cut(start[first:last], end[first:last]))
    return parts[0] if len(parts) == 1 else join(parts)


def _pairs(cuts: NDArray[np.int64], end: int) -> Iterator[tuple[int, int]]:
    bounds = [0, *cuts.tolist(), end]
    return pairwise(bounds)


def _file_of(node: FormatNode, depth: int, own: Spans, straight: NDArray[np.bool_]) -> Spans:
    """A straight-line format's runs: the file below knows where nothing is stored."""
    import numpy as np

    linear = node.format.linear or 0
    parts: list[Spans] = []
    for offset, length in zip(own.offset[straight].tolist(), own.length[straight].tolist(), strict=True):
        file = looked_through(node.format.children[0], offset + linear, length)
        if not isinstance(file, StorageNode):
            found = spans(file, offset + linear, length)
        else:
            runs = file.extents(offset + linear, length)
            data = runs.kind == DATA
            said = np.where(data, np.uint8(HAS_DATA | IS_PRESENT), np.uint8(IS_ZERO | IS_PRESENT))
            place = np.where(data, runs.file_offset, runs.offset)
            found = Spans(runs.offset, runs.length, said, np.empty(0, np.int16), place)
        same = np.full(len(found), depth, np.int16)
        flags = found.flags & np.uint8(~IS_BEYOND & 0xFF)  # the file's own chain is none of this one's
        parts.append(Spans(found.offset - linear, found.length, flags, same, found.file_offset))
    return join(parts)


def _moved(place: Bytes, by: Bytes) -> Bytes:
    """Places further on; -1 stays what it is."""
    import numpy as np

    return np.where(place >= 0, place + by, place)


def may_have_holes(node: Node) -> bool:
    """Whether a format's file is worth looking at for holes where the map names data, see ``Format.holes``. An image
    whose clusters were taken in advance has a file of which much is holes; elsewhere it would take time and find next
    to nothing. The rule is qemu-img's, so that both tell the same."""
    if not isinstance(node, FormatNode) or node.format.holes != "if many":
        return isinstance(node, FormatNode) and node.format.holes == "always"
    image = node.format.children[0]
    if not isinstance(image, StorageNode):
        return False
    space = image.storage.allocated_size()
    if space is None:
        return False
    clusters, in_use = -(-image.size // node.cluster_size), space // node.cluster_size
    return clusters >= max(in_use * 10 // 9, in_use + 2)

"""Status: what a guest range holds, seen through the whole backing chain.

Where ``Node.extents`` tells what one layer says, ``status`` follows UNALLOCATED runs into backing nodes
and straight-line formats (raw) into their files, whose holes read as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from diskwright.core.node import FormatNode, Node, StorageNode, below_filters
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, ZERO, Extent


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


def status(node: Node, offset: int, length: int, *, base: Node | None = None) -> list[Status]:
    """The runs of a range of ``node``, merged, in order and without gaps. Not deeper than above ``base``:
    what only ``base`` or something below it has is shown as not present.

    At most ``extents.WINDOW`` bytes at a time: the caller walks longer ranges with ``extents.windows``.
    """
    merged: list[Status] = []
    for run in _runs(below_filters(node), offset, length, 0, base and below_filters(base)):
        if merged and _continues(merged[-1], run):
            last = merged[-1]
            merged[-1] = last._replace(length=last.length + run.length)
        else:
            merged.append(run)
    return merged


def _runs(node: Node, offset: int, length: int, depth: int, base: Node | None) -> Iterator[Status]:
    for run in node.extents(offset, length):
        yield from _follow(node, run, depth, base)


def _follow(node: Node, run: Extent, depth: int, base: Node | None) -> Iterator[Status]:
    offset, length, kind = run.offset, run.length, run.kind
    if kind == DATA:
        if isinstance(node, FormatNode) and node.format.linear is not None:
            yield from _holes(node, offset, length, depth)
        else:
            verbatim = not (isinstance(node, FormatNode) and node.format.cipher is not None)
            yield Status(offset, length, False, True, True, depth, node, run.file_offset if verbatim else -1)
    elif kind == SPECIAL:
        yield Status(offset, length, False, True, True, depth, node, -1, True)
    elif kind == ZERO:
        yield Status(offset, length, True, False, True, depth, node, run.file_offset)
    else:
        yield from _below(node, run, depth, base)


def _below(node: Node, run: Extent, depth: int, base: Node | None) -> Iterator[Status]:
    """A run ``node`` says nothing of; it may have space ready for it."""
    offset, length, place = run.offset, run.length, run.file_offset
    backing = node.backing and below_filters(node.backing)
    if backing is None or backing is base:
        # Where there are no backing files at all, what is not there is said to be zeros by the image itself.
        present = isinstance(node, FormatNode) and not node.format.has_backing
        yield Status(offset, length, True, False, present, depth, node, place)
        return
    inside = max(0, min(length, backing.size - offset))
    if inside:
        yield from _runs(backing, offset, inside, depth + 1, base)
    if inside < length:
        # Beyond a short backing image's end its zeros count as said by that image.
        ready = place + inside if place >= 0 else -1
        yield Status(offset + inside, length - inside, True, False, True, depth + 1, backing, ready)


def _holes(node: FormatNode, offset: int, length: int, depth: int) -> Iterator[Status]:
    """A straight-line format's run: the file below knows where nothing is stored."""
    linear = node.format.linear or 0
    file = below_filters(node.format.children[0])
    if not isinstance(file, StorageNode):
        yield from (
            inner._replace(offset=inner.offset - linear, depth=depth, node=node)
            for inner in status(file, offset + linear, length)
        )
        return
    for run in file.extents(offset + linear, length):
        zero = run.kind in (ZERO, UNALLOCATED)
        place = run.file_offset if run.kind == DATA else run.offset
        yield Status(run.offset - linear, run.length, zero, not zero, True, depth, node, place)


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


def _continues(last: Status, run: Status) -> bool:
    if last[2:7] != run[2:7] or last.compressed != run.compressed:
        return False
    if last.file_offset < 0 or run.file_offset < 0:
        return last.file_offset == run.file_offset
    return last.file_offset + last.length == run.file_offset

"""Reopening: an open image becomes writable, or stops being so, and stays the node it is.

Backing files are opened for reading only. A job that is to write into one has it opened for writing first, and for
reading only again when it is done. The node remains, with its name, its place in the graph and the bitmaps it has in
memory; its driver, and with it the file's descriptor and locks, is exchanged for a new one.

Called with nothing in flight on any disk of the graph, and under the graph's lock.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from diskwright.core.node import FilterNode, FormatNode, Node, StorageNode
from diskwright.core.permissions import FORCED, READER, WRITER
from diskwright.errors import DiskwrightError, GraphError

if TYPE_CHECKING:
    from diskwright.core.driver import Format


def set_writable(node: Node, writable: bool) -> list[Node]:
    """Opens ``node`` and its files, which may lie in each other, anew; returns the nodes that have changed.

    Raises ImageLocked when another process has the image, OSError when the file may not be written to, GraphError for
    a node that cannot be opened again; everything is as before then.
    """
    if node.writable == writable:
        return []
    if writable:
        return _upgrade(node)
    return _downgrade(node)


def _upgrade(node: Node) -> list[Node]:
    """A file first, then what lies in it."""
    changed: list[Node] = []
    try:
        for role, child in node.children().items():
            if role != "backing" and not child.writable:
                changed += _upgrade(child)
        _exchange(node, True)
    except BaseException:
        for done in reversed(changed):
            with suppress(OSError, DiskwrightError):  # the first error is the one to tell
                _exchange(done, False)
        raise
    return [*changed, node]


def _downgrade(node: Node) -> list[Node]:
    """An image first, then what it lies in."""
    node.flush()
    _exchange(node, False)
    changed = [node]
    for role, child in node.children().items():
        if role != "backing" and child.writable:
            changed += _downgrade(child)
    return changed


def _exchange(node: Node, writable: bool) -> None:
    if isinstance(node, StorageNode):
        _exchange_storage(node, writable)
    elif isinstance(node, FormatNode):
        _exchange_format(node, writable)
    elif not isinstance(node, FilterNode):
        raise GraphError(f"Node '{node.name}' cannot be reopened")
    node.writable = writable


def _exchange_storage(node: StorageNode, writable: bool) -> None:
    old = node.storage
    if node.reopened is None:
        raise GraphError(f"Node '{node.name}' cannot be reopened")
    access = node.access_when or (lambda writable: WRITER if writable else READER)
    # Two descriptors of one process exclude each other as those of two do, so the old one's locks go first.
    old.set_access(FORCED)
    try:
        new = node.reopened(writable)
        try:
            new.set_access(access(writable))
        except BaseException:
            if new is not old:
                new.close()
            raise
    except BaseException:
        old.set_access(access(not writable))
        raise
    node.storage = new
    node.readv = new.readv  # type: ignore[method-assign]
    if new is not old:
        old.close()


def _exchange_format(node: FormatNode, writable: bool) -> None:
    if node.reopened is None:
        raise GraphError(f"Node '{node.name}' cannot be reopened")
    busy = [bitmap for bitmap in node.bitmaps if bitmap.persistent and bitmap.busy]
    if busy:
        busy[0].check()
    old = node.format
    if writable:
        new = node.reopened(True)
        old.close()  # it had nothing to write back
    else:
        old.close()  # what it had to write back must be there before somebody else reads it
        new = _opened_for_reading(node)
    node.exchange(new)
    store = new.bitmap_store
    # Persistent bitmaps are the image's: a writer loads them at once, a reader when they are asked for.
    loaded = tuple(store.load()) if writable and store is not None else ()
    node.bitmaps = (*(bitmap for bitmap in node.bitmaps if not bitmap.persistent), *loaded)


def _opened_for_reading(node: FormatNode) -> Format:
    """The image, once its writer has been closed. When it cannot be read any more, its users must learn of that, and a
    writer is as good as a reader for the time being."""
    assert node.reopened is not None
    try:
        return node.reopened(False)
    except (OSError, DiskwrightError):
        node.exchange(node.reopened(True))
        raise

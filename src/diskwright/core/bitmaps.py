"""Named dirty bitmaps of a node: what users and QMP do with them. What a bitmap is, is in ``bitmap``.

Every node can have named bitmaps in memory; a format with a ``BitmapStore`` also keeps those that are persistent.
Names are unique on a node. Errors are worded as QMP's are.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from diskwright.core.bitmap import DEFAULT_GRANULARITY, DirtyBitmap
from diskwright.core.node import FormatNode, Node
from diskwright.errors import DiskwrightError, GraphError, ImageError

if TYPE_CHECKING:
    from diskwright.core.driver import BitmapStore

SMALLEST_DEFAULT: Final = 4096
"""Granularity chosen for an image with smaller clusters: a bit for less than a page costs more than it saves."""

_loading = threading.Lock()


def store_of(node: Node) -> BitmapStore | None:
    """Where persistent bitmaps of ``node`` are kept; None when it cannot have any."""
    store = node.format.bitmap_store if isinstance(node, FormatNode) else None
    return store if store is not None and store.available else None


def named(node: Node) -> list[DirtyBitmap]:
    """The node's bitmaps that have names, those in its image included, in the image's order. Raises CorruptImage or
    LimitExceeded when they cannot be loaded."""
    store = store_of(node)
    if store is not None:
        with _loading:
            for bitmap in store.load():
                node.add_bitmap(bitmap)
    return [bitmap for bitmap in node.bitmaps if bitmap.name is not None]


def find(node: Node, name: str) -> DirtyBitmap:
    """The bitmap of that name. ``DirtyBitmap.run_windows`` tells what is dirty in it; ``check`` whether it may be
    used. Raises GraphError when there is none."""
    for bitmap in named(node):
        if bitmap.name == name:
            return bitmap
    raise GraphError(f"Dirty bitmap '{name}' not found")


def default_granularity(node: Node) -> int:
    """In bytes: the cluster size, but neither very small nor very large."""
    cluster = node.cluster_size
    return min(max(cluster, SMALLEST_DEFAULT), DEFAULT_GRANULARITY) if cluster > 1 else DEFAULT_GRANULARITY


def add(
    node: Node, name: str, granularity: int | None = None, *, persistent: bool = False, enabled: bool = True
) -> DirtyBitmap:
    """A new, clean bitmap on ``node``. A ``persistent`` one is stored when the node is closed.

    Raises GraphError for a name that is taken or empty, OptionError for a granularity that is none, ImageError when
    the image cannot keep it.
    """
    if not name:
        raise GraphError("Bitmap name cannot be empty")
    bitmap = DirtyBitmap(node.size, granularity or default_granularity(node), name=name, enabled=enabled)
    taken = any(other.name == name for other in named(node))
    if taken:
        raise GraphError(f"Bitmap already exists: {name}")
    if persistent:
        _check_persistent(node, bitmap)
        bitmap.persistent = True
    if not node.writable:
        bitmap.readonly = persistent
    node.add_bitmap(bitmap)
    store = store_of(node)
    if persistent and store is not None:
        store.add(bitmap)
    return bitmap


def _check_persistent(node: Node, bitmap: DirtyBitmap) -> None:
    store = node.format.bitmap_store if isinstance(node, FormatNode) else None
    if store is None:
        raise GraphError(f"Can't store persistent bitmaps to {node.name}: {os.strerror(errno.ENOTSUP)}")
    assert bitmap.name is not None
    try:
        if not node.writable:
            raise ImageError("the image is open read-only")
        store.check_new(bitmap.name, bitmap.granularity)
    except DiskwrightError as error:
        raise ImageError(f"Can't make bitmap '{bitmap.name}' persistent in '{node.name}': {error}") from error


def remove(node: Node, name: str) -> None:
    """Takes a bitmap away; a persistent one is gone from the image when this returns. An inconsistent one too."""
    bitmap = find(node, name)
    bitmap.check(allow_inconsistent=True)
    store = store_of(node)
    if bitmap.persistent and store is not None:
        store.remove(bitmap)
    node.remove_bitmap(bitmap)


def clear(node: Node, name: str) -> None:
    """Nothing is dirty any more."""
    bitmap = find(node, name)
    bitmap.check()
    bitmap.clear_all()


def enable(node: Node, name: str) -> None:
    """Writes are recorded from now on."""
    bitmap = find(node, name)
    bitmap.check()
    bitmap.enabled = True


def disable(node: Node, name: str) -> None:
    """Writes are recorded no longer."""
    bitmap = find(node, name)
    bitmap.check()
    bitmap.enabled = False


def merge(node: Node, name: str, sources: Sequence[tuple[Node, str]]) -> None:
    """Marks in bitmap ``name`` what is dirty in the ``(node, name)`` bitmaps; all of it or, when it raises, nothing.
    Granularities may differ, sizes may not."""
    target = find(node, name)
    target.check()
    collected = DirtyBitmap(target.size, target.granularity)
    for where, source_name in sources:
        source = find(where, source_name)
        source.check(allow_readonly=True)
        collected.merge(source)
    target.merge(collected)

"""Backing chains: walking down them, and finding an image in one by the name a user gives it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from diskwright.core.gate import resolve
from diskwright.core.graph import identity
from diskwright.core.node import FormatNode, StorageNode, below_filters

if TYPE_CHECKING:
    from diskwright.core.node import Node


def chain(node: Node) -> Iterator[Node]:
    """``node`` and all images below it, filters left out."""
    below: Node | None = below_filters(node)
    while below is not None:
        yield below
        below = below.backing and below_filters(below.backing)


def depth_of(node: Node, name: str) -> int | None:
    """How far below ``node`` the image ``name`` lies: 1 for its own backing file. ``name`` is a file name as seen from
    here or from the image that names it, or as that image writes it. None when it is not in the chain."""
    wanted = identity(name)
    above: Node | None = None
    for depth, image in enumerate(chain(node)):
        if above is not None:
            hint = above.format.backing if isinstance(above, FormatNode) else None
            names = [image.filename] if hint is None else [image.filename, hint.filename]
            if name in names or wanted == identity(image.filename):
                return depth
            if hint is not None and identity(resolve(name, above.filename)) == identity(image.filename):
                return depth
        above = image
    return None


def common_base(left: Node, right: Node) -> tuple[Node, Node] | None:
    """The topmost images of two chains that are one and the same, opened twice maybe; each chain's own node of it."""
    known = {(identity(image.filename), image.driver_name, image.size): image for image in chain(left)}
    for image in chain(right):
        other = known.get((identity(image.filename), image.driver_name, image.size))
        if other is not None and _plain(image) and _plain(other):
            return other, image
    return None


def _plain(image: Node) -> bool:
    """Whether an image is a whole file, and its backing chain what its header says: two such with one file's name read
    alike."""
    if not isinstance(image, FormatNode) or image.format.linear not in (None, 0):
        return False
    file = image.format.children[0]
    if len(image.format.children) > 1 or not isinstance(file, StorageNode) or not os.path.exists(file.filename):
        return False
    hint, backing = image.format.backing, image.backing
    if (hint is None) != (backing is None):
        return False
    return backing is None or (
        hint is not None
        and identity(resolve(hint.filename, image.filename)) == identity(backing.filename)
        and hint.format in (None, backing.driver_name)
        and _plain(backing)
    )

"""A temporary overlay: what is written goes there, and is gone when the disk is closed."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Final

from diskwright.cli.common import guest_size

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

_PLACE: Final = "/var/tmp"
"""Unless TMPDIR says otherwise. Not /tmp, often memory: an overlay may become as large as a disk."""


def temporary_overlay(graph: Graph, base: Node, *, writable: bool) -> Node:
    """A node that reads from ``base`` and writes to a file that has no name any more. The caller's hold of ``base``
    is given up for one of the overlay."""
    from diskwright.core.create import create_image

    handle, path = tempfile.mkstemp(prefix="diskwright-", dir=os.environ.get("TMPDIR", _PLACE))
    os.close(handle)
    try:
        create_image(path, "qcow2", {"size": guest_size(base)})
        file = {"driver": "file", "filename": path, "cache": "unsafe"}
        node = graph.open({"driver": "qcow2", "file": file, "backing": base.name}, writable=writable)
    finally:
        os.unlink(path)
    graph.release(base)
    return node

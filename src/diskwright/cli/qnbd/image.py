"""The disk that is served: an image, a snapshot in it, a part of it, or a temporary overlay on it."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from diskwright.cli.common import Failure, make_gate, opening_error, snapshot_options, specification, warn_guessed_raw
from diskwright.cli.qnbd.arguments import Settings
from diskwright.core.graph import Graph, parse_json
from diskwright.core.node import FormatNode, Node
from diskwright.errors import DiskwrightError

if TYPE_CHECKING:
    from argparse import Namespace


def new_graph(settings: Settings) -> Graph:
    return Graph(make_gate(settings.gate), settings.objects.secrets, settings.objects.groups)


def open_root(graph: Graph, settings: Settings) -> Node:
    """Opens what is to be exported. Raises Failure."""
    name = settings.image
    options: dict[str, object] = {}
    if settings.load_snapshot is not None:
        asked = SimpleNamespace(
            snapshot=settings.load_snapshot, format=settings.format, image_opts=settings.image_opts, force_share=False
        )
        options = snapshot_options(graph, name, cast("Namespace", asked))
    policy: dict[str, object] = {"discard": settings.discard or "ignore", "detect-zeroes": settings.detect_zeroes}
    over = settings.snapshot and not settings.read_only
    try:
        node = _open(graph, settings, {**options, **policy}, writable=not settings.read_only and not over)
        node = _guarded(graph, node, settings)
        if over:
            node = _overlay(graph, node, policy)
        return _window(graph, node, settings.offset) if settings.offset else node
    except (DiskwrightError, OSError) as error:
        raise Failure(f"Failed to blk_new_open '{name}': {opening_error(error)}") from error


def _open(graph: Graph, settings: Settings, options: dict[str, object], *, writable: bool) -> Node:
    spec = specification(settings.image, settings.image_opts)
    if isinstance(spec, str):
        spec = parse_json(spec[5:]) if spec.startswith("json:") else {"filename": spec}
    # What the image's own options say goes before what the command line says.
    return graph.open({**options, **spec}, driver=settings.format, writable=writable, cache=settings.cache)


def _guarded(graph: Graph, node: Node, settings: Settings) -> Node:
    """A raw disk nobody called raw must not be turned into something else by its client."""
    if node.writable:
        warn_guessed_raw(settings.image, node, settings.format, settings.image_opts)
    guessed = settings.format is None and not settings.image_opts and not settings.image.startswith("json:")
    if guessed and node.writable and isinstance(node, FormatNode) and node.format.name == "raw":
        from diskwright.filters.probe_guard import ProbeGuard

        return graph.insert_filter(ProbeGuard(node))
    return node


def _overlay(graph: Graph, base: Node, policy: dict[str, object]) -> Node:
    """An image that takes the writes and is gone with this process: it has no name any more once it is open."""
    from diskwright.core.create import create_image

    folder = os.environ.get("TMPDIR") or "/var/tmp"
    with ExitStack() as stack:
        descriptor, path = tempfile.mkstemp(prefix="diskwright-", dir=folder)
        os.close(descriptor)
        stack.callback(os.unlink, path)
        create_image(path, "qcow2", {"size": base.size})
        return graph.open(
            {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": base.name, **policy},
            writable=True,
            cache="unsafe",
        )


def _window(graph: Graph, node: Node, offset: int) -> Node:
    """The disk from ``offset`` on."""
    if offset > node.size:
        raise Failure(f"Offset ({offset}) cannot be greater than size of the containing file ({node.size})")
    return graph.open({"driver": "raw", "offset": offset, "file": node.name}, writable=node.writable)

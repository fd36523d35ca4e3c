"""``diskwright info``: what an image is, from its header alone."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import Failure
from diskwright.cli.output import indented, json_text
from diskwright.errors import DiskwrightError, message_of
from diskwright.units import MAX_CHAIN, human_size

if TYPE_CHECKING:
    from diskwright.core.driver import BackingHint, Info
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node
    from diskwright.core.snapshots import SnapshotInfo

SUMMARY: Final = "tell what an image is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser)
    common.add_output(parser)
    parser.add_argument("--backing-chain", action="store_true", help="go on with the backing file, and so on")
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    filename = common.one_operand(args.filename)
    as_json = common.check_output(args)
    with common.graph_of(args) as graph:
        images = _collect(graph, filename, args)
    if as_json:
        rows = [image.as_json() for image in images]
        print(json_text(rows if args.backing_chain else rows[0]))
    else:
        print("\n\n".join("\n".join(image.as_lines()) for image in images))
    return 0


def _collect(graph: Graph, filename: str, args: argparse.Namespace) -> list[ImageFacts]:
    """The facts of the image and, when asked, of all below it. Each is opened by itself: a broken backing file
    must not keep anyone from looking at its overlay."""
    from diskwright.core.graph import identity

    name, format, image_opts = filename, args.format, args.image_opts
    seen: set[str] = set()
    images: list[ImageFacts] = []
    while True:
        if len(images) == MAX_CHAIN:
            raise Failure(f"The backing chain of '{filename}' is longer than {MAX_CHAIN} images")
        node = common.open_image(
            graph,
            name,
            format=format,
            image_opts=image_opts,
            force_share=args.force_share,
            backing=False,
            guest_data=False,
        )
        try:
            facts = gather(node)
        except (DiskwrightError, OSError) as error:
            raise Failure(f"Could not open '{name}': {message_of(error).removeprefix(f'{name}: ')}") from error
        named_by = node.filename
        graph.release(node)
        images.append(facts)
        if not args.backing_chain or facts.full_backing is None or facts.backing is None:
            return images
        seen.add(identity(named_by))
        if identity(facts.full_backing) in seen:
            raise Failure(f"Backing file '{facts.full_backing}' creates an infinite loop.")
        graph.gate.admit(facts.full_backing, named_by=named_by, role="backing file")
        name, format, image_opts = facts.full_backing, facts.backing.format, False


@dataclass
class ImageFacts:
    """What is told of one image."""

    filename: str
    format: str
    size: int
    actual_size: int | None
    details: Info
    backing: BackingHint | None
    full_backing: str | None
    snapshots: list[SnapshotInfo] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """The order of the keys is that of qemu-img, whose output programs may compare as text."""
        details, backing = self.details, self.backing
        rows: dict[str, object] = {}
        if backing is not None and backing.format is not None:
            rows["backing-filename-format"] = backing.format
        if self.snapshots:
            from diskwright.cli.commands.snapshot import as_json

            rows["snapshots"] = [as_json(snapshot) for snapshot in self.snapshots]
        rows["virtual-size"] = self.size
        rows["filename"] = self.filename
        if details.cluster_size:
            rows["cluster-size"] = details.cluster_size
        rows["format"] = self.format
        if self.actual_size is not None:
            rows["actual-size"] = self.actual_size
        if details.specific is not None:
            rows["format-specific"] = {"type": self.format, "data": details.specific}
        if details.compressed:
            rows["compressed"] = True
        if details.encrypted:
            rows["encrypted"] = True
        if backing is not None:
            rows["full-backing-filename"] = self.full_backing
            rows["backing-filename"] = backing.filename
        rows["dirty-flag"] = bool(details.dirty)
        return rows

    def as_lines(self) -> list[str]:
        details, backing = self.details, self.backing
        disk_size = "unavailable" if self.actual_size is None else human_size(self.actual_size)
        lines = [
            f"image: {self.filename}",
            f"file format: {self.format}",
            f"virtual size: {human_size(self.size)} ({self.size} bytes)",
            f"disk size: {disk_size}",
        ]
        if details.encrypted:
            lines.append("encrypted: yes")
        if details.cluster_size:
            lines.append(f"cluster_size: {details.cluster_size}")
        if details.dirty:
            lines.append("cleanly shut down: no")
        if backing is not None:
            actual = "" if self.full_backing == backing.filename else f" (actual path: {self.full_backing})"
            lines.append(f"backing file: {backing.filename}{actual}")
            if backing.format is not None:
                lines.append(f"backing file format: {backing.format}")
        if self.snapshots:
            from diskwright.cli.commands.snapshot import listing

            lines += listing(self.snapshots)
        if details.specific is not None:
            lines += ["Format specific information:", *indented(details.specific, 1)]
        return lines


def gather(node: Node) -> ImageFacts:
    """The facts of an open image. Raises CorruptImage or LimitExceeded when its snapshots cannot be listed."""
    from diskwright.core import snapshots
    from diskwright.core.driver import Info
    from diskwright.core.gate import resolve
    from diskwright.core.node import FormatNode, below_filters

    bottom = below_filters(node)
    form = bottom.format if isinstance(bottom, FormatNode) else None
    backing = None if form is None else form.backing
    return ImageFacts(
        filename=node.filename,
        format=node.driver_name,
        size=common.guest_size(node),
        actual_size=_allocated(node),
        details=Info() if form is None else form.info(),
        backing=backing,
        full_backing=None if backing is None else resolve(backing.filename, node.filename),
        snapshots=snapshots.list_of(node),
    )


def _allocated(node: Node, seen: set[str] | None = None) -> int | None:
    """Bytes of media in use for an image, backing files not counted, and nothing twice; None when a part does not
    know."""
    from diskwright.core.node import StorageNode

    seen = set() if seen is None else seen
    if node.name in seen:
        return 0
    seen.add(node.name)
    if isinstance(node, StorageNode):
        return node.storage.allocated_size()
    total = 0
    for role, child in node.children().items():
        if role != "backing":
            part = _allocated(child, seen)
            if part is None:
                return None
            total += part
    return total

"""``diskwright compare``: whether two images read the same."""

from __future__ import annotations

import argparse
import threading
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import Failure, UsageError
from diskwright.cli.progress import Amount, Reporter
from diskwright.errors import ImageError, message_of
from diskwright.units import SECTOR

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

SUMMARY: Final = "tell whether two images hold the same"

DIFFERENT: Final = 1
CANNOT_OPEN: Final = 2
CANNOT_MAP: Final = 3
CANNOT_READ: Final = 4
"""The exit codes qemu-img documents; 0 is for images that are alike."""

EXIT_CODES: Final = {
    0: "the images are alike",
    DIFFERENT: "the images differ",
    CANNOT_OPEN: "an image cannot be opened",
    CANNOT_MAP: "an image's map cannot be read",
    CANNOT_READ: "an image cannot be read",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", metavar="FMT", help="format of the first image; probed when not given")
    parser.add_argument("-F", dest="second_format", metavar="FMT", help="format of the second image")
    parser.add_argument("-T", dest="source_cache", metavar="CACHE", help="cache mode for reading")
    parser.add_argument(
        "-s", "--strict", action="store_true", help="also sizes, and what is allocated, have to be the same"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_image_opts(parser)
    common.add_force_share(parser)
    common.add_object(parser, CANNOT_OPEN)
    common.add_gate(parser)
    common.add_progress(parser)
    parser.add_argument("names", nargs="*", metavar="IMAGE1 IMAGE2")


def run(args: argparse.Namespace) -> int:
    if len(args.names) != 2:
        raise UsageError("Expecting two image file names")
    cache = common.cache_mode(args.source_cache, "source cache", CANNOT_OPEN)
    with common.graph_of(args) as graph:
        left, right = (
            common.open_image(
                graph,
                name,
                format=format,
                image_opts=args.image_opts,
                force_share=args.force_share,
                cache=cache,
                code=CANNOT_OPEN,
            )
            for name, format in zip(args.names, (args.format, args.second_format), strict=True)
        )
        comparison = Comparison(graph, left, right, args)
        reporter = Reporter.of(args, comparison.amount, phase="compare")
        with reporter:
            code = comparison.run()
        if not args.quiet:
            for line in comparison.lines:
                print(line, flush=True)
        reporter.end_line()
    return code


class Comparison:
    """Two images, what has been said of them, and how far it has got."""

    def __init__(self, graph: Graph, left: Node, right: Node, args: argparse.Namespace) -> None:
        self.leases, self.left, self.right, self.args = graph.leases, left, right, args
        self.lines: list[str] = []
        self.done = 0
        self.total = max(common.guest_size(left), common.guest_size(right))
        self._lock = threading.Lock()

    def amount(self) -> Amount:
        return Amount(self.done, self.total)

    def run(self) -> int:
        """The exit code. Raises Failure when an image cannot be mapped or read."""
        sizes_differ = common.guest_size(self.left) != common.guest_size(self.right)
        if self.args.strict and sizes_differ:
            return self._say("Strict mode: Image size mismatch!")
        common_length = min(common.guest_size(self.left), common.guest_size(self.right))
        try:
            apart = self._allocation(common_length) if self.args.strict else None
            code = self._contents(common_length if apart is None else apart)
            if code == 0 and apart is not None:
                return self._say(f"Strict mode: Offset {apart} block status mismatch!")
            if code == 0:
                if sizes_differ:
                    self.lines.append("Warning: Image size mismatch!")
                code = self._rest(common_length)
        except ImageError as error:
            raise Failure(f"Sector allocation test failed: {message_of(error)}", CANNOT_MAP) from error
        except OSError as error:
            raise Failure(f"Error while reading: {message_of(error)}", CANNOT_READ) from error
        if code == 0:
            self.done = self.total
            self.lines.append("Images are identical.")
        return code

    def _contents(self, length: int) -> int:
        """Whether the first ``length`` bytes are alike."""
        from diskwright.engine.compare import first_difference

        return self._differ(first_difference(self.left, self.right, self.leases, length=length, progress=self._advance))

    def _rest(self, offset: int) -> int:
        """What only the longer image has must read as zeros: a disk that ends sooner would read so there."""
        from diskwright.engine.compare import beyond_is_zero

        longer = self.left if self.left.size > self.right.size else self.right
        return self._differ(beyond_is_zero(longer, self.leases, offset))

    def _allocation(self, length: int) -> int | None:
        """The first offset at which one image has a place for its bytes in another way than the other."""
        from diskwright.core.status import status
        from diskwright.extents import windows

        for offset, step in windows(0, length):
            with self.leases.held():
                runs = [
                    [(run.offset, run.end, run.data, run.zero, run.present, run.end == node.size) for run in found]
                    for node in (self.left, self.right)
                    for found in (status(node, offset, step),)
                ]
            at = _first_unlike(*runs)
            if at is not None:
                return at
        return None

    def _differ(self, at: int | None) -> int:
        """Says where contents differ, if they do: the sector, or where an image's file ends in the middle of it."""
        if at is None:
            return 0
        ends = [size for size in (self.left.size, self.right.size) if size <= at]
        return self._say(f"Content mismatch at offset {max([at // SECTOR * SECTOR, *ends])}!")

    def _say(self, line: str) -> int:
        self.lines.append(line)
        return DIFFERENT

    def _advance(self, length: int) -> None:
        with self._lock:
            self.done = min(self.total, self.done + length)


_Run = tuple[int, int, bool, bool, bool, bool]
"""``(offset, end, data, zero, present, last)``. Whether a run is an image's last counts because it does for
qemu-img: of two like runs of which one is the last, it tells the beginning and not the end of the shorter one."""


def _first_unlike(left: list[_Run], right: list[_Run]) -> int | None:
    """Where two lists of runs of the same range first say something else."""
    i = j = 0
    while i < len(left) and j < len(right):
        mine, theirs = left[i], right[j]
        if mine[2:] != theirs[2:]:
            return max(mine[0], theirs[0])
        i, j = i + (mine[1] <= theirs[1]), j + (theirs[1] <= mine[1])
    return None

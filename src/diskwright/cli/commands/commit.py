"""``diskwright commit``: put what an image has into its backing file."""

from __future__ import annotations

import argparse
import errno
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import Failure
from diskwright.cli.interruption import Interruption
from diskwright.cli.progress import Amount, Reporter
from diskwright.errors import DiskwrightError, message_of

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

SUMMARY: Final = "put what an image has into its backing file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", metavar="FMT", help="the image's format; probed when not given")
    parser.add_argument(
        "-b", dest="base", metavar="FILE", help="the image of the backing chain to commit to (default: the image's own "
        "backing file); goes with -d",
    )  # fmt: skip
    parser.add_argument("-d", dest="keep", action="store_true", help="do not empty the image afterwards")
    parser.add_argument(
        "-t", dest="cache", metavar="CACHE", default="writeback", help="cache mode for writing to the backing file"
    )
    parser.add_argument(
        "-r", dest="rate", metavar="RATE", type=common.size("rate limit"), default=0, help="bytes per second"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_image_opts(parser)
    common.add_object(parser)
    common.add_gate(parser)
    common.add_progress(parser)
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    filename = common.one_operand(args.filename)
    cache = common.cache_mode(args.cache, "cache")
    with common.graph_of(args) as graph, Interruption() as interruption:
        depth = _depth(graph, filename, args)
        top, base = _open(graph, filename, args, cache, depth)
        _commit(graph, top, base, args, interruption)
        if not args.keep and args.base is None:
            _empty(top)
    if not args.quiet:
        print("Image committed.")
    return 0


def _depth(graph: Graph, filename: str, args: argparse.Namespace) -> int:
    """How far down the chain the base lies. Raises Failure when there is none."""
    from diskwright.core.chain import depth_of
    from diskwright.core.node import below_filters

    top = common.open_image(graph, filename, format=args.format, image_opts=args.image_opts, backing=True)
    try:
        if args.base is None:
            depth = 1 if below_filters(top).backing is not None else None
            missing = "Image does not have a backing file"
        else:
            depth = depth_of(top, args.base)
            missing = f"Did not find '{args.base}' in the backing chain of '{filename}'"
    finally:
        graph.release(top)
    if depth is None:
        raise Failure(missing)
    return depth


def _open(graph: Graph, filename: str, args: argparse.Namespace, cache: str | None, depth: int) -> tuple[Node, Node]:
    """The image and the base, both open for writing, and what lies between."""
    from diskwright.core.chain import chain
    from diskwright.core.graph import Spec

    spec: Spec = common.specification(filename, args.image_opts)
    try:
        top = graph.open(spec, driver=args.format, writable=True, cache=cache, writable_backing=depth)
    except (DiskwrightError, OSError) as error:
        reason = below = common.opening_error(error)
        while below.startswith("Could not open backing file: "):
            below = below.removeprefix("Could not open backing file: ")
        if below != reason:  # only writing to the base is new: it could be read before
            raise Failure(below) from error
        raise Failure(f"Could not open '{filename}': {reason.removeprefix(f'{filename}: ')}") from error
    return top, list(chain(top))[depth]


def _commit(graph: Graph, top: Node, base: Node, args: argparse.Namespace, interruption: Interruption) -> None:
    from diskwright.engine.commit import Commit
    from diskwright.engine.convert import CopyFailed

    work = Commit(top, base, graph.leases, speed=args.rate, stop=lambda: interruption.signal != 0)
    reporter = Reporter.of(args, lambda: Amount(*work.progress()), phase="commit")
    with reporter:
        try:
            work.run()
        except CopyFailed as error:
            what = "reading" if error.operation == "read" else "writing"
            cause = message_of(error.__cause__ or error)
            raise Failure(f"error while {what} at byte {error.offset}: {cause}; nothing is lost") from error
        except (DiskwrightError, OSError) as error:
            raise Failure(f"Could not commit to '{base.filename}': {message_of(error)}") from error
    if interruption.signal:
        raise Failure("interrupted; the image is unchanged", 128 + interruption.signal)
    reporter.end_line()


def _empty(top: Node) -> None:
    from diskwright.core.node import format_of

    try:
        format_of(top).make_empty()
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
            raise Failure(f"Could not empty {top.filename}: {error.strerror or error}") from error

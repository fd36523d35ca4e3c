"""``diskwright rebase``: give an image another backing file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import Failure, UsageError
from diskwright.cli.interruption import Interruption
from diskwright.cli.progress import Amount, Reporter
from diskwright.errors import DiskwrightError, OptionError, message_of

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

SUMMARY: Final = "give an image another backing file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="format", metavar="FMT", help="the image's format; probed when not given")
    parser.add_argument(
        "-b", dest="backing", metavar="FILE", help="the new backing file, as the image shall name it; '' for none: "
        "the image then holds everything itself",
    )  # fmt: skip
    parser.add_argument("-F", dest="backing_format", metavar="FMT", help="the new backing file's format")
    parser.add_argument(
        "-u", dest="unsafe", action="store_true", help="only change the name: for a backing file that was moved. The "
        "image reads wrong if the new one holds something else",
    )  # fmt: skip
    parser.add_argument("-t", dest="cache", metavar="CACHE", default="writeback", help="cache mode for the image")
    parser.add_argument("-T", dest="source_cache", metavar="CACHE", help="cache mode for the backing files")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_image_opts(parser)
    common.add_force_share(parser)
    common.add_object(parser)
    common.add_gate(parser)
    common.add_progress(parser)
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    filename = common.one_operand(args.filename)
    if args.backing is None and not args.unsafe:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    cache = common.cache_mode(args.cache, "cache")
    source_cache = common.cache_mode(args.source_cache, "source cache")
    with common.graph_of(args) as graph, Interruption() as interruption:
        image = common.open_image(
            graph, filename, format=args.format, image_opts=args.image_opts, writable=True, cache=cache,
            backing=not args.unsafe,
        )  # fmt: skip
        _check_format(args.backing_format)
        if args.unsafe:
            _refuse(image, args)
            reporter = Reporter.of(args, lambda: Amount(0, 1), phase="rebase")
            with reporter:
                _rename(image, args)
            reporter.end_line()
            return 0
        new = _open_new(graph, image, args, source_cache)
        _refuse(image, args)
        _rebase(graph, image, new, args, interruption)
    return 0


def _check_format(name: str | None) -> None:
    from diskwright.core.registry import find

    if name is None:
        return
    try:
        find(name)
    except OptionError:
        raise Failure(f"Invalid format name: '{name}'") from None


def _refuse(image: Node, args: argparse.Namespace) -> None:
    """Whatever would fail in the end fails before anything is copied."""
    from diskwright.core.node import FormatNode, below_filters

    bottom = below_filters(image)
    if not isinstance(bottom, FormatNode) or not bottom.format.has_backing:
        raise _not_changed(args, "Operation not supported")
    if args.backing and args.backing_format is None:
        raise _not_changed(args, "backing format must be specified")


def _not_changed(args: argparse.Namespace, why: str) -> Failure:
    return Failure(f"Could not change the backing file to '{args.backing or ''}': {why}")


def _open_new(graph: Graph, image: Node, args: argparse.Namespace, cache: str | None) -> Node | None:
    """The new backing file, as the image will see it."""
    from diskwright.core.gate import resolve

    if not args.backing:
        return None
    name = resolve(args.backing, image.filename)
    try:
        return graph.open(name, driver=args.backing_format, force_share=args.force_share, cache=cache)
    except (DiskwrightError, OSError) as error:
        reason = common.opening_error(error).removeprefix(f"{name}: ")
        raise Failure(f"Could not open new backing file '{args.backing}': {reason}") from error


def _rebase(graph: Graph, image: Node, new: Node | None, args: argparse.Namespace, interruption: Interruption) -> None:
    from diskwright.core.node import below_filters
    from diskwright.engine.rebase import Rebase, RebaseFailed

    bottom = below_filters(image)
    old = bottom.backing
    if old is not None:
        graph.hold(old)
    graph.set_backing(bottom, new)
    work = Rebase(bottom, old, new, graph.leases, stop=lambda: interruption.signal != 0)
    reporter = Reporter.of(args, lambda: Amount(*work.progress()), phase="rebase")
    with reporter:
        try:
            work.run()
        except RebaseFailed as error:
            cause = message_of(error.__cause__ or error)
            raise Failure(f"error while {_DOING[error.what]} at byte {error.offset}: {cause}") from error
        if interruption.signal:
            raise Failure("interrupted; the backing file was not changed", 128 + interruption.signal)
        _rename(bottom, args)
    reporter.end_line()


_DOING: Final = {"read": "reading from a backing file", "write": "writing to the image"}


def _rename(image: Node, args: argparse.Namespace) -> None:
    from diskwright.core.node import format_of

    try:
        format_of(image).change_backing(args.backing or None, args.backing_format if args.backing else None)
    except OSError as error:
        raise _not_changed(args, error.strerror or message_of(error)) from error
    except DiskwrightError as error:
        raise _not_changed(args, message_of(error)) from error

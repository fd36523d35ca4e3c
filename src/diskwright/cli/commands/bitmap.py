"""``diskwright bitmap``: change an image's persistent dirty bitmaps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from diskwright.cli import common
from diskwright.cli.common import Failure
from diskwright.errors import DiskwrightError, message_of

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

SUMMARY: Final = "change an image's persistent dirty bitmaps"

MAX_ACTIONS: Final = 1024
"""Actions one command carries out: far more than make sense."""

HINT: Final = "\nTry block-dirty-bitmap-remove to delete this bitmap from disk"

_ACTIONS: Final = (
    ("add", "make a new bitmap, which records"),
    ("remove", "remove the bitmap; also one that is inconsistent"),
    ("clear", "nothing in it is dirty any more"),
    ("enable", "writes are recorded from now on"),
    ("disable", "writes are recorded no longer"),
)


class _Then(argparse.Action):
    """Actions are carried out in the order in which they are given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.actions = [*namespace.actions, (self.dest, values if isinstance(values, str) else None)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, text in _ACTIONS:
        parser.add_argument(f"--{name}", action=_Then, nargs=0, default=argparse.SUPPRESS, help=text)
    parser.add_argument(
        "--merge", action=_Then, metavar="SOURCE", default=argparse.SUPPRESS,
        help="mark what is dirty in the bitmap SOURCE too",
    )  # fmt: skip
    parser.add_argument("-b", "--source-file", metavar="FILE", help="the image SOURCE is in (default: the same)")
    parser.add_argument("-F", "--source-format", metavar="FMT", help="that image's format")
    parser.add_argument(
        "-g", "--granularity", metavar="SIZE", type=common.size("granularity"),
        help="bytes a bit of a new bitmap stands for",
    )  # fmt: skip
    parser.add_argument("-f", "--format", metavar="FMT", help="the image's format; probed when not given")
    common.add_image_opts(parser)
    common.add_object(parser)
    common.add_gate(parser)
    parser.set_defaults(actions=[])
    parser.add_argument("names", nargs="*", metavar="FILE BITMAP")


def run(args: argparse.Namespace) -> int:
    kinds = {kind for kind, _ in args.actions}
    granularity = args.granularity
    if len(args.actions) > MAX_ACTIONS:
        raise Failure(f"At most {MAX_ACTIONS} actions can be carried out by one command")
    if not kinds:
        raise Failure("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    if granularity is not None and "add" not in kinds:
        raise Failure("granularity only supported with --add")
    if args.source_format is not None and args.source_file is None:
        raise Failure("-F only supported with -b")
    if args.source_file is not None and "merge" not in kinds:
        raise Failure("Merge bitmap source file only supported with --merge")
    if len(args.names) != 2:
        raise Failure("Expecting filename and bitmap name")
    filename, name = args.names
    with common.graph_of(args) as graph:
        node = common.open_image(
            graph, filename, format=args.format, image_opts=args.image_opts, writable=True, backing=False
        )
        source = node
        if args.source_file is not None:
            source = common.open_image(graph, args.source_file, format=args.source_format, backing=False)
        for kind, operand in args.actions:
            try:
                _do(kind, node, name, granularity, source, operand)
            except (DiskwrightError, OSError) as error:
                raise Failure(f"Operation {kind} on bitmap {name} failed: {_told(error)}") from error
        _finish(graph, node, filename)
    return 0


def _do(kind: str, node: Node, name: str, granularity: int | None, source: Node, operand: str | None) -> None:
    from diskwright.core import bitmaps

    if kind == "add":
        bitmaps.add(node, name, granularity, persistent=True)
    elif kind == "merge":
        assert operand is not None
        bitmaps.merge(node, name, [(source, operand)])
    else:
        {"remove": bitmaps.remove, "clear": bitmaps.clear, "enable": bitmaps.enable, "disable": bitmaps.disable}[kind](
            node, name
        )


def _finish(graph: Graph, node: Node, filename: str) -> None:
    """Closing stores the bitmaps. Success is claimed only when they are in the image."""
    try:
        graph.release(node)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"'{filename}': {message_of(error)}") from error


def _told(error: BaseException) -> str:
    from diskwright.core.bitmap import InconsistentBitmap

    return message_of(error) + (HINT if isinstance(error, InconsistentBitmap) else "")

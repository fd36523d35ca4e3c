"""``diskwright resize``: change the size of a disk."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import Failure, UsageError
from diskwright.cli.faces import program
from diskwright.cli.parser import Parser
from diskwright.errors import DiskwrightError, OptionError, OutOfRange, message_of
from diskwright.units import MAX_DISK_SIZE, SECTOR, parse_size

if TYPE_CHECKING:
    from diskwright.core.node import Node

SUMMARY: Final = "change the size of a disk"

MODES: Final = ("off", "metadata", "falloc", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    if isinstance(parser, Parser):
        parser.last_is_operand = True
    parser.add_argument("-f", "--format", metavar="FMT", help="the image's format; probed when not given")
    common.add_image_opts(parser)
    parser.add_argument("--shrink", action="store_true", help="allow the disk to become smaller")
    parser.add_argument(
        "--preallocation", metavar="MODE", default="off", help="how new space is taken: off, metadata, falloc or full"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_object(parser)
    common.add_gate(parser)
    parser.add_argument("operands", nargs="*", metavar="FILENAME [+|-]SIZE")


def run(args: argparse.Namespace) -> int:
    if args.preallocation not in MODES:
        raise Failure(f"Invalid preallocation mode '{args.preallocation}'")
    if len(args.operands) < 2:
        raise UsageError("Not enough arguments")
    if len(args.operands) > 2:
        raise UsageError("Expecting image file name and size")
    filename, text = args.operands
    sign, amount = _amount(text)
    with common.graph_of(args) as graph:
        node = common.open_image(graph, filename, format=args.format, image_opts=args.image_opts, writable=True)
        current = common.guest_size(node)
        size = amount if not sign else current + sign * amount
        _check(node, current, size, args)
        try:
            node.resize(size, preallocation=args.preallocation)
            node.flush()
            graph.release(node)
        except (DiskwrightError, OSError) as error:
            raise Failure(message_of(error)) from error
    if not args.quiet:
        print("Image resized.")
    return 0


def _amount(text: str) -> tuple[int, int]:
    """``(sign, bytes)``; sign 0 stands for an absolute size."""
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    digits = text[1:] if sign else text
    try:
        return sign, parse_size(digits)
    except OptionError as error:
        if isinstance(error, OutOfRange):
            raise Failure(f"Value '{digits}' is out of range for parameter 'size'") from None
        raise Failure(
            f"Parameter 'size' expects a non-negative number below 2^64: '{digits}' is none, with or without a "
            "suffix k, M, G, T, P or E"
        ) from None


def _check(node: Node, current: int, size: int, args: argparse.Namespace) -> None:
    from diskwright.core.driver import Format
    from diskwright.core.node import FormatNode

    if not 0 < size <= MAX_DISK_SIZE:
        raise Failure("New image size must be positive")
    if size <= current and args.preallocation != "off":
        raise Failure("Preallocation can only be used for growing images")
    if size < current and not args.shrink:
        raise Failure(
            "Use the --shrink option to perform a shrink operation.\n"
            f"{program()}: warning: Shrinking an image will delete all data beyond the shrunken image's end. "
            "Before performing such an operation, make sure there is no important data there."
        )
    if isinstance(node, FormatNode) and type(node.format).resize is Format.resize:
        raise Failure("Image format driver does not support resize")
    if size % SECTOR and isinstance(node, FormatNode) and node.format.linear is None:
        raise Failure("The new size must be a multiple of 512")

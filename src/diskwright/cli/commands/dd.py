"""``diskwright dd``: copy blocks of an image into a new one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.commands.create import creation_error
from diskwright.cli.common import Failure
from diskwright.cli.faces import program
from diskwright.errors import DiskwrightError, OptionError, message_of

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

SUMMARY: Final = "copy blocks of an image into a new one"

DEFAULT_BLOCK: Final = 512
MAX_BLOCK: Final = (1 << 31) - 1
"""What qemu-img accepts. Nothing is read in pieces of that length: the block is a unit to count in."""


@dataclass
class Wish:
    """The operands. ``block`` is bytes, ``count`` and ``skip`` blocks."""

    source: str | None = None
    target: str | None = None
    block: int = DEFAULT_BLOCK
    count: int | None = None
    skip: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--format", metavar="FMT", help="the source's format; probed when not given")
    parser.add_argument("-O", dest="target_format", metavar="FMT", default="raw", help="the new image's format")
    common.add_image_opts(parser)
    common.add_force_share(parser)
    common.add_object(parser)
    common.add_gate(parser)
    parser.add_argument(
        "operands", nargs="*", metavar="OPERAND",
        help="if=SOURCE of=TARGET [bs=BYTES] [count=BLOCKS] [skip=BLOCKS]; a block is 512 bytes unless bs is given",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from diskwright.core.create import refuse_to_overwrite

    wish = _wish(args.operands)
    if wish.source is None or wish.target is None:
        raise Failure("Must specify both input and output files")
    with common.graph_of(args) as graph:
        source = common.open_image(
            graph, wish.source, format=args.format, image_opts=args.image_opts, force_share=args.force_share
        )
        size = common.guest_size(source)
        begin = wish.skip * wish.block
        end = size if wish.count is None else min(size, begin + wish.count * wish.block)
        _check_format(args.target_format)
        refuse_to_overwrite(graph, wish.target)
        _create(wish.target, args, max(0, end - begin))
        if begin > size:
            import sys

            # As ever, this is no failure: the copy is there, and is of nothing.
            print(f"{program()}: {wish.source}: cannot skip to specified offset", file=sys.stderr)
        target = common.open_image(graph, wish.target, format=args.target_format, writable=True)
        stored = min(end, source.size)  # what a file lacks of its last sector is zeros, and so is the new image
        if begin < stored:
            _copy(graph, source, target, begin, stored - begin)
        _finish(graph, target, wish.target)
    return 0


def _wish(operands: Sequence[str]) -> Wish:
    """Raises Failure for an operand that is none, or for a number that is none."""
    wish = Wish()
    for operand in operands:
        name, equals, value = operand.partition("=")
        if not equals or name not in ("if", "of", "bs", "count", "skip"):
            raise Failure(f"unrecognized operand {name}")
        if name == "if":
            wish.source = value
        elif name == "of":
            wish.target = value
        elif name == "bs":
            wish.block = common.size_argument(value, "bs")
            if not 1 <= wish.block <= MAX_BLOCK:
                raise Failure(f"Invalid bs specified. Must be between 1 and {MAX_BLOCK}.")
        elif name == "count":
            wish.count = common.size_argument(value, "count")
        else:
            wish.skip = common.size_argument(value, "skip")
    return wish


def _check_format(format: str) -> None:
    from diskwright.core import registry

    try:
        registry.find(format)
    except OptionError:
        raise Failure("Unknown file format") from None


def _create(name: str, args: argparse.Namespace, size: int) -> None:
    from diskwright.core.create import plan

    try:
        creation = plan(name, args.target_format, {"size": size}, gate=common.make_gate(args.gate))
    except DiskwrightError as error:
        raise Failure(message_of(error)) from error
    except OSError as error:
        raise Failure(message_of(error).rpartition(": ")[0] or message_of(error)) from error
    try:
        creation.make()
    except (DiskwrightError, OSError) as error:
        raise Failure(f"{name}: error while creating output image: {creation_error(error)}") from error


def _copy(graph: Graph, source: Node, target: Node, begin: int, length: int) -> None:
    from diskwright.engine.convert import Conversion, CopyFailed

    work = Conversion(target, graph.leases, length, target_is_zero=target.zero_init)
    try:
        work.copy_part(source, begin, length)
    except CopyFailed as error:
        what = "reading from" if error.operation == "read" else "writing to"
        cause = message_of(error.__cause__ or error)
        raise Failure(f"error while {what} image file at byte {error.offset}: {cause}") from error


def _finish(graph: Graph, target: Node, name: str) -> None:
    """The copy is claimed only when it is on the medium."""
    try:
        target.flush()
        graph.release(target)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"'{name}' is incomplete: {message_of(error)}") from error

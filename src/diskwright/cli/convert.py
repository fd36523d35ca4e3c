"""``diskwright convert``: copy images, one or several in a row, into a new or an existing one."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import PROGRAM, Failure
from diskwright.cli.create import creation_error, describe_options
from diskwright.cli.progress import Amount, Reporter
from diskwright.errors import DiskwrightError, OptionError, message_of
from diskwright.units import MiB

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

SUMMARY: Final = "copy an image into another format"

MAX_WORKERS: Final = 16
"""What qemu-img accepts for ``-m``."""

MAX_SPARSE: Final = 16 * MiB
"""Largest run of zeros that can be asked for with ``-S``: a copy looks at no more than this at a time."""

_UNSUPPORTED: Final = {
    "compress": "-c: compressed images cannot be written yet",
    "bitmaps": "--bitmaps: persistent bitmaps cannot be copied yet",
    "skip_broken_bitmaps": "--skip-broken-bitmaps: persistent bitmaps cannot be copied yet",
    "salvage": "--salvage: unreadable ranges cannot be skipped yet",
    "snapshot": "-l: internal snapshots cannot be converted yet",
}


@dataclass(frozen=True)
class Wish:
    """What a command line asks for, checked as far as it can be without opening anything."""

    sources: tuple[str, ...]
    target: str
    target_format: str | None
    options: dict[str, object]
    sparse: int
    speed: int
    workers: int
    source_cache: str | None
    target_cache: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, cache=True)
    parser.add_argument("-O", dest="target_format", metavar="FMT", help="format of the target (default: raw)")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPTIONS",
        help="options for creating the target: name=value,...; '-o help' lists them",
    )  # fmt: skip
    parser.add_argument("-B", dest="backing_file", metavar="FILE", help="backing file of the target: it gets only "
                        "what the source's own backing file does not have")  # fmt: skip
    parser.add_argument("-F", dest="backing_fmt", metavar="FMT", help="the backing file's format")
    parser.add_argument("-n", dest="existing", action="store_true", help="the target exists: write over it")
    parser.add_argument("--target-image-opts", action="store_true", help="the target's name is options; goes with -n")
    parser.add_argument("--target-is-zero", action="store_true", help="the target reads as zeros; goes with -n")
    parser.add_argument(
        "-S", dest="sparse", metavar="SIZE", help="how many zeros in a row are left out (default: 4k; 0: none)"
    )
    parser.add_argument(
        "-t", dest="target_cache", metavar="CACHE", default="writeback",
        help="cache mode for writing; with 'unsafe' the command does not wait until the copy is on the medium",
    )  # fmt: skip
    parser.add_argument("-m", dest="workers", metavar="N", help=f"parallel workers, 1 to {MAX_WORKERS}")
    parser.add_argument("-W", dest="out_of_order", action="store_true", help="accepted; the order is free anyway")
    parser.add_argument("-C", dest="offload", action="store_true", help="accepted; the kernel copies where it can")
    parser.add_argument("-r", dest="rate", metavar="RATE", help="limit in bytes per second")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_progress(parser)
    for flag, name in (("-c", "compress"), ("--bitmaps", "bitmaps"), ("--skip-broken-bitmaps", "skip_broken_bitmaps"),
                       ("--salvage", "salvage")):  # fmt: skip
        parser.add_argument(flag, dest=name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-l", dest="snapshot", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", metavar="SOURCE [SOURCE ...] TARGET")


def run(args: argparse.Namespace) -> int:
    options = common.join_options(args.options) if args.options else ""
    if options and common.wants_help(options):
        print(describe_options(args.target_format or "raw", args.names[-1] if args.names else None), end="")
        return 0
    wish = _wish(args, options)
    with common.graph_of(args) as graph, Interruption() as interruption:
        sources = [
            common.open_image(
                graph,
                name,
                format=args.format,
                image_opts=args.image_opts,
                force_share=args.force_share,
                cache=wish.source_cache,
            )
            for name in wish.sources
        ]
        total = sum(common.guest_size(source) for source in sources)
        if not args.existing:
            _create(wish, total, args.gate)
        target = _open_target(graph, wish, args)
        if target.size < total:
            raise Failure("output file is smaller than input file")
        new = not args.existing or args.target_is_zero
        copy = Conversion(graph, target, wish, interruption, target_zero=new and _reads_zero(target, args))
        reporter = Reporter.of(args, copy.amount, phase="convert")
        with reporter:
            copy.run(sources, total)
            reporter.phase = "flush"
            _finish(graph, target, wish)
        reporter.end_line()
    return 0


def _create(wish: Wish, size: int, gate: str) -> None:
    from diskwright.core.create import plan

    assert wish.target_format is not None
    try:
        creation = plan(wish.target, wish.target_format, {**wish.options, "size": size}, gate=common.make_gate(gate))
    except OptionError as error:
        raise Failure(message_of(error)) from error
    except (DiskwrightError, OSError) as error:
        raise _not_created(wish, error) from error
    try:
        creation.make()
    except (DiskwrightError, OSError) as error:
        raise _not_created(wish, error) from error


def _not_created(wish: Wish, error: BaseException) -> Failure:
    return Failure(f"{wish.target}: error while converting {wish.target_format}: {creation_error(error)}")


def _open_target(graph: Graph, wish: Wish, args: argparse.Namespace) -> Node:
    return common.open_image(
        graph,
        wish.target,
        format=wish.target_format,
        image_opts=args.target_image_opts,
        writable=True,
        cache=wish.target_cache,
    )


def _reads_zero(target: Node, args: argparse.Namespace) -> bool:
    """Whether a target nobody has written to reads as zeros."""
    if target.backing is not None:
        return False
    return args.target_is_zero or target.zero_init


def _finish(graph: Graph, target: Node, wish: Wish) -> None:
    """Closing writes back what is cached. Success is claimed only when the copy is where the user wants it."""
    try:
        target.flush()
        graph.release(target)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"'{wish.target}' is incomplete: {message_of(error)}") from error


class Conversion:
    """The copying, range by range, and how far it has got."""

    def __init__(
        self, graph: Graph, target: Node, wish: Wish, interruption: Interruption, *, target_zero: bool
    ) -> None:
        from diskwright.engine.rate import RateLimit

        self.graph, self.target, self.wish, self.interruption = graph, target, wish, interruption
        self.target_zero = target_zero
        self.rate = RateLimit(wish.speed)
        self.position, self.total = 0, 0

    def amount(self) -> Amount:
        return Amount(self.position, self.total)

    def run(self, sources: list[Node], total: int) -> None:
        """Copies the sources one after the other. Raises Failure; the target is then no copy."""
        self.total = total
        start = 0
        for source in sources:
            self._copy(source, start)
            start += common.guest_size(source)
            self.position = start

    def _copy(self, source: Node, start: int) -> None:
        """One source to ``start`` in the target."""
        from diskwright.engine.copy import CHUNK, WORKERS, chunks, data_plan, run_plan

        chunk = max(4096, self.rate.limit(CHUNK) // 4096 * 4096)
        for copier, offset, end in self._parts(source, start):
            if self.wish.sparse:
                whole = data_plan(source, self.graph.leases, end, zeros=not self.target_zero, chunk=chunk)
                ranges = ((at, length) for at, length in whole if at >= offset)
            else:
                ranges = chunks(offset, end - offset, chunk)
            run_plan(
                copier,
                ranges,
                workers=self.wish.workers or WORKERS,
                rate=self.rate,
                stop=lambda: self.interruption.signal != 0,
                done=lambda at, length: self._done(start + at + length),
                failed=self._failed,
                chunk=chunk,
            )
            self.interruption.check(self.wish.target)
# -- the command line ----------------------------------------------------------------------------


def _wish(args: argparse.Namespace, options: str) -> Wish:
    """Raises Failure for whatever does not fit together."""
    for name, text in _UNSUPPORTED.items():
        if getattr(args, name):
            raise Failure(text)
    workers, sparse, speed = _workers(args.workers), _sparse(args.sparse), _speed(args.rate)
    if args.existing and args.options:
        raise Failure("-o has no effect when skipping image creation")
    if args.offload and args.sparse is not None:
        raise Failure("Cannot enable copy offloading when -S is used")
    if args.target_is_zero and not args.existing:
        raise Failure("--target-is-zero requires use of -n flag")
    if args.target_is_zero and args.backing_file is not None:
        raise Failure("Cannot use --target-is-zero when the destination image has a backing file")
    if len(args.names) < 2:
        raise Failure("Must specify image file name")
    if args.target_image_opts and not args.existing:
        raise Failure("--target-image-opts requires use of -n flag")
    if args.target_image_opts and args.target_format is not None:
        raise Failure("--image-opts and --format are mutually exclusive")
    *sources, target = args.names
    wanted: dict[str, object] = dict(common.option_mapping(options))
    wanted.pop("size", None)  # the target is as large as the source, whatever was asked for
    if args.backing_file is not None:
        wanted["backing_file"] = args.backing_file
    if args.backing_fmt is not None:
        wanted["backing_fmt"] = args.backing_fmt
    if len(sources) > 1 and "backing_file" in wanted:
        raise Failure("Having a backing file for the target makes no sense when concatenating multiple input images")
    return Wish(
        tuple(sources),
        target,
        None if args.target_image_opts else args.target_format or "raw",
        wanted,
        sparse,
        speed,
        workers,
        common.cache_mode(args.source_cache, "source cache"),
        common.cache_mode(args.target_cache, "cache") or "writeback",
    )


def _workers(text: str | None) -> int:
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_WORKERS):
        raise Failure(f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {MAX_WORKERS}")
    return int(text)


def _sparse(text: str | None) -> int:
    """The length of zeros that is left out, in bytes; 0 to leave none out."""
    if text is None:
        return 4096
    value = common.size_argument(text, "buffer size for sparse output")
    if value % 512 or value > MAX_SPARSE:
        raise Failure(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to "
            f"{MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return value


def _speed(text: str | None) -> int:
    return 0 if text is None else common.size_argument(text, "rate limit")

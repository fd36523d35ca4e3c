"""``diskwright convert``: copy images, one or several in a row, into a new or an existing one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.commands.create import creation_error, describe_options
from diskwright.cli.common import Failure
from diskwright.cli.faces import program
from diskwright.cli.interruption import Interruption
from diskwright.cli.progress import Amount, Reporter
from diskwright.errors import DiskwrightError, OptionError, message_of
from diskwright.units import SECTOR, MiB, align_up

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node
    from diskwright.engine.convert import Conversion
    from diskwright.engine.package import Package

SUMMARY: Final = "copy an image into another format"

MAX_WORKERS: Final = 16
"""What qemu-img accepts for ``-m``."""

DEFAULT_SPARSE: Final = 4096

PACKAGES: Final = ("ova", "ovf")
"""Formats whose disks have other files around them."""

MAX_SPARSE: Final = 16 * MiB
"""Largest run of zeros that can be asked for with ``-S``: a copy looks at no more than this at a time."""


MAX_LEVEL: Final = 9
MAX_ZSTD_LEVEL: Final = 19


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
    compress: bool
    level: int | None
    source_cache: str | None
    target_cache: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, cache=True)
    parser.add_argument("-O", dest="target_format", metavar="FMT", help="format of the target (default: raw)")
    parser.add_argument(
        "-o", dest="options", action="append", type=common.option_list, default=[], metavar="OPTIONS",
        help="options for creating the target: name=value,...; '-o help' lists them",
    )  # fmt: skip
    parser.add_argument("-B", dest="backing_file", metavar="FILE", help="backing file of the target: it gets only "
                        "what the source's own backing file does not have")  # fmt: skip
    parser.add_argument("-F", dest="backing_fmt", metavar="FMT", help="the backing file's format")
    parser.add_argument("-n", dest="existing", action="store_true", help="the target exists: write over it")
    parser.add_argument("--target-image-opts", action="store_true", help="the target's name is options; goes with -n")
    parser.add_argument("--target-is-zero", action="store_true", help="the target reads as zeros; goes with -n")
    parser.add_argument(
        "-S",
        dest="sparse",
        metavar="SIZE",
        type=_sparse,
        help="how many zeros in a row are left out (default: 4k; 0: none)",
    )
    parser.add_argument(
        "-t", dest="target_cache", metavar="CACHE", default="writeback",
        help="cache mode for writing; with 'unsafe' the command does not wait until the copy is on the medium",
    )  # fmt: skip
    parser.add_argument(
        "-m", dest="workers", metavar="N", type=_workers, default=0, help=f"parallel workers, 1 to {MAX_WORKERS}"
    )
    parser.add_argument("-c", dest="compress", action="store_true", help="compress the target's clusters")
    parser.add_argument(
        "--compression-level", dest="level", metavar="N", type=_level,
        help=f"with -c: from 1, the quickest, to {MAX_LEVEL} with zlib (default 3; 6 gives the sizes of qemu-img), to "
        f"{MAX_ZSTD_LEVEL} with zstd (default 1; 3 gives the sizes of qemu-img)",
    )  # fmt: skip
    parser.add_argument(
        "-W", dest="out_of_order", action="store_true",
        help="with -c: place clusters as they come, not in their order; without, the order is free anyway",
    )  # fmt: skip
    parser.add_argument("-C", dest="offload", action="store_true", help="accepted; the kernel copies where it can")
    parser.add_argument(
        "-r", dest="rate", metavar="RATE", type=common.size("rate limit"), default=0, help="bytes per second"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_progress(parser)
    parser.add_argument("--bitmaps", action="store_true", help="copy persistent dirty bitmaps too")
    parser.add_argument("--skip-broken-bitmaps", action="store_true", help="without those that are inconsistent")
    parser.add_argument(
        "--salvage", action="store_true", help="what cannot be read becomes zeros, with a warning, and is no error"
    )
    parser.add_argument(
        "-l", dest="snapshot", metavar="SNAPSHOT",
        help="copy an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME",
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="SOURCE [SOURCE ...] TARGET")


def run(args: argparse.Namespace) -> int:
    options = common.join_options(args.options) if args.options else ""
    if options and common.wants_help(options):
        print(describe_options(args.target_format or "raw", args.names[-1] if args.names else None), end="")
        return 0
    wish = _wish(args, options)
    from diskwright.core.driver import COMPRESSION
    from diskwright.engine.compress import CompressedConversion
    from diskwright.engine.convert import Conversion

    with common.graph_of(args) as graph, Interruption() as interruption:
        sources = [
            common.open_image(
                graph,
                name,
                format=args.format,
                image_opts=args.image_opts,
                force_share=args.force_share,
                cache=wish.source_cache,
                options=common.snapshot_options(graph, name, args) if args.snapshot is not None else None,
            )
            for name in wish.sources
        ]
        if args.bitmaps:
            from diskwright.cli.convert_bitmaps import check_source

            check_source(sources[0], skip_broken=args.skip_broken_bitmaps)
        total = sum(common.guest_size(source) for source in sources)
        if wish.compress and not args.existing and wish.target_format not in PACKAGES:
            _require_compression(wish)
        package = _package(graph, wish, args, total)
        target = _target(graph, wish, args, total) if package is None else package.disk
        if target.size < total:
            raise Failure("output file is smaller than input file")
        compress = wish.compress or target.packs
        if compress and not target.compresses:
            raise Failure(COMPRESSION)
        if args.bitmaps:
            from diskwright.cli.convert_bitmaps import check_target

            check_target(target)
        new = not args.existing or args.target_is_zero
        make: Callable[..., Conversion] = Conversion
        if compress:
            make = partial(CompressedConversion, in_order=not args.out_of_order or target.only_compressed)
        work = make(
            target,
            graph.leases,
            total,
            target_is_zero=new and _reads_zero(target, args),
            sparse=wish.sparse,
            workers=wish.workers,
            speed=wish.speed,
            stop=lambda: interruption.signal != 0,
            unreadable=_Salvage(quiet=args.quiet) if args.salvage else None,
        )
        reporter = Reporter.of(args, lambda: Amount(*work.progress()), phase="convert")
        with reporter:
            _copy(work, sources, wish, interruption)
            if args.bitmaps:
                from diskwright.cli.convert_bitmaps import copy_bitmaps

                copy_bitmaps(sources[0], target, skip_broken=args.skip_broken_bitmaps)
            reporter.phase = "flush"
            _finish(graph, target, wish, package)
        reporter.end_line()
    return 0


class _Salvage:
    """Tells which sectors were lost. Only so many: a dead disk has millions."""

    _MOST: Final = 10000

    def __init__(self, *, quiet: bool) -> None:
        self._left = 0 if quiet else self._MOST

    def __call__(self, offset: int, error: Exception) -> None:
        if not self._left:
            return
        self._left -= 1
        print(f"{program()}: warning: error while reading offset {offset}: {message_of(error)}", file=sys.stderr)
        if not self._left:
            print(f"{program()}: warning: more of these are not told", file=sys.stderr)


def _require_compression(wish: Wish) -> None:
    """Raises Failure for what cannot be compressed, before there is a target."""
    from diskwright.core.driver import COMPRESSION, Format
    from diskwright.core.options import BOOL
    from diskwright.core.registry import find

    assert wish.target_format is not None
    try:
        driver = find(wish.target_format)
    except OptionError:
        return  # creating it will say so
    if not issubclass(driver, Format) or not driver.compresses:
        raise Failure(COMPRESSION)
    if "encrypt.format" in wish.options or BOOL.parse("encryption", wish.options.get("encryption", False)):
        raise Failure("Compression and encryption not supported at the same time")
    if wish.options.get("preallocation", "off") != "off":
        raise Failure("Compression and preallocation not supported at the same time")
    method = wish.options.get("compression_type", "zlib")
    if wish.level is not None and wish.level > MAX_LEVEL and method == "zlib":
        raise Failure(f"--compression-level is 1 to {MAX_LEVEL} with zlib")


def _create(wish: Wish, size: int, graph: Graph) -> None:
    from diskwright.core.create import plan

    assert wish.target_format is not None
    options = {**wish.options, "size": size}
    if not wish.sparse and not wish.compress and "backing_file" not in options and _can_reserve(wish.target_format):
        options.setdefault("preallocation", "falloc")
    try:
        creation = plan(wish.target, wish.target_format, options, gate=graph.gate, secrets=graph.secrets)
    except OptionError as error:
        text = message_of(error)
        if text.startswith("Backing format") or "does not accept value" in text:
            raise _not_created(wish, error) from error
        raise Failure(text) from error
    except (DiskwrightError, OSError) as error:
        raise _not_created(wish, error) from error
    try:
        creation.make(sparing=graph)
    except (DiskwrightError, OSError) as error:
        raise _not_created(wish, error) from error


def _can_reserve(format: str) -> bool:
    """Whether the format takes all space in advance when asked to, which is what ``-S 0`` is for."""
    from diskwright.core.options import OneOf, describe
    from diskwright.core.registry import find

    try:
        options = describe(getattr(find(format), "create_options"))  # noqa: B009
    except (OptionError, AttributeError):
        return False
    return any(i.name == "preallocation" and isinstance(i.type, OneOf) and "falloc" in i.type.words for i in options)


def _not_created(wish: Wish, error: BaseException) -> Failure:
    return Failure(f"{wish.target}: error while converting {wish.target_format}: {creation_error(error)}")


def _open_target(graph: Graph, wish: Wish, args: argparse.Namespace) -> Node:
    from diskwright.core.secrets import needed_to_open

    opening = needed_to_open(wish.options)
    if wish.level is not None:
        opening["compression-level"] = wish.level
    return common.open_image(
        graph,
        wish.target,
        format=wish.target_format,
        image_opts=args.target_image_opts,
        writable=True,
        cache=wish.target_cache,
        options=opening,
    )


def _package(graph: Graph, wish: Wish, args: argparse.Namespace, size: int) -> Package | None:
    """The package that is wanted, in the making; None when it is an image."""
    if wish.target_format not in PACKAGES:
        return None
    from diskwright.engine.package import Package

    if args.existing:
        raise Failure(f"-n makes no sense with {wish.target_format}: a package is written as a whole")
    try:
        return Package(graph, wish.target, wish.target_format, wish.options, align_up(size, SECTOR), wish.level)
    except (DiskwrightError, OSError) as error:
        raise _not_created(wish, error) from error


def _target(graph: Graph, wish: Wish, args: argparse.Namespace, size: int) -> Node:
    """The image to write into."""
    if not args.existing:
        from diskwright.core.create import refuse_to_overwrite
        from diskwright.storage.pipe import is_pipe

        if is_pipe(wish.target):
            return _pipe_target(graph, wish, args, size)
        refuse_to_overwrite(graph, wish.target)
        _create(wish, size, graph)
    return _open_target(graph, wish, args)


def _pipe_target(graph: Graph, wish: Wish, args: argparse.Namespace, size: int) -> Node:
    """A new image that goes into a pipe. Nothing has gone there yet when this returns."""
    from diskwright.core.create import create_in_one_pass
    from diskwright.core.secrets import needed_to_open
    from diskwright.storage.pipe import PipeStorage

    assert wish.target_format is not None
    if args.show_progress and _is_stdout(wish.target):
        raise Failure("-p and an image cannot both go to standard output")
    opening = needed_to_open(wish.options)
    if wish.level is not None:
        opening["compression-level"] = wish.level
    try:
        pipe = PipeStorage(wish.target)
        return create_in_one_pass(graph, pipe, wish.target_format, {**wish.options, "size": size}, opening)
    except (DiskwrightError, OSError) as error:
        raise _not_created(wish, error) from error


def _is_stdout(path: str) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


def _reads_zero(target: Node, args: argparse.Namespace) -> bool:
    """Whether a target nobody has written to reads as zeros."""
    if target.backing is not None:
        return False
    return args.target_is_zero or target.zero_init


def _finish(graph: Graph, target: Node, wish: Wish, package: Package | None) -> None:
    """Closing writes back what is cached. Success is claimed only when the copy is where the user wants it."""
    try:
        if package is not None:
            package.finish()
        else:
            target.flush()
            graph.release(target)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"'{wish.target}' is incomplete: {message_of(error)}") from error


def _copy(work: Conversion, sources: list[Node], wish: Wish, interruption: Interruption) -> None:
    """Copies the sources one after the other. Raises Failure; the target is then no copy."""
    from diskwright.engine.convert import CopyFailed

    start = 0
    for source in sources:
        base = source.backing if work.target.backing is not None else None
        try:
            work.copy(source, start, base=base)
        except CopyFailed as error:
            what = "reading" if error.operation == "read" else "writing"
            cause = message_of(error.__cause__ or error)
            text = f"error while {what} at byte {error.offset}: {cause}; '{wish.target}' is incomplete"
            raise Failure(text) from error
        interruption.check(wish.target)
        start += common.guest_size(source)


# -- the command line ----------------------------------------------------------------------------


def _wish(args: argparse.Namespace, options: str) -> Wish:
    """Raises Failure for whatever does not fit together."""
    if args.skip_broken_bitmaps and not args.bitmaps:
        raise Failure("Use of --skip-broken-bitmaps requires --bitmaps")
    if args.existing and args.options:
        raise Failure("-o has no effect when skipping image creation")
    if args.offload and args.compress:
        raise Failure("Cannot enable copy offloading when -c is used")
    if args.offload and args.sparse is not None:
        raise Failure("Cannot enable copy offloading when -S is used")
    if args.target_is_zero and not args.existing:
        raise Failure("--target-is-zero requires use of -n flag")
    if args.target_is_zero and args.backing_file is not None:
        raise Failure("Cannot use --target-is-zero when the destination image has a backing file")
    if args.level is not None and not args.compress:
        raise Failure("--compression-level requires use of -c flag")
    if args.target_image_opts and not args.existing:
        raise Failure("--target-image-opts requires use of -n flag")
    if args.salvage and args.offload:
        raise Failure("Cannot use copy offloading in salvaging mode")
    if len(args.names) < 2:
        raise Failure("Must specify image file name")
    if args.target_image_opts and args.target_format is not None:
        raise Failure("--image-opts and --format are mutually exclusive")
    *sources, target = args.names
    if args.bitmaps and len(sources) > 1:
        raise Failure("Copying bitmaps only possible with single source")
    wanted: dict[str, object] = dict(common.option_mapping(options))
    wanted.pop("size", None)  # the target is as large as the source, whatever was asked for
    if args.backing_file is not None:
        wanted["backing_file"] = args.backing_file
    if args.backing_fmt is not None:
        wanted["backing_fmt"] = args.backing_fmt
    if wanted.get("backing_file") and not wanted.get("backing_fmt"):
        raise Failure("Use of backing file requires explicit backing format")
    if len(sources) > 1 and args.snapshot is not None:
        raise Failure("No support for concatenating multiple snapshot")
    if len(sources) > 1 and "backing_file" in wanted:
        raise Failure("Having a backing file for the target makes no sense when concatenating multiple input images")
    return Wish(
        tuple(sources),
        target,
        None if args.target_image_opts else args.target_format or "raw",
        wanted,
        DEFAULT_SPARSE if args.sparse is None else args.sparse,
        args.rate,
        args.workers,
        args.compress,
        args.level,
        common.cache_mode(args.source_cache, "source cache"),
        common.cache_mode(args.target_cache, "cache") or "writeback",
    )


def _workers(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_WORKERS):
        raise Failure(f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {MAX_WORKERS}")
    return int(text)


def _level(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_ZSTD_LEVEL):
        raise Failure(f"Invalid compression level '{text}': it is 1 to {MAX_LEVEL}, or with zstd to {MAX_ZSTD_LEVEL}")
    return int(text)


def _sparse(text: str) -> int:
    """The length of zeros that is left out, in bytes; 0 to leave none out."""
    value = common.size_argument(text, "buffer size for sparse output")
    if value % 512 or value > MAX_SPARSE:
        raise Failure(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to "
            f"{MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return value

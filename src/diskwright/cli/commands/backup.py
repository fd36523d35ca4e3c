"""``diskwright backup``: copies an image, or what has changed in it since the last time."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from diskwright.cli import common
from diskwright.cli.common import Failure
from diskwright.cli.interruption import Interruption
from diskwright.cli.progress import Amount, Reporter
from diskwright.errors import DiskwrightError, JobError, message_of

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node
    from diskwright.jobs.backup import Backup

SUMMARY: Final = "copy an image, or what has changed in it since the last backup"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser)
    parser.add_argument(
        "-O", "--target-format", metavar="FMT", help="format of the target (default: by its ending, else the source's)"
    )
    parser.add_argument("-o", metavar="OPTIONS", action="append", default=[], help="options for creating the target")
    parser.add_argument("-n", "--existing", action="store_true", help="the target exists: write into it")
    parser.add_argument("-c", "--compress", action="store_true", help="write compressed clusters")
    parser.add_argument(
        "--sync", choices=("full", "top", "bitmap", "incremental"), help="what to copy: everything, the image's own "
        "layer, or what is dirty in the bitmap (default: incremental with --bitmap, else full)",
    )  # fmt: skip
    parser.add_argument("--bitmap", metavar="NAME", help="a dirty bitmap of the source")
    parser.add_argument(
        "--bitmap-mode", choices=("on-success", "always", "never"),
        help="when what has been copied is taken out of the bitmap (default: on-success)",
    )  # fmt: skip
    parser.add_argument("-r", "--speed", metavar="SIZE", help="limit in bytes per second")
    parser.add_argument("-t", "--target-cache", metavar="CACHE", default="writeback", help="cache mode of the target")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_progress(parser)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")


def run(args: argparse.Namespace) -> int:
    with common.graph_of(args) as graph, Interruption() as interruption:
        source = common.open_image(
            graph, args.source, format=args.format, image_opts=args.image_opts, force_share=args.force_share,
            writable=args.bitmap is not None and not args.force_share,
        )  # fmt: skip
        target = _target(graph, source, args)
        _copy(graph, source, target, args, interruption)
        try:
            graph.release(target)
            graph.release(source)
        except (DiskwrightError, OSError) as error:
            raise Failure(f"Could not close the images: {message_of(error)}") from error
    return 0


def _target(graph: Graph, source: Node, args: argparse.Namespace) -> Node:
    from diskwright.api import format_by_name, open_target
    from diskwright.core.node import below_filters

    try:
        return open_target(
            graph,
            args.target,
            source.size,
            format=args.target_format or format_by_name(args.target, below_filters(source).driver_name),
            options=common.option_mapping(common.join_options(args.o)) if args.o else {},
            existing=args.existing,
            cache=common.cache_mode(args.target_cache, "cache"),
        )
    except (DiskwrightError, OSError) as error:
        raise Failure(f"Could not open '{args.target}': {common.opening_error(error)}") from error


def _copy(graph: Graph, source: Node, target: Node, args: argparse.Namespace, interruption: Interruption) -> None:
    from diskwright.core.node import below_filters
    from diskwright.jobs.backup import Backup

    options: dict[str, Any] = {"sync": args.sync or ("full" if args.bitmap is None else "incremental")}
    if args.bitmap is not None:
        options |= {"bitmap": args.bitmap, "bitmap_mode": args.bitmap_mode or "on-success"}
    elif args.bitmap_mode is not None:
        options["bitmap_mode"] = args.bitmap_mode
    if args.speed is not None:
        options["speed"] = common.size_argument(args.speed, "speed")
    try:
        job = Backup("backup", graph, below_filters(source), target, compress=args.compress, **options)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"Could not back up '{args.source}': {message_of(error)}") from error
    reporter = Reporter.of(args, lambda: Amount(*job.progress()), phase="backup")
    with reporter:
        job.start()
        _wait(job, interruption)
    try:
        job.result(0)
    except JobError as error:
        if interruption.signal:
            text = f"interrupted; '{args.target}' is incomplete"
            raise Failure(text, 128 + interruption.signal) from None
        cause = error.__cause__ or error
        raise Failure(
            f"Could not back up '{args.source}': {message_of(cause)}; '{args.target}' is incomplete"
        ) from error
    reporter.end_line()


def _wait(job: Backup, interruption: Interruption) -> None:
    while not job.wait(0.1):
        if interruption.signal and not job.cancelled:
            try:
                job.cancel(force=True)
            except JobError:
                return  # it has just ended

"""``diskwright compact``: make an image's file as short as it can be, in place."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import Failure
from diskwright.cli.interruption import Interruption
from diskwright.cli.output import json_text
from diskwright.cli.progress import Amount, Reporter
from diskwright.errors import DiskwrightError, message_of

if TYPE_CHECKING:
    from diskwright.core.driver import CompactReport
    from diskwright.core.node import Node

SUMMARY: Final = "give back the space an image does not use, in place"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--format", metavar="FMT", help="the image's format; probed when not given")
    parser.add_argument("-t", dest="cache", metavar="CACHE", default="writeback", help="cache mode for the image")
    parser.add_argument(
        "-z", "--zeros", action="store_true", help="read all clusters, and give up those that are full of zeros"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_output(parser)
    common.add_image_opts(parser)
    common.add_object(parser)
    common.add_gate(parser)
    common.add_progress(parser)
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    as_json = common.check_output(args)
    filename = common.one_operand(args.filename)
    cache = common.cache_mode(args.cache, "cache")
    with common.graph_of(args) as graph, Interruption() as interruption:
        repairable = _has_repair(args, filename)
        node = common.open_image(
            graph,
            filename,
            format=args.format,
            image_opts=args.image_opts,
            writable=True,
            cache=cache,
            backing=False,
            options={"repair": True} if repairable else None,
        )
        try:
            graph.hold_exclusively(node)
        except DiskwrightError as error:
            raise Failure(f"Could not open '{filename}': {common.opening_error(error)}") from error
        report = _compact(node, args, interruption)
        if as_json:
            print(json_text(_as_json(report, node)))
        elif not args.quiet:
            print("\n".join(_summary(report)))
        if not report.complete:
            raise Failure("interrupted; another run goes on from here", 128 + interruption.signal)
    return 0


def _has_repair(args: argparse.Namespace, filename: str) -> bool:
    """Whether the image's format has an option for being opened to work on its metadata only."""
    from diskwright.core.driver import Format
    from diskwright.core.options import describe
    from diskwright.core.registry import find

    with common.graph_of(args) as graph:
        node = common.open_image(graph, filename, format=args.format, image_opts=args.image_opts, backing=False)
        driver = find(node.driver_name)
    return issubclass(driver, Format) and any(info.name == "repair" for info in describe(driver.options))


def _compact(node: Node, args: argparse.Namespace, interruption: Interruption) -> CompactReport:
    from diskwright.core.node import format_of

    amount = [0, 1]

    def advance(done: int, total: int) -> None:
        amount[:] = done, total

    reporter = Reporter.of(args, lambda: Amount(*amount), phase="compact")
    with reporter:
        try:
            report = format_of(node).compact(
                detect_zeros=args.zeros, progress=advance, stop=lambda: interruption.signal != 0
            )
        except OSError as error:
            raise Failure(f"Could not compact '{node.filename}': {error.strerror or error}") from error
        except DiskwrightError as error:
            reason = message_of(error).removeprefix(f"{node.filename}: ")
            raise Failure(f"Could not compact '{node.filename}': {reason}") from error
    reporter.end_line()
    return report


def _as_json(report: CompactReport, node: Node) -> dict[str, object]:
    return {
        "filename": node.filename,
        "format": node.driver_name,
        "bytes-before": report.before,
        "bytes-after": report.after,
        "clusters-moved": report.moved,
        "clusters-released": report.released,
        "complete": report.complete,
    }


def _summary(report: CompactReport) -> list[str]:
    from diskwright.units import human_size

    return [
        f"{human_size(report.before)} ({report.before} bytes) before, "
        f"{human_size(report.after)} ({report.after} bytes) after",
        f"{report.moved} clusters moved, {report.released} clusters of zeros given up",
    ]

"""``diskwright check``: look for damage in an image, and mend it when asked."""

from __future__ import annotations

import argparse
import errno
import sys
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import Failure, UsageError
from diskwright.cli.faces import program
from diskwright.cli.output import json_text
from diskwright.errors import DiskwrightError, OptionError, message_of

if TYPE_CHECKING:
    from diskwright.core.driver import CheckReport
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

SUMMARY: Final = "check an image for damage, and repair it"

CORRUPT: Final = 2
LEAKY: Final = 3
NO_CHECK: Final = 63
"""The exit codes qemu-img documents."""

EXIT_CODES: Final = {
    0: "the image is sound, or now mended",
    CORRUPT: "the image is corrupt",
    LEAKY: "there are leaked clusters, and nothing worse",
    NO_CHECK: "the format has no check",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, cache=True)
    common.add_output(parser)
    parser.add_argument(
        "-r", "--repair", metavar="leaks|all", help="repair leaks, or everything; see the documentation first"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="do not print the summary")
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    if args.repair not in (None, "leaks", "all"):
        raise UsageError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {args.repair}")
    filename = common.one_operand(args.filename)
    as_json = common.check_output(args)
    cache = common.cache_mode(args.source_cache, "source cache")
    with common.graph_of(args) as graph:
        node = _open(graph, filename, args, cache)
        report = _check(node, args.repair or "off")
        fixed = report.corruptions_fixed, report.leaks_fixed
        if any(fixed):
            if not args.quiet and not as_json:
                print(_repaired(report), flush=True)
            report = _check(node, "off")
            report.corruptions_fixed, report.leaks_fixed = fixed
        if as_json:
            print(json_text(_as_json(report, node)))
        elif not args.quiet:
            print("\n".join(_summary(report)))
    return _verdict(report)


def _open(graph: Graph, filename: str, args: argparse.Namespace, cache: str | None) -> Node:
    """The image, with whatever option its format has for opening what is damaged."""

    def opened(options: dict[str, object]) -> Node:
        return common.open_image(
            graph,
            filename,
            format=args.format,
            image_opts=args.image_opts,
            writable=args.repair is not None,
            force_share=args.force_share,
            cache=cache,
            options=options,
        )

    try:
        return opened({"repair": True})
    except Failure as failure:
        if isinstance(failure.__cause__, OptionError) and "'repair'" in str(failure.__cause__):
            return opened({})
        raise


def _check(node: Node, repair: str) -> CheckReport:
    """The format's own check. What it found in detail goes to standard error, line by line."""
    from diskwright.core.node import format_of

    try:
        report = format_of(node).check(repair)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
            raise Failure("This image format does not support checks", NO_CHECK) from error
        raise Failure(f"Check failed: {error.strerror or error}") from error
    except DiskwrightError as error:
        raise Failure(f"Check failed: {message_of(error)}") from error
    sys.stdout.flush()
    for message in report.messages:
        print(message, file=sys.stderr)
    if report.check_errors:
        print(f"{program()}: Check failed", file=sys.stderr)
    return report


def _verdict(report: CheckReport) -> int:
    """Of what was found and not repaired, the worst decides."""
    if report.check_errors:
        return 1
    if report.corruptions:
        return CORRUPT
    return LEAKY if report.leaks else 0


def _repaired(report: CheckReport) -> str:
    return (
        "The following inconsistencies were found and repaired:\n\n"
        f"    {report.leaks_fixed} leaked clusters\n"
        f"    {report.corruptions_fixed} corruptions\n\n"
        "Double checking the fixed image now..."
    )


def _summary(report: CheckReport) -> list[str]:
    lines: list[str] = []
    if not (report.corruptions or report.leaks or report.check_errors):
        lines.append("No errors were found on the image.")
    if report.corruptions:
        lines += [
            f"\n{report.corruptions} errors were found on the image.",
            "Data may be corrupted, or further writes to the image may corrupt it.",
        ]
    if report.leaks:
        lines += [
            f"\n{report.leaks} leaked clusters were found on the image.",
            "This means waste of disk space, but no harm to data.",
        ]
    if report.check_errors:
        lines.append(f"\n{report.check_errors} internal errors have occurred during the check.")
    if report.total_clusters and report.allocated_clusters:
        lines.append(
            f"{report.allocated_clusters}/{report.total_clusters} = "
            f"{_percent(report.allocated_clusters, report.total_clusters)} allocated, "
            f"{_percent(report.fragmented_clusters, report.allocated_clusters)} fragmented, "
            f"{_percent(report.compressed_clusters, report.allocated_clusters)} compressed clusters"
        )
    if report.image_end_offset:
        lines.append(f"Image end offset: {report.image_end_offset}")
    return lines


def _percent(part: int, whole: int) -> str:
    return f"{100.0 * part / whole:.2f}%"


def _as_json(report: CheckReport, node: Node) -> dict[str, object]:
    """The order of the keys is that of qemu-img; what is 0 is left out, except for the errors."""
    rows: dict[str, object] = {
        "image-end-offset": report.image_end_offset,
        "compressed-clusters": report.compressed_clusters,
        "total-clusters": report.total_clusters,
        "corruptions": report.corruptions,
        "corruptions-fixed": report.corruptions_fixed,
        "check-errors": report.check_errors,
        "leaks": report.leaks,
        "leaks-fixed": report.leaks_fixed,
        "allocated-clusters": report.allocated_clusters,
        "filename": node.filename,
        "format": node.driver_name,
        "fragmented-clusters": report.fragmented_clusters,
    }
    return {key: value for key, value in rows.items() if value or key == "check-errors"}

"""``diskwright measure``: how much space a new image will take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from diskwright.cli import common
from diskwright.cli.common import Failure
from diskwright.cli.faces import program
from diskwright.errors import OptionError

if TYPE_CHECKING:
    from diskwright.core.driver import Measurement
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

SUMMARY: Final = "tell how much space a new image will take"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser)
    common.add_output(parser)
    parser.add_argument("-O", dest="target_format", metavar="FMT", default="raw", help="the new image's format")
    parser.add_argument(
        "-o", dest="options", action="append", type=common.option_list, default=[], metavar="OPTIONS",
        help="options for creating it: name=value,...; those that 'create' takes",
    )  # fmt: skip
    parser.add_argument(
        "--size",
        metavar="N",
        type=common.size("image size"),
        help="measure an empty image of this size, rather than a copy",
    )
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="measure a copy of this internal snapshot")
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    options = common.join_options(args.options) if args.options else ""
    size = args.size
    as_json = common.check_output(args)
    filename = _filename(args, size)
    with common.graph_of(args) as graph:
        source = None
        if filename is not None:
            source = common.open_image(
                graph,
                filename,
                format=args.format,
                image_opts=args.image_opts,
                force_share=args.force_share,
                options=common.snapshot_options(graph, filename, args) if args.snapshot is not None else None,
            )
            size = common.guest_size(source)
        assert size is not None
        found = _measure(graph, args.target_format, options, size, source)
    _print(found, as_json)
    return 0


def _filename(args: argparse.Namespace, size: int | None) -> str | None:
    if len(args.filename) > 1:
        raise Failure("At most one filename argument is allowed.")
    if not args.filename:
        if args.image_opts or args.format is not None or args.snapshot is not None:
            raise Failure("--image-opts, -f, and -l require a filename argument.")
        if size is None:
            raise Failure("Either --size N or one filename must be specified.")
        return None
    if size is not None:
        raise Failure("--size N cannot be used together with a filename.")
    return str(args.filename[0])


def _measure(graph: Graph, format: str, options: str, size: int, source: Node | None) -> Measurement:
    from diskwright.core import options as opts
    from diskwright.core import registry
    from diskwright.core.secrets import bind
    from diskwright.engine.measure import can_measure, measure

    try:
        driver: type[Any] = registry.find(format)
    except OptionError:
        raise Failure(f"Unknown file format '{format}'") from None
    if not can_measure(driver):
        raise Failure(f"Block driver '{format}' does not support size measurement")
    known = {info.name for info in opts.describe(driver.create_options)}
    wanted: dict[str, object] = {}
    for key, value in common.option_mapping(options).items():
        if key.replace("_", "-") not in known:
            raise Failure(f"Invalid parameter '{key}'\n{program()}: Invalid options for file format '{format}'")
        wanted[key] = value
    wanted["size"] = size
    typed = opts.parse(driver.create_options, wanted, owner=format)
    return measure(driver, bind(typed, graph.secrets), source, graph.leases)


def _print(found: Measurement, as_json: bool) -> None:
    if as_json:
        from diskwright.cli.output import json_text

        facts: dict[str, object] = {} if found.bitmaps is None else {"bitmaps": found.bitmaps}
        facts.update({"required": found.required, "fully-allocated": found.fully_allocated})
        print(json_text(facts))
        return
    print(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print(f"bitmaps size: {found.bitmaps}")

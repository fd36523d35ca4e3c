"""``diskwright amend``: change what was chosen when an image was created."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from diskwright.cli import common
from diskwright.cli.common import Failure, UsageError
from diskwright.cli.faces import program
from diskwright.cli.progress import Amount, Reporter
from diskwright.errors import DiskwrightError, OptionError, message_of

if TYPE_CHECKING:
    from diskwright.core.node import Node

SUMMARY: Final = "change options of an existing image"

_HINTS: Final = {"Cannot amend the backing file": "You can use '{} rebase' instead."}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--format", metavar="FMT", help="the image's format; probed when not given")
    common.add_image_opts(parser)
    parser.add_argument(
        "-o", dest="options", action="append", type=common.option_list, default=[], metavar="OPTIONS",
        help="what is to change: name=value,...; '-o help' lists what can",
    )  # fmt: skip
    parser.add_argument("-t", dest="cache", metavar="CACHE", default="writeback", help="cache mode for the image")
    parser.add_argument("--force", action="store_true", help="allow what may lose access to data")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_progress(parser)
    common.add_object(parser)
    common.add_gate(parser)
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    if not args.options:
        raise UsageError("Must specify options (-o)")
    options = common.join_options(args.options)
    help = common.wants_help(options)
    if help and args.format is not None:
        print(_describe(args.format), end="")
        return 0
    if len(args.filename) != 1:
        raise Failure("Expecting one image file name")
    cache = common.cache_mode(args.cache, "cache")
    filename = args.filename[0]
    with common.graph_of(args) as graph:
        node = common.open_image(
            graph, filename, format=args.format, image_opts=args.image_opts, writable=True, cache=cache
        )
        if help:
            print(_describe(node.driver_name), end="")
            return 0
        typed = _typed(node.driver_name, common.option_mapping(options))
        _amend(node, typed, args)
        try:
            node.flush()
            graph.release(node)
        except (DiskwrightError, OSError) as error:
            raise Failure(message_of(error)) from error
    return 0


def _amend(node: Node, options: object, args: argparse.Namespace) -> None:
    from diskwright.core.node import FormatNode

    assert isinstance(node, FormatNode), "a storage has no options to amend"
    lock, state = threading.Lock(), (0, 1)

    def note(done: int, total: int) -> None:
        nonlocal state
        with lock:
            state = done, total

    reporter = Reporter.of(args, lambda: Amount(*state), phase="amend")
    try:
        with reporter:
            node.amend(options, force=args.force, progress=note)
        reporter.end_line()
    except (DiskwrightError, OSError) as error:
        text = message_of(error)
        raise Failure("\n".join([text, *([_HINTS[text].format(program())] if text in _HINTS else [])])) from error


def _driver(format: str) -> type[Any]:
    from diskwright.core import registry
    from diskwright.core.driver import Format

    try:
        driver: type[Any] = registry.find(format)
    except OptionError:
        raise Failure(f"Unknown file format '{format}'") from None
    if not issubclass(driver, Format) or not any("amend" in vars(cls) for cls in driver.__mro__ if cls is not Format):
        raise Failure(f"Format driver '{format}' does not support option amendment")
    return driver


def _typed(format: str, given: Mapping[str, str]) -> object:
    from diskwright.core.options import describe, parse

    driver = _driver(format)
    known = {info.name for info in describe(driver.amend_options)}
    creatable = {info.name for info in describe(driver.create_options)}
    for key in given:
        name = key.replace("_", "-")
        if name not in known:
            only = "\nThis option is only supported for image creation" if name in creatable else ""
            raise Failure(f"Invalid parameter '{key}'{only}")
    try:
        typed = parse(driver.amend_options, given, owner=format)
    except OptionError as error:
        raise Failure(message_of(error)) from error
    if getattr(typed, "size", None) == 0:  # more likely a slip of a script than a wish: everything would be lost
        raise Failure("New image size must be positive")
    return typed


def _describe(format: str) -> str:
    from diskwright.cli.commands.create import option_lines
    from diskwright.core.options import describe

    rows = {info.name: info for info in describe(_driver(format).amend_options)}
    return "\n".join([f"Amend options for '{format}':", *option_lines(rows)]) + "\n"

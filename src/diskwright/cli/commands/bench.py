"""``diskwright bench``: how long a number of requests to an image take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter
from typing import Final

from diskwright.cli import common
from diskwright.cli.common import Failure
from diskwright.errors import DiskwrightError, message_of

SUMMARY: Final = "measure how long requests to an image take"

_MAX_INT: Final = (1 << 31) - 1

_DEFAULT_COUNT: Final = 75000
_DEFAULT_DEPTH: Final = 64
_DEFAULT_SIZE: Final = 4096

MAX_SIZE: Final = 1 << 26
"""Longest request in bytes: each that is under way has a buffer of that length."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", dest="count", metavar="COUNT", type=_number("request count"), default=_DEFAULT_COUNT,
        help=f"how many requests (default: {_DEFAULT_COUNT})",
    )  # fmt: skip
    parser.add_argument(
        "-d", dest="depth", metavar="DEPTH", type=_number("queue depth"), default=_DEFAULT_DEPTH,
        help=f"how many at once (default: {_DEFAULT_DEPTH})",
    )  # fmt: skip
    parser.add_argument("-f", dest="format", metavar="FMT", help="the image's format; probed when not given")
    parser.add_argument(
        "--flush-interval", metavar="N", type=_number("flush interval"), default=0,
        help="with -w: flush whenever the requests left are a multiple of this",
    )  # fmt: skip
    parser.add_argument("--no-drain", action="store_true", help="do not wait for the other requests before a flush")
    parser.add_argument("-i", dest="aio", metavar="AIO", type=_aio, help="threads, native or io_uring: accepted")
    parser.add_argument("-n", dest="native", action="store_true", help="as -i native")
    parser.add_argument(
        "-o", dest="offset", metavar="OFFSET", type=common.size("offset"), default=0, help="where the first one goes"
    )
    parser.add_argument(
        "--pattern", metavar="BYTE", type=_number("pattern byte", 255), default=0, help="the byte to write (default: 0)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="accepted; the result is printed all the same")
    parser.add_argument(
        "-s", dest="size", metavar="SIZE", type=_size, default=_DEFAULT_SIZE, help="bytes of a request (default: 4k)"
    )
    parser.add_argument(
        "-S", dest="step", metavar="STEP", type=_step, default=0, help="how far apart they begin (default: their size)"
    )
    parser.add_argument("-t", dest="cache", metavar="CACHE", default="writeback", type=_cache, help="cache mode")
    parser.add_argument("-w", dest="write", action="store_true", help="write: what the image holds there is lost")
    common.add_image_opts(parser)
    common.add_force_share(parser)
    common.add_object(parser)
    common.add_gate(parser)
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    from diskwright.engine.bench import Bench, Load

    filename = common.one_operand(args.filename)
    _check(args, filename)
    load = Load(
        count=args.count, depth=args.depth, offset=args.offset, size=args.size, step=args.step,
        pattern=args.pattern if args.write else None, flush_interval=args.flush_interval, drain=not args.no_drain,
    )  # fmt: skip
    with common.graph_of(args) as graph:
        node = common.open_image(
            graph, filename, format=args.format, image_opts=args.image_opts, writable=args.write,
            force_share=args.force_share, cache=args.cache,
        )  # fmt: skip
        print(
            f"Sending {load.count} {'write' if args.write else 'read'} requests, {load.size} bytes each, "
            f"{load.depth} in parallel (starting at offset {load.offset}, step size {load.step or load.size})",
            flush=True,
        )
        if load.flush_interval:
            print(f"Sending flush every {load.flush_interval} requests", flush=True)
        begin = perf_counter()
        try:
            Bench(node, load).run()
        except (DiskwrightError, OSError) as error:
            raise Failure(f"Failed request: {message_of(error)}") from error
        print(f"Run completed in {perf_counter() - begin:3.3f} seconds.")
    return 0


def _check(args: argparse.Namespace, filename: str) -> None:
    """Raises Failure for options that do not go together."""
    if not args.write and args.flush_interval:
        raise Failure("--flush-interval is only available in write tests")
    if args.flush_interval and args.flush_interval < args.depth:
        raise Failure("Flush interval can't be smaller than depth")
    if not args.depth:
        raise Failure("Invalid queue depth specified")
    if (args.native or args.aio == "native") and args.cache not in ("none", "directsync"):
        raise Failure(
            f"Could not open '{filename}': aio=native was specified, but it requires cache.direct=on, which was not "
            "specified."
        )


def _number(what: str, most: int = _MAX_INT) -> Callable[[str], int]:
    """A type of option: a whole number from 0 to ``most``."""

    def read(text: str) -> int:
        try:
            value = int(text, 0) if text == text.strip() and "_" not in text else -1
        except ValueError:
            value = -1
        if not 0 <= value <= most:
            raise Failure(f"Invalid {what} specified")
        return value

    return read


def _aio(text: str) -> str:
    if text not in ("threads", "native", "io_uring"):
        raise Failure(f"Invalid aio option: {text}")
    return text


def _cache(text: str) -> str:
    if text not in common.CACHE_MODES:
        raise Failure("Invalid cache mode")
    return text


def _size(text: str) -> int:
    return _bounded(text, "buffer size")


def _step(text: str) -> int:
    return _bounded(text, "step_size")


def _bounded(text: str, what: str) -> int:
    value = common.size_argument(text, what, _MAX_INT)
    if what == "buffer size" and value > MAX_SIZE:
        raise Failure(f"Requests of more than {MAX_SIZE} bytes are not sent")
    return value

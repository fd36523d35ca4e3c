"""``diskwright mirror``: copies a disk while its guest, served over NBD, goes on writing."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from diskwright.api import GUEST, Mirror, format_by_name, open_target
from diskwright.cli import common
from diskwright.cli.commands.serve import add_listen_arguments, guarded, start
from diskwright.cli.common import Failure
from diskwright.cli.faces import program
from diskwright.cli.progress import Amount, Reporter
from diskwright.core.disk import Disk
from diskwright.core.node import below_filters
from diskwright.errors import JobError, OptionError, message_of
from diskwright.units import human_size

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node

SUMMARY: Final = "copy a disk while its guest goes on writing"

ABANDONED: Final = 130
"""The exit code when the user abandoned the mirror: as for any command ended by SIGINT."""

_POLICIES: Final = ("report", "ignore", "enospc", "stop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser)
    parser.add_argument(
        "-O", "--target-format", metavar="FMT", help="format of the target (default: by its ending, else the source's)"
    )
    parser.add_argument("-o", metavar="OPTIONS", action="append", default=[], help="options for creating the target")
    parser.add_argument("-n", "--existing", action="store_true", help="the target exists: write over it")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--cache", metavar="CACHE", default="writeback", help="cache mode of the source")
    parser.add_argument("-t", "--target-cache", metavar="CACHE", default="writeback", help="cache mode of the target")
    parser.add_argument("--progress", choices=("json",), help="progress on standard error as JSON lines")
    _add_job_arguments(parser)
    end = parser.add_argument_group("the end")
    end.add_argument(
        "--finish", choices=("when-ready",), help="finish as soon as the target is in sync, without waiting for Ctrl-C"
    )
    end.add_argument("--pivot", action="store_true", help="then go on serving, from the target")
    end.add_argument("--keep-serving", action="store_true", help="then go on serving, from the source")
    end.add_argument(
        "--verify", action="store_true", help="read source and target again and compare; the guest waits meanwhile"
    )
    add_listen_arguments(parser)
    parser.add_argument("--serve", metavar="PATH", dest="socket", help="same as --socket")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")


def _add_job_arguments(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group("the copying")
    job.add_argument("--sync", choices=("full", "top", "none"), default="full", help="what to copy (default: full)")
    job.add_argument("--granularity", metavar="SIZE", help="what a dirty bit stands for (default: 64k)")
    job.add_argument("--buf-size", metavar="SIZE", help="how much may be in flight (default: 16M)")
    job.add_argument("-r", "--speed", metavar="SIZE", help="limit in bytes per second")
    job.add_argument("--copy-mode", choices=("background", "write-blocking"), default="background")
    job.add_argument("--on-source-error", choices=_POLICIES, default="report")
    job.add_argument("--on-target-error", choices=_POLICIES, default="report")
    job.add_argument("--no-unmap", action="store_true", help="allocate zeros in the target too")


def run(args: argparse.Namespace) -> int:
    if args.pivot and args.keep_serving:
        raise OptionError("Give either --pivot or --keep-serving, not both")
    with common.graph_of(args) as graph, _place_to_listen(args):
        node = common.open_image(
            graph,
            args.source,
            format=args.format,
            image_opts=args.image_opts,
            writable=True,
            force_share=args.force_share,
            cache=common.cache_mode(args.cache, "cache"),
        )
        disk = graph.disk(guarded(graph, node, args, args.source), GUEST)
        session = _Session(args, graph, disk)
        server = start(args, disk, read_only=False)
        try:
            session.say(f"Serving '{args.source}' ({disk.size} bytes) at {server.uri(args.export)}")
            code = session.mirror()
            if code == 0 and (args.pivot or args.keep_serving):
                session.serve_on()
        finally:
            # A request that waits at a drained disk's gate would keep the server from closing.
            disk.shut()
            server.close()
            session.let_guest_go()
        disk.close()
        return code


class _Session:
    """One mirror with its signals: the first asks for the end, the second abandons."""

    def __init__(self, args: argparse.Namespace, graph: Graph, disk: Disk) -> None:
        self.args, self.graph, self.disk = args, graph, disk
        self.signals = 0
        self.wake = threading.Event()
        self.holding = False
        self.mirrored: Mirror | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.signals += 1
        self.wake.set()

    def say(self, text: str) -> None:
        if not self.args.quiet:
            print(text, flush=True)

    # -- the mirror ------------------------------------------------------------------------------

    def mirror(self) -> int:
        target = self._open_target()
        began = time.monotonic()
        mirror = Mirror(self.disk, target, on_event=self._on_event, at_end=self._at_end, **self._job_options())
        self.mirrored = mirror
        signal.signal(signal.SIGUSR2, lambda number, frame: self._resume(mirror))
        try:
            mirror.start()
            with self._reporter(mirror):
                self._until(lambda: mirror.ready or mirror.ended)
                if not mirror.ended:
                    self.say(f"Ready: the target is in sync after {time.monotonic() - began:.1f} s")
                    by_hand = self.args.finish is None and self.args.progress is None
                    if by_hand and not self.args.quiet and not self.signals:
                        print("Press Ctrl-C to finish, twice to abandon", file=sys.stderr, flush=True)
                    self._until(
                        lambda: mirror.ended,
                        finish=lambda: mirror.finish(pivot=self.args.pivot, wait=False),
                    )
            mirror.result()
            self._tell(mirror, began)
            return 0
        except JobError as error:
            if self.signals > 1:
                raise Failure("Abandoned: the target is not a copy of the source", ABANDONED) from None
            cause = error.__cause__ or error
            raise Failure(f"The mirror failed: {message_of(cause)}; the target is not a copy of the source") from error
        finally:
            mirror.close()

    def _until(self, done: Callable[[], bool], finish: Callable[[], None] | None = None) -> None:
        """Waits for ``done``; calls ``finish`` once when the user, or --finish, wants the end."""
        asked = False
        while not done():
            if self.signals > 1:
                raise JobError("abandoned")
            if finish is not None and not asked and (self.signals or self.args.finish == "when-ready"):
                asked = True
                finish()
            self.wake.wait(0.2)
            self.wake.clear()

    def _resume(self, mirror: Mirror) -> None:
        try:
            mirror.job.resume()
        except JobError:
            pass  # it was not paused

    def _at_end(self) -> None:
        """The moment of which the target is the source: both stand still."""
        if self.args.verify:
            self._verify()
        if not (self.args.pivot or self.args.keep_serving):
            # Nobody serves the guest from here on, so what it still sends must not reach the source either.
            self.disk.start_drain()
            self.holding = True

    def _verify(self) -> None:
        began = time.monotonic()
        assert self.mirrored is not None
        difference = self.mirrored.verify()
        if difference is not None:
            raise JobError(f"verification found a difference at offset {difference}")
        seconds = time.monotonic() - began
        self.say(f"Verified: {human_size(self.disk.size)} read on both sides and equal, {seconds:.1f} s")

    def let_guest_go(self) -> None:
        if self.holding:
            self.holding = False
            self.disk.end_drain()

    def serve_on(self) -> None:
        self.say(f"Serving from the {'target' if self.args.pivot else 'source'}; Ctrl-C to stop")
        before = self.signals
        while self.signals == before:
            self.wake.wait(1)
            self.wake.clear()

    # -- parts -----------------------------------------------------------------------------------

    def _open_target(self) -> Node:
        args = self.args
        options = common.option_mapping(common.join_options(args.o)) if args.o else {}
        return open_target(
            self.graph,
            args.target,
            self.disk.size,
            format=args.target_format or format_by_name(args.target, below_filters(self.disk.node).driver_name),
            options=options,
            existing=args.existing,
            cache=common.cache_mode(args.target_cache, "cache"),
        )

    def _job_options(self) -> dict[str, Any]:
        args = self.args
        options: dict[str, Any] = {
            "sync": args.sync,
            "copy_mode": args.copy_mode,
            "on_source_error": args.on_source_error,
            "on_target_error": args.on_target_error,
            "unmap": not args.no_unmap,
            "target_is_new": not args.existing,
        }
        for name, what in (("granularity", "granularity"), ("buf_size", "buffer size"), ("speed", "speed")):
            text = getattr(args, name)
            if text is not None:
                options[name] = common.size_argument(text, what)
        return options

    def _reporter(self, mirror: Mirror) -> Reporter:
        style = "json" if self.args.progress == "json" else None
        if style is None and sys.stdout.isatty() and not self.args.quiet:
            style = "line"
        return Reporter(style, lambda: Amount(*mirror.progress()), phase="mirror")

    def _on_event(self, name: str, data: dict[str, object]) -> None:
        self.wake.set()
        if self.args.progress == "json":
            import json

            # One write: the progress reports come from another thread.
            print(json.dumps({"event": name, "data": data}) + "\n", end="", file=sys.stderr, flush=True)
        elif name == "BLOCK_JOB_ERROR" and data.get("action") == "stop":
            print(
                f"{program()}: a {data['operation']} failed; the mirror is paused and its guest goes on. "
                "Mend the cause and send SIGUSR2 to resume",
                file=sys.stderr,
                flush=True,
            )

    def _tell(self, mirror: Mirror, began: float) -> None:
        seconds = time.monotonic() - began
        done, _ = mirror.progress()
        self.say(
            f"Finished: '{self.args.target}' is '{self.args.source}' as it was at one moment; "
            f"{human_size(done)} copied in {seconds:.1f} s"
        )


@contextmanager
def _place_to_listen(args: argparse.Namespace) -> Iterator[None]:
    """Without a place given, a unix socket in a folder of its own, which goes away at the end."""
    if args.socket is not None or args.bind is not None or args.port is not None:
        yield
        return
    folder = tempfile.mkdtemp(prefix="diskwright-", dir=os.environ.get("XDG_RUNTIME_DIR") or None)
    args.socket = os.path.join(folder, "nbd.sock")
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)

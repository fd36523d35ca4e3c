"""``diskwright serve``: one image as an NBD export, until told to stop."""

from __future__ import annotations

import argparse
import signal
import threading
from typing import TYPE_CHECKING

from diskwright.cli.common import Failure, add_source, cache_mode, graph_of, open_image, warn_guessed_raw
from diskwright.cli.objects import Objects, objects_of
from diskwright.core.disk import Disk
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, Node
from diskwright.errors import OptionError
from diskwright.exports.nbd import NbdExport, NbdServer

if TYPE_CHECKING:
    from diskwright.exports.nbd.tls import ServerTls

SUMMARY = "serve an image over NBD"

DEFAULT_PORT = 10809
"""The port IANA gave NBD."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add_listen_arguments(parser)
    add_tls_arguments(parser)
    parser.add_argument("--read-only", action="store_true", help="refuse every write")
    parser.add_argument("--cache", default="writeback", help="cache mode: none, writeback, writethrough, ...")
    parser.add_argument("image", metavar="IMAGE", help="a file name or json: options")


def add_listen_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to listen; shared with ``mirror``."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="listen on this unix socket")
    where.add_argument("--bind", metavar="ADDR", help="listen on this address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help=f"TCP port (default: {DEFAULT_PORT}; 0: any free one)")
    parser.add_argument("--export", metavar="NAME", default="", help="name of the export (default: none)")
    parser.add_argument("--connections", metavar="N", type=int, default=64, help="how many clients at once (64)")


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls-creds", metavar="ID", help="speak TLS, with the credentials of an --object")
    parser.add_argument("--tls-authz", metavar="ID", help="let in only whom this --object allows")
    parser.add_argument("--tls-optional", action="store_true", help="let clients go without TLS as well")


def server_tls(objects: Objects, creds: str | None, authz: str | None, *, optional: bool) -> ServerTls | None:
    """How a server is to speak TLS; None when it is not asked to. Raises Failure or OptionError."""
    if creds is None:
        for given, name in ((authz is not None, "authz"), (optional, "optional")):
            if given:
                raise Failure(f"--tls-{name} is not permitted without --tls-creds")
        return None
    from diskwright.exports.nbd.tls import ServerTls

    try:
        credentials = objects.credentials(creds, "server")
    except Failure as failure:
        raise Failure(f"Failed to get TLS creds: {failure.message}") from None
    allows = objects.authz(authz) if authz is not None else None
    return ServerTls(credentials, required=not optional, allows=allows)


def run(args: argparse.Namespace) -> int:
    stop = Stop()
    cache = cache_mode(args.cache, "cache")
    with graph_of(args) as graph:
        node = open_image(
            graph,
            args.image,
            format=args.format,
            image_opts=args.image_opts,
            writable=not args.read_only,
            force_share=args.force_share,
            cache=cache,
        )
        disk = graph.disk(guarded(graph, node, args, args.image))
        tls = server_tls(objects_of(args.object), args.tls_creds, args.tls_authz, optional=args.tls_optional)
        server = start(args, disk, read_only=args.read_only, tls=tls)
        try:
            print(f"Serving '{args.image}' ({disk.size} bytes) at {server.uri(args.export)}", flush=True)
            stop.event.wait()
        finally:
            server.close()
        disk.close()
    return 0


def guarded(graph: Graph, node: Node, args: argparse.Namespace, image: str) -> Node:
    """What a guest is to be given of the image that was opened as ``image``: a raw disk nobody called raw gets the
    probe guard (see filters/probe_guard.py)."""
    if node.writable:
        warn_guessed_raw(image, node, args.format, args.image_opts)
    guessed = args.format is None and not args.image_opts and not image.startswith("json:")
    if not (guessed and node.writable and isinstance(node, FormatNode) and node.format.name == "raw"):
        return node
    from diskwright.filters.probe_guard import ProbeGuard

    return graph.insert_filter(ProbeGuard(node))


def start(args: argparse.Namespace, disk: Disk, *, read_only: bool, tls: ServerTls | None = None) -> NbdServer:
    """A server on the place the arguments name, with ``disk`` as its only export."""
    if args.port is not None and args.socket is not None:
        raise OptionError("--port goes with --bind, not with --socket")
    server = NbdServer(max_connections=args.connections, tls=tls)
    server.add_export(NbdExport(args.export, disk, read_only=read_only))
    if args.socket is not None:
        server.listen_unix(args.socket)
    else:
        server.listen_tcp(args.bind or "127.0.0.1", DEFAULT_PORT if args.port is None else args.port)
    server.start()
    return server


class Stop:
    """Set by SIGINT, SIGTERM or SIGHUP. ``count`` tells how often: a second time may mean more."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.count += 1
        self.event.set()

"""``qemu-nbd``, also as ``diskwright nbd``: exports an image over NBD, lists exports, connects the kernel's devices."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from diskwright.cli.common import Failure
from diskwright.cli.faces import program
from diskwright.cli.qnbd import arguments
from diskwright.cli.qnbd.arguments import MAX_CLIENTS, Settings
from diskwright.errors import DiskwrightError, message_of

if TYPE_CHECKING:
    import socket

    from diskwright.cli.qnbd.background import Background
    from diskwright.cli.qnbd.device import Device
    from diskwright.core.disk import Disk
    from diskwright.exports.nbd import NbdExport
    from diskwright.exports.nbd.tls import ServerTls

SUMMARY = "export an image over NBD, with qemu-nbd's command line"


def main(words: Sequence[str]) -> int:
    """Runs it. Raises Failure."""
    settings = arguments.parse(words)
    if settings.help:
        from diskwright.cli.qnbd.help import text

        print(text(), end="")
        return 0
    if settings.version:
        from diskwright.cli.faces import current
        from diskwright.cli.help import version

        print(version(current()))
        return 0
    if settings.help_on_objects:
        print(arguments.OBJECT_HELP, end="")
        return 0
    return _run(settings)


def _run(settings: Settings) -> int:
    from diskwright.cli.commands.serve import server_tls
    from diskwright.cli.qnbd.listen import passed_socket

    passed = passed_socket(settings)
    if settings.list:
        from diskwright.cli.qnbd.listing import run

        return run(settings)
    tls = server_tls(settings.objects, settings.tls_creds, settings.tls_authz, optional=settings.tls_optional)
    if settings.disconnect:
        from diskwright.cli.qnbd.device import disconnect

        return disconnect(settings.image)
    background: Background | None = None
    if settings.fork or (settings.connect is not None and not settings.verbose):
        from diskwright.cli.qnbd.background import fork

        forked = fork()
        if isinstance(forked, int):
            return forked
        background = forked
    return _serve(settings, tls, passed, background)


class _End:
    """What ends the program: a signal, or the last client's leaving. A context manager: signals are its own within."""

    def __init__(self, persistent: bool) -> None:
        self._persistent = persistent
        self.event = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _End:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, lambda *_: self.event.set())
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_leave(self, served: bool, left: int) -> None:
        """See ``NbdServer``. Who has only asked what there is was no client."""
        if served and not left and not self._persistent:
            self.event.set()


def _serve(
    settings: Settings, tls: ServerTls | None, passed: socket.socket | None, background: Background | None
) -> int:
    """Serves until the end. Every step that may fail comes before anybody is told that all is well."""
    from diskwright.cli.qnbd import image
    from diskwright.cli.qnbd.background import write_pid_file
    from diskwright.cli.qnbd.device import Device, default_socket
    from diskwright.cli.qnbd.listen import listen
    from diskwright.exports.nbd import NbdServer

    if settings.verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"{program()}: %(message)s")
    if settings.connect is not None and settings.socket is None:
        settings.socket = default_socket(settings.connect)
    clients = min(settings.shared or MAX_CLIENTS, MAX_CLIENTS)
    with ExitStack() as stack:
        end = stack.enter_context(_End(settings.persistent))
        server = NbdServer(max_connections=clients, tls=tls, queue=True, on_leave=end.on_leave)
        stack.callback(server.close)
        if passed is not None:
            server.listen_on(passed)
        else:
            listen(server, settings)
        graph = image.new_graph(settings)
        stack.callback(graph.close)
        disk = graph.disk(image.open_root(graph, settings))
        stack.callback(disk.close)
        device = Device(settings.connect) if settings.connect is not None else None
        if device is not None:
            stack.callback(device.close)
        server.add_export(_export(settings, disk, stack))
        stack.callback(server.close)  # before the disk: what clients have sent is served
        if settings.pid_file is not None:
            write_pid_file(settings.pid_file)
        server.start()
        if device is not None:
            _attach(device, settings, end, stack)
        if background is not None:
            background.ready(keep_stderr=settings.verbose)
        end.event.wait()
    return 0


def _export(settings: Settings, disk: Disk, stack: ExitStack) -> NbdExport:
    """What is exported, with what block status can tell of it. Raises Failure."""
    from diskwright.exports.nbd import NbdExport
    from diskwright.exports.nbd.contexts import AllocationDepth, BaseAllocation, Context, dirty_runs

    contexts: list[Context] = [BaseAllocation()]
    if settings.allocation_depth:
        contexts.append(AllocationDepth())
    for name in settings.bitmaps:
        try:
            found = dirty_runs(disk.node, name, read_only=settings.read_only)
        except DiskwrightError as error:
            raise Failure(message_of(error)) from error
        stack.callback(found.release)
        contexts.append(found)
    name, text = settings.export_name or "", settings.description or ""
    # A second connection of the only client there may be would wait for the first to end.
    return NbdExport(name, disk, text, settings.read_only, tuple(contexts), multi=settings.shared != 1)


def _attach(device: Device, settings: Settings, end: _End, stack: ExitStack) -> None:
    """Makes the kernel the server's client, until either leaves."""
    device.attach(settings.socket or "", settings.export_name or "")

    def run() -> None:
        try:
            device.run()
        except OSError as error:
            print(f"{program()}: {device.path}: {message_of(error)}", file=sys.stderr)
        finally:
            end.event.set()

    def stop() -> None:
        try:
            device.stop()
        except OSError:
            pass  # it is disconnected already
        thread.join()

    thread = threading.Thread(target=run, name="nbd-device")
    thread.start()
    stack.callback(stop)
    threading.Thread(target=_look_for_partitions, args=(device,), name="nbd-partitions", daemon=True).start()
    if settings.verbose:
        print(f"NBD device {device.path} is now connected to {settings.image}", file=sys.stderr)


def _look_for_partitions(device: Device) -> None:
    try:
        device.read_partitions()
    except OSError:
        pass  # the device is good without

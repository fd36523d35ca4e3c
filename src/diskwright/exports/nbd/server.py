"""The NBD server: listens, shakes hands, and gives each client a thread."""

from __future__ import annotations

import logging
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from diskwright.core.disk import Disk
from diskwright.errors import GraphError, ProtocolError
from diskwright.exports.nbd.connection import Clients, Connection
from diskwright.exports.nbd.contexts import BaseAllocation, Context
from diskwright.exports.nbd.crew import Crew
from diskwright.units import KiB
from diskwright.wire.nbd import constants as c
from diskwright.wire.nbd.handshake import CLOSED, SECURING, TRANSMISSION, Chosen, ExportInfo, ServerHandshake, Tls

if TYPE_CHECKING:
    from diskwright.core.tls.stream import TlsSocket
    from diskwright.exports.nbd.channel import Stream
    from diskwright.exports.nbd.tls import ServerTls

_log: Final = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds a client may take for the whole handshake; a slow network needs one."""
CLOSE_TIMEOUT: Final = 30.0
"""Seconds clients have to take their last replies when the server closes."""
_BACKLOG: Final = 128
_ACCEPT_PAUSE: Final = 0.05


@dataclass(frozen=True)
class NbdExport:
    """A disk under a name. ``contexts`` are what block status can tell of it."""

    name: str
    disk: Disk
    description: str = ""
    read_only: bool = False
    contexts: tuple[Context, ...] = (BaseAllocation(),)
    multi: bool = True
    """Whether clients are told that they may come over several connections."""

    def info(self) -> ExportInfo:
        """What a client is told at this moment."""
        flags = c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_CACHE | (c.FLAG_CAN_MULTI_CONN if self.multi else 0)
        if self.read_only or self.disk.read_only:
            flags |= c.FLAG_READ_ONLY
        else:
            flags |= c.FLAG_SEND_FUA | c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_FAST_ZERO
        preferred = max(4 * KiB, min(self.disk.node.cluster_size, 64 * KiB))
        return ExportInfo(self.disk.size, flags, self.description, 1, preferred, self._names())

    def _names(self) -> tuple[str, ...]:
        return tuple(context.name for context in self.contexts)

    def chosen_contexts(self, chosen: Chosen) -> list[tuple[int, Context]]:
        """Those a client has chosen, with their ids."""
        return [(n, each) for n, each in enumerate(self.contexts, 1) if each.name in chosen.contexts]


class NbdServer:
    """Serves exports to many clients. ``start`` after at least one ``listen_...``; ``close`` ends everything.

    Of more than ``max_connections`` clients the last are turned away; with ``queue`` they wait until others have left,
    in the listener's own queue. ``on_leave`` is called when a client has left, with whether it had chosen an export,
    and how many are left; by that client's thread, which must not wait there.
    """

    def __init__(
        self,
        *,
        max_connections: int = 64,
        handshake_timeout: float = HANDSHAKE_TIMEOUT,
        tls: ServerTls | None = None,
        queue: bool = False,
        on_leave: Callable[[bool, int], None] | None = None,
    ) -> None:
        self._max, self._timeout = max_connections, handshake_timeout
        self._tls, self._queue, self._on_leave = tls, queue, on_leave
        self._exports: dict[str, NbdExport] = {}
        self._listeners: list[socket.socket] = []
        self._unix_paths: list[tuple[str, int]] = []
        self._lock = threading.Condition(threading.Lock())
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._shared = Clients()
        self._crews: dict[Disk, Crew] = {}
        self._acceptor: threading.Thread | None = None
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC)[::-1]
        self._closing = False

    # -- exports ---------------------------------------------------------------------------------

    def add_export(self, export: NbdExport) -> None:
        """Offers ``export`` from now on. Raises GraphError when the name is taken."""
        with self._lock:
            if export.name in self._exports:
                raise GraphError(f"NBD server already has export named '{export.name}'")
            self._exports[export.name] = export

    def remove_export(self, name: str) -> None:
        """New clients do not find it any more; those connected keep it."""
        with self._lock:
            if self._exports.pop(name, None) is None:
                raise GraphError(f"Export '{name}' is not found")

    # -- listening -------------------------------------------------------------------------------

    def listen_unix(self, path: str) -> str:
        """Listens on a unix socket; one left there by a server that died is replaced. Raises OSError."""
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(path)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            error.filename = error.filename or path
            raise
        self._listeners.append(listener)
        self._unix_paths.append((path, os.stat(path).st_ino))
        return path

    def listen_tcp(self, host: str, port: int) -> tuple[str, int]:
        """Listens on TCP; port 0 takes a free one. Returns the address. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            error.filename = error.filename or f"{host}:{port}"
            raise
        self._listeners.append(listener)
        address: tuple[str, int] = listener.getsockname()[:2]
        return address

    def listen_on(self, listener: socket.socket) -> None:
        """Takes a socket that listens already, as a service manager passes one. It is closed at the end; a unix
        socket's file is left to who made it."""
        listener.setblocking(True)
        self._listeners.append(listener)

    def uri(self, name: str = "") -> str:
        """The NBD URI of an export at the first place listened on."""
        listener = self._listeners[0]
        scheme = "nbds" if self._tls is not None and self._tls.required else "nbd"
        if listener.family == socket.AF_UNIX:
            return f"{scheme}+unix:///{quote(name)}?socket={quote(listener.getsockname(), safe='/')}"
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return f"{scheme}://{shown}:{port}/{quote(name)}"

    def start(self) -> None:
        """Begins to accept clients."""
        self._acceptor = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)
        self._acceptor.start()

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Stops: no new clients; requests that have been received are served and answered; then every connection
        ends. A client that does not take its replies within ``timeout`` seconds is cut off."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        os.write(self._wake, b"x")
        if self._acceptor is not None:
            self._acceptor.join()
        for listener in self._listeners:
            listener.close()
        for path, inode in self._unix_paths:
            _unlink_own(path, inode)
        self._end_clients(timeout)
        os.close(self._wake)
        os.close(self._woken)

    def _end_clients(self, timeout: float) -> None:
        with self._lock:
            threads = list(self._clients.values())
            self._shared.closing = True
            # Reading ends: what is in the buffers is still served.
            for client in self._clients:
                _shut(client, socket.SHUT_RD)
            if not self._lock.wait_for(lambda: not self._clients, timeout):
                self._shared.cut.set()
                for client in self._clients:
                    _shut(client, socket.SHUT_RDWR)
        for thread in threads:
            thread.join()

    # -- clients ---------------------------------------------------------------------------------

    def _accept(self) -> None:
        poller = select.poll()
        by_fd = {listener.fileno(): listener for listener in self._listeners}
        poller.register(self._woken, select.POLLIN)
        for listener in self._listeners:
            listener.setblocking(False)
            poller.register(listener, select.POLLIN)
        while not self._closing:
            for fd, _ in poller.poll():
                if fd not in by_fd:
                    os.read(self._woken, 64)
                elif not self._is_full():
                    self._take(by_fd[fd])
            for fd in by_fd:
                # Nobody is looked for while there is no place; who leaves then wakes this thread.
                poller.modify(fd, 0 if self._is_full() else select.POLLIN)

    def _is_full(self) -> bool:
        return self._queue and len(self._clients) >= self._max

    def _take(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError as error:
            # Gone again already, or no descriptors left: neither is a reason to stop serving the others.
            _log.warning("Could not accept an NBD client: %s", error)
            time.sleep(_ACCEPT_PAUSE)
            return
        client.setblocking(True)
        with self._lock:
            if len(self._clients) >= self._max:
                _log.warning("Refused an NBD client: %d are connected already", self._max)
                client.close()
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="nbd-client", daemon=True)
            self._clients[client] = thread
            self._shared.connected = len(self._clients)
            try:
                thread.start()
            except RuntimeError as error:
                self._forget(client)
                _log.warning("Could not start a thread for an NBD client: %s", error)

    def _serve(self, client: socket.socket) -> None:
        served = False
        try:
            agreed = self._agree(client)
            if agreed is not None:
                served = True
                self._transmit(*agreed)
        except (ProtocolError, OSError, GraphError) as error:
            _log.info("An NBD client's connection ended: %s", error)
        except Exception:
            _log.exception("An NBD client's connection failed")
        finally:
            with self._lock:
                was_full = self._is_full()
                self._forget(client)
                left = len(self._clients)
                self._lock.notify_all()
                if was_full and not self._closing:
                    os.write(self._wake, b"x")
            if self._on_leave is not None:
                self._on_leave(served, left)

    def _forget(self, client: socket.socket) -> None:
        """Under the lock."""
        del self._clients[client]
        self._shared.connected = len(self._clients)
        client.close()

    def _agree(self, client: socket.socket) -> tuple[Stream, NbdExport, Chosen, bytes] | None:
        """Shakes hands: what the client goes on over, what it has chosen, and what it has sent since; None when it has
        chosen nothing."""
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that died frees its place
        with self._lock:
            exports = dict(self._exports)
        infos = {name: export.info() for name, export in exports.items()}
        shake = ServerHandshake(infos, Tls.NONE if self._tls is None else self._tls.kind)
        deadline = time.monotonic() + self._timeout
        client.settimeout(self._timeout)
        stream: socket.socket | TlsSocket = client
        stream.sendall(shake.greeting())
        while shake.state not in (TRANSMISSION, CLOSED):
            data = stream.recv(4096)
            if not data:
                return None
            answer = shake.feed(data)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no agreement within {self._timeout:g} seconds")
            client.settimeout(left)  # for all of it together: a byte now and then must not keep a place
            if answer and not self._reply(stream, answer, shake.state == CLOSED):
                return None
            if shake.state == SECURING and self._tls is not None:
                stream = self._tls.secure(client, left)
                shake.secured()
        if shake.chosen is None:
            return None
        client.settimeout(None)
        return stream, exports[shake.chosen.name], shake.chosen, shake.rest

    def _reply(self, stream: Stream, answer: bytes, farewell: bool) -> bool:
        """Sends an answer. False when it was the last, and nobody waited for it."""
        try:
            stream.sendall(answer)
        except OSError:
            if farewell:
                return False
            raise
        return True

    def _transmit(self, stream: Stream, export: NbdExport, chosen: Chosen, rest: bytes) -> None:
        """Serves a client until it leaves."""
        read_only = export.read_only or export.disk.read_only
        contexts = export.chosen_contexts(chosen)
        plain = isinstance(stream, socket.socket)
        # A crew's leader looks at sockets, and what TLS has decrypted is not in one: there each has its own thread.
        with self._lock:
            crew = self._crews.setdefault(export.disk, Crew()) if plain else Crew()
        connection = Connection(stream, export.disk, read_only, chosen.structured, contexts, self._shared, crew)
        try:
            connection.serve(rest)
        finally:
            if not isinstance(stream, socket.socket):
                stream.finish()


def _shut(client: socket.socket, how: int) -> None:
    try:
        client.shutdown(how)
    except OSError:
        pass  # it has left by itself


def _remove_stale(path: str) -> None:
    """A socket nobody listens on is removed; anything else stays, and binding will say so."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a server with a full queue is there too
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass


def _unlink_own(path: str, inode: int) -> None:
    try:
        if os.stat(path).st_ino == inode:
            os.unlink(path)
    except OSError:
        pass

"""Reads that the kernel serves: bytes go from the image's file to the client's socket without passing through here.

``sendfile`` queues the file's own pages, not copies of them. Until the client has read them, what they hold must
not become another guest range's data, so the lease under which the bytes were found ends only when they have left:

* A unix socket tells how much is still unread. Leases wait in a queue until their bytes have left it, after the
  client has gone as well, and a full queue makes further reads go through memory.
* A TCP socket tells what was acknowledged, but on one host the receiver's queue shares the pages too. So there
  ``sendfile`` serves only images whose bytes never move: those without clusters.
* With TLS the kernel would send what nobody could decrypt: there it serves nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from diskwright.core.disk import Disk
from diskwright.core.driver import FilePlace
from diskwright.core.node import Node
from diskwright.units import KiB, MiB

if TYPE_CHECKING:
    from diskwright.exports.nbd.channel import Stream

SENDFILE: Final = 64 * KiB
"""Reads from this length on are sent from the file itself; below it copying costs less than the calls."""
MAX_PENDING: Final = 64
"""Leases one connection holds for bytes that are under way."""

_PIECE: Final = 1 * MiB
_ZEROS: Final = bytes(64 * KiB)
_FIRST_WAIT: Final = 0.005
_LONGEST_WAIT: Final = 1.0


class Found:
    """A place in a file, a descriptor of its own for it, and the lease under which it holds."""

    __slots__ = ("lease", "place")

    def __init__(self, place: FilePlace, lease: int) -> None:
        self.place, self.lease = place, lease


class Places:
    """The places one connection sends from. Used by the connection's own thread only."""

    def __init__(self, sock: Stream, disk: Disk) -> None:
        self._sock, self._disk, self._leases = sock, disk, disk.graph.leases
        self._plain = isinstance(sock, socket.socket)
        self._counts_unread = sock.family == socket.AF_UNIX
        self.pending: deque[tuple[int, int]] = deque()
        """``(bytes sent by then, lease)``, oldest first: places whose bytes may still be under way."""
        self._sent = 0  # bytes of places only: too few, so that leases end late rather than early
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def find(self, offset: int, length: int) -> Found | None:
        """Where the first bytes of the range lie, when it is worth sending them from there. Raises what ``Disk``
        raises. What it returns goes to ``send``, which gives it up."""
        if not self._plain:
            return None
        if len(self.pending) >= MAX_PENDING:
            self.release()
            if len(self.pending) >= MAX_PENDING:
                return None
        lease = self._leases.take()  # before the look-up: what is freed after it waits for this lease
        try:
            with self._disk.request():
                place = self._disk.place(offset, length) if self._usable() else None
                if place is not None and place.length >= SENDFILE:
                    # The gate is left before the bytes are: a switch may close the file meanwhile, and its number may
                    # then belong to another.
                    return Found(place._replace(fd=os.dup(place.fd)), lease)
        except BaseException:
            self._leases.end(lease)
            raise
        self._leases.end(lease)
        return None

    def send(self, header: bytes, found: Found, *, pad: bool) -> OSError | None:
        """Sends ``header`` and then exactly ``found.place.length`` bytes, while no other thread sends.

        Raises OSError when the socket fails. When the file fails: with ``pad`` sends zeros in place of the rest and
        returns why, for the caller to tell the client; without it raises, and the connection has to end there,
        since what the client has been promised cannot be kept.
        """
        place = found.place
        try:
            self._sock.sendall(header, socket.MSG_MORE)
            return self._send_file(place, pad)
        finally:
            os.close(place.fd)
            self._sent += place.length
            if self._counts_unread:
                self.pending.append((self._sent, found.lease))
            else:
                self._leases.end(found.lease)

    def give_up(self, found: Found) -> None:
        """For a place that will not be sent."""
        os.close(found.place.fd)
        self._leases.end(found.lease)

    def release(self) -> None:
        """Ends the leases of what has left the socket."""
        # The kernel counts at least the bytes nobody has read, and some of its own: again late rather than early.
        queued = struct.unpack("i", fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        gone = self._sent - queued if queued else self._sent
        while self.pending and self.pending[0][0] <= gone:
            self._leases.end(self.pending.popleft()[1])

    def wait_for_client(self) -> None:
        """Returns when the client has sent something or has left; ends leases meanwhile, so that a client that
        idles holds nothing up."""
        wait = _FIRST_WAIT
        self.release()
        while self.pending and not self._poll.poll(wait * 1000):
            self.release()
            wait = min(2 * wait, _LONGEST_WAIT)

    def end(self, cut: threading.Event) -> None:
        """Nothing more is sent. Waits until the client has read what was, or has closed its end, or ``cut`` is set."""
        if self.pending:
            try:
                self._sock.shutdown(socket.SHUT_WR)  # the client sees the end while we wait
            except OSError:
                pass
        wait = _FIRST_WAIT
        self.release()
        while self.pending and not cut.wait(wait):
            self.release()
            wait = min(2 * wait, _LONGEST_WAIT)
        while self.pending:
            self._leases.end(self.pending.popleft()[1])

    def _usable(self) -> bool:
        return self._counts_unread or not _has_clusters(self._disk.node)

    def _send_file(self, place: FilePlace, pad: bool) -> OSError | None:
        out, fd, offset, left = self._sock.fileno(), *place
        while left:
            try:
                sent = os.sendfile(out, fd, offset, left)
            except OSError:
                # The socket, the medium, or a file system without sendfile: by hand it will show which.
                sent = 0
            if not sent:
                return self._send_by_hand(FilePlace(fd, offset, left), pad)
            offset += sent
            left -= sent
        return None

    def _send_by_hand(self, place: FilePlace, pad: bool) -> OSError | None:
        fd, offset, left = place
        while left:
            try:
                data = os.pread(fd, min(left, _PIECE), offset)
                if not data:
                    raise OSError(errno.EIO, "The image became shorter while it was read")
            except OSError as error:
                if not pad:
                    raise
                self._send_zeros(left)
                return error
            self._sock.sendall(data)
            offset += len(data)
            left -= len(data)
        return None

    def _send_zeros(self, left: int) -> None:
        while left:
            step = min(left, len(_ZEROS))
            self._sock.sendall(memoryview(_ZEROS)[:step])
            left -= step


def _has_clusters(node: Node) -> bool:
    return node.cluster_size > 1 or any(_has_clusters(child) for child in node.children().values())

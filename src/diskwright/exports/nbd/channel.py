"""Sending to one client: whole replies, one after the other, whoever sends them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from diskwright.core.tls.stream import TlsSocket

    Stream = socket.socket | TlsSocket

IOV_MAX: Final = 1000
"""Buffers handed to one sendmsg; the kernel takes 1024."""

Buffers = list[bytes | memoryview]


class Channel:
    """A client's socket as those see it who answer the client. Thread-safe."""

    def __init__(self, sock: Stream) -> None:
        self.socket = sock
        self.lock = threading.Lock()
        """Held while a reply is sent, from its first byte to its last."""
        self._owed = b""
        self._begun = False

    def put(self, data: bytes | memoryview) -> None:
        """Sends every byte, waiting for the client to take them. Raises OSError when it is gone."""
        with self.lock:
            self.socket.sendall(data)

    def put_all(self, buffers: Buffers) -> None:
        """As ``put``, of buffers one behind the other."""
        with self.lock:
            send_all(self.socket, buffers)

    def offer(self, data: bytes | memoryview) -> bool:
        """Sends what can be sent without waiting. False when something is left: then the next call is to ``settle``."""
        if not self.lock.acquire(blocking=False):  # somebody is waiting for the client
            self._owed, self._begun = bytes(data), False
            return False
        try:
            sent = self.socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except BaseException:
            self.lock.release()
            raise
        if sent == len(data):
            self.lock.release()
            return True
        # The lock stays taken: half a reply must be followed by its other half.
        self._owed, self._begun = bytes(data[sent:]), True
        return False

    def settle(self) -> None:
        """Sends what ``offer`` has left, waiting for the client."""
        owed, self._owed = self._owed, b""
        if not self._begun:
            self.put(owed)
            return
        try:
            self.socket.sendall(owed)
        finally:
            self._begun = False
            self.lock.release()

    def hang_up(self) -> None:
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is gone already


def send_all(sock: Stream, buffers: Sequence[bytes | memoryview]) -> None:
    """Sends every byte. Raises OSError when the client is gone."""
    for first in range(0, len(buffers), IOV_MAX):
        part = buffers[first : first + IOV_MAX]
        sent = sock.sendmsg(part)
        for buffer in part:
            if sent >= len(buffer):
                sent -= len(buffer)
            else:
                sock.sendall(memoryview(buffer)[sent:])
                sent = 0

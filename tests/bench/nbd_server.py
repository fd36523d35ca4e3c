"""A tiny NBD server in a thread: one connection, a disk in memory, and the faults that a test asks for."""

from __future__ import annotations

import os
import socket
import struct
import threading
from types import TracebackType
from typing import Self

from bench.client import CHUNK, CHUNK_MAGIC, DISCONNECT, READ, REQUEST, SIMPLE, SIMPLE_MAGIC, WRITE

ACK, INFO = 1, 3


class TinyServer:
    """Serves ``disk``, which writes change. Requests that go wrong, by number: ``fail_at`` is answered with an error;
    of ``spoil_at``, a read, a byte is wrong; ``lose_at``, a write, is answered and not done; at ``close_at`` it goes.
    """

    def __init__(
        self,
        path: str,
        disk: bytearray,
        *,
        fail_at: int = -1,
        spoil_at: int = -1,
        lose_at: int = -1,
        close_at: int = -1,
    ) -> None:
        self.disk, self.fail_at, self.spoil_at = disk, fail_at, spoil_at
        self.lose_at, self.close_at = lose_at, close_at
        self.cookies: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._run, name="tiny-nbd-server")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream:
                try:
                    self._requests(connection, stream, self._greet(connection, stream))
                except (EOFError, ConnectionError, struct.error):
                    pass

    def _greet(self, connection: socket.socket, stream: object) -> bool:
        read = stream.read  # type: ignore[attr-defined]
        connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        read(4)
        structured = False
        while True:
            _, option, length = struct.unpack(">QII", read(16))
            read(length)
            if option == 8:
                structured = True
            else:
                info = struct.pack(">HQH", 0, len(self.disk), 1)
                connection.sendall(struct.pack(">QIII", 0x3E889045565A9, option, INFO, len(info)) + info)
            connection.sendall(struct.pack(">QIII", 0x3E889045565A9, option, ACK, 0))
            if option != 8:
                return structured

    def _requests(self, connection: socket.socket, stream: object, structured: bool) -> None:
        read = stream.read  # type: ignore[attr-defined]
        number = 0
        while True:
            _, _, kind, cookie, offset, length = REQUEST.unpack(read(REQUEST.size))
            if kind == DISCONNECT:
                return
            self.cookies.append(cookie)
            if number == self.close_at:
                return
            data = b""
            if kind == WRITE:
                payload = read(length)
                if number != self.lose_at:
                    self.disk[offset : offset + length] = payload
            elif kind == READ:
                found = bytearray(self.disk[offset : offset + length])
                if number == self.spoil_at:
                    found[length // 2] ^= 1
                data = bytes(found)
            error = 5 if number == self.fail_at else 0
            number += 1
            if structured and kind == READ and not error:
                half = length // 2
                for flags, at, part in ((0, offset, data[:half]), (1, offset + half, data[half:])):
                    head = CHUNK.pack(CHUNK_MAGIC, flags, 1, cookie, 8 + len(part))
                    connection.sendall(head + struct.pack(">Q", at) + part)
            else:
                connection.sendall(SIMPLE.pack(SIMPLE_MAGIC, error, cookie) + (b"" if error else data))


def disk_of(path: str, size: int) -> bytearray:
    """Random bytes, also written to ``path`` as the reference."""
    data = os.urandom(size)
    with open(path, "wb") as file:
        file.write(data)
    return bytearray(data)

"""The client side of NBD, as little of it as a load generator needs: newstyle negotiation, requests, replies.

The protocol is in doc/proto.md of https://github.com/NetworkBlockDevice/nbd ("the specification" here).
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Final

REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
REQUEST_MAGIC: Final = 0x25609513
SIMPLE: Final = struct.Struct(">IIQ")  # magic, error, cookie
SIMPLE_MAGIC: Final = 0x67446698
CHUNK: Final = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
CHUNK_MAGIC: Final = 0x668E33EF
CHUNK_DONE: Final = 1  # flag: the reply's last chunk
CHUNK_DATA: Final = 1
CHUNK_HOLE: Final = 2
CHUNK_ERROR: Final = 1 << 15  # bit of every error type

READ: Final = 0
WRITE: Final = 1
DISCONNECT: Final = 2
FLUSH: Final = 3

_OPTION_MAGIC: Final = 0x49484156454F5054
_OPT_GO: Final = 7
_OPT_STRUCTURED: Final = 8
_ACK: Final = 1
_INFO: Final = 3
_REPLY_ERROR: Final = 1 << 31
_LONGEST_OPTION_REPLY: Final = 1 << 16

TIMEOUT: Final = 60.0
"""Seconds without a byte after which a server is given up."""


class ServerError(Exception):
    """The server broke the protocol, refused, or failed a request."""


class ServerGone(ServerError):
    """The server closed the connection."""


class Connection:
    """A negotiated connection. ``size`` is the export's, in bytes; ``structured`` says whether replies are.

    Raises OSError when there is nobody, ServerError when the server does not agree.
    """

    def __init__(self, path: str, *, export: str = "", structured: bool = False) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.structured = False
        try:
            self.socket.settimeout(TIMEOUT)
            self.socket.connect(path)
            self.size = self._negotiate(export.encode(), structured)
            # A timeout in Python makes a socket non-blocking and each call a poll() more; the kernel's own does not.
            self.socket.settimeout(None)
            seconds = struct.pack("@ll", int(TIMEOUT), 0)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        except BaseException:
            self.socket.close()
            raise

    def exactly(self, count: int) -> bytes:
        """Receives ``count`` bytes. Raises ServerGone when the connection ends before."""
        data = bytearray(count)
        into, got = memoryview(data), 0
        while got < count:
            received = self.socket.recv_into(into[got:])
            if not received:
                raise ServerGone("the server closed the connection")
            got += received
        return bytes(data)

    def request(self, kind: int, offset: int, length: int, data: bytes = b"") -> bytes:
        """One request and its reply, nothing else being under way: for checks, not for load. Returns what was read."""
        self.socket.sendall(REQUEST.pack(REQUEST_MAGIC, 0, kind, offset, offset, length) + data)
        into = bytearray(length if kind == READ else 0)
        seen = 0
        while True:
            magic = int.from_bytes(self.exactly(4), "big")
            if magic == SIMPLE_MAGIC:
                error, _ = struct.unpack(">IQ", self.exactly(12))
                if error:
                    raise ServerError(f"request {kind} at {offset}: error {error}")
                return self.exactly(length) if kind == READ else b""
            if magic != CHUNK_MAGIC:
                raise ServerError(f"reply magic 0x{magic:08x}")
            flags, what, _, size = struct.unpack(">HHQI", self.exactly(16))
            payload = self.exactly(size)
            if what & CHUNK_ERROR:
                raise ServerError(f"request {kind} at {offset}: error {int.from_bytes(payload[:4], 'big')}")
            if what == CHUNK_DATA:
                at = int.from_bytes(payload[:8], "big") - offset
                into[at : at + size - 8] = payload[8:]
                seen += size - 8
            elif what == CHUNK_HOLE:
                seen += int.from_bytes(payload[8:12], "big")
            if flags & CHUNK_DONE:
                if seen != len(into):
                    raise ServerError(f"read at {offset}: {seen} of {len(into)} bytes were sent")
                return bytes(into)

    def close(self) -> None:
        """Says goodbye, if anybody still listens, and closes."""
        try:
            self.socket.sendall(REQUEST.pack(REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0))
        except OSError:
            pass
        self.socket.close()

    def _negotiate(self, export: bytes, structured: bool) -> int:
        greeting = self.exactly(18)
        if greeting[:16] != b"NBDMAGICIHAVEOPT":
            raise ServerError("not a newstyle NBD server")
        self.socket.sendall(struct.pack(">I", int.from_bytes(greeting[16:], "big") & 3))
        if structured:
            self._option(_OPT_STRUCTURED, b"")
            kind, _ = self._option_reply()
            if kind != _ACK:
                raise ServerError(f"no structured replies: 0x{kind:08x}")
            self.structured = True
        self._option(_OPT_GO, struct.pack(">I", len(export)) + export + struct.pack(">H", 0))
        size = None
        while True:
            kind, data = self._option_reply()
            if kind == _INFO and data[:2] == b"\0\0":  # NBD_INFO_EXPORT
                size = int.from_bytes(data[2:10], "big")
            elif kind == _ACK and size is not None:
                return size
            elif kind & _REPLY_ERROR:
                raise ServerError(f"the export was refused: 0x{kind:08x} {data.decode('utf-8', 'replace')}")

    def _option(self, option: int, data: bytes) -> None:
        self.socket.sendall(struct.pack(">QII", _OPTION_MAGIC, option, len(data)) + data)

    def _option_reply(self) -> tuple[int, bytes]:
        _, _, kind, length = struct.unpack(">QIII", self.exactly(20))
        if length > _LONGEST_OPTION_REPLY:
            raise ServerError(f"an option reply of {length} bytes")
        return kind, self.exactly(length)


def connect_when_there(path: str, *, seconds: float, export: str = "", structured: bool = False) -> Connection:
    """Connects as soon as somebody listens at ``path``. Raises the last error after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        try:
            return Connection(path, export=export, structured=structured)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.002)

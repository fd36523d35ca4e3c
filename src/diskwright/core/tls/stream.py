"""A socket that speaks TLS.

OpenSSL's connection must not be read and written at the same time, and a reader that waits must not keep writers
waiting. So the bytes go through memory: OpenSSL works under a lock and never waits, and the socket is read and written
outside it.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Final, cast

from diskwright.errors import ProtocolError
from diskwright.units import KiB

_RECEIVE: Final = 256 * KiB
"""Most that is received from the socket at a time."""
_PIECE: Final = 256 * KiB
"""Most that is encrypted before it is sent; bounds the memory a long reply takes once more."""
_JOINED: Final = 16 * KiB
"""A record's longest content: what is shorter goes into one record with its neighbours."""

Bytes = bytes | bytearray | memoryview


class TlsSocket:
    """TLS over a connected socket, with those methods of a socket that a conversation needs. One thread may receive
    while others send. Every method raises OSError (``ssl.SSLError`` is one) when the connection fails.

    ``socket`` is the one below; its timeouts hold here too, for each wait by itself. A peer that closes it without the
    farewell TLS knows has ended as well: what NBD says has a length of its own, so an end forged in its midst shows.
    """

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, hostname: str | None = None
    ) -> None:
        self.socket = sock
        self.family = sock.family
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self._incoming, self._outgoing, server_side, hostname)
        self._state = threading.Lock()  # OpenSSL's
        self._order = threading.Lock()  # records leave in the order they were made
        self._buffer = memoryview(bytearray(_RECEIVE))
        self._ended = False

    def handshake(self, seconds: float) -> None:
        """Agrees with the peer, within ``seconds``. Raises ProtocolError, or OSError."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.object.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                self._say_why()
                raise ProtocolError(f"TLS handshake failed: {reason(error)}") from error
            else:
                self._send_pending()
                return
            self._send_pending()
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no TLS agreement within {seconds:g} seconds")
            self.socket.settimeout(left)
            got = self.socket.recv_into(self._buffer)
            if not got:
                raise ProtocolError("TLS handshake failed: the peer has hung up")
            self._incoming.write(self._buffer[:got])

    def _send_pending(self) -> None:
        if self._outgoing.pending:
            self.socket.sendall(self._outgoing.read())

    def fileno(self) -> int:
        return self.socket.fileno()

    def settimeout(self, seconds: float | None) -> None:
        self.socket.settimeout(seconds)

    # -- receiving -------------------------------------------------------------------------------

    def recv(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end."""
        buffer = bytearray(size)
        got = self.recv_into(memoryview(buffer))
        return bytes(buffer[:got])

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Fills ``buffer`` with what is here, waiting for something (unless ``flags`` say not to); 0 at the end."""
        view = buffer[:nbytes] if nbytes else buffer
        while True:
            got = self._decrypted(view)
            if got or self._ended:
                return got
            received = self.socket.recv_into(self._buffer, 0, flags)
            if not received:
                # OpenSSL is not told: an end without a farewell is an error to it, after which it sends nothing more.
                self._ended = True
                return 0
            self._incoming.write(self._buffer[:received])

    def _decrypted(self, view: memoryview) -> int:
        got = 0
        with self._state:
            while got < len(view):
                try:
                    step = cast(int, self.object.read(len(view) - got, view[got:]))
                except ssl.SSLWantReadError:
                    break
                except ssl.SSLZeroReturnError:
                    step = 0
                if not step:
                    self._ended = True
                    break
                got += step
        return got

    # -- sending ---------------------------------------------------------------------------------

    def sendall(self, data: Bytes, flags: int = 0) -> None:
        """Sends every byte."""
        view = memoryview(data)
        with self._order:
            for at in range(0, len(view), _PIECE):
                self.socket.sendall(self._encrypted(view[at : at + _PIECE]))

    def send(self, data: Bytes, flags: int = 0) -> int:
        """As ``sendall``. Where it may not wait it sends nothing, since half a record cannot be taken back."""
        if flags & socket.MSG_DONTWAIT:
            raise BlockingIOError
        self.sendall(data)
        return len(data)

    def sendmsg(self, buffers: Sequence[Bytes]) -> int:
        """Sends every byte of all buffers; returns how many."""
        small: list[Bytes] = []
        held = total = 0
        for buffer in buffers:
            total += len(buffer)
            if held + len(buffer) <= _JOINED:
                small.append(buffer)
                held += len(buffer)
                continue
            if small:
                self.sendall(b"".join(small))
            small, held = [], 0
            if len(buffer) <= _JOINED:
                small, held = [buffer], len(buffer)
            else:
                self.sendall(buffer)
        if small:
            self.sendall(b"".join(small))
        return total

    def _encrypted(self, data: memoryview) -> bytes:
        with self._state:
            done = 0
            while done < len(data):
                done += self.object.write(data[done:])
            return self._outgoing.read()

    # -- the end ---------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        self.socket.shutdown(how)

    def finish(self) -> None:
        """Tells the peer that nothing follows, if that can be done at once. The socket stays open."""
        try:
            with self._state:
                self.object.unwrap()
        except (ssl.SSLError, ValueError):
            pass  # wants the peer's farewell, which nobody needs
        self._say_why()

    def _say_why(self) -> None:
        """Sends what OpenSSL has left for the peer: an alert, most likely. It may not get there."""
        try:
            self.socket.send(self._outgoing.read(), socket.MSG_DONTWAIT)
        except OSError:
            pass


def reason(error: ssl.SSLError) -> str:
    """Why OpenSSL gave up, for a person."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate was not accepted: {error.verify_message}"
    return (error.reason or str(error)).lower().replace("_", " ")

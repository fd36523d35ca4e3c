"""A conversation with an NBD server up to the point where it would serve an export, over a socket that waits."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Final

from diskwright.cli.common import Failure
from diskwright.errors import message_of
from diskwright.wire.nbd import client
from diskwright.wire.nbd import constants as c

if TYPE_CHECKING:
    from diskwright.core.tls.credentials import Credentials
    from diskwright.exports.nbd.channel import Stream

TIMEOUT: Final = 30.0
"""Seconds a server may take for an answer, and for TLS."""


class Dialog:
    """One connection. A context manager. Raises Failure, ProtocolError or OSError."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT)
        self._raw = sock
        self._stream: Stream = sock
        self._incoming = client.Incoming()
        self._options = False

    def __enter__(self) -> Dialog:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self._options and exception[0] is None:
                self._stream.sendall(client.option(c.OPT_ABORT))
        except OSError:
            pass  # the server may have gone; so do we
        finally:
            self._raw.close()

    def greet(self) -> client.Greeting:
        """The server's greeting, answered."""
        while (greeting := self._incoming.greeting()) is None:
            self._receive("initial magic")
        if greeting.old is None:
            self._stream.sendall(client.client_flags(greeting))
            self._options = greeting.fixed
        return greeting

    def ask(self, number: int, data: bytes = b"") -> client.Answer:
        """Sends an option; returns what was answered. See ``client.Ask``."""
        self._stream.sendall(client.option(number, data))
        collector = client.Collector(number)
        deadline = time.monotonic() + TIMEOUT
        while True:
            while (reply := self._incoming.reply()) is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no answer to option {number} within {TIMEOUT:g} seconds")
                self._receive("option reply")
            if (answer := collector.add(reply)) is not None:
                return answer

    def start_tls(self, credentials: Credentials, hostname: str | None) -> None:
        """Goes on over TLS."""
        from diskwright.core.tls.stream import TlsSocket

        client.start_tls(self.ask)
        if self._incoming.rest:
            raise Failure("The server sent more than its answer before TLS had begun")
        stream = TlsSocket(self._raw, credentials.terms().context, server_side=False, hostname=hostname)
        stream.handshake(TIMEOUT)
        self._raw.settimeout(TIMEOUT)
        self._stream = stream

    def disconnect(self) -> None:
        """Leaves a server that serves already."""
        self._stream.sendall(c.REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_DISC, 0, 0, 0))

    def _receive(self, what: str) -> None:
        data = self._stream.recv(65536)
        if not data:
            raise Failure(f"Failed to read {what}: Unexpected end-of-file before all data were read")
        self._incoming.feed(data)


def connect(path: str | None, host: str, port: str) -> socket.socket:
    """Connects to a server. Raises Failure."""
    if path is not None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(TIMEOUT)
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise Failure(f"Failed to connect to '{path}': {message_of(error)}") from None
        return sock
    failure: OSError | None = None
    for family, kind, protocol, _, address in resolve(host, port, passive=False):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(TIMEOUT)
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    reason = message_of(failure) if failure is not None else "it has no address"
    raise Failure(f"Failed to connect to '{host}:{port}': {reason}")


_Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int]]


def resolve(host: str, port: str, *, passive: bool) -> list[_Address]:
    """The addresses of a host and port, a number or a service's name. Raises Failure."""
    flags = socket.AI_PASSIVE if passive else 0
    try:
        found = socket.getaddrinfo(host, port or "0", type=socket.SOCK_STREAM, flags=flags)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "that is no host's name"
        raise Failure(f"address resolution failed for {host}:{port}: {reason}") from None
    return [each for each in found if each[0] in (socket.AF_INET, socket.AF_INET6)]  # type: ignore[misc]

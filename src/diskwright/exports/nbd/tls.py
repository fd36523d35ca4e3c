"""TLS of an NBD server: who has to use it, and who may come in."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diskwright.core.tls.stream import TlsSocket
from diskwright.errors import OptionError, ProtocolError
from diskwright.wire.nbd.handshake import Tls

if TYPE_CHECKING:
    from diskwright.core.tls.authz import Allows
    from diskwright.core.tls.credentials import Credentials


@dataclass(frozen=True)
class ServerTls:
    """How a server does TLS. ``allows`` decides by a client's proven identity (of a certificate its subject, with a
    pre-shared key its user name). Raises OptionError when clients would not have to prove one."""

    credentials: Credentials
    required: bool = True
    allows: Allows | None = None

    def __post_init__(self) -> None:
        if self.credentials.endpoint != "server":
            raise OptionError("Expected TLS credentials for a server endpoint")
        if self.allows is not None and not self.credentials.proves_peer:
            raise OptionError("Authorization needs clients that prove who they are: verify-peer=on")
        if self.allows is not None and not self.required:
            raise OptionError("Authorization would keep nobody out where clients may go without TLS")

    @property
    def kind(self) -> Tls:
        return Tls.REQUIRED if self.required else Tls.OPTIONAL

    def secure(self, client: socket.socket, seconds: float) -> TlsSocket:
        """Sets TLS up with a client that has asked for it. Raises ProtocolError or OSError."""
        terms = self.credentials.terms()
        stream = TlsSocket(client, terms.context, server_side=True)
        stream.handshake(seconds)
        if self.allows is not None:
            identity = terms.identity(stream.object)
            if identity is None or not self.allows(identity):
                raise ProtocolError(f"TLS client '{identity or 'without a name'}' may not come in")
        return stream

"""Where qemu-nbd listens: a unix socket, TCP addresses, or sockets a service manager has passed on."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Final

from diskwright.cli.common import Failure
from diskwright.cli.qnbd.arguments import DEFAULT_BIND, DEFAULT_PORT, Settings
from diskwright.cli.qnbd.dialog import resolve

if TYPE_CHECKING:
    from diskwright.exports.nbd import NbdServer

_FIRST_PASSED: Final = 3
"""The first descriptor a service manager passes (sd_listen_fds(3))."""
_LONGEST_PATH: Final = 107


def passed_socket(settings: Settings) -> socket.socket | None:
    """The socket a service manager has passed, if one has. Raises Failure; also when the command line names another
    place."""
    # The number is for this process only, and the variables are for nobody it may start.
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal() or not int(count):
        return None
    found = None
    for number in range(_FIRST_PASSED, _FIRST_PASSED + min(int(count), 2)):
        try:
            os.set_inheritable(number, False)
            found = found or socket.socket(fileno=number)
        except OSError as error:
            raise Failure(
                f"Socket activation failed: invalid file descriptor fd = {number}: {error.strerror}"
            ) from None
    if int(count) != 1:
        raise Failure(f"qemu-nbd does not support socket activation with LISTEN_FDS > 1 (it is {int(count)})")
    given = (
        ("list mode (--list)", settings.list),
        ("-k/--socket", settings.socket is not None),
        ("-b/--bind", settings.bind is not None),
        ("-p/--port", settings.port is not None),
        ("-c/--connect", settings.connect is not None),
        ("-d/--disconnect", settings.disconnect),
        ("--fork", settings.fork),
    )
    for name, there in given:
        if there:
            raise Failure(f"{name} cannot be used with socket activation")
    return found


def listen(server: NbdServer, settings: Settings) -> None:
    """Makes ``server`` listen where the settings say. Raises Failure."""
    if settings.socket is not None:
        _listen_unix(server, settings.socket)
    else:
        _listen_tcp(server, settings.bind or DEFAULT_BIND, settings.port or DEFAULT_PORT)


def _listen_unix(server: NbdServer, path: str) -> None:
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise Failure(f"UNIX socket path '{path}' is too long\nPath must be less than {_LONGEST_PATH + 1} bytes")
    try:
        server.listen_unix(path)
    except OSError as error:
        raise Failure(f"Failed to bind socket to {path}: {error.strerror}") from None


def _listen_tcp(server: NbdServer, host: str, port: str) -> None:
    """On every address of ``host``; one that can be had is enough."""
    listening = False
    failure: OSError | None = None
    for *_, address in resolve(host, port, passive=True):
        try:
            server.listen_tcp(str(address[0]), int(address[1]))
            listening = True
        except OSError as error:
            failure = error
    if not listening:
        in_use = failure is not None and failure.errno == errno.EADDRINUSE
        # Not the error's own text, to which Python has added the address.
        reason = os.strerror(failure.errno or 0) if failure is not None else "it has no address"
        raise Failure(f"Failed to {'find an available port' if in_use else 'bind socket'}: {reason}")

"""Linux's own NBD client: connects a device such as /dev/nbd0 to a server, and disconnects it (nbd(4), linux/nbd.h)."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import Final

from diskwright.cli.common import Failure
from diskwright.cli.qnbd.dialog import Dialog, connect
from diskwright.errors import message_of
from diskwright.units import SECTOR
from diskwright.wire.nbd import client

SET_SOCK: Final = 0xAB00
SET_BLKSIZE: Final = 0xAB01
DO_IT: Final = 0xAB03
CLEAR_SOCK: Final = 0xAB04
CLEAR_QUE: Final = 0xAB05
SET_SIZE_BLOCKS: Final = 0xAB07
DISCONNECT: Final = 0xAB08
SET_FLAGS: Final = 0xAB0A


def default_socket(device: str) -> str:
    """Where the server for a device listens."""
    return f"/var/lock/qemu-nbd-{os.path.basename(device)}"


def disconnect(device: str) -> int:
    """Frees a device. Raises Failure."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Failure(f"Cannot open {device}: {error.strerror}") from None
    try:
        for request in (CLEAR_QUE, DISCONNECT, CLEAR_SOCK):
            fcntl.ioctl(descriptor, request)
    except OSError as error:
        raise Failure(f"Cannot disconnect {device}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    print(f"{device} disconnected")
    return 0


class Device:
    """A device, open; ``attach`` and then ``run`` make it one with a server's export."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise Failure(f"Failed to open {path}: {error.strerror}") from None
        self._sock: socket.socket | None = None

    def attach(self, server: str, export: str) -> None:
        """Chooses an export of the server at a unix socket, and gives the connection to the kernel. Raises Failure,
        ProtocolError or OSError. The kernel knows simple replies only, so no others are asked for."""
        sock = connect(server, "", "")
        dialog = Dialog(sock)
        try:
            dialog.greet()
            found = client.info(dialog.ask, export, go=True)
            if found.size % SECTOR:
                raise Failure(f"{self.path} cannot have {found.size} bytes, which are no whole sectors")
            sock.settimeout(None)
            for request, value in (
                (SET_BLKSIZE, SECTOR),
                (SET_SIZE_BLOCKS, found.size // SECTOR),
                (SET_FLAGS, found.flags),
                (SET_SOCK, sock.fileno()),
            ):
                fcntl.ioctl(self._descriptor, request, value)
        except OSError as error:
            sock.close()
            raise Failure(f"Failed to set {self.path} up: {message_of(error)}") from None
        except BaseException:
            sock.close()
            raise
        self._sock = sock

    def run(self) -> None:
        """Returns when the device has been disconnected. Raises OSError when its connection failed."""
        try:
            fcntl.ioctl(self._descriptor, DO_IT)
        finally:
            for request in (CLEAR_QUE, CLEAR_SOCK):
                fcntl.ioctl(self._descriptor, request)

    def read_partitions(self) -> None:
        """Opening it makes the kernel look for partitions, which it can do only while ``run`` runs."""
        with open(self.path, "rb", buffering=0):
            pass

    def stop(self) -> None:
        """Makes ``run`` return."""
        fcntl.ioctl(self._descriptor, DISCONNECT)

    def close(self) -> None:
        os.close(self._descriptor)
        if self._sock is not None:
            self._sock.close()

"""The NBD servers that are compared, each started on a unix socket with the same cache mode: the host's page cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.peers.process import Server

from bench.client import Connection, ServerError
from bench.timing import cpu_seconds, peak_memory
from bench.workspace import diskwright_command

CONNECTIONS: Final = 8
"""Clients that qemu-nbd is told to expect; the others take any number."""

OURS: Final = "diskwright"
QEMU_THREADS: Final = "qemu-nbd threads"
QEMU_URING: Final = "qemu-nbd io_uring"
NBDKIT: Final = "nbdkit"


@dataclass(frozen=True)
class Kind:
    """A way to serve: its name in tables, the formats it can serve, its command line for (image, format, socket)."""

    name: str
    formats: tuple[str, ...]
    command: Callable[[str, str, str], list[str]]


def _qemu(aio: str) -> Callable[[str, str, str], list[str]]:
    def command(image: str, fmt: str, socket: str) -> list[str]:
        options = ["-t", "-e", str(CONNECTIONS), "-f", fmt, "-k", socket, f"--aio={aio}", "--cache=writeback"]
        return ["qemu-nbd", *options, image]

    return command


def _nbdkit(image: str, fmt: str, socket: str) -> list[str]:
    return ["nbdkit", "--foreground", "--unix", socket, "file", image]


def _ours(image: str, fmt: str, socket: str) -> list[str]:
    return diskwright_command("serve", "-f", fmt, "--cache", "writeback", "--socket", socket, image)


KINDS: Final = (
    Kind(QEMU_THREADS, ("raw", "qcow2"), _qemu("threads")),
    Kind(QEMU_URING, ("raw", "qcow2"), _qemu("io_uring")),
    Kind(NBDKIT, ("raw",), _nbdkit),
    Kind(OURS, ("raw", "qcow2"), _ours),
)


class NbdServer(Server):
    """A running server of one image at ``socket``; gone after the ``with`` block. Raises PeerError, MissingPeer."""

    def __init__(self, kind: Kind, image: str, fmt: str) -> None:
        self.kind, self.image, self.format = kind, image, fmt
        program, *arguments = kind.command(image, fmt, "")
        super().__init__(program)
        self.socket = self.path("s")
        self.uri = f"nbd+unix:///?socket={self.socket}"
        _, *arguments = kind.command(image, fmt, self.socket)
        self.launch(arguments, self._answers)

    @property
    def cpu(self) -> float:
        """CPU seconds it has used so far."""
        return cpu_seconds(self.pid)

    @property
    def peak(self) -> int:
        """Peak resident memory in bytes so far."""
        return peak_memory(self.pid)

    def _answers(self) -> bool:
        if not os.path.exists(self.socket):
            return False
        try:
            Connection(self.socket).close()
        except (OSError, ServerError):
            return False
        return True

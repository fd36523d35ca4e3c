"""qemu-nbd: serves an image on a unix socket.

python -m tests.peers.qemu_nbd IMAGE [--format qcow2]
"""

from __future__ import annotations

import argparse
from urllib.parse import quote

from tests.peers.process import Server, is_written, until_interrupted


class QemuNbd(Server):
    """A running qemu-nbd; ``socket`` and ``uri`` say where."""

    def __init__(
        self,
        image: str,
        fmt: str = "raw",
        *,
        export: str = "",
        read_only: bool = False,
        shared: int = 16,
        arguments: tuple[str, ...] = (),
    ) -> None:
        super().__init__("qemu-nbd")
        self.socket = self.path("s")
        self.uri = f"nbd+unix:///{quote(export)}?socket={self.socket}"
        pid_file = self.path("pid")
        options = ["--persistent", "--socket", self.socket, "--pid-file", pid_file, "--format", fmt]
        options += ["--shared", str(shared), "--discard=unmap", "--export-name", export]
        options += ["--read-only"] if read_only else []
        self.launch([*options, *arguments, image], is_written(pid_file))


def serve(image: str, fmt: str = "raw", **options: object) -> QemuNbd:
    """Serves ``image`` until the ``with`` block ends; see QemuNbd for the options."""
    return QemuNbd(image, fmt, **options)  # type: ignore[arg-type]


def main() -> None:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.qemu_nbd")
    parser.add_argument("image")
    parser.add_argument("--format", default="raw")
    parser.add_argument("--read-only", action="store_true")
    given = parser.parse_args()
    with serve(given.image, given.format, read_only=given.read_only) as server:
        until_interrupted(server, server.uri)


if __name__ == "__main__":
    main()

"""qemu-storage-daemon, spoken to over QMP: the peer of our own daemon.

python -m tests.peers.qemu_storage_daemon [ARGUMENT...]      prints its QMP socket; see tests.peers.qmp
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.peers.process import Server, is_written, until_interrupted
from tests.peers.qmp import Qmp


class QemuStorageDaemon(Server):
    """A running daemon: ``qmp`` is a connection to it, ``nbd_socket`` where ``serve_nbd`` makes it listen."""

    def __init__(self, *blockdevs: dict[str, Any], arguments: tuple[str, ...] = (), monitor: bool = True) -> None:
        super().__init__("qemu-storage-daemon")
        self.qmp_socket = self.path("q")
        self.nbd_socket = self.path("s")
        self._qmp: Qmp | None = None
        pid_file = self.path("pid")
        options = ["--pidfile", pid_file]
        options += ["--chardev", f"socket,id=qmp,path={self.qmp_socket},server=on,wait=off", "--monitor", "chardev=qmp"]
        for blockdev in blockdevs:
            options += ["--blockdev", json.dumps(blockdev)]
        self.launch([*options, *arguments], is_written(pid_file))
        if monitor:
            try:
                self._qmp = Qmp(self.qmp_socket)
            except BaseException:
                self.stop()
                raise

    @property
    def qmp(self) -> Qmp:
        """The connection; without ``monitor`` there is none."""
        assert self._qmp
        return self._qmp

    def serve_nbd(self, node: str, *, name: str | None = None, writable: bool = True) -> str:
        """Exports a node by NBD and returns the URI. The server is started at the first call."""
        servers = [export["id"] for export in self.qmp.execute("query-block-exports")]
        if not servers:
            address = {"type": "unix", "data": {"path": self.nbd_socket}}
            self.qmp.execute("nbd-server-start", addr=address)
        name = node if name is None else name
        export = {"type": "nbd", "id": f"export-{len(servers)}", "node-name": node, "writable": writable}
        self.qmp.execute("block-export-add", export | {"name": name})
        return f"nbd+unix:///{name}?socket={self.nbd_socket}"

    def stop(self) -> None:
        """Closes the connection and ends the daemon."""
        if self._qmp:
            self._qmp.close()
        super().stop()


if __name__ == "__main__":
    with QemuStorageDaemon(arguments=tuple(sys.argv[1:]), monitor=False) as running:
        until_interrupted(running, running.qmp_socket)

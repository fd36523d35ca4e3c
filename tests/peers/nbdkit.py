"""nbdkit: serves NBD from its plugins through its filters (error, delay, log, nozero, noextents, ...).

    python -m tests.peers.nbdkit [ARGUMENT...]         for instance: --filter=delay memory 64M rdelay=10ms

nbdkit in the foreground dies with the *thread* that started it, not only with the process: start it from a thread that
outlives its use, which in a test is the main one.
"""

from __future__ import annotations

import sys

from tests.peers.process import Server, is_written, until_interrupted


class Nbdkit(Server):
    """A running nbdkit; ``socket`` and ``uri`` say where."""

    def __init__(self, *arguments: str, threads: int = 0) -> None:
        super().__init__("nbdkit")
        self.socket = self.path("s")
        self.uri = f"nbd+unix:///?socket={self.socket}"
        pid_file = self.path("pid")
        options = ["--foreground", "--unix", self.socket, "--pidfile", pid_file]
        options += ["--threads", str(threads)] if threads else []
        self.launch([*options, *arguments], is_written(pid_file))


def serve(*arguments: str, threads: int = 0) -> Nbdkit:
    """Serves until the ``with`` block ends. ``arguments``: --filter options, the plugin, and its key=value words."""
    return Nbdkit(*arguments, threads=threads)


if __name__ == "__main__":
    with serve(*(sys.argv[1:] or ["memory", "64M"])) as running:
        until_interrupted(running, running.uri)

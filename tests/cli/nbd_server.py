"""This project's qemu-nbd, and the real one, run the same way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.run import TIMEOUT, Result, environment

OURS = (
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'qemu-nbd'; from diskwright.cli.main import main; sys.exit(main())",
)
REAL = ("qemu-nbd",)


def run(program: tuple[str, ...], *words: str, cwd: Path) -> Result:
    """Runs a command line that ends by itself. Both call themselves qemu-nbd."""
    done = subprocess.run(
        [*program, *words],
        cwd=cwd,
        env={**environment(), "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


class Running:
    """A server on ``socket`` (unless the words name another place) until the ``with`` block ends."""

    def __init__(
        self,
        *words: str,
        folder: str,
        program: tuple[str, ...] = OURS,
        place: bool = True,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        self.socket = os.path.join(folder, "n")
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self._pid_file = os.path.join(folder, "pid")
        self._log = open(os.path.join(folder, "log"), "w+b")  # noqa: SIM115 - closed with the server
        where = ["-k", self.socket] if place else []
        self.process = subprocess.Popen(
            [*program, *where, "--pid-file", self._pid_file, *words],
            env={**environment(), "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=pass_fds,
        )
        deadline = time.monotonic() + TIMEOUT
        try:
            while not os.path.exists(self._pid_file) or not os.path.getsize(self._pid_file):
                assert self.process.poll() is None, self.log()
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.005)
        except BaseException:
            self.__exit__()
            raise

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def ends(self) -> int:
        """Waits until it has ended by itself; its exit code."""
        return self.process.wait(TIMEOUT)

    def running(self) -> bool:
        return self.process.poll() is None

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.ends()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port

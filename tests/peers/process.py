"""Starts other people's programs: once to an end, or as a server until the ``with`` block ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from tests.peers import find

RUN_TIMEOUT = 120.0  # seconds for a program that is to end by itself
START_TIMEOUT = 30.0
STOP_TIMEOUT = 20.0
SOCKET_PATH_LIMIT = 107  # bytes: sun_path of unix(7) holds 108 with its final zero


class PeerError(Exception):
    """A program failed; the message holds its command line and what it wrote to stderr."""


def run(
    name: str,
    *arguments: str,
    check: bool = True,
    data: bytes | None = None,
    timeout: float = RUN_TIMEOUT,
    cwd: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, in the C locale. With ``check``, raises PeerError when its status is not 0."""
    command = [find(name), *arguments]
    done = subprocess.run(
        command,
        env=environment(),
        input=b"" if data is None else data,
        capture_output=True,
        check=False,
        timeout=timeout,
        cwd=cwd,
    )
    stdout, stderr = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    if check and done.returncode:
        raise PeerError(f"{name} {' '.join(arguments)}: status {done.returncode}: {(stderr or stdout).strip()}")
    return subprocess.CompletedProcess(command, done.returncode, stdout, stderr)


def environment() -> dict[str, str]:
    """Returns this process's environment with messages in English."""
    return dict(os.environ, LC_ALL="C.UTF-8")


class Server:
    """A program that runs until ``stop``. As a context manager it is ready inside the block and gone after it.

    ``scratch`` is a folder of its own under /tmp with a short name, for sockets; it goes when the server does.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.scratch = tempfile.mkdtemp(prefix="dw", dir=short_folder())
        self._process: subprocess.Popen[bytes] | None = None
        self._log = os.path.join(self.scratch, "log")

    def path(self, name: str) -> str:
        """Returns a path in the scratch folder, for instance of a socket."""
        return os.path.join(self.scratch, name)

    def launch(self, arguments: Sequence[str], ready: Callable[[], bool], *, pass_fds: Sequence[int] = ()) -> None:
        """Starts the program and waits until ``ready``. Raises PeerError when it ends before that, or never is."""
        try:
            command = [find(self.name), *arguments]
            with open(self._log, "wb") as log:
                self._process = subprocess.Popen(
                    command, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=pass_fds
                )
            end = time.monotonic() + START_TIMEOUT
            while not ready():
                if self._process.poll() is not None:
                    raise PeerError(f"{' '.join(command)}: ended with {self._process.returncode}: {self.log()}")
                if time.monotonic() > end:
                    raise PeerError(f"{' '.join(command)}: not ready in {START_TIMEOUT:g} s: {self.log()}")
                time.sleep(0.005)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Process id of the running program."""
        assert self._process
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.poll() if self._process else None

    def log(self) -> str:
        """Returns what the program has written to stdout and stderr, or its last 4000 characters."""
        try:
            with open(self._log, encoding="utf-8", errors="replace") as file:
                return file.read()[-4000:].strip()
        except FileNotFoundError:
            return ""

    def kill(self) -> None:
        """Kills the program at once, as a crash would. ``stop`` is still to be called."""
        assert self._process
        self._process.kill()
        self._process.wait()

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        """Waits for the program to end by itself and returns its status. Raises PeerError."""
        assert self._process
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise PeerError(f"{self.name} still runs after {timeout:g} s: {self.log()}") from None

    def stop(self) -> None:
        """Ends the program, politely at first, and removes the scratch folder."""
        process = self._process
        if process and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def short_folder() -> str:
    """Returns a folder for sockets whose name leaves room below the 108-byte limit: a long $TMPDIR is passed over."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= SOCKET_PATH_LIMIT - 40 else "/tmp"


def is_written(path: str) -> Callable[[], bool]:
    """Returns a test for a pid file: these servers write theirs once they listen."""

    def test() -> bool:
        try:
            return os.path.getsize(path) > 0
        except FileNotFoundError:
            return False

    return test


def until_interrupted(server: Server, *lines: str) -> None:
    """Prints ``lines`` and waits for Ctrl-C or the server's end: the body of a module run by hand."""
    for line in lines:
        print(line, flush=True)
    try:
        while server.returncode is None:
            time.sleep(0.2)
        print(server.log())
    except KeyboardInterrupt:
        pass

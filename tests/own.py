"""This project's own command as a process of its own: as a user runs it, and so that it can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from tests.peers.process import environment

TIMEOUT = 120.0  # seconds


class Diskwright:
    """``diskwright ARGUMENTS`` in the background. As a context manager it is gone after the block.

    Standard output is collected in ``lines``, JSON lines of standard error in ``records``, others in ``errors``.
    """

    def __init__(self, *arguments: str) -> None:
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "diskwright", *arguments],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        streams = ((self._process.stdout, self._line), (self._process.stderr, self._error))
        self._readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in streams]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Diskwright:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_line(self, text: str, timeout: float = TIMEOUT) -> str:
        """The first line of standard output that has ``text`` in it."""
        return self._wait(lambda: next((line for line in self.lines if text in line), None), text, timeout)

    def wait_event(self, name: str, timeout: float = TIMEOUT) -> dict[str, Any]:
        """The data of the first event ``name`` (with --progress=json)."""
        return self._wait(
            lambda: next((record["data"] for record in self.records if record.get("event") == name), None),
            name,
            timeout,
        )

    def signal(self, number: int = signal.SIGINT) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """As a crash would end it."""
        self._process.kill()
        self.end()

    def end(self, timeout: float = TIMEOUT) -> int:
        """Waits until it has ended by itself; its exit code."""
        code = self._process.wait(timeout)
        for reader in self._readers:
            reader.join()
        return code

    def _wait(self, found: Any, what: str, timeout: float) -> Any:
        end = time.monotonic() + timeout
        with self._changed:
            while (result := found()) is None:
                if self._process.poll() is not None and not any(reader.is_alive() for reader in self._readers):
                    raise AssertionError(f"ended with {self._process.returncode} before {what!r}: {self._said()}")
                if time.monotonic() > end:
                    raise AssertionError(f"no {what!r} in {timeout:g} s: {self._said()}")
                self._changed.wait(0.1)
            return result

    def _said(self) -> str:
        return " | ".join([*self.lines[-5:], *self.errors[-5:]])

    def _read(self, stream: Any, take: Any) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    take(line.rstrip("\n"))
                    self._changed.notify_all()

    def _line(self, line: str) -> None:
        self.lines.append(line)

    def _error(self, line: str) -> None:
        if line.startswith("{"):
            self.records.append(json.loads(line))
        else:
            self.errors.append(line)

"""A small QMP client: one command at a time, events kept until somebody asks for them. For QEMU's daemon and for ours.

python -m tests.peers.qmp SOCKET COMMAND [JSON-ARGUMENTS]
"""

from __future__ import annotations

import collections
import json
import socket
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

REPLY_TIMEOUT = 60.0
MAX_MESSAGE = 64 << 20  # bytes; query-qmp-schema answers with 150 KiB
EVENTS_KEPT = 10_000


class QmpError(Exception):
    """The server refused a command: ``kind`` is its error class, ``text`` its description."""

    def __init__(self, command: str, kind: str, text: str) -> None:
        super().__init__(f"{command}: {kind}: {text}")
        self.kind, self.text = kind, text


class Qmp:
    """A connection, past the negotiation. ``greeting`` is what the server said first."""

    def __init__(self, path: str, timeout: float = REPLY_TIMEOUT) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pending = b""
        self._serial = 0
        self.events: collections.deque[dict[str, Any]] = collections.deque(maxlen=EVENTS_KEPT)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            self.greeting = self._message(timeout)
            if "QMP" not in self.greeting:
                raise QmpError("greeting", "protocol", repr(self.greeting))
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None, /, **words: Any) -> Any:
        """Runs a command and returns its result. In ``words`` an underscore stands for a hyphen. Raises QmpError."""
        given = dict(arguments or {}) | {name.replace("_", "-"): value for name, value in words.items()}
        self._serial += 1
        message: dict[str, Any] = {"execute": command, "id": self._serial}
        if given:
            message["arguments"] = given
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        while True:
            reply = self._message(REPLY_TIMEOUT)
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise QmpError(command, reply["error"]["class"], reply["error"]["desc"])
            elif reply.get("id") != self._serial:
                raise QmpError(command, "protocol", f"the reply is to {reply.get('id')}, not {self._serial}")
            else:
                return reply["return"]

    def wait_event(
        self, name: str, timeout: float = REPLY_TIMEOUT, match: Callable[[dict[str, Any]], bool] | None = None
    ) -> dict[str, Any]:
        """Takes the first event of this name whose data ``match``; others are kept. Raises TimeoutError."""
        end = time.monotonic() + timeout
        skipped: list[dict[str, Any]] = []
        try:
            while True:
                event = self.events.popleft() if self.events else self._message(end - time.monotonic())
                if event.get("event") == name and (match is None or match(event.get("data", {}))):
                    return event
                skipped.append(event)
        except TimeoutError:
            raise TimeoutError(f"no event {name} in {timeout:g} s; there were {skipped!r}") from None
        finally:
            self.events.extendleft(reversed(skipped))

    def wait_job(self, job: str, status: str, timeout: float = REPLY_TIMEOUT) -> None:
        """Waits for JOB_STATUS_CHANGE of ``job`` to ``status``."""
        self.wait_event("JOB_STATUS_CHANGE", timeout, lambda data: data == {"id": job, "status": status})

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def _message(self, timeout: float) -> dict[str, Any]:
        """Returns the next message. Raises TimeoutError, or ConnectionError when the server has gone."""
        end = time.monotonic() + timeout
        while b"\n" not in self._pending:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no QMP message in {timeout:g} s")
            self._socket.settimeout(left)
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("the QMP server closed the connection")
            self._pending += data
            if len(self._pending) > MAX_MESSAGE:
                raise ConnectionError("a QMP message without end")
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


if __name__ == "__main__":
    with Qmp(sys.argv[1]) as connection:
        print(json.dumps(connection.execute(sys.argv[2], json.loads((sys.argv[3:] or ["{}"])[0])), indent=1))

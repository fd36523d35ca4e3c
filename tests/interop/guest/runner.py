"""Runs the guest on a disk and listens to it.

    with Guest("/tmp/x/nbd.sock") as guest:             # or an nbd:// URI, or a raw image's path
        guest.wait_for("ack", timeout=60)
        copy_the_disk()
        floor = guest.acked()                             # all this was flushed before now
        guest.stop()                                      # checks everything, unmounts, powers off

    python -m tests.interop.guest.runner DISK [--mode raw] [--seconds 5] [--action verify]

The machine is emulated without KVM: a nested one is not to be had everywhere, and may half work, which is worse.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.interop.guest.build import BuildError, build
from tests.peers import MissingPeer, find

MEMORY = 192  # MiB; the initramfs unpacks to 14
BOOT_TIMEOUT = 120.0  # seconds; 4 on an idle machine
MAX_LINES = 1_000_000  # of conversation kept; at 300 batches a second an hour of it


class GuestError(Exception):
    """The guest did not do what it should have; the message ends with what it said last."""


@dataclass(frozen=True)
class Line:
    """One line from the guest; ``time`` is the host's monotonic clock when it arrived."""

    time: float
    text: str


class Guest:
    """A guest on one disk. As a context manager it runs inside the block and is dead after it.

    disk     the path of a unix socket or of a raw image, or an nbd:// or nbd+unix:// URI
    mode     "ext4": a file system, made if the disk has none; "raw": records straight on the disk, each write ended
             before the next begins
    action   "run": write until told to stop or ``limit`` seconds have passed; "verify": only check, then power off
    acked    what an earlier guest on this disk was acknowledged: it must be there
    slots, batch, seed, churn: see records.Plan; an existing record file's own plan goes first
    pace     seconds to rest between two batches
    reconnect  seconds for which QEMU holds requests back while the NBD server is away (0: they fail at once)
    """

    def __init__(
        self,
        disk: str,
        *,
        mode: str = "ext4",
        action: str = "run",
        slots: int = 4096,
        batch: int = 16,
        seed: int = 1,
        churn: int = 4,
        pace: float = 0.0,
        limit: float = 300.0,
        acked: int = 0,
        reconnect: int = 0,
    ) -> None:
        if mode not in ("ext4", "raw") or action not in ("run", "verify"):
            raise ValueError(f"mode {mode!r}, action {action!r}")
        self.node = _block_node(disk, reconnect)
        words = {"mode": mode, "action": action, "slots": slots, "batch": batch, "seed": seed, "churn": churn}
        words |= {"pace": pace, "limit": limit, "acked": acked}
        self._append = "console=ttyS0 loglevel=4 panic=-1 random.trust_cpu=on " + " ".join(
            f"dw.{name}={value}" for name, value in words.items()
        )
        self.lines: list[Line] = []
        self._acks: list[tuple[float, int]] = []
        self._changed = threading.Condition()
        self._ended = False
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Guest:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        if self._scratch:
            self._scratch.cleanup()

    def start(self) -> None:
        """Boots. Raises MissingPeer when there is no emulator or no way to build the guest."""
        emulator = find("qemu-system-x86_64")
        try:
            files = build()
        except BuildError as error:
            raise MissingPeer(f"guest: {error}") from None
        self._scratch = tempfile.TemporaryDirectory(prefix="dwguest")
        console = os.path.join(self._scratch.name, "console")
        command = [emulator, "-machine", "pc,accel=tcg", "-cpu", "qemu64,+rdrand", "-m", str(MEMORY), "-smp", "1"]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-kernel", files.kernel, "-initrd", files.initramfs, "-append", self._append]
        command += ["-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"]
        command += ["-chardev", "stdio,id=talk,signal=off", "-serial", "chardev:talk"]
        command += ["-blockdev", json.dumps(self.node)]
        command += ["-device", "virtio-blk-pci,drive=disk,discard=on,write-zeroes=on,werror=report,rerror=report"]
        with open(os.path.join(self._scratch.name, "stderr"), "wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
            )
        self._reader = threading.Thread(target=self._read, name="guest console", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The emulator's process."""
        assert self._process
        return self._process.pid

    @property
    def running(self) -> bool:
        """False once the emulator has ended."""
        return self._process is not None and self._process.poll() is None

    def acked(self, before: float | None = None) -> int:
        """Returns the newest sequence known to be flushed: now, or at a time of time.monotonic()."""
        with self._changed:
            if before is None:
                return self._acks[-1][1] if self._acks else 0
            return max((sequence for at, sequence in self._acks if at <= before), default=0)

    def wait_for(self, pattern: str, timeout: float = BOOT_TIMEOUT, since: int = 0) -> re.Match[str]:
        """Returns the match of the first line, from number ``since`` on, that ``pattern`` matches at its start.

        Raises GuestError when the guest ends or ``timeout`` seconds pass before there is one.
        """
        end = time.monotonic() + timeout
        wanted = re.compile(pattern)
        with self._changed:
            while True:
                while since < len(self.lines):
                    found = wanted.match(self.lines[since].text)
                    since += 1
                    if found:
                        return found
                if self._ended:
                    raise GuestError(f"the guest ended before it said {pattern!r}; {self._last()}")
                left = end - time.monotonic()
                if left <= 0:
                    raise GuestError(f"the guest did not say {pattern!r} in {timeout:g} s; {self._last()}")
                self._changed.wait(left)

    def wait_acked(self, more: int = 1, timeout: float = BOOT_TIMEOUT) -> int:
        """Waits until ``more`` further records are acknowledged; returns the newest."""
        goal = self.acked() + more
        end = time.monotonic() + timeout
        with self._changed:
            while not self._acks or self._acks[-1][1] < goal:
                if self._ended or time.monotonic() > end:
                    raise GuestError(f"no acknowledgement of record {goal} in {timeout:g} s; {self._last()}")
                self._changed.wait(max(0.0, end - time.monotonic()))
            return self._acks[-1][1]

    def command(self, text: str) -> int:
        """Sends one command. Returns the number of the line from which its answer is to be looked for."""
        with self._changed:
            number = len(self.lines)
        assert self._process and self._process.stdin
        self._process.stdin.write(text.encode() + b"\n")
        return number

    def stop(self, timeout: float = 120.0) -> int:
        """Ends the workload, lets the guest check its disk and power off. Returns its last acknowledged sequence.

        Raises GuestError when anything was wrong with what it read back.
        """
        if self.running:
            self.command("stop")
        self.finish(timeout)
        return self.acked()

    def finish(self, timeout: float = 120.0) -> None:
        """Waits until the guest has powered off by itself. Raises GuestError unless its result was good."""
        found = self.wait_for(r"done result=(\d+)", timeout)
        assert self._process and self._reader
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest did not power off; {self._last()}") from None
        self._reader.join(timeout)
        if found[1] != "0" or self._process.returncode:
            raise GuestError(f"the guest ended with result {found[1]}; {self._last()}")

    def kill(self) -> None:
        """Pulls the plug: the emulator dies at once, with whatever it had not sent."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        process.wait()
        assert self._reader and process.stdin
        self._reader.join()
        process.stdin.close()

    def slowest(self) -> float:
        """Returns the longest time, in milliseconds, that one batch took the guest."""
        with self._changed:
            times = [re.match(r"ack \d+ ms=([\d.]+)", line.text) for line in self.lines]
        return max((float(found[1]) for found in times if found), default=0.0)

    def _read(self) -> None:
        """Collects the lines of the conversation until the emulator closes its end."""
        assert self._process and self._process.stdout
        with self._process.stdout as pipe:
            pending = b""
            while data := pipe.read(65536):
                now = time.monotonic()
                *whole, pending = (pending + data).split(b"\n")
                with self._changed:
                    for raw in whole:
                        self._line(Line(now, raw.decode("utf-8", "replace").rstrip("\r")))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _line(self, line: Line) -> None:
        if len(self.lines) < MAX_LINES:
            self.lines.append(line)
        if found := re.match(r"ack (\d+) ", line.text):
            self._acks.append((line.time, int(found[1])))

    def _last(self) -> str:
        """Returns the ends of the conversation, of the kernel's log and of the emulator's complaints."""
        parts = ["last lines: " + " | ".join(line.text for line in self.lines[-4:])]
        for name in ("console", "stderr"):
            path = os.path.join(self._scratch.name, name) if self._scratch else ""
            if os.path.exists(path):
                with open(path, encoding="utf-8", errors="replace") as file:
                    text = file.read()[-600:].strip()
                if text:
                    parts.append(f"{name}: {text}")
        return "; ".join(parts)


def _block_node(disk: str, reconnect: int) -> dict[str, Any]:
    """Returns the description of the disk as QEMU's -blockdev wants it."""
    node: dict[str, Any] = {"node-name": "disk", "discard": "unmap"}
    parts = urlsplit(disk)
    if parts.scheme in ("nbd", "nbd+unix"):
        server: dict[str, str]
        if parts.scheme == "nbd":
            server = {"type": "inet", "host": parts.hostname or "localhost", "port": str(parts.port or 10809)}
        else:
            server = {"type": "unix", "path": parse_qs(parts.query)["socket"][0]}
        return node | {
            "driver": "nbd",
            "server": server,
            "export": unquote(parts.path.removeprefix("/")),
            "reconnect-delay": reconnect,
        }
    if os.path.isfile(disk):
        return node | {"driver": "raw", "file": {"driver": "file", "filename": disk, "discard": "unmap"}}
    return node | {"driver": "nbd", "server": {"type": "unix", "path": disk}, "reconnect-delay": reconnect}


def main() -> int:
    """Runs a guest by hand and prints what it says."""
    parser = argparse.ArgumentParser(prog="python -m tests.interop.guest.runner")
    parser.add_argument("disk", help="unix socket, NBD URI, or raw image")
    parser.add_argument("--mode", choices=("ext4", "raw"), default="ext4")
    parser.add_argument("--action", choices=("run", "verify"), default="run")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--acked", type=int, default=0)
    given = parser.parse_args()
    guest = Guest(
        given.disk, mode=given.mode, action=given.action, limit=given.seconds, slots=given.slots, acked=given.acked
    )
    try:
        with guest:
            guest.finish(given.seconds + BOOT_TIMEOUT)
    except (GuestError, MissingPeer) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for line in guest.lines:
            if not line.text.startswith("ack "):
                print(line.text)
    print(f"acknowledged up to {guest.acked()}, slowest batch {guest.slowest():.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())

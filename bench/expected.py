"""What an image must hold after a run, so that no server is called fast for losing data."""

from __future__ import annotations

import os
import random
from typing import Final

from tests.peers.process import run

from bench.client import READ, WRITE, Connection
from bench.load import BLOCK, PAYLOAD, RING, Workload

SAMPLES: Final = 400
"""Requests of a check through a server, of each kind."""
LONG_READ: Final = 1 << 20
_STEP: Final = 4 << 20


class WrongData(Exception):
    """An image or a server gave other bytes than were written."""


class Expected:
    """The bytes of a disk: those of ``reference``, a raw file (None: zeros), under the blocks that were overwritten.

    Every write of the load generator writes the same PAYLOAD, so the order of writes does not matter.
    """

    def __init__(self, size: int, reference: str | None) -> None:
        self.size, self.reference = size, reference
        self._written = bytearray(size // BLOCK)

    def mark(self, work: Workload, issued: int) -> None:
        """Notes the first ``issued`` requests of a workload that writes."""
        span = work.block // BLOCK
        for offset in work.offsets()[: min(issued, RING)]:
            first = offset // BLOCK
            self._written[first : first + span] = b"\1" * span

    def written(self) -> list[int]:
        """Numbers of the blocks that were overwritten."""
        found, at = [], self._written.find(1)
        while at >= 0:  # a disk has millions of blocks, few of them written
            found.append(at)
            at = self._written.find(1, at + 1)
        return found

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range."""
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        data = bytearray(self._original(first * BLOCK, (last - first) * BLOCK))
        for number in range(first, last):
            if self._written[number]:
                data[(number - first) * BLOCK : (number - first + 1) * BLOCK] = PAYLOAD
        return bytes(data[offset - first * BLOCK :][:length])

    def check_server(self, socket: str, *, structured: bool = False, writable: bool = True) -> None:
        """Reads and overwrites at random places through a server, and reads back. Raises WrongData."""
        pick = random.Random(self.size)
        connection = Connection(socket, structured=structured)
        try:
            for _ in range(SAMPLES):
                length = pick.choice((512, BLOCK, 3 * BLOCK, 65536, LONG_READ))
                self._compare(connection, pick.randrange((self.size - length) // 512) * 512, length)
            if not writable:
                return
            # Each block once: a second write of the same bytes would hide that the first was lost.
            blocks = pick.sample(range(self.size // BLOCK), min(SAMPLES, self.size // BLOCK))
            for number in blocks:
                connection.request(WRITE, number * BLOCK, BLOCK, PAYLOAD)
                self._written[number] = 1
            for number in blocks:
                at = max(0, number * BLOCK - 512)
                self._compare(connection, at, min(BLOCK + 1024, self.size - at))
        finally:
            connection.close()

    def check_written(self, socket: str) -> None:
        """Reads overwritten blocks and their neighbours through a server. Raises WrongData."""
        pick, blocks = random.Random(self.size), self.written()
        connection = Connection(socket)
        try:
            for number in pick.sample(blocks, min(len(blocks), 4 * SAMPLES)):
                at = max(0, (number - 1) * BLOCK)
                self._compare(connection, at, min(3 * BLOCK, self.size - at))
        finally:
            connection.close()

    def check_image(self, path: str, fmt: str) -> None:
        """Compares the whole of an image that nobody serves any more; qcow2 as qemu-img reads it. Raises WrongData."""
        if fmt != "raw":
            check_tables(path)
            plain = path + ".plain"
            run("qemu-img", "convert", "-f", fmt, "-O", "raw", path, plain)
            try:
                self.check_image(plain, "raw")
            finally:
                os.unlink(plain)
            return
        with open(path, "rb") as file:
            for offset in range(0, self.size, _STEP):
                length = min(_STEP, self.size - offset)
                found, wanted = file.read(length), self.read(offset, length)
                if found != wanted:
                    raise WrongData(f"{path}: wrong data at offset {offset + _first_difference(found, wanted)}")

    def _compare(self, connection: Connection, offset: int, length: int) -> None:
        found, wanted = connection.request(READ, offset, length), self.read(offset, length)
        if found != wanted:
            raise WrongData(f"wrong data was read at offset {offset + _first_difference(found, wanted)}")

    def _original(self, offset: int, length: int) -> bytes:
        if self.reference is None:
            return bytes(length)
        with open(self.reference, "rb") as file:
            return os.pread(file.fileno(), length, offset)


def check_tables(path: str) -> None:
    """Has qemu-img check a qcow2 image. Raises WrongData for anything but a clean one."""
    done = run("qemu-img", "check", "-f", "qcow2", path, check=False)
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[-400:]
        raise WrongData(f"{path}: qemu-img check ended with {done.returncode}: {said}")


def _first_difference(found: bytes, wanted: bytes) -> int:
    for i, (a, b) in enumerate(zip(found, wanted, strict=False)):
        if a != b:
            return i
    return min(len(found), len(wanted))

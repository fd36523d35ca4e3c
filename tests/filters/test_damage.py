"""An I/O error at any occurrence of an event leaves a qcow2 image sound, and loses nothing a flush had promised."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, Node
from diskwright.core.snapshots import read_vm_state, write_vm_state
from diskwright.errors import DiskwrightError
from diskwright.filters.blkdebug.driver import Blkdebug
from diskwright.units import KiB, MiB
from tests.peers.qemu_img import qemu_img

OCCURRENCES = max(1, int(float(os.environ.get("DISKWRIGHT_FUZZ") or 1)))
"""How many of an event's occurrences fail, each in a run of its own: the first ones, and the last."""

SIZE = 8 * MiB
UNIT = 64 * KiB


class Guest:
    """Knows of each byte whether it must be there, and what it is then."""

    def __init__(self, node: FormatNode) -> None:
        self.node = node
        self.errors = 0
        self.content = np.zeros(2 * SIZE, np.uint8)
        self.written = np.zeros(2 * SIZE, np.bool_)
        self.flushed = np.zeros(2 * SIZE, np.bool_)

    def _change(self, at: int, length: int, action: Callable[[], None], data: bytes | None) -> None:
        end = at + length
        if end > self.node.size:
            return  # making the disk larger has failed
        self.written[at:end] = self.flushed[at:end] = False  # until it has ended nobody knows what is there
        action()
        if data is not None:
            self.content[at:end] = np.frombuffer(data, np.uint8)
            self.written[at:end] = True

    def write(self, at: int, data: bytes, *, compressed: bool = False) -> None:
        node = self.node
        plain, packed = (lambda: node.pwrite(at, data)), (lambda: node.write_compressed([(at, memoryview(data))]))
        self._change(at, len(data), packed if compressed else plain, data)

    def zero(self, at: int, length: int) -> None:
        self._change(at, length, lambda: self.node.write_zeros(at, length, unmap=True), bytes(length))

    def discard(self, at: int, length: int) -> None:
        self._change(at, length, lambda: self.node.discard(at, length), None)

    def flush(self) -> None:
        self.node.flush()
        self.flushed |= self.written

    def lost(self, node: Node) -> list[int]:
        """The first bytes of ``node`` that are not what a flush had made durable."""
        size = min(node.size, 2 * SIZE)
        found = np.frombuffer(node.pread(0, size), np.uint8)
        return np.flatnonzero((found != self.content[:size]) & self.flushed[:size])[:3].tolist()


def _writing(guest: Guest) -> list[Callable[[], None]]:
    return [
        lambda: guest.write(0, b"a" * UNIT),
        lambda: guest.write(UNIT + 100, b"b" * 5000),
        guest.flush,
        lambda: guest.write(MiB, b"c" * (512 * KiB)),
        lambda: guest.zero(2 * MiB, 2 * UNIT),
        guest.flush,
        lambda: guest.write(2 * MiB + 1000, b"d" * 3000),
        lambda: guest.discard(MiB, UNIT),
        guest.flush,
        lambda: guest.write(3 * MiB, b"e" * UNIT, compressed=True),
        lambda: guest.write(4 * MiB, b"f" * MiB),
        guest.flush,
        lambda: guest.write(0, b"g" * UNIT),
        guest.flush,
    ]


def _reading(guest: Guest) -> list[Callable[[], None]]:
    return [
        *_writing(guest),
        lambda: guest.write(5 * MiB + 700, b"h" * (2 * MiB)),
        guest.flush,
        *(lambda at=at: guest.node.pread(at, 100) for at in (0, MiB, 3 * MiB, 7 * MiB)),  # type: ignore[misc]
    ]


def _emptying(guest: Guest) -> list[Callable[[], None]]:
    return [
        *_writing(guest)[:6],
        lambda: guest.discard(0, SIZE),
        guest.node.format.make_empty,
        lambda: guest.write(UNIT, b"b" * UNIT),
        guest.flush,
    ]


def _keeping_a_machine(guest: Guest) -> list[Callable[[], None]]:
    state = memoryview(b"state" * 10_000)
    return [
        lambda: guest.write(0, b"a" * UNIT),
        guest.flush,
        lambda: write_vm_state(guest.node, 0, state),
        guest.flush,
        lambda: read_vm_state(guest.node, 100, memoryview(bytearray(1000))),
        lambda: guest.write(UNIT, b"b" * UNIT),
        guest.flush,
    ]


def _sizing(guest: Guest) -> list[Callable[[], None]]:
    return [
        lambda: guest.write(0, b"a" * UNIT),
        guest.flush,
        lambda: guest.node.resize(2 * SIZE),
        lambda: guest.write(SIZE + UNIT, b"b" * UNIT),
        guest.flush,
        lambda: guest.node.resize(256 * SIZE),
        lambda: guest.write(2 * MiB, b"c" * UNIT),
        guest.flush,
        lambda: guest.node.resize(SIZE),
        guest.flush,
    ]


def _snapshotting(guest: Guest) -> list[Callable[[], None]]:
    return [
        lambda: guest.write(0, b"a" * UNIT),
        guest.flush,
        lambda: guest.write(UNIT, b"b" * UNIT),
        lambda: guest.node.resize(SIZE),
        guest.flush,
        lambda: guest.write(0, b"c" * 4096 + b"a" * (UNIT - 4096)),
        guest.flush,
    ]


WORK = {
    "writing": (_writing, ("-o", "cluster_size=64k")),
    "small clusters": (_reading, ("-o", "cluster_size=512,refcount_bits=64")),
    "emptied": (_emptying, ("-o", "cluster_size=4k")),
    "a machine's state": (_keeping_a_machine, ("-o", "cluster_size=4k")),
    "subclusters": (_reading, ("-o", "extended_l2=on")),
    "sizes": (_sizing, ("-o", "cluster_size=4k")),
    "after a snapshot": (_snapshotting, ("-o", "cluster_size=4k")),
}


def run(
    work: Callable[[Guest], list[Callable[[], None]]], image: Path, rules: dict[str, object], heard: list[str]
) -> Guest:
    """As a guest does: after an error it goes on. Closing may fail too."""
    graph = Graph(OpenGate())
    file = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(image)}, **rules}
    node = graph.open({"driver": "qcow2", "file": file}, writable=True)
    assert isinstance(node, FormatNode) and node.file is not None
    debug = node.file.filter  # type: ignore[attr-defined]
    assert isinstance(debug, Blkdebug)
    debug.rules.heard = heard.append
    guest = Guest(node)
    for action in work(guest):
        try:
            action()
        except (OSError, DiskwrightError):
            guest.errors += 1
    try:
        graph.close()
    except (OSError, DiskwrightError):
        pass
    return guest


def _at(event: str, occurrence: int) -> dict[str, object]:
    """An error at one occurrence of an event: the state counts them."""
    counting = [{"event": event, "state": i + 1, "new_state": i + 2} for i in range(occurrence)]
    return {"set-state": counting, "inject-error": [{"event": event, "state": occurrence + 1, "once": True}]}


@pytest.mark.parametrize("name", WORK)
def test_an_error_at_any_event(tmp_path: Path, name: str) -> None:
    work, options = WORK[name]
    model, image = tmp_path / "model", tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", *options, str(model), str(SIZE))
    if name == "after a snapshot":
        run(_writing, model, {}, [])
        qemu_img("snapshot", "-c", "one", str(model))
    heard: list[str] = []
    shutil.copy(model, image)
    run(work, image, {}, heard)
    assert qemu_img("check", "-q", str(image), check=False).returncode == 0
    failed = 0
    for event, count in Counter(heard).items():
        for occurrence in sorted({*range(min(OCCURRENCES, count)), count - 1}):
            shutil.copy(model, image)
            told: list[str] = []
            guest = run(work, image, _at(event, occurrence), told)
            where = (event, occurrence)
            failed += guest.errors > 0
            assert told.count(event) > occurrence, where
            done = qemu_img("check", "-q", str(image), check=False)
            assert done.returncode in (0, 3), (where, done.stdout)
            graph = Graph(OpenGate())
            node = graph.open(str(image))
            assert guest.lost(node) == [], where
            graph.close()
    assert failed >= 12, "runs in which a request failed"

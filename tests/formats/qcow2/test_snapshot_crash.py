"""Crashes while snapshots are made, applied and deleted: each is there and whole or not there, and nothing leaks."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from diskwright.core import snapshots
from diskwright.core.snapshots import VmState
from tests.formats.qcow2.snapshotting import states
from tests.formats.qcow2.support import LONG, Image, Tape, checked, contents, created
from tests.formats.qcow2.test_crash import Guest, after_crash

CASES: dict[str, dict[str, Any]] = {
    "512": {"size": 48 << 10, "cluster_size": 512},
    "4k version 2": {"size": 256 << 10, "cluster_size": 4096, "compat": "0.10"},
    "4k refcounts of 4 bits": {"size": 256 << 10, "cluster_size": 4096, "refcount_bits": 4},
    "512, 64 bits": {"size": 48 << 10, "cluster_size": 512, "refcount_bits": 64},
    "64k": {"size": 1 << 20, "cluster_size": 65536},
}


@dataclass
class Phase:
    """Writes of a guest from tape position ``start`` on, and the operation from ``begun`` to ``end``."""

    start: int
    guest: Guest
    before: dict[str, bytes]
    begun: int = 0
    end: int = 0
    after: dict[str, bytes] = field(default_factory=dict)
    disk: bytes = b""
    """The guest's disk when the operation is done."""


def play(tape: Tape, chance: random.Random, operations: int, *, resize: bool) -> list[Phase]:
    phases: list[Phase] = []
    kept: dict[str, bytes] = {}
    with Image(tape) as image:
        disk = image.disk
        for _ in range(operations):
            phase = Phase(len(tape.changes), Guest(disk.pread(0, disk.size)), dict(kept))
            phase.guest.flushed = [(phase.start, 0, bytes(phase.guest.now))]
            for _ in range(chance.randrange(5)):
                _write(tape, image, phase.guest, chance)
            if resize and chance.random() < 0.5:
                disk.flush()
                image.node.resize(disk.size + (chance.randrange(1, 9) << 12))
                phase.start, phase.guest = len(tape.changes), Guest(disk.pread(0, disk.size))
                phase.guest.flushed = [(phase.start, 0, bytes(phase.guest.now))]
            phase.begun = len(tape.changes)
            _operate(image, chance, kept)
            phase.end, phase.after, phase.disk = len(tape.changes), dict(kept), disk.pread(0, disk.size)
            phases.append(phase)
    return phases


def _write(tape: Tape, image: Image, guest: Guest, chance: random.Random) -> None:
    disk = image.disk
    offset = chance.randrange(disk.size >> 9) << 9
    length = min(disk.size - offset, chance.randrange(1, 20) << 9)
    position = len(tape.changes)
    if chance.random() < 0.8:
        data = chance.randbytes(length)
        guest.does(position, offset, data)
        disk.pwrite(offset, data)
    else:
        guest.does(position, offset, bytes(length))
        disk.zero(offset, length, unmap=True)


def _operate(image: Image, chance: random.Random, kept: dict[str, bytes]) -> None:
    action = chance.random()
    if not kept or (action < 0.45 and len(kept) < 4):
        state = VmState(io.BytesIO(b"m" * 5000), 5000) if chance.random() < 0.3 else None
        now = image.disk.pread(0, image.disk.size)
        kept[snapshots.create(image.node, "name", vm_state=state).id] = now
    elif action < 0.75:
        snapshots.apply(image.node, chance.choice(list(kept)))
    else:
        id = chance.choice(list(kept))
        snapshots.delete(image.node, id)
        del kept[id]


def look(data: bytes, phase: Phase, position: int) -> bool:
    """Whether the operation has happened. Fails when what is there is neither the state before nor that after."""
    report = checked(data)
    assert (report.corruptions, report.check_errors) == (0, 0), (position, report.messages)
    found, disk = states(data), contents(data)
    if position > phase.begun and found == phase.after and disk == phase.disk:
        # An ordinary checkpoint comes before the operation, and that may leak.
        assert report.leaks == 0 or phase.after == phase.before, report.messages
        return True
    assert found == phase.before, position
    phase.guest.check(position, disk)
    return False


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(40 if LONG else 2))
def test_crash_anywhere(case: str, seed: int) -> None:
    chance = random.Random(f"{case} {seed}")
    start = created(**CASES[case])
    tape = Tape(start)
    phases = play(tape, chance, 7, resize="version 2" not in case)
    happened = 0
    for phase in phases:
        for position in range(phase.start, phase.end + 1):
            for _ in range(3 if position > phase.begun else 1):
                happened += look(after_crash(start, tape.changes, position, chance), phase, position)
        last = bytearray(after_crash(start, [*tape.changes[: phase.end], ("flush", 0, b"")], phase.end + 1, chance))
        assert look(bytes(last), phase, phase.end)
        assert not checked(bytes(last)).leaks
        assert contents(bytes(last)) == phase.disk, "what has returned is durable"
        assert states(bytes(last)) == phase.after
    assert happened > len(phases)


@pytest.mark.parametrize("seed", range(40 if LONG else 2))
def test_image_goes_on_after_a_crash(seed: int) -> None:
    """What a crash leaves is an image like any other: it can be written to, and snapshots made of it."""
    chance = random.Random(seed)
    start = created(size=48 << 10, cluster_size=512)
    tape = Tape(start)
    phases = play(tape, chance, 5, resize=False)
    for phase in phases:
        position = chance.randrange(phase.begun, phase.end + 1)
        crashed = Tape(after_crash(start, tape.changes, position, chance))
        before = states(bytes(crashed.data))
        with Image(crashed) as image:
            image.disk.pwrite(0, b"x" * 30_000)
            now = image.disk.pread(0, image.disk.size)
            before[snapshots.create(image.node, "later").id] = now
            image.disk.pwrite(5000, b"y" * 10_000)
        assert states(bytes(crashed.data)) == before
        assert not checked(bytes(crashed.data)).corruptions

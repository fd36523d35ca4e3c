"""Records that prove what a disk kept: the layout, the writer's plan and the check. Used in the guest and on the host.

A record file (or a raw disk) is a header block and then ``slots`` blocks of ``block`` bytes. Record number ``sequence``
(from 1) always goes to the same slot and always has the same bytes, so whoever knows the header can tell what every
slot should hold. Slots are written over again and again, in no order a copier could guess.

Records are written in batches. A batch ends with an fsync, and only then is its last sequence *acknowledged*. Hence,
on any image that is the disk as it was at one moment:

- everything acknowledged before that moment is there (``acked``, which only the console can tell);
- if one record of a batch is there, all batches before it are: the *barrier*, which the image alone shows;
- if each write ended before the next began (``ordered``: raw mode) there are no gaps at all below the newest record.

This module runs inside the guest too, on a stripped Python: it imports nothing heavy.
"""

from __future__ import annotations

import os
import struct
import zlib

TYPE_CHECKING = False  # typing itself would be slow to import under emulation
if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = struct.Struct("<8sIIIIQI")  # magic, block, slots, batch, churn, seed, crc32 of the fields before
HEADER_MAGIC = b"dwplan01"
RECORD = struct.Struct("<8sQQII")  # magic, sequence, seed, slot, crc32 of the whole block with this field zero
RECORD_MAGIC = b"dwrecord"

MAX_SLOTS = 1 << 20  # 4 GiB of records; a damaged header must not make the checker allocate more
MAX_BLOCK = 1 << 16
MAX_SEQUENCE = 1 << 40  # beyond any run: a larger one is damage
POOL = 1 << 16  # bytes of noise that the bodies are cut from, plus one block
CHURN_KEPT = 8  # files of the churn directory alive at a time
SHOWN = 5  # problems reported one by one


class Damaged(Exception):
    """A header or a record that is neither whole nor empty."""


class Plan:
    """What is written where. ``churn`` n > 0: every n-th batch makes one file and removes an old one."""

    def __init__(self, slots: int, batch: int = 16, seed: int = 1, block: int = 4096, churn: int = 0) -> None:
        if not (0 < slots <= MAX_SLOTS and 512 <= block <= MAX_BLOCK and block % 512 == 0 and 0 < batch <= 1 << 16):
            raise Damaged(f"impossible plan: {slots} slots of {block} bytes in batches of {batch}")
        self.slots, self.batch, self.seed, self.block, self.churn = slots, batch, seed, block, churn
        self.length = (slots + 1) * block
        self._zeros = bytes(block)
        self._pool = _noise(seed, POOL + block)

    def header(self) -> bytes:
        """Returns the block at offset 0."""
        fields = HEADER.pack(HEADER_MAGIC, self.block, self.slots, self.batch, self.churn, self.seed, 0)[:-4]
        return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(self.block, b"\0")

    @classmethod
    def parse(cls, block: bytes) -> Plan | None:
        """Returns the plan a header block describes, or None for a block of zeros. Raises Damaged."""
        if not block.strip(b"\0"):
            return None
        if len(block) < HEADER.size:
            raise Damaged(f"the header ends after {len(block)} bytes")
        magic, size, slots, batch, churn, seed, crc = HEADER.unpack_from(block)
        if magic != HEADER_MAGIC or crc != zlib.crc32(block[: HEADER.size - 4]):
            raise Damaged("the header's magic or checksum is wrong")
        return cls(slots, batch, seed, size, churn)

    def slot(self, sequence: int) -> int:
        """Returns the slot of a record: as good as random, so that some are soon written over and some hardly ever."""
        mixed = (sequence + self.seed) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        return mixed * self.slots >> 64

    def offset(self, slot: int) -> int:
        """Returns the byte offset of a slot."""
        return (slot + 1) * self.block

    def record(self, sequence: int) -> bytes:
        """Returns the bytes of record ``sequence``; every sector of them differs from those of its neighbours."""
        start = sequence * 2654435761 % POOL
        body = self._pool[start : start + self.block - RECORD.size]
        head = RECORD.pack(RECORD_MAGIC, sequence, self.seed, self.slot(sequence), 0)
        crc = zlib.crc32(body, zlib.crc32(head))
        return head[:-4] + struct.pack("<I", crc) + body

    def read(self, slot: int, block: bytes) -> int:
        """Returns the sequence of the record in a slot's block, 0 for zeros. Raises Damaged for all else."""
        if block == self._zeros:
            return 0
        magic, sequence, _, _, crc = RECORD.unpack_from(block)
        if magic != RECORD_MAGIC or not 0 < sequence <= MAX_SEQUENCE:
            raise Damaged("neither a record nor zeros")
        if self.slot(sequence) != slot:
            raise Damaged(f"record {sequence} belongs to slot {self.slot(sequence)}")
        at = RECORD.size - 4
        if zlib.crc32(block[RECORD.size :], zlib.crc32(block[:at] + b"\0\0\0\0")) != crc:
            raise Damaged(f"the checksum of record {sequence} is wrong")
        if block != self.record(sequence):
            raise Damaged(f"record {sequence} has a right checksum and wrong contents")
        found: int = sequence
        return found

    def batch_start(self, sequence: int) -> int:
        """Returns the first sequence of the batch that ``sequence`` is in."""
        return (sequence - 1) // self.batch * self.batch + 1

    def latest(self, sequence: int) -> list[int]:
        """Returns for each slot the newest record not above ``sequence`` (0: none), as a list."""
        found = [0] * self.slots
        for number in range(1, sequence + 1):
            found[self.slot(number)] = number
        return found

    def churn_file(self, batch_number: int) -> tuple[str, bytes] | None:
        """Returns (name, contents) of the file that batch ``batch_number`` makes, or None."""
        if not self.churn or batch_number % self.churn:
            return None
        number = batch_number // self.churn
        length = 4096 + number * 7919 % 200_000
        text = b"%d %d\n" % (number, self.seed)
        body = (self._pool * (length // len(self._pool) + 1))[: length - len(text)]
        return f"{number:08d}", text + body


class Report:
    """What a check found. ``ok`` is false when a record that had to be there is not, or anything is damaged."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.count = 0
        self.records = 0
        self.newest = 0
        self.floor = 0

    @property
    def ok(self) -> bool:
        return self.count == 0

    def problem(self, text: str) -> None:
        self.count += 1
        if len(self.problems) < SHOWN:
            self.problems.append(text)

    def __str__(self) -> str:
        text = f"records={self.records} newest={self.newest} floor={self.floor} problems={self.count}"
        return text + "".join("; " + p for p in self.problems)


def verify(
    read: Callable[[int, int], bytes], plan: Plan, acked: int = 0, ordered: bool = False, torn: bool = False
) -> Report:
    """Reads all slots by ``read(offset, length)`` and returns a Report.

    Every record up to the floor must be there or have been overwritten by a newer one. The floor is the higher of
    ``acked`` and what the barrier says (see above); with ``ordered`` the barrier is the newest record itself.
    ``torn`` allows half-written blocks in slots that the batch after the floor was writing: for tests that cut the
    power in the middle of a block.
    """
    report = Report()
    found = [0] * plan.slots
    damaged: dict[int, str] = {}
    for slot in range(plan.slots):
        try:
            found[slot] = plan.read(slot, read(plan.offset(slot), plan.block))
        except Damaged as error:
            damaged[slot] = str(error)
    report.records = sum(1 for sequence in found if sequence)
    report.newest = max(found)
    barrier = report.newest if ordered else plan.batch_start(report.newest) - 1 if report.newest else 0
    report.floor = max(acked, barrier)
    # The acknowledgement of one more batch may be on its way to us.
    writing = {plan.slot(report.floor + n) for n in range(1, 2 * plan.batch + 1)} if torn else set()
    for slot, why in damaged.items():
        if slot not in writing:
            report.problem(f"slot {slot}: {why}")
    for slot, wanted in enumerate(plan.latest(report.floor)):
        if slot not in damaged and found[slot] < wanted:
            what = f"record {found[slot]}" if found[slot] else "zeros"
            report.problem(f"slot {slot}: {what} where record {wanted} was written and flushed")
    return report


def verify_file(path: str, acked: int = 0, ordered: bool = False, torn: bool = False) -> Report:
    """Verifies a record file or raw disk; the plan is read from its header. Raises OSError when it can't be read."""
    report = Report()
    with open(path, "rb", buffering=0) as file:
        try:
            plan = Plan.parse(_pread(file.fileno(), 0, 512))
        except Damaged as error:
            report.problem(str(error))
            return report
        if plan is None:
            if acked:
                report.problem(f"no records at all where {acked} were acknowledged")
            return report
        return verify(lambda offset, length: _pread(file.fileno(), offset, length), plan, acked, ordered, torn)


def verify_churn(directory: str, plan: Plan, report: Report) -> None:
    """Checks the churn directory against the records: adds problems to their ``report``."""
    if not plan.churn:
        return
    made = report.floor // plan.batch // plan.churn  # files whose batch ended before the floor
    begun = (report.newest // plan.batch + 2) // plan.churn  # the newest file whose making may have begun
    names = set(os.listdir(directory)) if os.path.isdir(directory) else set()
    for number in range(1, begun + 1):
        made_so = plan.churn_file(number * plan.churn)
        assert made_so
        name, contents = made_so
        if number <= made and name in names:
            with open(os.path.join(directory, name), "rb") as file:
                if file.read() != contents:
                    report.problem(f"churn file {name}: wrong contents")
        elif begun - CHURN_KEPT < number <= made:
            report.problem(f"churn file {name} is missing")


def _pread(fd: int, offset: int, length: int) -> bytes:
    """Reads ``length`` bytes; what lies beyond the end reads as zeros, as in a record file cut short by a crash."""
    parts = []
    while length:
        part = os.pread(fd, length, offset)
        if not part:
            parts.append(bytes(length))
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def _noise(seed: int, length: int) -> bytes:
    """Returns ``length`` bytes that do not compress (xorshift64)."""
    state = (seed * 0x9E3779B97F4A7C15 ^ 0x2545F4914F6CDD1D) & 0xFFFFFFFFFFFFFFFF or 1
    words = []
    for _ in range(length // 8 + 1):
        state ^= state << 13 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 7
        state ^= state << 17 & 0xFFFFFFFFFFFFFFFF
        words.append(state)
    return struct.pack(f"<{len(words)}Q", *words)[:length]

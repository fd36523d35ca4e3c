"""What a guest's disk begins with: a partition table, a file system, or another image.

Sources: UEFI Specification 2.10, section 5 (GPT and protective MBR); the rest is named in ``signatures``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from uuid import UUID

from diskwright.engine.signatures import FILE_SYSTEMS, FILES, HEAD, IMAGE, Found, matches

MAX_PARTITIONS: Final = 128
"""As many as a GPT of the usual size has."""

_MBR_TABLE: Final = 446
_GPT: Final = struct.Struct("<8sIIIIQQQQ16sQIII")


class Partition(NamedTuple):
    """``start`` and ``length`` in bytes. ``type`` is an MBR's number or a GPT's UUID, as text."""

    number: int
    type: str
    start: int
    length: int


@dataclass
class Content:
    """What the first bytes look like. ``looked_at`` is how many there were."""

    looked_at: int = 0
    table: str | None = None
    """``gpt``, ``mbr`` or None."""
    partitions: list[Partition] = field(default_factory=list)
    signatures: list[Found] = field(default_factory=list)
    blank: bool = False
    """Whether all of it is zeros."""
    problems: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[Found]:
        return [found for found in self.signatures if found.signature.kind == IMAGE]


def look(head: bytes, size: int) -> Content:
    """What a disk of ``size`` bytes, beginning with ``head`` (``HEAD`` bytes are enough), looks like."""
    content = Content(len(head), blank=not head.strip(b"\0"))
    content.signatures = matches((*FILE_SYSTEMS, *FILES), head[:HEAD])
    for sector in (512, 4096):
        if head[sector : sector + 8] == b"EFI PART":
            content.table = "gpt"
            _read_gpt(content, head, sector, size)
            return content
    # A boot sector of a file system ends with the same two bytes as a partition table's.
    if head[510:512] == b"\x55\xaa":
        partitions = _mbr_partitions(head)
        if partitions:
            content.table, content.partitions = "mbr", partitions
            _judge(content, size)
    return content


def _mbr_partitions(head: bytes) -> list[Partition]:
    """The partitions of a table that could be one; none when it is rather a boot sector's code."""
    found: list[Partition] = []
    for number in range(4):
        row = head[_MBR_TABLE + number * 16 :][:16]
        start, sectors = struct.unpack_from("<II", row, 8)
        if row[0] not in (0, 0x80):
            return []
        if row[4]:
            found.append(Partition(number + 1, f"{row[4]:#04x}", start * 512, sectors * 512))
    return found


def _read_gpt(content: Content, head: bytes, sector: int, size: int) -> None:
    if len(head) < sector + _GPT.size:
        content.problems.append("the GPT header is cut off")
        return
    fields = _GPT.unpack_from(head, sector)
    table, count, width = fields[10], fields[11], fields[12]
    if width < 128 or width > 4096:
        content.problems.append(f"GPT entries of {width} bytes")
        return
    for number in range(min(count, MAX_PARTITIONS)):
        at = table * sector + number * width
        if at + 48 > len(head):
            content.problems.append("the GPT goes on beyond what was looked at")
            break
        kind = head[at : at + 16]
        if kind.strip(b"\0"):
            first, last = struct.unpack_from("<QQ", head, at + 32)
            length = max(0, last - first + 1) * sector
            content.partitions.append(Partition(number + 1, str(UUID(bytes_le=kind)), first * sector, length))
    if count > MAX_PARTITIONS:
        content.problems.append(f"the GPT has room for {count} partitions; {MAX_PARTITIONS} were looked at")
    _judge(content, size)


def _judge(content: Content, size: int) -> None:
    for number, _, start, length in content.partitions:
        if start + length > size:
            content.problems.append(f"partition {number} ends at {start + length}, beyond the disk's end, {size}")

"""vhdx: the metadata region: a table of items, and the items. MS-VHDX 2.6."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.units import KiB, MiB, TiB, is_power_of_two

if TYPE_CHECKING:
    from diskwright.formats.vhdx.header import Bytes, Region

TABLE: Final = 64 * KiB
"""Length of the table; items lie behind it."""
_HEAD: Final = struct.Struct("<8sHH20s")
_ENTRY: Final = struct.Struct("<16sIIII")
_MOST_ENTRIES: Final = 2047
_MOST_USER_ENTRIES: Final = 1024
_MOST_ITEM: Final = MiB

FILE_PARAMETERS: Final = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
VIRTUAL_DISK_SIZE: Final = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
VIRTUAL_DISK_ID: Final = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le
LOGICAL_SECTOR_SIZE: Final = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
PHYSICAL_SECTOR_SIZE: Final = uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556").bytes_le
PARENT_LOCATOR: Final = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le

_IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4

_KNOWN: Final = {
    FILE_PARAMETERS: ("File Parameters", 8, IS_REQUIRED),
    VIRTUAL_DISK_SIZE: ("Virtual Disk Size", 8, IS_REQUIRED | IS_VIRTUAL_DISK),
    VIRTUAL_DISK_ID: ("Virtual Disk ID", 16, IS_REQUIRED | IS_VIRTUAL_DISK),
    LOGICAL_SECTOR_SIZE: ("Logical Sector Size", 4, IS_REQUIRED | IS_VIRTUAL_DISK),
    PHYSICAL_SECTOR_SIZE: ("Physical Sector Size", 4, IS_REQUIRED | IS_VIRTUAL_DISK),
    PARENT_LOCATOR: ("Parent Locator", 0, IS_REQUIRED),
}
"""Items by GUID: their name, their length (0: any) and their flags."""

MIN_BLOCK: Final = MiB
MAX_BLOCK: Final = 256 * MiB
MAX_SIZE: Final = 64 * TiB
SECTOR_SIZES: Final = (512, 4096)
_LEAVE_ALLOCATED, _HAS_PARENT = 1, 2
_MOST_INHERITED: Final = MiB // 2
"""Bytes of items that a child takes over, at most: half of its metadata region."""
CHUNK_SECTORS: Final = 1 << 23
"""Sectors that one block of the sector bitmap tells of."""


@dataclass(frozen=True)
class Disk:
    """What the items say. Sizes in bytes."""

    size: int
    block_size: int
    leave_allocated: bool
    has_parent: bool
    logical_sector: int
    physical_sector: int
    disk_id: bytes
    locator: bytes | None = None
    places: Mapping[bytes, tuple[int, int]] | None = None
    """``(file offset, length)`` of each system item."""
    inherited: tuple[tuple[bytes, int, bytes], ...] = ()
    """``(GUID, flags, contents)`` of items that are not known here and belong to the disk, not to the file: what a new
    child has from its parent."""

    @property
    def chunk_ratio(self) -> int:
        """Blocks that one block of the sector bitmap tells of."""
        return CHUNK_SECTORS * self.logical_sector // self.block_size

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)

    @property
    def bat_entries(self) -> int:
        """Entries of the table, those for blocks of the sector bitmap included. MS-VHDX 2.5."""
        if self.has_parent:
            return -(-self.blocks // self.chunk_ratio) * (self.chunk_ratio + 1)
        return self.blocks + max(0, self.blocks - 1) // self.chunk_ratio

    def items(self) -> dict[bytes, bytes]:
        """All items as they are stored."""
        flags = self.leave_allocated * _LEAVE_ALLOCATED | self.has_parent * _HAS_PARENT
        items = {
            FILE_PARAMETERS: struct.pack("<II", self.block_size, flags),
            VIRTUAL_DISK_SIZE: struct.pack("<Q", self.size),
            VIRTUAL_DISK_ID: self.disk_id,
            LOGICAL_SECTOR_SIZE: struct.pack("<I", self.logical_sector),
            PHYSICAL_SECTOR_SIZE: struct.pack("<I", self.physical_sector),
        }
        if self.locator is not None:
            items[PARENT_LOCATOR] = self.locator
        return items

    def encode(self) -> bytes:
        """The region from its beginning to the end of the last item."""
        items = [(guid, _KNOWN[guid][2], item) for guid, item in self.items().items()] + list(self.inherited)
        table = _HEAD.pack(b"metadata", 0, len(items), bytes(20))
        body = b""
        for guid, flags, item in items:
            table += _ENTRY.pack(guid, TABLE + len(body) if item else 0, len(item), flags, 0)
            body += item
        return table.ljust(TABLE, b"\0") + body


def read_disk(source: Bytes, region: Region) -> Disk:
    """The items, checked. Raises CorruptImage, UnsupportedFeature or LimitExceeded."""
    path = source.filename
    if region.end > source.size:
        raise CorruptImage(
            path, "metadata region", f"{region.length} bytes at {region.offset:#x}", None,
            f"it would end behind the file ({source.size} bytes)",
        )  # fmt: skip
    places = _places(source, region)
    items = {guid: source.pread(at, length) if length else b"" for guid, (at, length) in places.items()}

    def number(guid: bytes, layout: str) -> Any:
        return struct.unpack(layout, items[guid])[0]

    block_size, flags = struct.unpack("<II", items[FILE_PARAMETERS])
    disk = Disk(
        size=number(VIRTUAL_DISK_SIZE, "<Q"),
        block_size=block_size,
        leave_allocated=bool(flags & _LEAVE_ALLOCATED) and not flags & _HAS_PARENT,
        has_parent=bool(flags & _HAS_PARENT),
        logical_sector=number(LOGICAL_SECTOR_SIZE, "<I"),
        physical_sector=number(PHYSICAL_SECTOR_SIZE, "<I"),
        disk_id=items[VIRTUAL_DISK_ID],
        locator=items.get(PARENT_LOCATOR),
        places=places,
    )
    _check_disk(path, disk, places)
    return disk


def _places(source: Bytes, region: Region) -> dict[bytes, tuple[int, int]]:
    """``(file offset, length)`` of each known item."""
    path, table = source.filename, source.pread(region.offset, TABLE)
    signature, _, count, _ = _HEAD.unpack_from(table)
    if signature != b"metadata":
        raise CorruptImage(path, "Signature", signature.hex(), region.offset, "the metadata table should begin there")
    if count > _MOST_ENTRIES:
        raise CorruptImage(path, "EntryCount", count, region.offset + 10, f"at most {_MOST_ENTRIES} are possible")
    places: dict[bytes, tuple[int, int]] = {}
    taken: list[tuple[int, int]] = []
    seen: set[tuple[bytes, int]] = set()
    users = 0
    for number in range(count):
        at = _HEAD.size + number * _ENTRY.size
        guid, offset, length, flags, _ = _ENTRY.unpack_from(table, at)
        user = flags & _IS_USER
        known = not user and guid in _KNOWN
        name = _KNOWN[guid][0] if known else guid_text(guid)
        if flags & IS_REQUIRED and not known:
            raise UnsupportedFeature(f"{path}: needs the metadata item {name}, which is not known")
        fits = TABLE <= offset <= offset + length <= region.length if length else not offset
        if length > _MOST_ITEM or not fits:
            raise CorruptImage(
                path, f"metadata item {name}", f"{length} bytes at {offset:#x}", region.offset + at,
                "no item can lie there",
            )  # fmt: skip
        if (guid, user) in seen:
            raise CorruptImage(path, "metadata table", "damaged", region.offset + at, f"{name} is there twice")
        seen.add((guid, user))
        taken.append((offset, offset + length))
        users += user
        if known:
            places[guid] = region.offset + offset, length
    for (_, end), (start, _) in pairwise(sorted(taken)):
        if start < end:
            raise CorruptImage(path, "metadata table", "damaged", region.offset, f"two items overlap at {start:#x}")
    if users > _MOST_USER_ENTRIES:
        raise CorruptImage(path, "metadata table", "damaged", region.offset, f"it has {users} items of users")
    for guid, (name, length, _) in _KNOWN.items():
        if guid == PARENT_LOCATOR:
            continue
        if guid not in places:
            raise CorruptImage(path, "metadata table", "damaged", region.offset, f"{name} is missing")
        if places[guid][1] != length:
            raise CorruptImage(path, f"length of {name}", places[guid][1], region.offset, f"it must be {length}")
    return places


def inherited_items(source: Bytes, region: Region) -> tuple[tuple[bytes, int, bytes], ...]:
    """``Disk.inherited`` of a child of this image. Raises LimitExceeded."""
    table = source.pread(region.offset, TABLE)
    found: list[tuple[bytes, int, bytes]] = []
    size = 0
    for at in range(_HEAD.size, _HEAD.size + _HEAD.unpack_from(table)[2] * _ENTRY.size, _ENTRY.size):
        guid, offset, length, flags, _ = _ENTRY.unpack_from(table, at)
        if flags & IS_VIRTUAL_DISK and (flags & _IS_USER or guid not in _KNOWN):
            size += length
            if size > _MOST_INHERITED:
                raise LimitExceeded(
                    f"{source.filename}: has more than {_MOST_INHERITED} bytes for a child to take over"
                )
            found.append((guid, flags, source.pread(region.offset + offset, length) if length else b""))
    return tuple(found)


def changed_item(source: Bytes, region: Region, guid: bytes, item: bytes) -> list[tuple[int, bytes]]:
    """``(file offset, bytes)`` of what has to be written, all at once, to give a system item that is there other
    contents. Raises LimitExceeded."""
    table = source.pread(region.offset, TABLE)
    count = _HEAD.unpack_from(table)[2]
    others: list[tuple[int, int]] = []
    own = -1
    for at in range(_HEAD.size, _HEAD.size + count * _ENTRY.size, _ENTRY.size):
        found, offset, length, flags, _ = _ENTRY.unpack_from(table, at)
        if found == guid and not flags & _IS_USER:
            own = at
        elif length:
            others.append((offset, offset + length))
    place = TABLE
    for start, end in sorted(others):
        if place + len(item) <= start:
            break
        place = max(place, end)
    if place + len(item) > region.length or own < 0:
        raise LimitExceeded(f"{source.filename}: its metadata region has no room for {len(item)} bytes more")
    entry = _ENTRY.pack(guid, place, len(item), _KNOWN[guid][2], 0)
    return [(region.offset + own, entry), (region.offset + place, item)]


def guid_text(raw: bytes) -> str:
    return str(uuid.UUID(bytes_le=raw))


def _check_disk(path: str, disk: Disk, places: Mapping[bytes, tuple[int, int]]) -> None:
    for guid, value in ((LOGICAL_SECTOR_SIZE, disk.logical_sector), (PHYSICAL_SECTOR_SIZE, disk.physical_sector)):
        if value not in SECTOR_SIZES:
            raise CorruptImage(path, _KNOWN[guid][0], value, places[guid][0], "512 and 4096 are possible")
    if not MIN_BLOCK <= disk.block_size <= MAX_BLOCK or not is_power_of_two(disk.block_size):
        raise CorruptImage(
            path, "BlockSize", disk.block_size, places[FILE_PARAMETERS][0],
            "it must be a power of two from 1 MiB to 256 MiB",
        )  # fmt: skip
    at = places[VIRTUAL_DISK_SIZE][0]
    if disk.size > MAX_SIZE:
        raise LimitExceeded(f"{path}: has a disk of {disk.size} bytes; at most {MAX_SIZE} are possible")
    if disk.size % disk.logical_sector:
        raise CorruptImage(path, "VirtualDiskSize", disk.size, at, f"no multiple of {disk.logical_sector}")
    if disk.has_parent and disk.locator is None:
        raise CorruptImage(path, "metadata table", "damaged", None, "Parent Locator is missing")

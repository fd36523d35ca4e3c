"""What the tests of snapshots share."""

from __future__ import annotations

from diskwright.core.snapshots import list_of
from tests.formats.qcow2.support import Image, Tape, checked


def states(data: bytes) -> dict[str, bytes]:
    """The contents of every snapshot of an image given as bytes, by id."""
    with Image(Tape(data), writable=False) as image:
        ids = [info.id for info in list_of(image.node)]
    assert len(set(ids)) == len(ids)
    return {id: shown(data, snapshot_id=id) for id in ids}


def shown(data: bytes, **option: str) -> bytes:
    with Image(Tape(data), writable=False, **option) as image:
        return image.disk.pread(0, image.disk.size)


def sound(data: bytes) -> None:
    """Neither damage nor leaks."""
    report = checked(data)
    assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0), report.messages

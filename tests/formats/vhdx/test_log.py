"""The log: which entries count, and what opening an image does with them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import diskwright
from diskwright.codecs.crc32c import crc32c
from diskwright.core.driver import OpenContext
from diskwright.core.graph import Graph
from diskwright.core.node import StorageNode
from diskwright.errors import DiskwrightError
from diskwright.formats.vhdx.driver import Vhdx, VhdxOptions
from tests.cli.run import diskwright as ours
from tests.cli.run import qemu_img
from tests.crash.recording import Recording
from tests.formats.qcow2.support import LONG
from tests.formats.vhdx.entries import GUID, LOG, entry, put, use_log

MiB = 1 << 20
SIZE = 8 * MiB
BAT = 2 * MiB


def base(tmp_path: Path) -> bytearray:
    """An image of eight blocks, of which three are there: they hold 1s, 2s and 3s. The table names none of them."""
    path = tmp_path / "base"
    diskwright.create(str(path), format="vhdx", size=SIZE, block_size=MiB)
    return bytearray(path.read_bytes()) + b"".join(bytes([n]) * MiB for n in (1, 2, 3))


def table(image: bytes, **entries: int) -> bytes:
    """The table's page with blocks in places: ``b3=4`` puts block 3 to 4 MiB."""
    page = bytearray(image[BAT : BAT + 4096])
    for name, place in entries.items():
        struct.pack_into("<Q", page, 8 * int(name[1:]), place << 20 | 6 if place else 2)
    return bytes(page)


def reads(path: Path) -> list[int]:
    """The first byte of each block."""
    with diskwright.open(str(path)) as disk:
        return [disk.pread(block * MiB, 1)[0] for block in range(8)]


Build = Callable[[bytearray], None]


def one(image: bytearray) -> None:
    put(image, 0, entry(1, [(BAT, table(image, b3=4))], tail=0))


def two_of_one_sequence(image: bytearray) -> None:
    at = put(image, 0, entry(7, [(BAT, table(image, b0=4))], tail=0))
    put(image, at, entry(8, [(BAT, table(image, b0=4, b3=5))], tail=0))


def only_the_newer_of_two(image: bytearray) -> None:
    """The newer one makes a sequence by itself: the older has been applied, and must not be once more."""
    at = put(image, 0, entry(7, [(BAT, table(image, b0=4))], tail=0))
    put(image, at, entry(8, [(BAT + 4096, bytes(4096))], tail=at))
    image[BAT : BAT + 4096] = table(image, b3=4)


def around_the_end(image: bytearray) -> None:
    at = put(image, MiB - 4096, entry(3, [(BAT, table(image, b1=5))], tail=MiB - 4096))
    assert at == 4096
    put(image, at, entry(4, [(BAT, table(image, b1=5, b3=4))], tail=MiB - 4096))


def a_torn_one_behind(image: bytearray) -> None:
    at = put(image, 0, entry(1, [(BAT, table(image, b3=4))], tail=0))
    torn = entry(2, [(BAT, table(image, b0=5))], tail=at)
    put(image, at, torn[:4096])


def a_wrong_checksum_behind(image: bytearray) -> None:
    at = put(image, 0, entry(1, [(BAT, table(image, b3=4))], tail=0))
    bad = bytearray(entry(2, [(BAT, table(image, b0=5))], tail=at))
    bad[2000] ^= 1
    put(image, at, bytes(bad))


def a_gap_in_the_numbers(image: bytearray) -> None:
    """The second entry's sequence would begin with the first, which is not the one before it."""
    at = put(image, 0, entry(1, [(BAT, table(image, b3=4))], tail=0))
    put(image, at, entry(3, [(BAT, table(image, b0=5))], tail=0))


def another_logs_entry(image: bytearray) -> None:
    at = put(image, 0, entry(1, [(BAT, table(image, b3=4))], tail=0))
    put(image, at, entry(2, [(BAT, table(image, b0=5))], tail=at, guid=bytes(range(2, 18))))


def the_greatest_number(image: bytearray) -> None:
    put(image, 0, entry(5, [(BAT, table(image, b0=5))], tail=0))
    put(image, 65536, entry((1 << 33) + 9, [(BAT, table(image, b3=4))], tail=65536))
    put(image, 131072, entry(6, [(BAT, table(image, b1=5))], tail=131072))


def zeros_and_then_pages(image: bytearray) -> None:
    image[BAT : BAT + 4096] = table(image, b0=5, b1=6)
    put(image, 0, entry(1, [(BAT, 8192), (BAT, table(bytes(len(image)), b3=4))], tail=0))


def an_empty_one(image: bytearray) -> None:
    image[BAT : BAT + 4096] = table(image, b3=4)
    put(image, 0, entry(1, [], tail=0))


def longer_than_it_needs_to_be(image: bytearray) -> None:
    put(image, 8192, entry(1, [(BAT, table(image, b3=4))], tail=8192, pages=8))


GOOD: list[Build] = [
    one, two_of_one_sequence, only_the_newer_of_two, around_the_end, a_torn_one_behind, a_wrong_checksum_behind,
    a_gap_in_the_numbers, another_logs_entry, the_greatest_number, zeros_and_then_pages, an_empty_one,
    longer_than_it_needs_to_be,
]  # fmt: skip
EXPECTED = {
    "two_of_one_sequence": [1, 0, 0, 2, 0, 0, 0, 0],
    "around_the_end": [0, 2, 0, 1, 0, 0, 0, 0],
}


@pytest.mark.parametrize("build", GOOD, ids=lambda build: build.__name__)
def test_what_counts_is_replayed(build: Build, tmp_path: Path) -> None:
    image = base(tmp_path)
    build(image)
    use_log(image)
    path = tmp_path / "image"
    path.write_bytes(image)
    expected = EXPECTED.get(build.__name__, [0, 0, 0, 1, 0, 0, 0, 0])
    assert reads(path) == expected
    assert path.read_bytes() == image, "reading changes nothing"
    assert ours("check", "image", cwd=tmp_path).err == "ERROR the log has not been replayed\n"
    done = ours("check", "-r", "all", "image", cwd=tmp_path)
    assert done.code == 0 and "    1 corruptions\n" in done.out
    assert reads(path) == expected
    changed = path.read_bytes()
    assert changed[(128 << 10) + 48 :][:16] == changed[(64 << 10) + 48 :][:16] == bytes(16)
    assert changed[(64 << 10) + 16 :][:16] != image[(64 << 10) + 16 :][:16], "FileWriteGuid"
    assert changed[(64 << 10) + 32 :][:16] == image[(64 << 10) + 32 :][:16], "DataWriteGuid"
    assert qemu_img("check", "image", cwd=tmp_path).code == 0


# qemu-img 7.2 replays entries that stand before the one the newest names as its first, and does not mind a gap.
QEMU_TOO = [build for build in GOOD if build not in (only_the_newer_of_two, a_gap_in_the_numbers)]


@pytest.mark.parametrize("build", QEMU_TOO, ids=lambda build: build.__name__)
def test_qemu_replays_it_so_too(build: Build, tmp_path: Path) -> None:
    image = base(tmp_path)
    build(image)
    use_log(image)
    for name in ("ours", "theirs"):
        (tmp_path / name).write_bytes(image)
    assert ours("check", "-r", "all", "ours", cwd=tmp_path).code == 0
    assert qemu_img("check", "-r", "all", "theirs", cwd=tmp_path).code == 0
    assert qemu_img("compare", "ours", "theirs", cwd=tmp_path).code == 0
    assert reads(tmp_path / "ours") == reads(tmp_path / "theirs")


def test_a_log_without_a_whole_entry(tmp_path: Path) -> None:
    image = base(tmp_path)
    image[BAT : BAT + 4096] = table(image, b2=6)
    put(image, 0, entry(1, [(BAT, table(image, b3=4))], tail=0)[:4096])
    use_log(image)
    path = tmp_path / "image"
    path.write_bytes(image)
    for writable in (False, True):
        with pytest.raises(DiskwrightError, match="the header says that it is in use, and no entry in it is whole"):
            diskwright.open(str(path), writable=writable)
    assert path.read_bytes() == image
    done = ours("check", "image", cwd=tmp_path)
    assert (done.code, done.err) == (2, "ERROR the log has no whole entry; it is given up\n")
    assert path.read_bytes() == image
    assert ours("check", "-r", "all", "image", cwd=tmp_path).code == 0
    assert reads(path) == [0, 0, 3, 0, 0, 0, 0, 0]


def test_a_file_that_is_shorter_than_when_its_log_was_written(tmp_path: Path) -> None:
    image = base(tmp_path)
    put(image, 0, entry(1, [(BAT, table(image, b3=4))], tail=0, flushed=7 * MiB, last=7 * MiB))
    use_log(image)
    path = tmp_path / "image"
    path.write_bytes(image)
    assert reads(path)[3] == 1
    path.write_bytes(image[: 6 * MiB])
    for writable in (False, True):
        with pytest.raises(DiskwrightError, match="had 7340032 bytes when its log was written: it has been cut off"):
            diskwright.open(str(path), writable=writable)


def test_replaying_makes_the_file_as_long_as_it_has_to_be(tmp_path: Path) -> None:
    image = base(tmp_path)
    put(image, 0, entry(1, [(BAT, table(image, b3=9)), (12 * MiB, bytes(4096))], tail=0, last=11 * MiB))
    use_log(image)
    path = tmp_path / "image"
    path.write_bytes(image)
    assert reads(path) == [0] * 8
    with diskwright.open(str(path), writable=True):
        assert path.stat().st_size == 12 * MiB + 4096


@pytest.mark.parametrize(("changes", "last"), [([(1 << 46, 4096)], 0), ([(0x500000, 1 << 45)], 0), ([], 1 << 46)])
def test_a_log_that_makes_the_file_huge(changes: list[tuple[int, bytes | int]], last: int, tmp_path: Path) -> None:
    image = base(tmp_path)
    put(image, 0, entry(1, changes, tail=0, last=last))
    use_log(image)
    path = tmp_path / "image"
    path.write_bytes(image)
    for writable in (False, True):
        with pytest.raises(DiskwrightError, match="its log would make the file"):
            diskwright.open(str(path), writable=writable)
    assert path.read_bytes() == image


def test_a_log_that_changes_data_is_not_replayed_in_memory(tmp_path: Path) -> None:
    image = base(tmp_path)
    put(image, 0, entry(1, [(BAT, table(image, b3=4)), (4 * MiB + 8192, b"x" * 4096)], tail=0))
    use_log(image)
    path = tmp_path / "image"
    path.write_bytes(image)
    with pytest.raises(DiskwrightError, match="its log changes the disk's data at 0x402000"):
        diskwright.open(str(path))
    with diskwright.open(str(path), writable=True) as disk:
        assert disk.pread(3 * MiB + 8191, 3) == b"\1xx"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 1}, "has a log of version 1"),
        ({"length": 1 << 19}, "LogLength"),
        ({"length": 1 << 30}, "the log would end behind the file"),
        ({"offset": 4096}, "LogOffset"),
        ({"offset": 0}, "LogOffset"),
    ],
)
def test_a_header_that_says_wrong_things_of_its_log(change: dict[str, int], text: str, tmp_path: Path) -> None:
    image = base(tmp_path)
    one(image)
    for at in (64 << 10, 128 << 10):
        struct.pack_into("<H", image, at + 64, change.get("version", 0))
        struct.pack_into("<I", image, at + 68, change.get("length", MiB))
        struct.pack_into("<Q", image, at + 72, change.get("offset", LOG))
    use_log(image)
    (tmp_path / "image").write_bytes(image)
    with pytest.raises(DiskwrightError, match=text):
        diskwright.open(str(tmp_path / "image"))


def test_made_up_logs_cost_little(tmp_path: Path) -> None:
    """Headers everywhere that claim all of the ring, or that follow each other and never make a sequence."""
    path = tmp_path / "image"
    for pages, tail, count in ((256, 0, 256), (128, 4096, 256), (1, 4096 * 200, 128)):
        image = base(tmp_path)
        for at in range(count):
            data = bytearray(entry(at + 1, [], tail=tail, pages=pages))
            put(image, at * 4096, bytes(data[:4096]))
        use_log(image)
        path.write_bytes(image)
        with pytest.raises(DiskwrightError, match="log"):
            diskwright.open(str(path))


@pytest.mark.parametrize("seed", range(300 if LONG else 40))
def test_damaged_logs_end_in_an_answer_or_an_error(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    image = base(tmp_path)
    chance.choice(GOOD)(image)
    for _ in range(chance.choice((1, 2, 5))):
        at = LOG + chance.choice((0, 4096, 65536, MiB - 4096)) + chance.choice((8, 12, 16, 24, 32, 48, 56, 64, 72, 80))
        struct.pack_into(
            "<Q", image, at, chance.choice((0, 1, 4096, 1 << 20, 1 << 40, (1 << 64) - 1, chance.getrandbits(64)))
        )
        start = at - at % 4096
        length = struct.unpack_from("<I", image, start + 8)[0]
        if image[start : start + 4] == b"loge" and length <= MiB and chance.random() < 0.8:
            whole = bytearray(image[start : start + length])
            whole[4:8] = bytes(4)
            struct.pack_into("<I", image, start + 4, crc32c(whole))
    use_log(image)
    path = tmp_path / "image"
    path.write_bytes(image)
    for writable in (False, True):
        try:
            with diskwright.open(str(path), writable=writable) as disk:
                disk.pread(0, disk.size)
        except (DiskwrightError, OSError):
            pass
    assert ours("check", "-r", "all", "image", cwd=tmp_path).code in (0, 1, 2, 3)


@pytest.mark.parametrize("build", [two_of_one_sequence, zeros_and_then_pages], ids=lambda build: build.__name__)
def test_a_crash_while_replaying(build: Build, tmp_path: Path) -> None:
    image = base(tmp_path)
    build(image)
    use_log(image)
    expected = EXPECTED.get(build.__name__, [0, 0, 0, 1, 0, 0, 0, 0])
    recording = Recording(file=bytes(image))
    graph = Graph()
    file = StorageNode("file", recording.files["file"], True)
    graph.adopt(file)
    Vhdx.open(OpenContext(file, graph.leases, lambda *_: file, True), VhdxOptions())
    graph.close()
    assert len(recording.changes) > 8
    path = tmp_path / "image"
    for _, files in recording.crashes(random.Random(1)):
        path.write_bytes(files["file"])
        assert reads(path) == expected


def test_a_name_that_is_not_the_logs(tmp_path: Path) -> None:
    """The GUID in the header decides, not that there are entries."""
    image = base(tmp_path)
    one(image)
    path = tmp_path / "image"
    path.write_bytes(image)
    assert reads(path) == [0] * 8
    use_log(image, guid=GUID[::-1])
    path.write_bytes(image)
    with pytest.raises(DiskwrightError, match="no entry in it is whole"):
        diskwright.open(str(path))

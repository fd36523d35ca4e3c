"""blklogwrites: what is in the log, replayed, is what was written; and QEMU's log of the same is the same."""

from __future__ import annotations

import random
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskwright.core.graph import Graph
from diskwright.core.node import FilterNode
from diskwright.errors import CorruptImage, OptionError
from tests.filters.opening import memory, opened
from tests.filters.scripts import carry_out
from tests.peers.qemu_img import qemu_img

SIZE = 1 << 20


class Log:
    """A reader of the format of dm-log-writes, by the kernel's documentation and nothing else."""

    def __init__(self, raw: bytes) -> None:
        magic, version, self.entries, self.unit = struct.unpack_from("<QQQI", raw)
        assert (magic, version) == (0x6A736677736872, 1)
        self._raw = raw

    def __iter__(self) -> Iterator[tuple[int, int, int, bytes]]:
        """``(first sector, sectors, flags, data)`` of each entry."""
        at = self.unit
        for _ in range(self.entries):
            sector, count, flags, length = struct.unpack_from("<QQQQ", self._raw, at)
            assert length == 0
            at += self.unit
            data = b"" if flags & 4 else self._raw[at : at + count * self.unit]
            assert len(data) == (0 if flags & 4 else count * self.unit)
            at += len(data)
            yield sector, count, flags, data
        self.end = at

    def replay(self, disk: bytearray) -> bytearray:
        for sector, count, flags, data in self:
            start = sector * self.unit
            disk[start : start + count * self.unit] = bytes(count * self.unit) if flags & 4 else data
        return disk


def logged(**options: object) -> tuple[Graph, FilterNode]:
    named = {key.replace("_", "-"): value for key, value in options.items()}
    return opened({"driver": "blklogwrites", "file": memory(SIZE), "log": memory(0), **named})


def log_of(node: FilterNode) -> Log:
    log = node.children()["log"]
    return Log(log.pread(0, log.size))


@pytest.mark.parametrize("unit", [512, 4096])
def test_replayed_it_gives_the_disk(unit: int) -> None:
    graph, node = logged(log_sector_size=unit)
    rng, content = random.Random(unit), bytearray(SIZE)
    for _ in range(300):
        offset = rng.randrange(SIZE - 1)
        length = min(rng.choice([1, 512, 4096, 10000]), SIZE - offset)
        kind = rng.choice(["write", "write", "zero", "discard", "flush"])
        if kind == "write":
            content[offset : offset + length] = data = rng.randbytes(length)
            node.pwrite(offset, data)
        elif kind == "zero":
            content[offset : offset + length] = bytes(length)
            node.write_zeros(offset, length, unmap=rng.random() < 0.5)
        elif kind == "discard":
            node.discard(offset, length)
            first, last = -(-offset // unit) * unit, (offset + length) // unit * unit
            if first < last:
                content[first:last] = bytes(last - first)
        else:
            node.flush()
    node.flush()
    assert node.pread(0, SIZE) == content
    assert log_of(node).replay(bytearray(SIZE)) == content
    graph.close()


def test_a_flush_is_an_entry_and_makes_those_before_it_count() -> None:
    graph, node = logged()
    node.pwrite(0, b"x" * 512)
    node.flush()
    node.pwrite(512, b"y" * 512)
    assert [(sector, count, flags) for sector, count, flags, _ in log_of(node)] == [(0, 1, 0), (0, 0, 1)]
    node.flush()
    assert [entry[:3] for entry in log_of(node)][2:] == [(1, 1, 0), (0, 0, 1)]
    graph.close()


def test_without_flushes_the_superblock_is_written_every_so_many_entries() -> None:
    graph, node = logged(log_super_update_interval=4)
    for i in range(11):
        node.pwrite(i * 512, bytes([i]) * 512)
    assert log_of(node).entries == 8
    graph.close()


def test_the_end_of_the_log_is_kept_when_it_is_closed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for round in range(3):
        log.touch()
        options = {"driver": "blklogwrites", "file": memory(SIZE), "log": {"driver": "file", "filename": str(log)}}
        graph, node = opened({**options, "log-append": True})
        node.pwrite(round * 512, bytes([round + 1]) * 512)
        graph.close()
    wanted = bytearray(SIZE)
    for round in range(3):
        wanted[round * 512 : round * 512 + 512] = bytes([round + 1]) * 512
    found = Log(log.read_bytes())
    assert found.replay(bytearray(SIZE)) == wanted and found.entries == 3


def test_writes_of_many_threads_are_logged_in_the_order_of_the_disk() -> None:
    graph, node = logged()
    threads = [
        threading.Thread(target=lambda i=i: [node.pwrite(n % 7 * 512, bytes([i]) * 1024) for n in range(60)])  # type: ignore[misc]
        for i in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    node.flush()
    log = log_of(node)
    assert log.replay(bytearray(SIZE)) == node.pread(0, SIZE) and log.entries == 241
    graph.close()


SCRIPT = (
    "write -P 1 0 4k", "flush", "write -P 2 1000 100", "flush", "discard 8k 4k", "flush", "write -z 16k 8k", "flush",
    "write -P 3 20k 512", "flush", "write -P 3 24k 512", "flush", "write -P 9 65000 3000", "flush",
)  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"log-sector-size": 4096}, {"log-append": "on"}])
def test_the_log_is_qemus_byte_for_byte(tmp_path: Path, more: dict[str, object]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for log in (ours, theirs):
        log.touch()
    for _ in range(2):
        (tmp_path / "disk").write_bytes(bytes(SIZE))
        words = [word for command in SCRIPT for word in ("-c", command)]
        options = {
            "file.driver": "file",
            "file.filename": tmp_path / "disk",
            "log.driver": "file",
            "log.filename": theirs,
        }
        if "log-append" in more and not theirs.stat().st_size:
            options["log-sector-size"] = 1024  # QEMU appends to no empty log
            first: dict[str, object] = {"log-sector-size": 1024}
        else:
            options |= more
            first = more
        text = ",".join(f"{key}={value}" for key, value in {"driver": "blklogwrites", **options}.items())
        subprocess.run(["qemu-io", "--image-opts", *words, text], check=True, capture_output=True)
        graph, node = opened(
            {"driver": "blklogwrites", "file": memory(SIZE), "log": {"driver": "file", "filename": str(ours)}, **first}
        )
        for command in SCRIPT:
            carry_out(node, command)
        graph.close()
        raw = theirs.read_bytes()
        # When qemu-io ends it flushes, and that is an entry; whether it comes to that depends on what was written.
        extra = Log(raw).entries - Log(ours.read_bytes()).entries
        assert extra == 0
        assert ours.read_bytes() == raw


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"log-append": True, "log-sector-size": 512}, "mutually exclusive"),
        ({"log-sector-size": 3000}, "Invalid log sector size 3000"),
        ({"log-sector-size": 256}, "Invalid log sector size"),
        ({"log-sector-size": 1 << 24}, "Invalid log sector size"),
        ({"log-super-update-interval": 0}, "Invalid log superblock update interval 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], what: str) -> None:
    with pytest.raises(OptionError, match=what):
        logged(**options)


SUPER = struct.Struct("<QQQI")


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (bytes(4096), "magic"),
        (SUPER.pack(0x6A736677736872, 2, 0, 512).ljust(512), "version"),
        (SUPER.pack(0x6A736677736872, 1, 0, 0).ljust(512), "sector size"),
        (SUPER.pack(0x6A736677736872, 1, 0, 513).ljust(512), "sector size"),
        (SUPER.pack(0x6A736677736872, 1, 1 << 60, 512).ljust(512), "number of log entries"),
        (SUPER.pack(0x6A736677736872, 1, 2, 512).ljust(1024, b"\0"), "log entry 1"),
        (
            SUPER.pack(0x6A736677736872, 1, 1, 512).ljust(512) + struct.pack("<QQQQ", 0, 1 << 62, 0, 0).ljust(512),
            "entry 0",
        ),
    ],
)
def test_a_log_that_cannot_be_gone_on_with(tmp_path: Path, raw: bytes, what: str) -> None:
    log = tmp_path / "log"
    log.write_bytes(raw)
    below = {"driver": "file", "filename": str(log)}
    with pytest.raises(CorruptImage, match=what):
        opened({"driver": "blklogwrites", "file": memory(SIZE), "log": below, "log-append": True})
    assert log.read_bytes() == raw


def test_a_log_that_fails_fails_the_write() -> None:
    rule = {"event": "none", "iotype": "write"}
    log = {"driver": "blkdebug", "image": memory(0), "inject-error": [rule]}
    graph, node = opened({"driver": "blklogwrites", "file": memory(SIZE), "log": log})
    with pytest.raises(OSError):
        node.pwrite(0, b"x")
    with pytest.raises(OSError):
        graph.close()


def test_a_crash_after_any_write_leaves_an_image_sound(tmp_path: Path) -> None:
    """What the log is for: qcow2 at each moment of its life, as far as writes are done in their order."""
    image, log = tmp_path / "image", tmp_path / "log"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", str(image), "4M")
    before = image.read_bytes()
    log.touch()
    options = {
        "driver": "qcow2",
        "file": {
            "driver": "blklogwrites",
            "file": {"driver": "file", "filename": str(image)},
            "log": {"driver": "file", "filename": str(log)},
        },
    }
    graph, node = opened(options)
    for command in (
        "write -P 1 0 64k", "write -P 2 3M 5k", "flush", "write -P 3 1000 3000", "discard 3M 1M", "flush",
        "write -c -P 4 1M 64k", "write -P 5 1M 4k", "flush", "write -z 0 32k", "flush", "truncate 512M", "flush",
    ):  # fmt: skip
        carry_out(node, command)
    graph.close()
    disk, sound = bytearray(before), 0
    for sector, count, flags, data in (found := Log(log.read_bytes())):
        start, length = sector * found.unit, count * found.unit
        disk += bytes(max(0, start + length - len(disk)))
        if flags & 1:
            continue
        disk[start : start + length] = data if not flags & 4 else bytes(length)
        (tmp_path / "then").write_bytes(disk)
        done = qemu_img("check", "-q", str(tmp_path / "then"), check=False)
        assert done.returncode in (0, 3), (sector, count, done.stdout, done.stderr)
        sound += 1
    assert sound >= 20
    assert bytes(disk[: image.stat().st_size]) == image.read_bytes()

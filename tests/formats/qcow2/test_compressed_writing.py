"""Writing compressed clusters: QEMU reads every one of them, refcounts are right, and nothing is lost when a write
fails, the machine stops, or many write at once."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import sysconfig
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from diskwright.core.node import StorageNode
from diskwright.errors import ImageError, OptionError, UnsupportedFeature
from diskwright.extents import SPECIAL
from diskwright.formats.qcow2.encoding import Encoder
from diskwright.formats.qcow2.layout import COMPRESSED
from tests.formats.qcow2.support import (
    LONG,
    Image,
    Tape,
    checked,
    contents,
    created,
    header_of,
    l2_entry,
    our_check,
    qemu,
    qemu_check,
)
from tests.formats.qcow2.test_crash import SECTOR, Guest, crash_everywhere
from tests.formats.qcow2.test_threads import together

K = 65536
SIZES = [512, 1024, 4096, 65536, 1 << 20, 2 << 20]


def text(chance: random.Random, length: int) -> bytes:
    """Bytes that compress, some better than others."""
    words = [chance.randbytes(chance.randrange(2, 9)) for _ in range(chance.randrange(2, 60))]
    return b"".join(chance.choices(words, k=length // 2 + 1))[:length]


def piece(chance: random.Random, length: int) -> bytes:
    return chance.randbytes(length) if chance.random() < 0.2 else text(chance, length)


def compress(image: Image, offset: int, data: bytes) -> None:
    image.node.write_compressed([(offset, memoryview(data))])


def sound(data: bytes) -> Any:
    report = checked(data)
    assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0), report.messages
    return report


# -- encoding --------------------------------------------------------------------------------------------


def inflated(raw: bytes) -> bytes:
    """As QEMU does it: with a window of 4 KiB and no more."""
    return zlib.decompressobj(-12).decompress(raw + b"\xff" * 511)


@pytest.mark.parametrize("level", [None, 1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("size", SIZES)
def test_deflate_keeps_to_a_window_of_4_kib(level: int | None, size: int) -> None:
    chance = random.Random(size)
    encoder = Encoder("image", "zlib", size, level)
    # What repeats at distances around 4 KiB and up to 32 KiB tempts an encoder to reach too far back.
    for distance in (100, 4095, 4096, 4097, 5000, 32000):
        data = (chance.randbytes(distance) * (size // distance + 1))[:size]
        raw = encoder.encode(memoryview(data))
        if distance == 100 or distance < 4096 < size:
            assert raw is not None and len(raw) < size
        if raw is not None:
            assert inflated(raw) == data


def test_what_does_not_shrink_is_none() -> None:
    noise = random.Random(1).randbytes(K)
    for method in ("zlib", "zstd"):
        for level in (1, 3, 6):
            assert Encoder("image", method, K, level).encode(memoryview(noise)) is None


def test_without_isal_the_standard_library_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    data = text(random.Random(2), K)
    raw = Encoder("image", "zlib", K, None).encode(memoryview(data))
    assert raw is not None and inflated(raw) == data


def test_levels_grow_smaller_and_strange_ones_are_refused() -> None:
    data = memoryview((Path(os.__file__).read_bytes() * 4)[:K])
    for method, levels in (("zlib", (1, 6)), ("zstd", (1, 19))):
        quick, small = (Encoder("image", method, K, level).encode(data) for level in levels)
        assert quick is not None and small is not None and len(small) < len(quick)
        for level in (0, -1, 10 if method == "zlib" else 20):
            with pytest.raises(OptionError, match="compression-level must be 1 to"):
                Encoder("image", method, K, level)


def test_a_missing_zstd_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression", "compression.zstd", "backports", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedFeature, match="no zstd library"):
        Encoder("image", "zstd", K, None).encode(memoryview(bytes(K)))


def test_every_cluster_of_a_file_system_inflates_with_4_kib(tmp_path: Path) -> None:
    """Programs and texts as they are on a disk; at every quick level."""
    if shutil.which("mke2fs", path=f"{os.environ.get('PATH')}:/sbin:/usr/sbin") is None:
        pytest.skip("needs mke2fs")
    files, image = tmp_path / "files", tmp_path / "ext4"
    files.mkdir()
    left = 24 << 20
    for path in sorted([*Path(sysconfig.get_path("stdlib")).rglob("*.py"), *Path("/usr/lib").rglob("*.so*")]):
        if left > 0 and path.is_file() and not path.is_symlink():
            left -= path.stat().st_size
            shutil.copyfile(path, files / f"{left}")
    tool = shutil.which("mke2fs", path=f"{os.environ.get('PATH')}:/sbin:/usr/sbin") or ""
    image.write_bytes(b"")
    subprocess.run([tool, "-q", "-t", "ext4", "-d", files, image, "40M"], check=True, timeout=120)
    data = image.read_bytes()
    encoders = [Encoder("image", "zlib", K, level) for level in (1, 3)]
    seen = 0
    for at in range(0, len(data), K):
        cluster = data[at : at + K]
        if any(cluster):
            for encoder in encoders:
                raw = encoder.encode(memoryview(cluster))
                if raw is not None:
                    seen += 1
                    assert inflated(raw) == cluster, f"the cluster at {at}"
    assert seen > 300


# -- images QEMU reads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [1, 4, 16, 64])
def test_qemu_reads_what_is_written(tmp_path: Path, size: int, method: str, bits: int) -> None:
    chance = random.Random(f"{size} {bits}")
    end = 5 * size + 1024 if size > 4096 else 300 * size + 512
    tape = Tape(created(size=end, cluster_size=size, compression_type=method, refcount_bits=bits))
    data = b"".join(piece(chance, size) for _ in range(end // size)) + text(chance, end % size)
    with Image(tape) as image:
        step = size * chance.choice((1, 3, 50))
        for at in range(0, end, step):
            compress(image, at, data[at : at + step])
        assert image.disk.pread(0, end) == data
    raw, path = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(data)
    path.write_bytes(tape.data)
    assert len(tape.data) % SECTOR == 0, "the last sector must be whole"
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, path)
    assert qemu_check(path) == our_check(sound(bytes(tape.data)))
    assert qemu_check(path)["compressed-clusters"]
    assert contents(bytes(tape.data)) == data


def test_the_descriptor_counts_the_sectors_its_bytes_touch() -> None:
    chance = random.Random(5)
    tape = Tape(created(size=40 * 4096, cluster_size=4096))
    with Image(tape) as image:
        compress(image, 0, b"".join(text(chance, 4096) for _ in range(40)))
        stored = [image.format.extent_at(at, 4096) for at in range(0, 40 * 4096, 4096)]
        assert all(run.kind == SPECIAL for run in stored)
        for one, after in pairwise(stored):
            end = one.file_offset + one.stored
            assert end % SECTOR == 0
            # The next one begins in this one's last sector, or at its end: byte by byte, none left between.
            assert end - SECTOR < after.file_offset <= end
    counts: dict[int, int] = {}
    for one in stored:
        for host in range(one.file_offset // 4096, (one.file_offset + one.stored - 1) // 4096 + 1):
            counts[host] = counts.get(host, 0) + 1
    with Image(Tape(bytes(tape.data))) as image:
        assert image.format.writer is not None
        for host, count in counts.items():
            assert image.format.writer.refcounts.get(host) >= 1
            assert abs(image.format.writer.refcounts.get(host) - count) <= 1
    sound(bytes(tape.data))


def test_formats_without_compression_refuse() -> None:
    node = StorageNode("file", Tape(), True)
    assert not node.compresses
    with pytest.raises(OSError, match="Compression not supported for this file format"):
        node.write_compressed([(0, memoryview(bytes(512)))])


def test_only_whole_clusters_are_taken() -> None:
    with Image(Tape(created(size=3 * K + 512))) as image:
        for offset, length in ((0, 512), (512, K), (0, K + 512), (3 * K, 511)):
            with pytest.raises(OSError, match="not whole clusters"):
                compress(image, offset, bytes(length))
        compress(image, 3 * K, b"x" * 512)


def test_a_read_only_image_refuses() -> None:
    with (
        Image(Tape(created(size=K)), writable=False) as image,
        pytest.raises(ImageError, match="read-only"),
    ):
        compress(image, 0, b"x" * K)


def test_neighbours_are_read_with_one_read() -> None:
    chance = random.Random(6)
    data = text(chance, 32 * K)
    tape = Tape(created(size=len(data)))
    with Image(tape) as image:
        compress(image, 0, data)
    reads = 0

    class Counted(Tape):
        def readv(self, segments: Any, *, nowait: bool = False) -> None:
            nonlocal reads
            reads += len(segments)
            super().readv(segments, nowait=nowait)

    with Image(Counted(bytes(tape.data)), writable=False) as image:
        image.disk.pread(0, 1)
        reads = 0
        assert image.disk.pread(0, len(data)) == data
        assert reads == 1


# -- overwriting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60 if LONG else 4))
@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512},
        {"cluster_size": 4096},
        {"cluster_size": 4096, "compat": "0.10"},
        {"cluster_size": 4096, "refcount_bits": 2},
        {"cluster_size": K, "compression_type": "zstd"},
    ],
    ids=str,
)
def test_clusters_change_between_all_kinds(options: dict[str, Any], seed: int) -> None:
    """Compressed over plain over zero over compressed, in any order, with places given up and taken again."""
    chance = random.Random(f"{options} {seed}")
    cluster = options["cluster_size"]
    size = 24 * cluster + 512 * (cluster > 512)
    tape = Tape(created(size=size, **options))
    model = bytearray(size)
    with Image(tape) as image:
        for _ in range(150):
            first = chance.randrange(25 if cluster > 512 else 24) * cluster
            length = min(size - first, chance.randrange(1, 5) * cluster)
            action = chance.random()
            if action < 0.45:
                data = piece(chance, length)
                compress(image, first, data)
                model[first : first + length] = data
            elif action < 0.65:
                at = first + chance.randrange(length)
                data = chance.randbytes(chance.randrange(1, first + length - at + 1))
                image.disk.pwrite(at, data)
                model[at : at + len(data)] = data
            elif action < 0.75:
                image.disk.zero(first, length, unmap=chance.random() < 0.5)
                model[first : first + length] = bytes(length)
            elif action < 0.85:
                image.disk.trim(first, length)
                model[first : first + length] = image.disk.pread(first, length)
            elif action < 0.97:
                image.disk.flush()
            assert image.disk.pread(first, length) == model[first : first + length]
        assert image.disk.pread(0, size) == model
    assert contents(bytes(tape.data)) == model
    sound(bytes(tape.data))


def test_a_cluster_about_to_be_discarded_is_packed_no_further() -> None:
    """Freed clusters are discarded without the lock: what were packed there meanwhile would be lost."""
    chance = random.Random(8)
    small = [text(chance, 500).ljust(K, b"\1") for _ in range(3)]
    tape = Tape(created(size=8 * K))
    with Image(tape) as image:
        compress(image, 0, small[0])
        image.disk.flush()
        place = image.format.extent_at(0, K).file_offset
        image.disk.trim(0, K)
        discard = tape.discard
        written: list[int] = []

        def meanwhile(offset: int, length: int) -> None:
            if not written:
                written.append(1)
                compress(image, K, small[1])
            discard(offset, length)

        tape.discard = meanwhile  # type: ignore[method-assign]
        for _ in range(3):
            image.disk.flush()
        assert written, "the freed cluster must have been discarded"
        assert image.format.extent_at(K, K).file_offset // K != place // K
        compress(image, 2 * K, small[2])
        assert image.disk.pread(K, 2 * K) == small[1] + small[2]
    assert contents(bytes(tape.data))[K : 3 * K] == small[1] + small[2]
    sound(bytes(tape.data))


def test_a_cluster_freed_and_taken_again_is_packed_no_further() -> None:
    chance = random.Random(9)
    small, plain = text(chance, 500).ljust(K, b"\1"), chance.randbytes(K)
    tape = Tape(created(size=40 * K))
    with Image(tape) as image:
        compress(image, 0, small)
        place = image.format.extent_at(0, K).file_offset
        image.disk.trim(0, K)
        for _ in range(3):
            image.disk.flush()
        for at in range(2, 20):
            image.disk.pwrite(at * K, plain)
        hosts = {image.format.extent_at(at * K, K).file_offset // K for at in range(2, 20)}
        assert place // K in hosts, "its place must have been taken by one of these"
        compress(image, K, small)
        for at in range(2, 20):
            assert image.disk.pread(at * K, K) == plain
    sound(bytes(tape.data))


def test_snapshots_keep_what_they_share(tmp_path: Path) -> None:
    chance = random.Random(10)
    path = tmp_path / "image"
    tape = Tape(created(size=40 * 4096, cluster_size=4096))
    first = b"".join(piece(chance, 4096) for _ in range(40))
    with Image(tape) as image:
        compress(image, 0, first)
    path.write_bytes(tape.data)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    assert not qemu_check(path)["corruptions"]
    tape = Tape(path.read_bytes())
    second = bytearray(first)
    with Image(tape) as image:
        for _ in range(60):
            at = chance.randrange(40) * 4096
            data = piece(chance, 4096)
            if chance.random() < 0.6:
                compress(image, at, data)
            else:
                image.disk.pwrite(at, data)
            second[at : at + 4096] = data
            if chance.random() < 0.2:
                image.disk.flush()
    sound(bytes(tape.data))
    path.write_bytes(tape.data)
    found = qemu_check(path)
    assert not found["corruptions"] and not found["leaks"]
    assert contents(path.read_bytes()) == second
    qemu("qemu-img", "snapshot", "-a", "one", path)
    assert contents(path.read_bytes()) == first
    qemu("qemu-img", "snapshot", "-d", "one", path)
    found = qemu_check(path)
    assert not found["corruptions"] and not found["leaks"]


# -- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [512, 4096])
def test_a_write_that_fails_leaves_a_sound_image(cluster: int) -> None:
    """The medium fails at the n-th change, for every n; then it works again."""
    chance = random.Random(11)
    start = created(size=64 * cluster, cluster_size=cluster, refcount_bits=64)
    rounds = [(i * 7 % 60 * cluster, b"".join(piece(chance, cluster) for _ in range(4))) for i in range(6)]
    for fail in range(60):
        tape = Tape(start)
        failed = 0
        with Image(tape) as image:
            tape.fail = fail
            for at, data in rounds:
                try:
                    compress(image, at, data)
                    image.disk.flush()
                except OSError:
                    failed += 1
                    tape.fail = -1
                    compress(image, at, data)
                assert image.disk.pread(at, len(data)) == data
            tape.fail = -1
        for at, data in rounds[-1:]:
            assert contents(bytes(tape.data))[at : at + len(data)] == data
        report = checked(bytes(tape.data))
        assert (report.corruptions, report.leaks) == (0, 0), (fail, report.messages)
        if not failed:
            return
    raise AssertionError("the failures must come to an end")


def test_an_aborted_reservation_gives_its_place_back() -> None:
    tape = Tape(created(size=40 * 4096, cluster_size=4096))
    with Image(tape) as image:
        compress(image, 0, b"a" * 4096)
        image.format.reserve_stored([(4096, 3000), (2 * 4096, 4000), (9 * 4096, 100)]).abort()
        compress(image, 4096, b"b" * 4096)
        assert image.disk.pread(0, 3 * 4096) == b"a" * 4096 + b"b" * 4096 + bytes(4096)
    sound(bytes(tape.data))


def play(tape: Tape, chance: random.Random, steps: int) -> Guest:
    """A guest whose clusters are compressed, overwritten, discarded and flushed."""
    with Image(tape) as image:
        disk, cluster = image.disk, image.format.cluster_size
        guest = Guest(disk.pread(0, disk.size))
        for _ in range(steps):
            offset = chance.randrange(disk.size // cluster) * cluster
            length = min(disk.size - offset, chance.randrange(1, 5) * cluster)
            action, position = chance.random(), len(tape.changes)
            if action < 0.55:
                data = piece(chance, length)
                guest.does(position, offset, data)
                compress(image, offset, data)
            elif action < 0.7:
                data = chance.randbytes(SECTOR)
                guest.does(position, offset, data)
                disk.pwrite(offset, data)
            elif action < 0.85:
                disk.trim(offset, length)
                guest.does(position, offset, disk.pread(offset, length))
            else:
                disk.flush()
                guest.has_flushed(len(tape.changes))
        image.node.flush()
    return guest


@pytest.mark.parametrize(
    "options", [{"cluster_size": 512}, {"cluster_size": 4096, "compression_type": "zstd"}], ids=str
)
@pytest.mark.parametrize("seed", range(40 if LONG else 2))
def test_crash_anywhere(options: dict[str, Any], seed: int, tmp_path: Path) -> None:
    chance = random.Random(f"{options} {seed}")
    start = created(size=48 * options["cluster_size"], **options)
    tape = Tape(start)
    guest = play(tape, chance, 60)
    crash_everywhere(start, tape, guest, chance, tmp_path / "crashed.qcow2")
    assert contents(bytes(tape.data)) == guest.now


@pytest.mark.parametrize("cache_size", [1, 32 << 20])
@pytest.mark.parametrize("cluster", [512, 4096])
def test_threads(cluster: int, cache_size: int) -> None:
    """Every thread has clusters of its own, packed among those of all others."""
    count, rows = 6, 30
    size = count * rows * cluster
    tape = Tape(created(size=size, cluster_size=cluster))
    final: dict[int, bytes] = {}
    with Image(tape, cache_size=cache_size) as image:

        def work(number: int) -> None:
            chance = random.Random(number)
            mine: dict[int, bytes] = {}
            for _ in range(150):
                offset = (chance.randrange(rows) * count + number) * cluster
                action = chance.random()
                if action < 0.6:
                    mine[offset] = piece(chance, cluster)
                    compress(image, offset, mine[offset])
                elif action < 0.75:
                    mine[offset] = chance.randbytes(cluster)
                    image.disk.pwrite(offset, mine[offset])
                elif action < 0.9:
                    image.disk.trim(offset, cluster)
                    mine[offset] = bytes(cluster)
                elif action < 0.95:
                    image.disk.flush()
                assert image.disk.pread(offset, cluster) == mine.get(offset, bytes(cluster))
            final.update(mine)

        together(work, count)
    model = bytearray(size)
    for offset, data in final.items():
        model[offset : offset + cluster] = data
    assert contents(bytes(tape.data)) == model
    sound(bytes(tape.data))


def test_a_batch_over_several_tables_and_a_growing_refcount_table() -> None:
    """With clusters of 512 bytes an L2 table maps 32 KiB, and a refcount block of 64-bit counts 32 KiB of the file."""
    chance = random.Random(12)
    data = b"".join(piece(chance, 512) for _ in range(12000))
    tape = Tape(created(size=len(data), cluster_size=512, refcount_bits=64))
    before = header_of(bytes(tape.data)).refcount_table_offset
    with Image(tape) as image:
        compress(image, 0, data)
    assert header_of(bytes(tape.data)).refcount_table_offset != before, "the table must have moved"
    assert contents(bytes(tape.data)) == data
    assert any(l2_entry(bytes(tape.data), at) & COMPRESSED for at in range(0, 512 * 20, 512))
    sound(bytes(tape.data))

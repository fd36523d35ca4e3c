"""Compaction: contents stay, the file becomes as long as it has clusters in use, and no crash costs anything."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from diskwright.core.driver import CompactReport
from diskwright.core.node import StorageNode
from diskwright.errors import ImageError, UnsupportedFeature
from diskwright.formats.qcow2.check import inspect
from diskwright.formats.qcow2.compact import Compaction
from diskwright.formats.qcow2.header import AT_AUTOCLEAR, AT_INCOMPATIBLE, read_header
from diskwright.formats.qcow2.layout import ZERO
from diskwright.formats.qcow2.refcounts import Refcounts
from tests.formats.qcow2.support import LONG, Image, Tape, checked, contents, created, l2_entry, poked, qemu, qemu_check
from tests.formats.qcow2.test_crash import after_crash

KiB = 1 << 10


def compacted(data: bytes, **options: object) -> tuple[bytes, CompactReport]:
    tape = Tape(data)
    report = Compaction(StorageNode("file", tape, True), **options).run()  # type: ignore[arg-type]
    return bytes(tape.data), report


def in_use(data: bytes) -> int:
    file = StorageNode("file", Tape(data), False)
    return Refcounts(file, read_header(file), 1 << 20).used()


def sound(data: bytes) -> bool:
    report = checked(data)
    return not (report.corruptions or report.leaks or report.check_errors)


def is_shortest(data: bytes) -> bool:
    """Whether the file has no more clusters than are in use."""
    file = StorageNode("file", Tape(data), False)
    return len(data) == in_use(data) << read_header(file).cluster_bits


def scattered(seed: int, **options: object) -> bytes:
    """An image after writes, zeros and discards at random."""
    chance = random.Random(seed)
    tape = Tape(created(**options))
    with Image(tape) as image:
        disk, cluster = image.disk, image.format.cluster_size
        for _ in range(150):
            offset = chance.randrange(disk.size // 512) * 512
            length = min(disk.size - offset, chance.choice((512, cluster, 3 * cluster)))
            action = chance.random()
            if action < 0.6:
                disk.pwrite(offset, chance.randbytes(length))
            elif action < 0.75:
                disk.zero(offset, length, unmap=False)
            else:
                disk.trim(offset, length)
        for _ in range(80):  # holes that nothing is written to any more
            disk.trim(chance.randrange(disk.size // cluster) * cluster, cluster)
    return bytes(tape.data)


CASES: dict[str, dict[str, object]] = {
    "512": {"size": 200 * KiB, "cluster_size": 512},
    "4k": {"size": 512 * KiB, "cluster_size": 4096},
    "4k version 2": {"size": 512 * KiB, "cluster_size": 4096, "compat": "0.10"},
    "512 bits 1": {"size": 200 * KiB, "cluster_size": 512, "refcount_bits": 1},
    "512 bits 64": {"size": 200 * KiB, "cluster_size": 512, "refcount_bits": 64},
    "64k": {"size": 3 << 20, "cluster_size": 65536},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(40 if LONG else 3))
def test_scattered_images(case: str, seed: int, tmp_path: Path) -> None:
    start = scattered(seed, **CASES[case])
    before = contents(start)
    for zeros in (False, True):
        data, report = compacted(start, detect_zeros=zeros)
        assert contents(data) == before
        assert sound(data) and report.complete
        assert is_shortest(data), (len(data), in_use(data))
        assert (report.before, report.after) == (len(start), len(data))
        (tmp_path / "image").write_bytes(data)
        found = qemu_check(tmp_path / "image")
        assert not (found["corruptions"] or found["leaks"] or found["check-errors"])
        assert compacted(data, detect_zeros=zeros)[0] == data, "there is nothing left to do"


def test_small_windows_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    start = scattered(7, size=512 * KiB, cluster_size=512)
    at_once, _ = compacted(start)
    by_windows, _ = compacted(start, window=16)
    assert len(at_once) == len(by_windows)
    assert contents(at_once) == contents(by_windows)
    monkeypatch.setattr("diskwright.formats.qcow2.compact.MAX_WORDS", 300)
    halved, _ = compacted(start, window=4096)
    assert len(halved) == len(at_once) and contents(halved) == contents(at_once)


# -- images of QEMU's, with everything there is ------------------------------------------------------------------


def with_snapshots(path: Path, seed: int, size: int = 1024, cluster: str = "4k", more: str = "") -> dict[str, bytes]:
    """An image fragmented by random writes and discards between snapshots, one of which is deleted again. Returns what
    every snapshot reads as, and the active disk under ''."""
    chance = random.Random(seed)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}{more}", path, f"{size}k")
    known: dict[str, bytes] = {}
    for name in ("one", "two", "three", ""):
        commands: list[object] = []
        for _ in range(20):
            at = chance.randrange(size // 4) * 4
            length = min(size - at, chance.choice((4, 8, 60)))
            verb = chance.choice((f"write -P {chance.randrange(1, 255)}", "discard", "write -z", "write -z -u"))
            commands += ["-c", f"{verb} {at}k {length}k"]
        qemu("qemu-io", "-d", "unmap", *commands, path)
        known[name] = contents(path.read_bytes())
        if name:
            qemu("qemu-img", "snapshot", "-c", name, path)
    qemu("qemu-img", "snapshot", "-d", "two", path)
    del known["two"]
    return known


def snapshots_read(path: Path, known: dict[str, bytes]) -> None:
    for name, expected in known.items():
        if name:
            qemu("qemu-img", "snapshot", "-a", name, path)
            assert contents(path.read_bytes()) == expected, name


@pytest.mark.parametrize("seed", range(20 if LONG else 3))
@pytest.mark.parametrize("cluster", ["512", "4k", "64k"])
def test_snapshots(cluster: str, seed: int, tmp_path: Path) -> None:
    path = tmp_path / "image"
    known = with_snapshots(path, seed, cluster=cluster)
    assert sound(path.read_bytes())
    data, _ = compacted(path.read_bytes(), detect_zeros=bool(seed % 2))
    assert contents(data) == known[""]
    assert sound(data) and is_shortest(data), (len(data), in_use(data))
    path.write_bytes(data)
    found = qemu_check(path)
    assert not (found["corruptions"] or found["leaks"])
    snapshots_read(path, known)
    assert not qemu_check(path)["corruptions"]


def compressed_image(path: Path, seed: int, **more: str) -> bytes:
    """Compressed clusters among others, part of them overwritten, one snapshot."""
    chance = random.Random(seed)
    raw = path.with_suffix(".raw")
    raw.write_bytes(b"".join(chance.choice((chance.randbytes(700) + bytes(3396), b"ab" * 2048)) for _ in range(200)))
    options = ",".join(f"{key}={value}" for key, value in {"cluster_size": "4k", **more}.items())
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, path)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    commands: list[object] = []
    for _ in range(40):
        commands += ["-c", f"{chance.choice(('write -P 3', 'discard'))} {chance.randrange(199) * 4}k 8k"]
    qemu("qemu-io", "-d", "unmap", *commands, path)
    qemu("qemu-img", "snapshot", "-d", "one", path)
    return contents(path.read_bytes())


@pytest.mark.parametrize("seed", range(20 if LONG else 3))
@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_compressed_clusters(method: str, seed: int, tmp_path: Path) -> None:
    path = tmp_path / "image"
    expected = compressed_image(path, seed, compression_type=method)
    start = path.read_bytes()
    data, report = compacted(start)
    assert contents(data) == expected
    assert sound(data) and report.complete
    assert len(data) < len(start)
    # Clusters that are only partly filled are left: what is moved cannot always be packed as closely.
    assert len(data) <= (in_use(data) + 4) * 4096
    path.write_bytes(data)
    assert not qemu_check(path)["corruptions"]
    qemu("qemu-img", "compare", "-f", "qcow2", path, "-F", "raw", _raw(tmp_path, expected))


def _raw(directory: Path, data: bytes) -> Path:
    (directory / "expected.raw").write_bytes(data)
    return directory / "expected.raw"


def test_bitmaps_keep_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "4M")
    qemu("qemu-io", "-c", "write 0 1M", path)
    for name in ("a", "b"):
        qemu("qemu-img", "bitmap", "--add", "-g", "512", path, name)
        qemu("qemu-io", "-c", f"write {ord(name) - 90}k 300k", path)
    qemu("qemu-io", "-d", "unmap", "-c", "discard 0 700k", path)
    before = _bitmaps(path)
    assert len(before) == 2 and any("true" in text for text in before)
    disk = contents(path.read_bytes())
    data, _ = compacted(path.read_bytes())
    assert len(data) < path.stat().st_size and is_shortest(data)
    import diskwright

    diskwright.compact(path)
    assert path.read_bytes() == data, "the front door does the same, and takes the bitmaps with it"
    assert contents(data) == disk and sound(data)
    assert _bitmaps(path) == before
    assert not qemu_check(path)["corruptions"]


def _bitmaps(path: Path) -> list[str]:
    """What qemu-nbd tells of the bitmaps, by way of map with its x-dirty-bitmap option."""
    import subprocess

    from tests.peers import find

    found = []
    for name in ("a", "b"):
        socket = path.parent / "socket"
        server = subprocess.Popen([find("qemu-nbd"), "-r", "-f", "qcow2", "-B", name, "-k", str(socket), str(path)])
        try:
            while not socket.exists():
                assert server.poll() is None
            url = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
            found.append(qemu("qemu-img", "map", "--output=json", "--image-opts", url))
        finally:
            server.terminate()
            server.wait()
            socket.unlink(missing_ok=True)
    return found


def test_tables_in_several_clusters(tmp_path: Path) -> None:
    """An L1 table that has grown lies at the end of the file, in one piece."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    qemu("qemu-io", "-c", "write -P 1 0 1M", path)
    qemu("qemu-img", "resize", "-q", path, "40M")
    qemu("qemu-io", "-c", "write -P 2 30M 20k", path)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    qemu("qemu-io", "-d", "unmap", "-c", "discard 0 900k", path)
    qemu("qemu-img", "snapshot", "-d", "one", path)
    start = path.read_bytes()
    data, _ = compacted(start)
    assert contents(data) == contents(start)
    assert sound(data) and is_shortest(data), (len(data), in_use(data))
    path.write_bytes(data)
    assert not qemu_check(path)["corruptions"]


@pytest.mark.parametrize("kept", [40, 1500, 2900])
def test_refcount_table_that_has_moved(kept: int) -> None:
    """With 64 bits a count, a table of one cluster counts 2 MiB: the larger one lies at the end of the file. Whole
    blocks of free clusters ahead of it have lost their refcount blocks, and get new ones."""
    tape = Tape(created(size=3 << 20, cluster_size=512, refcount_bits=64))
    chance = random.Random(kept)
    with Image(tape) as image:
        writer = image.format.writer
        assert writer is not None
        before = writer.refcounts.table_offset
        image.disk.pwrite(0, chance.randbytes(3 << 20))
        assert writer.refcounts.table_offset != before
        image.disk.trim(0, (3 << 20) - kept * KiB)
        for _ in range(kept // 4):
            image.disk.trim(chance.randrange(6 << 10) * 512, 512)
    start = bytes(tape.data)
    data, _ = compacted(start, window=500)
    assert contents(data) == contents(start)
    assert sound(data) and is_shortest(data), (len(data), in_use(data))
    tape = Tape(start)
    Compaction(StorageNode("file", tape, True)).run()
    for position in range(0, len(tape.changes) + 1, 9):
        found = after_crash(start, tape.changes, position, chance)
        report = checked(found)
        assert not report.corruptions and not report.check_errors, (position, report.messages)
        assert contents(found) == contents(start)


def test_space_kept_for_zeros_is_given_up() -> None:
    tape = Tape(created(size=256 * KiB, cluster_size=4096, preallocation="metadata"))
    with Image(tape) as image:
        image.disk.pwrite(200 * KiB, b"x" * 5000)
        image.disk.zero(0, 128 * KiB, unmap=False)
        image.disk.pwrite(150 * KiB, bytes(4096))
    start = bytes(tape.data)
    before = contents(start)
    data, report = compacted(start)
    assert report.released == 32 and contents(data) == before
    data, report = compacted(start, detect_zeros=True)
    assert report.released == 62 and contents(data) == before and is_shortest(data)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("backed", [False, True])
def test_zeros_are_found_where_they_can_be_told(compat: str, backed: bool) -> None:
    """Version 2 has no word for zeros but that of nothing, which shows a backing file."""
    options = {"backing_file": "base", "backing_fmt": "raw"} if backed else {}
    tape = Tape(created(size=64 * KiB, cluster_size=4096, compat=compat, **options))
    with Image(tape) as image:
        image.disk.pwrite(0, bytes(32 * KiB))
        image.disk.pwrite(32 * KiB, b"d" * 4096)
    data, report = compacted(bytes(tape.data), detect_zeros=True)
    assert report.released == (0 if backed and compat == "0.10" else 8)
    assert sound(data) and contents(data) == contents(bytes(tape.data))
    entry = l2_entry(data, 4096)
    assert entry == ZERO if compat == "1.1" else (entry != 0) == backed


# -- what is refused ---------------------------------------------------------------------------------------------


def test_damaged_images_are_refused() -> None:
    start = scattered(1, size=200 * KiB, cluster_size=512)
    file = StorageNode("file", Tape(start), False)
    header = read_header(file)
    block = struct.unpack_from(">Q", start, header.refcount_table_offset)[0]
    for data in (poked(start, AT_INCOMPATIBLE, 2), poked(start, block + 2 * 3, 0, 2)):
        tape = Tape(data)
        with pytest.raises(ImageError, match=r"corrupt|damaged"):
            Compaction(StorageNode("file", tape, True)).run()
        assert tape.data == data and not tape.changes
    with pytest.raises(UnsupportedFeature, match="autoclear"):
        compacted(poked(start, AT_AUTOCLEAR, 1 << 40))


def test_leaks_and_the_dirty_bit_are_mended_first() -> None:
    start = scattered(1, size=200 * KiB, cluster_size=512)
    leaky = bytearray(start + bytes(512))
    header = read_header(StorageNode("file", Tape(start), False))
    last = len(start) // 512
    block = struct.unpack_from(">Q", start, header.refcount_table_offset + last // 256 * 8)[0]
    struct.pack_into(">H", leaky, block + last % 256 * 2, 1)
    assert checked(bytes(leaky)).leaks == 1
    for data in (bytes(leaky), poked(start, AT_INCOMPATIBLE, 1)):
        result, _ = compacted(data)
        assert contents(result) == contents(start) and sound(result) and is_shortest(result)


# -- interruptions -----------------------------------------------------------------------------------------------


def crashes(start: bytes, check: Callable[[bytes], None], chance: random.Random, every: int = 1) -> None:
    """Ends a compaction after each change, with any part of the unflushed ones on the medium; and once more after a
    second run."""
    tape = Tape(start)
    Compaction(StorageNode("file", tape, True), window=64, detect_zeros=True).run()
    assert len(tape.changes) > 10
    for position in range(0, len(tape.changes) + 1, every):
        data = after_crash(start, tape.changes, position, chance)
        report = checked(data)
        assert not report.corruptions and not report.check_errors, (position, report.messages)
        check(data)
        if position % 9 == 0:
            again, done = compacted(data)
            assert done.complete and sound(again)
            check(again)
    check(bytes(tape.data))


@pytest.fixture(params=[16, 4096], ids=["small batches", "one batch"])
def batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diskwright.formats.qcow2.compact.BATCH_MOST", request.param)
    monkeypatch.setattr("diskwright.formats.qcow2.repacking._BATCH", request.param)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("case", ["512", "4k version 2", "512 bits 1"])
def test_crash_anywhere(case: str) -> None:
    for seed in range(20 if LONG else 1):
        start = scattered(seed, **CASES[case])
        before = contents(start)

        def check(data: bytes, before: bytes = before) -> None:
            assert contents(data) == before

        crashes(start, check, random.Random(seed))


@pytest.mark.usefixtures("batches")
def test_crash_with_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "image"
    known = with_snapshots(path, 5, size=512)

    def check(data: bytes) -> None:
        assert contents(data) == known[""]
        assert snapshot_contents(data) == expected

    start = path.read_bytes()
    expected = snapshot_contents(start)
    assert expected == [known["one"], known["three"]]
    crashes(start, check, random.Random(1), 2)


def snapshot_contents(data: bytes) -> list[bytes]:
    """What the snapshots read as: each one's L1 table is put in the place of the active one."""
    header = read_header(StorageNode("file", Tape(data), False))
    found, at = [], header.snapshots_offset
    for _ in range(header.nb_snapshots):
        table, size, id_length, name_length, *_, extra = struct.unpack_from(">QIHHIIQII", data, at)
        found.append(contents(poked(poked(data, 36, size, 4), 40, table)))
        at += 40 + id_length + name_length + extra
        at += -at % 8
    return found


@pytest.mark.usefixtures("batches")
def test_crash_with_compressed_clusters(tmp_path: Path) -> None:
    path = tmp_path / "image"
    expected = compressed_image(path, 3)

    def check(data: bytes) -> None:
        assert contents(data) == expected

    crashes(path.read_bytes(), check, random.Random(2), 2)


def test_a_run_that_was_stopped_is_gone_on_with() -> None:
    start = scattered(3, size=100 * KiB, cluster_size=512)
    before = contents(start)
    whole, _ = compacted(start)
    data, runs = start, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diskwright.formats.qcow2.compact.BATCH_MOST", 2)
        while True:
            asked = iter(range(1))
            data, report = compacted(data, stop=lambda asked=asked: next(asked, None) is None)
            runs += 1
            assert contents(data) == before and sound(data)
            if report.complete:
                break
    assert runs > 2 and len(data) == len(whole)


def test_an_error_loses_nothing() -> None:
    start = scattered(4, size=200 * KiB, cluster_size=512)
    before = contents(start)
    changes = Tape(start)
    Compaction(StorageNode("file", changes, True)).run()
    for fail in range(len(changes.changes)):
        tape = Tape(start)
        tape.fail = fail
        with pytest.raises(OSError, match="torn"):
            Compaction(StorageNode("file", tape, True)).run()
        report = inspect(StorageNode("file", Tape(bytes(tape.data)), False), read_header(StorageNode("f", tape, False)))
        assert not report.report.corruptions
        assert contents(bytes(tape.data)) == before

"""Differencing images."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.core import options as opts
from diskwright.core.driver import CheckReport, OpenContext
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, StorageNode
from diskwright.core.permissions import READER, WRITER
from diskwright.errors import DiskwrightError
from diskwright.formats.vhdx import locator
from diskwright.formats.vhdx.create import VhdxCreateOptions
from diskwright.formats.vhdx.driver import Vhdx, VhdxOptions
from diskwright.formats.vhdx.journal import Journal
from tests.cli.run import diskwright as ours
from tests.cli.run import qemu_img
from tests.crash.recording import RecordedFile, Recording
from tests.crash.workload import Workload
from tests.formats.qcow2.support import LONG

KiB, MiB = 1 << 10, 1 << 20
SIZE = 6 * MiB


def make(path: Path, size: int | None = SIZE, **options: object) -> Path:
    values = {"block_size": MiB, **options}
    if size is not None:
        values["size"] = size
    diskwright.create(str(path), format="vhdx", **values)
    return path


def family(folder: Path, **options: object) -> tuple[Path, Path, bytearray]:
    """A parent with something in it, its child, and what both read as."""
    parent = make(folder / "parent.vhdx", **options)
    model = bytearray(SIZE)
    with diskwright.open(str(parent), writable=True) as disk:
        for at, length in ((0, MiB), (2 * MiB + 4096, 8192), (4 * MiB, 2 * MiB)):
            data = random.Random(at).randbytes(length)
            disk.pwrite(at, data)
            model[at : at + length] = data
    child = make(folder / "child.avhdx", None, backing_file="parent.vhdx", backing_fmt="vhdx")
    return parent, child, model


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("seed", range(10 if LONG else 2))
def test_a_child_reads_and_is_written_to(sector: int, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    parent, child, model = family(tmp_path, logical_sector_size=sector)
    before = parent.read_bytes()
    for _ in range(3):
        with diskwright.open(str(child), writable=True) as disk:
            assert disk.size == SIZE and disk.pread(0, SIZE) == model
            for _ in range(30):
                at = chance.randrange(SIZE)
                length = min(SIZE - at, chance.choice([1, 511, 4096, 70000, MiB, 2 * MiB + 5]))
                action = chance.random()
                if action < 0.7:
                    data = chance.randbytes(length)
                    disk.pwrite(at, data)
                    model[at : at + length] = data
                elif action < 0.9:
                    disk.zero(at, length, unmap=action < 0.8)
                    model[at : at + length] = bytes(length)
                else:
                    disk.flush()
                assert disk.pread(at, length) == model[at : at + length]
            rows = list(disk.extents())
            assert sum(row.length for row in rows) == SIZE
            assert disk.pread(0, SIZE) == model
    assert ours("check", str(child), cwd=tmp_path).code == 0
    assert parent.read_bytes() == before
    raw = tmp_path / "raw"
    assert ours("convert", "-O", "raw", str(child), str(raw), cwd=tmp_path).code == 0
    assert raw.read_bytes() == model


def test_extents_one_by_one_and_in_bulk(tmp_path: Path) -> None:
    _, child, _ = family(tmp_path)
    with diskwright.open(str(child), writable=True) as disk:
        for at in (0, 512, 4096, MiB - 512, MiB, 3 * MiB + 1024):
            disk.pwrite(at, b"x" * 512)
        disk.pwrite(5 * MiB, b"y" * MiB)
        disk.flush()
        form = disk.node.format
        for start, length in ((0, SIZE), (256, 5000), (MiB - 700, 1400), (5 * MiB + 3, 100)):
            single, at = [], start
            while at < start + length:
                run = form.extent_at(at, start + length - at)
                single += [(byte, run.kind, run.file_offset + byte - at) for byte in range(at, run.end, 128)]
                at = run.end
            bulk = form.extents(start, length)
            assert int(bulk.offset[0]) == start and int(bulk.length.sum()) == length
            kinds = {byte: (kind, place) for byte, kind, place in single}
            for run in bulk:
                for byte, (kind, place) in kinds.items():
                    if run.offset <= byte < run.end:
                        assert kind == run.kind
                        assert kind != 0 or place == run.file_offset + byte - run.offset


def test_a_write_takes_only_its_sectors(tmp_path: Path) -> None:
    """No copy of the parent's block; and a block written in full is fully present."""
    _, child, _ = family(tmp_path)
    with diskwright.open(str(child), writable=True) as disk:
        disk.pwrite(4 * MiB + 512, b"x" * 512)
        disk.pwrite(5 * MiB, b"y" * 512)
        disk.pwrite(5 * MiB + 512, b"y" * (MiB - 512))
    data = child.read_bytes()
    table = struct.unpack_from("<8Q", data, 2 * MiB)
    assert [entry & 7 for entry in table[:6]] == [0, 0, 0, 0, 7, 6]
    place = table[4] >> 20 << 20
    assert data[place : place + 512] == bytes(512) and data[place + 512 : place + 1024] == b"x" * 512
    (entry,) = struct.unpack_from("<Q", data, 2 * MiB + 8 * 4096)
    assert entry & 7 == 6
    bits = data[entry >> 20 << 20 :][: MiB // 4096 * 6]
    assert bits[4 * 256] == 0b10 and not any(bits[: 4 * 256]) and set(bits[5 * 256 : 6 * 256]) == {0xFF}


def test_a_parent_that_has_changed_is_refused(tmp_path: Path) -> None:
    parent, child, _ = family(tmp_path)
    with diskwright.open(str(parent), writable=True) as disk:
        disk.pwrite(0, b"x")
    with pytest.raises(DiskwrightError, match=r"its parent '.*parent.vhdx' has changed since: its DataWriteGuid is"):
        diskwright.open(str(child))
    spec = f"driver=vhdx,file.filename={child},ignore-id-mismatch=on"
    assert ours("rebase", "--image-opts", "-b", "parent.vhdx", "-F", "vhdx", spec, cwd=tmp_path).code == 0
    with diskwright.open(str(child)) as disk:
        assert disk.pread(0, 1) == b"x"


def test_a_parent_that_is_only_opened_does_not_change(tmp_path: Path) -> None:
    parent, child, model = family(tmp_path)
    before = parent.read_bytes()
    with diskwright.open(str(parent), writable=True) as disk:
        disk.flush()
    assert parent.read_bytes() == before
    with diskwright.open(str(child)) as disk:
        assert disk.pread(0, SIZE) == model


def test_a_parent_that_is_not_in_the_directory_is_refused_by_the_gate(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    make(tmp_path / "parent.vhdx")
    make(inner / "child.avhdx", None, backing_file="../parent.vhdx", backing_fmt="vhdx", gate=diskwright.OpenGate())
    with pytest.raises(DiskwrightError, match="not a file in the image's own directory"):
        diskwright.open(str(inner / "child.avhdx"))
    assert ours("compare", "child.avhdx", "../parent.vhdx", cwd=inner).code == 0


def test_commit_tells_the_child_of_its_parents_new_identity(tmp_path: Path) -> None:
    parent, child, model = family(tmp_path)
    with diskwright.open(str(child), writable=True) as disk:
        disk.pwrite(MiB + 100, b"new" * 1000)
        model[MiB + 100 : MiB + 3100] = b"new" * 1000
    assert ours("commit", "child.avhdx", cwd=tmp_path).code == 0
    for path in (parent, child):
        with diskwright.open(str(path)) as disk:
            assert disk.pread(0, SIZE) == model
        assert ours("check", path.name, cwd=tmp_path).code == 0
    assert child.stat().st_size == 4 * MiB
    assert qemu_img("check", "parent.vhdx", cwd=tmp_path).code == 0
    with diskwright.open(str(child), writable=True) as disk:
        disk.pwrite(0, b"again")
    assert ours("commit", "-d", "child.avhdx", cwd=tmp_path).code == 0
    with diskwright.open(str(child)) as disk:
        assert disk.pread(0, 5) == b"again"


def test_a_chain_and_another_parent(tmp_path: Path) -> None:
    parent, child, model = family(tmp_path)
    grandchild = make(tmp_path / "grandchild.avhdx", None, backing_file="child.avhdx", backing_fmt="vhdx")
    with diskwright.open(str(grandchild), writable=True) as disk:
        disk.pwrite(3 * MiB, b"third")
        model[3 * MiB : 3 * MiB + 5] = b"third"
    assert ours("rebase", "-b", "parent.vhdx", "-F", "vhdx", "grandchild.avhdx", cwd=tmp_path).code == 0
    child.unlink()
    with diskwright.open(str(grandchild)) as disk:
        assert disk.pread(0, SIZE) == model
    parent.rename(tmp_path / "moved.vhdx")
    assert ours("rebase", "-u", "-b", "moved.vhdx", "-F", "vhdx", "grandchild.avhdx", cwd=tmp_path).code == 0
    with diskwright.open(str(grandchild)) as disk:
        assert disk.pread(0, SIZE) == model


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"subformat": "fixed"}, "cannot be of the subformat 'fixed'"),
        ({"backing_file": "raw", "backing_fmt": "raw"}, "'raw' is no VHDX image"),
        ({"backing_file": "nowhere"}, "No such file"),
    ],
)
def test_what_cannot_be_created(options: dict[str, object], text: str, tmp_path: Path) -> None:
    make(tmp_path / "parent.vhdx")
    (tmp_path / "raw").write_bytes(bytes(SIZE))
    with pytest.raises((DiskwrightError, OSError), match=text):
        make(tmp_path / "child", None, **{"backing_file": "parent.vhdx", "backing_fmt": "vhdx", **options})
    assert not (tmp_path / "child").exists()


def test_a_child_is_made_where_there_was_one(tmp_path: Path) -> None:
    _, child, model = family(tmp_path)
    with diskwright.open(str(child), writable=True) as disk:
        disk.pwrite(0, b"x")
    make(child, None, backing_file="parent.vhdx", backing_fmt="vhdx")
    with diskwright.open(str(child)) as disk:
        assert disk.pread(0, SIZE) == model


def test_growing_a_child(tmp_path: Path) -> None:
    _, child, model = family(tmp_path)
    with diskwright.open(str(child), writable=True) as disk:
        disk.pwrite(5 * MiB, b"z" * 100)
        disk.flush()
    model[5 * MiB : 5 * MiB + 100] = b"z" * 100
    assert ours("resize", "child.avhdx", "5G", cwd=tmp_path).code == 0
    with diskwright.open(str(child), writable=True) as disk:
        assert disk.size == 5 << 30 and disk.pread(0, SIZE + MiB) == model + bytes(MiB)
        disk.pwrite((5 << 30) - 700, b"end")
        disk.pwrite((4 << 30) - 2, b"edge")
    with diskwright.open(str(child)) as disk:
        assert disk.pread((5 << 30) - 700, 3) == b"end" and disk.pread((4 << 30) - 2, 4) == b"edge"
        assert disk.pread(0, SIZE) == model
    assert ours("check", "child.avhdx", cwd=tmp_path).code == 0


def test_a_child_whose_locator_has_changed_has_another_identity_when_it_is_written_to(tmp_path: Path) -> None:
    """The locator is no part of the disk's contents; what is written in the same session is."""
    _, child, _ = family(tmp_path)

    def identity() -> bytes:
        data = child.read_bytes()
        at = max((64 << 10, 128 << 10), key=lambda place: struct.unpack_from("<Q", data, place + 8))
        return data[at + 32 : at + 48]

    before = identity()
    with diskwright.open(str(child), writable=True) as disk:
        disk.node.format.change_backing("parent.vhdx", "vhdx")
        assert identity() == before
        disk.pwrite(0, b"x")
        assert identity() != before
    make(tmp_path / "grandchild", None, backing_file="child.avhdx", backing_fmt="vhdx")
    with diskwright.open(str(tmp_path / "grandchild")) as disk:
        assert disk.pread(0, 1) == b"x"


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (0, "ERROR block 0 of the sector bitmap is missing, and blocks are partly present\n"),
        (6 | 2 << 20, "ERROR block 0 of the sector bitmap lies where it cannot lie\n"),
        (6 | 99 << 20, "ERROR block 0 of the sector bitmap lies where it cannot lie\n"),
    ],
)
def test_a_lost_sector_bitmap_is_told_and_nothing_is_made_up(entry: int, text: str, tmp_path: Path) -> None:
    _, child, model = family(tmp_path)
    with diskwright.open(str(child), writable=True) as disk:
        disk.pwrite(512, b"x" * 512)
        disk.pwrite(5 * MiB, b"y" * MiB)
    data = bytearray(child.read_bytes())
    struct.pack_into("<Q", data, 2 * MiB + 8 * 4096, entry)
    child.write_bytes(data)
    for words in (["check"], ["check", "-r", "all"]):
        done = ours(*words, "child.avhdx", cwd=tmp_path)
        assert done.code == 2 and done.err == text
        assert child.read_bytes() == data
    with diskwright.open(str(child), writable=True) as disk:
        assert disk.pread(2 * MiB, MiB) == model[2 * MiB : 3 * MiB] and disk.pread(5 * MiB, MiB) == b"y" * MiB
        for access in (lambda: disk.pwrite(0, b"x"), lambda: disk.pread(0, 512)):
            with pytest.raises(DiskwrightError, match="but a block it tells of is partly present"):
                access()


def test_a_child_takes_over_what_belongs_to_the_disk(tmp_path: Path) -> None:
    """Items that are marked so, whatever they are; the disk's identity and sectors anyway."""
    parent = make(tmp_path / "parent.vhdx", logical_sector_size=4096, physical_sector_size=4096)
    data = bytearray(parent.read_bytes())
    region = 3 * MiB
    rows = ((b"u" * 16, 70000, 5, 3), (b"f" * 16, 80000, 5, 1), (b"e" * 16, 0, 0, 2))
    struct.pack_into("<H", data, region + 10, 5 + len(rows))
    for number, row in enumerate(rows, 6):
        struct.pack_into("<16sIIII", data, region + 32 * number, *row, 0)
    data[region + 70000 : region + 70005] = b"hello"
    parent.write_bytes(data)
    child = make(tmp_path / "child", None, backing_file="parent.vhdx", backing_fmt="vhdx")
    found = child.read_bytes()[region : region + MiB]
    (count,) = struct.unpack_from("<H", found, 10)
    items = {}
    for number in range(count):
        guid, at, length, flags, _ = struct.unpack_from("<16sIIII", found, 32 + 32 * number)
        items[guid] = flags, found[at : at + length] if length else b""
    assert count == 8 and items[b"u" * 16] == (3, b"hello") and items[b"e" * 16] == (2, b"")
    assert found[(64 << 10) + 16 : (64 << 10) + 40] == data[region + (64 << 10) + 16 : region + (64 << 10) + 40]
    with diskwright.open(str(child)) as disk:
        assert disk.pread(0, 512) == bytes(512)


# -- the locator -------------------------------------------------------------------------------------


def test_names_of_a_parent() -> None:
    guid = bytes(range(16))
    pairs = locator.pairs_for("/a/b/child", "../c/parent.vhdx", guid)
    assert pairs[locator.RELATIVE] == "..\\c\\parent.vhdx"
    assert locator.decode("x", locator.encode(pairs)) == pairs
    assert locator.links(pairs) == {guid}
    assert locator.file_name(pairs) == "../c/parent.vhdx"
    assert locator.file_name({locator.ABSOLUTE: "\\\\?\\d:\\x\\parent.vhdx"}) == "parent.vhdx"
    assert locator.file_name({locator.VOLUME: "\\\\?\\Volume{1}\\p.vhdx", locator.RELATIVE: ".\\q.vhdx"}) == "q.vhdx"
    with pytest.raises(DiskwrightError, match="backslash"):
        locator.pairs_for("/a/child", "back\\slash", guid)


@pytest.mark.parametrize("at", range(0, 200, 4))
def test_a_damaged_locator_is_an_answer_or_an_error(at: int) -> None:
    data = bytearray(locator.encode(locator.pairs_for("/a/child", "parent.vhdx", bytes(16))))
    for value in (0, 0xFFFFFFFF, 0x7FFF0001):
        damaged = bytearray(data)
        struct.pack_into("<I", damaged, at, value)
        try:
            pairs = locator.decode("image", bytes(damaged))
        except DiskwrightError:
            continue
        locator.links(pairs)
        locator.file_name(pairs)


# -- crashes -----------------------------------------------------------------------------------------


def made_over(parent: bytes) -> bytes:
    """A child of an image, both in memory."""
    recording = Recording(parent=parent, child=b"")
    nodes = {name: StorageNode(name, file, True) for name, file in recording.files.items()}
    graph = Graph()
    for node in nodes.values():
        node.filename = f"/{node.name}"
        graph.adopt(node)
    context = OpenContext(nodes["parent"], graph.leases, lambda *_: nodes["parent"], False)
    above = FormatNode("above", Vhdx.open(context, VhdxOptions()), False)
    options = {"size": above.size, "block-size": MiB, "backing-file": "parent", "backing-fmt": "vhdx"}
    typed = opts.parse(VhdxCreateOptions, options, owner="test")
    Vhdx.create_from(nodes["child"], typed, {"backing": above})
    return recording.contents()["child"]


class Pair:
    """A child over its parent, which is open for writing as well when ``both``."""

    both = False

    def __init__(self, files: Mapping[str, RecordedFile], writable: bool) -> None:
        self.graph = Graph()
        self.base = self._open("parent", files, writable and self.both)
        self.node = self._open("file", files, writable)
        self.format = self.node.format
        self.format.accept_backing(self.base)
        self.node.backing = self.base
        self.graph.hold(self.base)
        self.disk = self.graph.disk(self.node, WRITER if writable else READER)
        check = self.format.check

        def judged(repair: str) -> CheckReport:
            report = check(repair)
            if "ERROR the log has not been replayed" in report.messages:
                report.corruptions -= 1
            return report

        self.format.check = judged  # type: ignore[method-assign]

    def _open(self, name: str, files: Mapping[str, RecordedFile], writable: bool) -> Any:
        file = StorageNode(f"{name} file", files[name], writable)
        self.graph.adopt(file)
        context = OpenContext(file, self.graph.leases, lambda *_: file, writable)
        node = FormatNode(name, Vhdx.open(context, VhdxOptions()), writable)
        self.graph.adopt(node)
        return node

    def close(self) -> None:
        self.graph.close()


class Both(Pair):
    both = True


def parent_image() -> bytes:
    recording = Recording(file=b"")
    options = opts.parse(VhdxCreateOptions, {"size": SIZE, "block-size": MiB}, owner="test")
    Vhdx.create(StorageNode("new", recording.files["file"], True), options)
    files = {"parent": recording.files["file"]}
    graph = Graph()
    file = StorageNode("file", files["parent"], True)
    graph.adopt(file)
    context = OpenContext(file, graph.leases, lambda *_: file, True)
    node = FormatNode("image", Vhdx.open(context, VhdxOptions()), True)
    graph.adopt(node)
    disk = graph.disk(node, WRITER)
    for block in (0, 2, 5):
        disk.pwrite(block * MiB + 512, random.Random(block).randbytes(100_000))
    disk.flush()
    graph.close()
    return bytes(files["parent"].data)


@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_a_crash_costs_nothing_that_was_flushed(seed: int) -> None:
    chance = random.Random(f"differencing {seed}")
    parent = parent_image()
    with Workload(made_over(parent), opener=Pair, parent=parent) as work:
        work.play(chance, 40, actions="wwwwwzzdff" + "g" * (seed % 2))
    work.verify(chance, most=0 if LONG else 25, each=1)


@pytest.mark.parametrize("seed", range(20 if LONG else 3))
def test_a_crash_between_the_entries_of_one_flush(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when more pages have changed than the log takes at once."""
    monkeypatch.setattr(Journal, "_most_pages", lambda self: 1)
    chance = random.Random(f"entries {seed}")
    parent = parent_image()
    with Workload(made_over(parent), opener=Pair, parent=parent) as work:
        for _ in range(3):
            for _ in range(5):
                work.write(chance.randrange(SIZE // 512 - 8) * 512, chance.randbytes(4096))
            work.flush()
    work.verify(chance, each=1, reopen=1000)


def test_a_crash_while_the_child_goes_into_its_parent() -> None:
    """Whatever the moment: the child knows its parent, and reads as before."""
    from diskwright.engine.commit import Commit

    chance = random.Random("commit")
    parent = parent_image()
    with Workload(made_over(parent), opener=Both, parent=parent) as work:
        for at in (0, 512, MiB + 1024, 5 * MiB):
            work.write(at, chance.randbytes(3072))
        work.flush()
        Commit(work.image.node, work.image.base, work.image.graph.leases).run()
        work.image.format.make_empty()
    work.verify(chance, most=0 if LONG else 60, each=1, reopen=1000)

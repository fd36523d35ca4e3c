"""External data files: how they are found, opened, written in order, resized; and what is refused."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from diskwright.api import info
from diskwright.cli.main import main
from diskwright.core.create import create_image
from diskwright.core.gate import ClosedGate, DirectoryGate
from diskwright.core.graph import Graph
from diskwright.errors import (
    CorruptImage,
    DiskwrightError,
    ImageError,
    OptionError,
    UnsafeReference,
    UnsupportedFeature,
)
from diskwright.extents import DATA
from diskwright.formats.qcow2.header import AT_AUTOCLEAR, RAW_DATA_FILE
from tests.formats.qcow2.support import Image, Tape, created, header_of, poked, qemu
from tests.formats.qcow2.variants import agreed, make, opened, our_map, their_map
from tests.peers import find

M = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = make(tmp_path, {"data_file": "data"}, M)
    with_data = opened(path)
    with_data.pwrite(0, b"x" * 100_000)
    with_data.close()
    return path


def nameless(path: Path) -> Path:
    """The image, changed so that it does not name its data file."""
    at = path.read_bytes().index(b"DATA")
    path.write_bytes(poked(path.read_bytes(), at, 0x12345678, 4))
    return path


# -- finding it --------------------------------------------------------------------------------------------


def test_it_goes_through_the_gate(path: Path) -> None:
    with pytest.raises(UnsafeReference, match="data-file"):
        Graph(ClosedGate()).open(str(path))
    elsewhere = path.parent / "sub"
    elsewhere.mkdir()
    (elsewhere / "image").write_bytes(path.read_bytes())
    with pytest.raises(UnsafeReference, match="not a file in the image's own directory"):
        Graph(DirectoryGate()).open(str(elsewhere / "image"))


def test_a_relative_name_is_seen_from_the_image(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    create_image(str(folder / "image"), "qcow2", {"size": M, "data_file": "data"})
    assert (folder / "data").stat().st_size == M
    disk = opened(folder / "image")
    disk.pwrite(5, b"here")
    disk.close()
    assert (folder / "data").read_bytes()[5:9] == b"here"


def test_the_user_may_say_where_it_is(path: Path, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        Graph().open(str(path))
    nested = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)},
              "data-file": {"driver": "file", "filename": str(tmp_path / "moved")}}  # fmt: skip
    dotted = {"driver": "qcow2", "file.filename": str(path), "data-file.driver": "file",
              "data-file.filename": str(tmp_path / "moved")}  # fmt: skip
    for spec in (nested, dotted, "json:" + json.dumps(nested)):
        graph = Graph(ClosedGate())
        node = graph.open(spec, writable=True)
        assert node.pread(99_999, 2) == b"x\0" and set(node.children()) == {"file", "data-file"}
        graph.close()
    graph = Graph(ClosedGate())
    node = graph.open({"driver": "file", "filename": str(tmp_path / "moved"), "node-name": "there"})
    image = graph.open({"driver": "qcow2", "file.filename": str(path), "data-file": "there"})
    assert image.pread(0, 1) == b"x"
    graph.release(image)
    graph.release(node)


def test_nobody_names_it(path: Path) -> None:
    with pytest.raises(ImageError, match=r"^'data-file' is required for this image$"):
        Graph().open(str(nameless(path)))
    shown = info(path)["format-specific"]
    assert isinstance(shown, dict) and "data-file" not in shown["data"] and shown["data"]["data-file-raw"] is False


def test_it_is_named_for_an_image_without(tmp_path: Path) -> None:
    create_image(str(tmp_path / "image"), "qcow2", {"size": M})
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(OptionError, match="can only be set for images with an external data file"):
        Graph().open({"driver": "qcow2", "file.filename": str(tmp_path / "image"),
                      "data-file": {"driver": "file", "filename": str(tmp_path / "data")}})  # fmt: skip


def test_it_cannot_be_the_image_itself(path: Path) -> None:
    (path.parent / "data").unlink()
    (path.parent / "data").symlink_to(path)
    for writable in (False, True):
        with pytest.raises((CorruptImage, DiskwrightError), match=r"the image itself|lock"):
            Graph(DirectoryGate()).open(str(path), writable=writable)


def test_info_does_not_need_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path.parent / "data").unlink()
    for form in ("json", "human"):
        assert main(["info", f"--output={form}", str(path)]) == 0
        assert capsys.readouterr().out == qemu("qemu-img", "info", f"--output={form}", path)
    assert main(["map", str(path)]) == 1
    ours = capsys.readouterr().err
    theirs = subprocess.run([find("qemu-img"), "map", str(path)], capture_output=True, text=True, check=False).stderr
    assert ours.partition(": ")[2] == theirs.partition(": ")[2]
    graph = Graph()
    node = graph.open(str(path), guest_data=False)
    with pytest.raises(ImageError, match="without its external data file"):
        node.pread(0, 1)
    graph.close()


def test_the_map_names_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", str(path)]) == 0
    assert capsys.readouterr().out == qemu("qemu-img", "map", path)


# -- writing to it -----------------------------------------------------------------------------------------


def test_data_is_durable_before_anything_points_at_it() -> None:
    data = Tape(filename="data")
    tape = Tape(created(size=M, data=data, data_file="d"))
    tape.log = data.log = []
    with Image(tape, data=data) as image:
        image.disk.pwrite(0, b"x" * 5000)
        image.disk.flush()
    flushed = next(i for i, (at, change) in enumerate(tape.log) if at is data and change[0] == "flush")
    written = next(i for i, (at, change) in enumerate(tape.log) if at is data and change[0] == "write")
    l1_table = 3 << 16
    own = [(i, change) for i, (at, change) in enumerate(tape.log) if at is tape and change[0] == "write"]
    tables = [i for i, change in own if change[1] >= l1_table]
    assert written < flushed < min(tables)


def test_a_failed_flush_of_the_data_leaves_the_tables_as_they_were() -> None:
    data = Tape(filename="data")
    tape = Tape(created(size=M, data=data, data_file="d"))
    before = bytes(tape.data)
    with Image(tape, data=data) as image:
        image.disk.pwrite(0, b"x" * 65536)
        data.fail = 0
        with pytest.raises(OSError, match="torn"):
            image.disk.flush()
        assert tape.data[3 << 16 : 4 << 16] == before[3 << 16 : 4 << 16], "the L1 table must not have changed"
        data.fail = -1
        image.disk.flush()
        assert tape.data[3 << 16 : 4 << 16] != before[3 << 16 : 4 << 16]


def test_data_clusters_have_no_refcounts_and_lie_at_their_guest_offset(path: Path) -> None:
    disk = opened(path)
    size = path.stat().st_size
    disk.pwrite(0, random.Random(1).randbytes(M))
    disk.flush()
    assert path.stat().st_size == size
    runs = list(disk.node.extents(0, M))
    assert [(r.offset, r.length, r.kind, r.file_offset, r.child) for r in runs] == [(0, M, DATA, 0, 1)]
    expected = disk.pread(0, M)
    disk.close()
    assert (path.parent / "data").read_bytes() == expected


@pytest.mark.parametrize("raw", [False, True])
def test_zeros_and_discards_reach_the_data_file(raw: bool, tmp_path: Path) -> None:
    """Of a raw data file the map says data, whatever happens; in any other what is discarded is given back."""
    path = make(tmp_path, {"data_file": "data", "data_file_raw": raw}, M)
    disk = opened(path)
    disk.pwrite(0, b"x" * M)
    disk.zero(1000, 200_000, unmap=True)
    disk.trim(400_000, 300_000)
    disk.flush()
    content, own = disk.pread(0, M), (tmp_path / "data").read_bytes()
    assert content[1000:201_000] == bytes(200_000) and not any(content[458_752:655_360])
    assert own[65536:196_608] == bytes(131_072) and not any(own[458_752:655_360])
    assert (own == content) or not raw
    kinds = {run.kind for run in disk.node.extents(0, M)}
    assert (kinds == {DATA}) is raw
    disk.close()
    agreed(path, content, tmp_path)


def test_writing_keeps_the_raw_bit(tmp_path: Path) -> None:
    path = make(tmp_path, {"data_file": "data", "data_file_raw": True}, M, ours=False)
    path.write_bytes(poked(path.read_bytes(), AT_AUTOCLEAR, RAW_DATA_FILE | 1 << 40))
    disk = opened(path)
    disk.pwrite(0, b"x")
    disk.close()
    assert header_of(path.read_bytes()).autoclear_features == RAW_DATA_FILE
    plain = created(size=M)
    tape = Tape(poked(plain, AT_AUTOCLEAR, RAW_DATA_FILE))
    Image(tape).close()
    assert header_of(bytes(tape.data)).autoclear_features == 0, "without a data file it means nothing"


def test_stale_bytes_in_a_data_file_are_not_shown(tmp_path: Path) -> None:
    """A data file may be longer than the disk; what is there is not the disk's."""
    for raw in (False, True):
        path = make(tmp_path, {"data_file": "data", "data_file_raw": raw}, M)
        with (tmp_path / "data").open("r+b") as file:
            file.seek(M)
            file.write(b"stale" * 100_000)
        disk = opened(path)
        with disk.drained():
            disk.node.resize(2 * M)
        disk.pwrite(M + 70_000, b"y")
        expected = bytes(M + 70_000) + b"y" + bytes(M - 70_001)
        assert disk.pread(0, 2 * M) == expected
        disk.close()
        agreed(path, expected, tmp_path)
        assert not raw or (tmp_path / "data").read_bytes() == expected
        path.unlink()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("size", [3 * M, 3 * M + 512, 100 * 1024 + 512])
def test_resizing_makes_the_data_file_as_qemu_does(raw: bool, size: int, tmp_path: Path) -> None:
    outcomes = []
    for ours in (False, True):
        path = make(tmp_path, {"data_file": "data", "data_file_raw": raw}, M, ours=False)
        qemu("qemu-io", "-c", "write -P 1 0 1M", path)
        if ours:
            disk = opened(path)
            with disk.drained():
                disk.node.resize(size)
            disk.close()
        else:
            qemu("qemu-img", "resize", "-q", "-f", "qcow2", *(["--shrink"] if size < M else []), path, size)
        outcomes.append((our_map(path), their_map(path)))
        assert (tmp_path / "data").stat().st_size >= size
        agreed(path, (b"\1" * M)[:size].ljust(size, b"\0"), tmp_path)
    assert outcomes[0] == outcomes[1]
    assert (tmp_path / "data").stat().st_size == size


# -- the rest ----------------------------------------------------------------------------------------------


def test_creating_never_empties_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(b"precious" * 10_000)
    for more in ([], ["-U"]):
        words = ["convert", *more, "-f", "raw", "-O", "qcow2", "-o", f"data_file={source}", str(source)]
        assert main([*words, str(tmp_path / "target")]) == 1
    capsys.readouterr()
    assert source.read_bytes() == b"precious" * 10_000


def test_converting_to_and_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes((random.Random(3).randbytes(M) + bytes(M)) * 2)
    for name, options in (("a", f"data_file={tmp_path}/a.data"), ("b", f"data_file={tmp_path}/b.data,data_file_raw=on"),
                          ("c", "extended_l2=on"), ("d", f"extended_l2=on,data_file={tmp_path}/d.data")):  # fmt: skip
        target = tmp_path / name
        assert main(["convert", "-O", "qcow2", "-o", options, str(source), str(target)]) == 0
        agreed(target, source.read_bytes(), tmp_path)
        assert main(["convert", "-O", "raw", str(target), str(tmp_path / "back")]) == 0
        assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert (tmp_path / "b.data").read_bytes() == source.read_bytes()
    capsys.readouterr()


def test_an_image_with_snapshots_is_only_read(path: Path) -> None:
    """QEMU makes none with a data file; writing would change what the snapshot has."""
    data = poked(path.read_bytes(), 60, 1, 4)
    path.write_bytes(poked(data, 64, 3 << 16))
    opened(path, writable=False).close()
    with pytest.raises(UnsupportedFeature, match="snapshots"):
        opened(path)

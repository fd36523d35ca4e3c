"""copy-before-write and snapshot-access: what the source was can be read while it is written to."""

from __future__ import annotations

import errno
import random
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.core import bitmaps
from diskwright.core.create import create_image
from diskwright.core.disk import Disk
from diskwright.core.graph import Graph
from diskwright.core.node import FilterNode, Node
from diskwright.core.permissions import READER
from diskwright.errors import GraphError, ImageError, OptionError
from diskwright.filters.copy_before_write import CopyBeforeWrite
from diskwright.units import KiB, MiB
from tests.jobs.mirrors import GUEST, WAIT, Writers, read_all, until

SIZE = 2 * MiB + 10 * KiB
GRANULE = 64 * KiB


class Fleece:
    """A qcow2 disk ``disk`` with random contents, a target, the filter ``cbw`` and, over it, ``snapshot``."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.graph = Graph()
        names = {name: str(folder / f"{name}.qcow2") for name in ("disk", "target")}
        for name in names.values():
            create_image(name, "qcow2", {"size": SIZE, "cluster_size": 4096})
        self.disk = self.open("disk", driver="qcow2", file={"driver": "file", "filename": names["disk"]})
        chance = random.Random(5)
        for at in range(0, SIZE - 8192, 24 * KiB):
            self.disk.pwrite(at, chance.randbytes(8192))
        if "bitmap" in options:
            bitmaps.add(self.disk, "b", GRANULE)
            self.disk.pwrite(5 * GRANULE, b"dirty")
        self.target = self.open("target", driver="qcow2", file={"driver": "file", "filename": names["target"]})
        self.moment = read_all(self.disk)
        self.cbw = self.open("cbw", driver="copy-before-write", file="disk", target="target", **options)
        self.snapshot = self.open("snapshot", driver="snapshot-access", file="cbw")
        self.guest = self.graph.disk(self.cbw, GUEST)
        self.reader = self.graph.disk(self.snapshot, READER)

    def open(self, name: str, **options: Any) -> Node:
        return self.graph.open({"node-name": name, **options}, writable=True)

    @property
    def filter(self) -> CopyBeforeWrite:
        assert isinstance(self.cbw, FilterNode)
        assert isinstance(self.cbw.filter, CopyBeforeWrite)
        return self.cbw.filter

    def __enter__(self) -> Fleece:
        return self

    def __exit__(self, *error: object) -> None:
        self.graph.close()


def read_through_map(disk: Disk) -> bytes:
    """The contents as one who trusts the map reads them: zeros are not asked for."""
    found = bytearray(disk.size)
    for row in disk.extents():
        if not row.zero:
            found[row.offset : row.end] = disk.pread(row.offset, row.length)
    return bytes(found)


def test_the_snapshot_stays_what_it_was(tmp_path: Path) -> None:
    with Fleece(tmp_path) as f:
        assert f.reader.pread(0, SIZE) == f.moment
        with Writers(f.guest, 3) as writers:
            until(lambda: writers.writes > 50)
            for _ in range(3):
                assert f.reader.pread(0, SIZE) == f.moment
                assert read_through_map(f.reader) == f.moment
                until(lambda before=writers.writes: writers.writes > before + 20)
        writers.check()
        assert read_all(f.disk) != f.moment
        assert f.reader.pread(0, SIZE) == f.moment


def test_readers_and_writers_of_the_same_places(tmp_path: Path) -> None:
    with Fleece(tmp_path) as f:
        stop = threading.Event()
        wrong: list[int] = []

        def read(seed: int) -> None:
            chance = random.Random(seed)
            while not stop.is_set():
                at = chance.randrange(SIZE - 5000)
                length = chance.randrange(1, 5000)
                if f.reader.pread(at, length) != f.moment[at : at + length]:
                    wrong.append(at)

        readers = [threading.Thread(target=read, args=(i,)) for i in range(3)]
        for reader in readers:
            reader.start()
        with Writers(f.guest, 2) as writers:
            until(lambda: writers.writes > 300)
        stop.set()
        for reader in readers:
            reader.join(WAIT)
        assert not wrong


def test_the_kernel_is_not_asked_for_what_the_filter_has(tmp_path: Path) -> None:
    with Fleece(tmp_path) as f:
        assert f.reader.place(0, 4096) is None
        f.guest.zero(0, SIZE)
        assert all(row.zero for row in f.guest.extents())
        assert not all(row.zero for row in f.reader.extents())
        out = tmp_path / "out.raw"
        with open(out, "wb") as file:
            while piece := f.reader.read(MiB):
                file.write(piece)
        assert out.read_bytes() == f.moment


def test_only_what_is_dirty_in_a_bitmap(tmp_path: Path) -> None:
    with Fleece(tmp_path, bitmap={"node": "disk", "name": "b"}) as f:
        f.guest.pwrite(0, b"not kept")
        f.guest.pwrite(5 * GRANULE, b"kept")
        assert read_all(f.target)[5 * GRANULE : 6 * GRANULE] == f.moment[5 * GRANULE : 6 * GRANULE]
        assert not any(read_all(f.target)[:GRANULE])
        assert f.reader.pread(5 * GRANULE, GRANULE) == f.moment[5 * GRANULE : 6 * GRANULE]
        for at in (0, 4 * GRANULE, 6 * GRANULE - 1):
            with pytest.raises(PermissionError):
                f.reader.pread(at, 2)


def test_a_discard_of_the_snapshot_ends_it_there(tmp_path: Path) -> None:
    with Fleece(tmp_path) as f:
        f.guest.pwrite(0, b"x")
        f.snapshot.discard(0, 3 * GRANULE + 5)
        f.guest.pwrite(GRANULE, b"x")
        assert not any(read_all(f.target)[: 3 * GRANULE])
        for at in (0, GRANULE):
            with pytest.raises(PermissionError):
                f.reader.pread(at, 1)
        assert f.reader.pread(3 * GRANULE, 10) == f.moment[3 * GRANULE : 3 * GRANULE + 10]
        f.guest.pwrite(3 * GRANULE, b"y")
        assert f.reader.pread(3 * GRANULE, 10) == f.moment[3 * GRANULE : 3 * GRANULE + 10]


def test_a_broken_snapshot_is_not_read(tmp_path: Path) -> None:
    with Fleece(tmp_path, **{"on-cbw-error": "break-snapshot"}) as f:
        f.guest.pwrite(0, b"fine")
        assert f.reader.pread(0, 4) == f.moment[:4]
        broken = OSError(errno.EIO, "Input/output error")

        def fail(*request: object) -> None:
            raise broken

        f.target.writev = fail  # type: ignore[method-assign]
        at = 24 * KiB * 10
        f.guest.pwrite(at, b"goes on")
        assert f.guest.pread(at, 7) == b"goes on"
        for place in (0, at, SIZE - 1):
            with pytest.raises(PermissionError):
                f.reader.pread(place, 1)
        with pytest.raises(PermissionError):
            f.reader.extents()


def test_it_is_read_only_and_of_a_filter_that_keeps_one(tmp_path: Path) -> None:
    with Fleece(tmp_path) as f:
        writer = f.graph.disk(f.snapshot, READER)
        with pytest.raises(PermissionError):
            writer.pwrite(0, b"x")
        with pytest.raises(PermissionError):
            writer.zero(0, 512)
        with pytest.raises(GraphError, match="keeps no snapshot"):
            f.open("other", driver="snapshot-access", file="disk")
        with pytest.raises(GraphError, match="Conflicting uses"):
            f.graph.disk(f.target)
        with pytest.raises(OSError, match="cannot resize"):
            f.cbw.resize(SIZE * 2)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"cbw-timeout": -1}, OptionError, "cbw-timeout"),
        ({"on-cbw-error": "shrug"}, OptionError, "on-cbw-error"),
        ({"bitmap": {"node": "disk", "name": "none"}}, GraphError, "Dirty bitmap 'none' not found"),
        ({"bitmap": {"node": "disk"}}, OptionError, "needs both"),
        ({"target": "small"}, GraphError, "fewer than the source's"),
        ({"target": "read-only"}, ImageError, "read-only"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str) -> None:
    graph = Graph()
    try:
        graph.open({"driver": "memory", "size": SIZE, "node-name": "disk"}, writable=True)
        graph.open({"driver": "memory", "size": SIZE, "node-name": "target"}, writable=True)
        graph.open({"driver": "memory", "size": MiB, "node-name": "small"}, writable=True)
        graph.open({"driver": "memory", "size": SIZE, "node-name": "read-only"})
        wanted = {"driver": "copy-before-write", "file": "disk", "target": "target", **options}
        with pytest.raises(error, match=text):
            graph.open(wanted, writable=True)
    finally:
        graph.close()


def test_it_can_be_put_under_a_disk_in_use(tmp_path: Path) -> None:
    graph = Graph()
    try:
        disk = graph.open({"driver": "memory", "size": SIZE, "node-name": "disk"}, writable=True)
        graph.open({"driver": "memory", "size": SIZE, "node-name": "target"}, writable=True)
        guest = graph.disk(disk, GUEST)
        guest.pwrite(0, b"before")
        node = graph.open({"driver": "copy-before-write", "file": "disk", "target": "target"}, writable=True)
        assert isinstance(node, FilterNode)
        graph.put_over(node)
        assert guest.node is node
        guest.pwrite(0, b"after!")
        snapshot = graph.open({"driver": "snapshot-access", "file": node.name})
        assert snapshot.pread(0, 6) == b"before"
        graph.remove_filter(node)
        assert guest.node is disk
        guest.pwrite(0, b"x")
        assert snapshot.pread(0, 6) == b"before"
    finally:
        graph.close()


def test_an_nbd_client_reads_the_snapshot(tmp_path: Path) -> None:
    with Fleece(tmp_path) as f:
        f.guest.pwrite(0, b"changed")
        socket = str(tmp_path / "s")
        server = diskwright.serve(f.reader, socket, read_only=True)
        try:
            f.guest.pwrite(24 * KiB, b"changed too")
            out = tmp_path / "out.raw"
            uri = f"nbd+unix:///?socket={socket}"
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(out)], check=True, timeout=60)
            assert out.read_bytes() == f.moment.ljust(-(-SIZE // 512) * 512, b"\0")
        finally:
            server.close()

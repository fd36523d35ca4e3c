"""quorum: what several children say, put to a vote."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from diskwright.core.graph import Graph
from diskwright.core.node import FilterNode
from diskwright.errors import DiskwrightError, FatalError, OptionError
from diskwright.filters.quorum import MAX_CHILDREN, Quorum
from diskwright.jobs.mirror import Mirror
from diskwright.units import KiB, MiB
from tests.jobs.faulty import Fault, Faulty, faulty_node
from tests.jobs.mirrors import GUEST, WAIT, Writers, read_all, until, until_ready

SIZE = MiB + 300


class Vote:
    """A quorum of ``count`` faulty children with the same random contents."""

    def __init__(self, count: int = 3, threshold: int = 2, **options: Any) -> None:
        self.graph = Graph()
        self.rams: list[Faulty] = []
        self.model = bytearray(random.Random(1).randbytes(SIZE))
        for i in range(count):
            _, ram = faulty_node(self.graph, SIZE, f"c{i}")
            ram.data[:] = self.model
            self.rams.append(ram)
        wanted = {"driver": "quorum", "children": [f"c{i}" for i in range(count)], "vote-threshold": threshold}
        self.node = self.graph.open({**wanted, **options}, writable=True)
        assert isinstance(self.node, FilterNode)
        assert isinstance(self.node.filter, Quorum)
        self.told: list[tuple[str, dict[str, object]]] = []
        self.node.filter.report = lambda name, data: self.told.append((name, data))
        self.disk = self.graph.disk(self.node, GUEST)

    def __enter__(self) -> Vote:
        return self

    def __exit__(self, *error: object) -> None:
        for ram in self.rams:
            ram.hook = None
        self.graph.close()


def test_all_agree() -> None:
    with Vote() as v:
        v.disk.pwrite(1000, b"written")
        v.model[1000:1007] = b"written"
        v.disk.zero(5000, 70_000)
        v.model[5000:75_000] = bytes(70_000)
        assert v.disk.pread(0, SIZE) == v.model
        assert all(ram.data == v.model for ram in v.rams)
        v.disk.flush()
        assert all(ram.calls[-1] == ("flush",) for ram in v.rams)
        assert v.told == []


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("liar", [0, 1, 2])
def test_one_that_differs_is_outvoted(liar: int, rewrite: bool) -> None:
    with Vote(rewrite_corrupted=rewrite) as v:
        v.rams[liar].data[70_000] ^= 1
        assert v.disk.pread(65_536, 10_000) == v.model[65_536:75_536]
        bad = {"type": "read", "node-name": f"c{liar}", "sector-num": 128, "sectors-count": 20}
        assert v.told == [("QUORUM_REPORT_BAD", bad)]
        assert (v.rams[liar].data == v.model) == rewrite
        v.told.clear()
        assert v.disk.pread(65_536, 10_000) == v.model[65_536:75_536]
        assert v.told == ([] if rewrite else [("QUORUM_REPORT_BAD", bad)])


def test_without_a_majority_there_is_no_answer() -> None:
    with Vote(3, 2, rewrite_corrupted=True) as v:
        v.rams[0].data[0] ^= 1
        v.rams[1].data[0] ^= 2
        before = [bytes(ram.data) for ram in v.rams]
        with pytest.raises(OSError, match="Input/output error"):
            v.disk.pread(0, 512)
        assert [bytes(ram.data) for ram in v.rams] == before
        assert v.told == [("QUORUM_FAILURE", {"sector-num": 0, "sectors-count": 1})]
        assert v.disk.pread(512, 512) == v.model[512:1024]


def test_one_that_fails_is_left_out_and_two_are_too_many() -> None:
    with Vote() as v:
        v.rams[0].hook = Fault("read", errno.EIO, times=None)
        assert v.disk.pread(0, 100) == v.model[:100]
        assert v.told[0][1] | {"sector-num": 0} == {
            "type": "read", "node-name": "c0", "error": "Input/output error", "sector-num": 0, "sectors-count": 1,
        }  # fmt: skip
        v.rams[1].hook = Fault("read", errno.ENOMEM, times=None)
        v.rams[2].hook = Fault("read", errno.ENOMEM, times=None)
        with pytest.raises(OSError) as caught:
            v.disk.pread(0, 100)
        assert caught.value.errno == errno.ENOMEM  # what most of them met


def test_writes_and_flushes_succeed_on_enough_children() -> None:
    with Vote() as v:
        v.rams[1].hook = Fault("write", errno.ENOSPC, times=None)
        v.disk.pwrite(0, b"new")
        assert v.told[0][1]["type"] == "write"
        assert v.disk.pread(0, 3) == b"new"
        v.rams[2].hook = Fault("write", errno.ENOSPC, times=None)
        with pytest.raises(OSError, match="No space left"):
            v.disk.pwrite(0, b"newer")
        v.rams[0].hook = Fault("flush")
        v.disk.flush()
        v.rams[0].hook, v.rams[1].hook = Fault("flush"), Fault("flush")
        with pytest.raises(OSError, match="Input/output"):
            v.disk.flush()


def test_fifo_reads_one_child_and_the_next_when_it_fails() -> None:
    with Vote(3, 1, read_pattern="fifo") as v:
        v.rams[1].data[0] ^= 1
        reads = [0, 0, 0]

        def count(which: int) -> Any:
            def hook(operation: str, offset: int, length: int) -> None:
                reads[which] += operation == "read"

            return hook

        for i, ram in enumerate(v.rams):
            ram.hook = count(i)
        assert v.disk.pread(0, 10) == v.model[:10]
        assert reads == [1, 0, 0]
        v.rams[0].hook = Fault("read", times=None)
        v.rams[1].hook = Fault("read", times=None)
        assert v.disk.pread(0, 10) == v.model[:10]
        assert reads == [1, 0, 1]
        assert [data["node-name"] for _, data in v.told] == ["c0", "c1"]


def test_blkverify_ends_everything_at_the_first_difference() -> None:
    with Vote(2, 2, blkverify=True) as v:
        assert v.disk.pread(0, 100) == v.model[:100]
        v.rams[1].data[4101] ^= 1
        with pytest.raises(FatalError) as caught:
            v.disk.pread(4096, 4096)
        assert str(caught.value) == "quorum: offset=4096 bytes=4096 contents mismatch at offset 5"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"vote-threshold": 0}, "Parameter 'vote-threshold' expects a value >= 1"),
        ({"vote-threshold": 4}, "threshold may not exceed children count"),
        (
            {"vote-threshold": 1, "blkverify": True},
            "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
        ),
        ({"read-pattern": "x"}, "Please set read-pattern as fifo or quorum"),
        ({"children": []}, "Number of provided children must be 1 or more"),
        ({"children": {"0": "c0", "2": "c1"}}, "numbered from 0 on"),
        ({"children": ["c0"] * (MAX_CHILDREN + 1)}, f"more than the {MAX_CHILDREN}"),
        ({"children": ["c0", "small"]}, "of one size"),
    ],
)
def test_what_is_refused(options: dict[str, Any], text: str) -> None:
    with Vote() as v:
        v.graph.open({"driver": "memory", "size": 512, "node-name": "small"}, writable=True)
        v.disk.close()
        wanted: dict[str, Any] = {"driver": "quorum", "children": ["c0", "c1", "c2"], "vote-threshold": 2, **options}
        with pytest.raises(DiskwrightError, match=text.replace("(", r"\(")):
            v.graph.open(wanted, writable=True)
    with Vote(2, 2) as v, pytest.raises(OptionError, match="rewrite-corrupted=on cannot be used with blkverify=on"):
        Quorum([v.graph.node("c0"), v.graph.node("c1")], 2, blkverify=True, rewrite_corrupted=True)


def test_children_may_be_options_and_dotted_keys(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.raw").write_bytes(b"x" * 4096)
    graph = Graph()
    try:
        wanted: dict[str, object] = {"driver": "quorum", "vote-threshold": "2"}
        for i in range(2):
            wanted |= {f"children.{i}.driver": "raw", f"children.{i}.file.driver": "file"}
            wanted[f"children.{i}.file.filename"] = str(tmp_path / f"{i}.raw")
        node = graph.open(wanted, writable=True)
        node.pwrite(1, b"y")
        assert list(node.children()) == ["children.0", "children.1"]
    finally:
        graph.close()
    assert [(tmp_path / f"{i}.raw").read_bytes()[:3] for i in range(2)] == [b"xyx", b"xyx"]


def test_the_map_says_zeros_only_where_all_do() -> None:
    with Vote() as v:
        for ram in v.rams:
            ram.data[:] = bytes(SIZE)
        v.rams[1].data[8192] = 1
        rows = [(row.offset, row.length, row.zero) for row in v.disk.extents()]
        assert rows == [(0, 8192, True), (8192, 4096, False), (12_288, SIZE - 12_288, True)]
        assert v.disk.place(0, 512) is None


def test_readers_do_not_mistake_a_write_under_way_for_damage() -> None:
    """A reader that comes while one child has a write and the others have not waits, and sees it."""
    with Vote(rewrite_corrupted=True) as v:
        held, go = threading.Event(), threading.Event()

        def hold(operation: str, offset: int, length: int) -> None:
            if operation == "write":
                held.set()
                assert go.wait(WAIT)

        v.rams[1].hook = hold
        writer = threading.Thread(target=v.disk.pwrite, args=(100, b"new"))
        writer.start()
        assert held.wait(WAIT)
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(v.disk.pread(90, 20)))
        reader.start()
        reader.join(0.05)
        assert reader.is_alive()
        assert v.disk.pread(512, 20) == v.model[512:532]  # elsewhere nobody waits
        go.set()
        for thread in (writer, reader):
            thread.join(WAIT)
        v.model[100:103] = b"new"
        assert found == [v.model[90:110]]
        assert all(ram.data == v.model for ram in v.rams)
        assert v.told == []


def test_under_load_nothing_is_reported() -> None:
    with Vote(rewrite_corrupted=True) as v:
        with Writers(v.disk, 2) as writers:
            until(lambda: v.disk.pread(0, SIZE) and writers.writes > 50)
        writers.check()
        assert v.told == []


def test_a_child_is_replaced_by_its_mirror() -> None:
    with Vote() as v:
        new, new_ram = faulty_node(v.graph, SIZE, "new")
        job = Mirror("m", v.graph, v.node, new, replaces=v.graph.node("c1"))
        job.start()
        until_ready(job)
        v.disk.pwrite(7, b"while")
        job.complete()
        job.result(WAIT)
        assert isinstance(v.node, FilterNode)
        assert [child.name for child in v.node.children().values()] == ["c0", "new", "c2"]
        v.disk.pwrite(100, b"after")
        assert new_ram.data == v.rams[0].data == v.rams[2].data == read_all(v.node)
        assert v.told == []


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io")
def test_the_same_damage_seen_by_qemu(tmp_path: Path) -> None:
    chance = random.Random(4)
    good = chance.randbytes(64 * KiB)
    words = []
    for i in range(3):
        data = bytearray(good)
        data[i * 512 : i * 512 + 512] = bytes(512)  # each has its own damage ...
        if i < 2:
            data[40_000:40_010] = bytes([i + 1]) * 10  # ... and at one place no two agree
        (tmp_path / f"{i}.raw").write_bytes(data)
        words += [f"children.{i}.driver=raw", f"children.{i}.file.driver=file"]
        words += [f"children.{i}.file.filename={tmp_path / f'{i}.raw'}"]
    text = ",".join(["driver=quorum", "vote-threshold=2", *words])
    graph = Graph()
    try:
        node = graph.open(dict(word.split("=", 1) for word in text.split(",")))
        for at in (0, 512, 4096, 36_864, 45_056):
            command = ["qemu-io", "-r", "--image-opts", "-c", f"read -v {at} 4096", text]
            run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
            lines = [line for line in run.stdout.splitlines() if len(line) > 60 and line[8:10] == ": "]
            theirs = b"".join(bytes.fromhex("".join(line.split(":", 1)[1].split()[:16])) for line in lines)
            try:
                ours = node.pread(at, 4096)
            except OSError:
                ours = b""
            assert ours == theirs, at
            assert (ours == good[at : at + 4096]) == bool(ours)
    finally:
        graph.close()

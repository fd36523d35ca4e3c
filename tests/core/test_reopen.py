"""Reopening: an image becomes writable and read-only again, as the same node, and nothing of it is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from diskwright.core import bitmaps
from diskwright.core.create import create_image
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, Node, StorageNode
from diskwright.core.permissions import LIVE_READER
from diskwright.core.secrets import Secrets
from diskwright.errors import GraphError, ImageError, ImageLocked
from diskwright.units import KiB, MiB

SIZE = MiB


def graph_of(**secrets: bytes) -> Graph:
    return Graph(None, Secrets(secrets))


def kinds(folder: Path) -> dict[str, dict[str, Any]]:
    """Options of images of many kinds, each with something in it."""
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "raw": ("raw", {}),
        "qcow2": ("qcow2", {}),
        "qcow2 subclusters": ("qcow2", {"extended_l2": True, "cluster_size": 16 * KiB}),
        "qcow2 data file": ("qcow2", {"data_file": str(folder / "data")}),
        "qcow2 luks": ("qcow2", {"encrypt.format": "luks", "encrypt.key-secret": "k", "encrypt.iter-time": 10}),
        "luks": ("luks", {"key-secret": "k", "iter-time": 10}),
        "vdi": ("vdi", {}),
        "parallels": ("parallels", {}),
        "qed": ("qed", {}),
    }
    options: dict[str, dict[str, Any]] = {}
    for name, (driver, given) in made.items():
        path = str(folder / f"{name}.img")
        create_image(path, driver, {"size": SIZE, **given}, secrets=Secrets({"k": b"key"}))
        options[name] = {"driver": driver, "filename": path}
        if name == "luks":
            options[name]["key-secret"] = "k"
        if name == "qcow2 luks":
            options[name]["encrypt"] = {"format": "luks", "key-secret": "k"}
    return options


def test_every_kind_of_image_there_and_back(tmp_path: Path) -> None:
    for name, options in kinds(tmp_path).items():
        graph = graph_of(k=b"key")
        try:
            node = graph.open({**options, "node-name": "n"})
            disk = graph.disk(node, LIVE_READER)
            before = disk.pread(0, SIZE)
            assert name == "luks" or not any(before), name  # what nobody has encrypted reads as anything
            for i in range(3):
                changed = graph.set_writable(node, True)
                assert changed[-1] is node
                assert len(changed) == len(set(changed)) > 1
                assert all(each.writable for each in changed)
                assert graph.node("n") is node
                node.pwrite(i * 100_000, name.encode())
                assert disk.pread(i * 100_000, len(name)) == name.encode()
                assert graph.set_writable(node, True) == []
                assert set(graph.set_writable(node, False)) == set(changed)
                assert not any(each.writable for each in changed)
                assert graph.set_writable(node, False) == []
                for j in range(i + 1):
                    assert disk.pread(j * 100_000, len(name)) == name.encode()
        finally:
            graph.close()
        graph = graph_of(k=b"key")
        try:
            node = graph.open(options)
            assert node.pread(200_000, len(name)) == name.encode()
        finally:
            graph.close()


def test_users_read_on_meanwhile(tmp_path: Path) -> None:
    path = str(tmp_path / "a.qcow2")
    create_image(path, "qcow2", {"size": SIZE})
    graph = Graph()
    try:
        node = graph.open(path, writable=True)
        node.pwrite(0, b"x" * SIZE)
        graph.set_writable(node, False)
        disk = graph.disk(node, LIVE_READER)
        stop = threading.Event()
        wrong: list[object] = []

        def read() -> None:
            while not stop.is_set():
                try:
                    if disk.pread(0, SIZE) != b"x" * SIZE:
                        wrong.append("other bytes")
                except BaseException as error:
                    wrong.append(error)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        fds = []
        for _ in range(20):
            graph.set_writable(node, True)
            node.pwrite(SIZE - 4, b"xxxx")
            graph.set_writable(node, False)
            fds.append(len(os.listdir("/proc/self/fd")))
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(set(fds)) == 1
    finally:
        graph.close()


def test_locks_go_with_it(tmp_path: Path) -> None:
    path = str(tmp_path / "a.qcow2")
    create_image(path, "qcow2", {"size": SIZE})
    code = f"import diskwright\nwith diskwright.open({path!r}, writable=WRITABLE): print('open')"

    def other(writable: bool) -> bool:
        command = [sys.executable, "-c", code.replace("WRITABLE", str(writable))]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return run.stdout == "open\n"

    graph = Graph()
    try:
        node = graph.open(path)
        assert (other(False), other(True)) == (True, False)
        graph.set_writable(node, True)
        assert (other(False), other(True)) == (False, False)
        graph.set_writable(node, False)
        assert (other(False), other(True)) == (True, False)
    finally:
        graph.close()
    assert other(True)


def test_bitmaps_in_the_image_and_in_memory(tmp_path: Path) -> None:
    path = str(tmp_path / "a.qcow2")
    create_image(path, "qcow2", {"size": SIZE})
    graph = Graph()
    try:
        node = graph.open(path, writable=True)
        bitmaps.add(node, "kept", 64 * KiB, persistent=True)
        bitmaps.add(node, "here", 64 * KiB)
        node.pwrite(0, b"x")
        for i in range(1, 4):
            graph.set_writable(node, False)
            assert [(b.name, b.granules) for b in sorted(bitmaps.named(node), key=lambda b: b.name or "")] == [
                ("here", i), ("kept", i),
            ]  # fmt: skip
            graph.set_writable(node, True)
            node.pwrite(i * 64 * KiB, b"x")
        bitmaps.find(node, "kept").hold()
        with pytest.raises(GraphError, match="currently in use"):
            graph.set_writable(node, False)
        assert node.writable
        bitmaps.find(node, "kept").release()
    finally:
        graph.close()
    graph = Graph()
    try:
        node = graph.open(path)
        assert [(b.name, b.granules, b.inconsistent) for b in bitmaps.named(node)] == [("kept", 4, False)]
    finally:
        graph.close()


def test_what_cannot_be_opened_for_writing_stays_as_it_is(tmp_path: Path) -> None:
    path = str(tmp_path / "a.qcow2")
    create_image(path, "qcow2", {"size": SIZE})
    graph, second = Graph(), Graph()
    try:
        node = graph.open(path)
        reader = second.open(path)  # whom a writer would disturb
        with pytest.raises(ImageLocked):
            graph.set_writable(node, True)
        assert not any(each.writable for each in [node, *node.children().values()])
        assert not any(node.pread(0, SIZE))
        second.release(reader)
        _break_header(graph, node)
        with pytest.raises(ImageError):
            graph.set_writable(node, True)
        assert not any(each.writable for each in [node, *node.children().values()])
        assert not any(node.pread(0, SIZE))
        with second_reader(second, path):
            pass  # the locks are a reader's again
    finally:
        graph.close()
        second.close()


class second_reader:
    def __init__(self, graph: Graph, path: str) -> None:
        self.graph, self.node = graph, graph.open({"driver": "file", "filename": path})

    def __enter__(self) -> None:
        return

    def __exit__(self, *error: object) -> None:
        self.graph.release(self.node)


def _break_header(graph: Graph, node: Node) -> None:
    """Makes the image one that can be read by who has it open, and not opened."""
    assert isinstance(node, FormatNode)
    file = node.children()["file"]
    assert isinstance(file, StorageNode)
    with open(file.filename, "r+b") as raw:
        raw.write(b"QFI\0")


def test_filters_and_named_files_below(tmp_path: Path) -> None:
    path = str(tmp_path / "a.qcow2")
    create_image(path, "qcow2", {"size": SIZE})
    graph = Graph()
    try:
        file = graph.open({"driver": "file", "filename": path, "node-name": "f"})
        node = graph.open({"driver": "qcow2", "file": {"driver": "blkdebug", "image": "f"}, "node-name": "q"})
        names = [each.name for each in graph.set_writable(node, True)]
        assert names[0] == "f"
        assert names[-1] == "q"
        assert len(names) == 3
        node.pwrite(0, b"through")
        assert file.writable
        graph.set_writable(node, False)
        assert node.pread(0, 7) == b"through"
        assert not file.writable
    finally:
        graph.close()


def test_memory_keeps_what_it_has() -> None:
    graph = Graph()
    try:
        node = graph.open({"driver": "memory", "size": SIZE}, writable=True)
        node.pwrite(0, b"kept")
        graph.set_writable(node, False)
        graph.set_writable(node, True)
        assert node.pread(0, 4) == b"kept"
        node.pwrite(0, b"more")
    finally:
        graph.close()


def test_a_node_made_outside_cannot_be_reopened() -> None:
    from tests.core.ram import ram_node

    graph = Graph()
    try:
        node = ram_node(graph, SIZE, "r", writable=False)
        with pytest.raises(GraphError, match="cannot be reopened"):
            graph.set_writable(node, True)
    finally:
        graph.close()

"""Create and amend, as jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diskwright.core.create import create_image
from diskwright.core.graph import Graph
from diskwright.core.permissions import READER
from diskwright.errors import GraphError, JobError, OptionError
from diskwright.jobs.create import Amend, Create
from diskwright.jobs.states import State
from diskwright.units import KiB, MiB
from tests.jobs.mirrors import WAIT
from tests.peers.qemu_img import info_json


class Made:
    def __init__(self) -> None:
        self.graph = Graph()
        self.events: list[tuple[str, dict[str, object]]] = []

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *error: object) -> None:
        self.graph.close()

    def create(self, **options: Any) -> Create:
        options = {name.replace("_", "-"): value for name, value in options.items()}
        return Create("c", self.graph, options, on_event=lambda name, data: self.events.append((name, data)))


def finished(job: Any) -> None:
    job.start()
    job.result(WAIT)
    assert job.state is State.CONCLUDED  # it stays until it is dismissed
    job.dismiss()


def test_a_file_and_an_image_in_it(tmp_path: Path) -> None:
    name = str(tmp_path / "a.qcow2")
    with Made() as m:
        finished(m.create(driver="file", filename=name, size=0))
        assert Path(name).stat().st_size == 0
        m.graph.open({"driver": "file", "filename": name, "node-name": "f"}, writable=True)
        finished(m.create(driver="qcow2", file="f", size=5 * MiB, cluster_size=4 * KiB, version="v2"))
        assert [name for name, _ in m.events] == ["JOB_STATUS_CHANGE"] * 12
        assert [data["status"] for _, data in m.events[:7]] == [
            "created", "running", "waiting", "pending", "concluded", "null", "created",
        ]  # fmt: skip
    info = info_json(name)
    assert (info["format"], info["virtual-size"], info["cluster-size"]) == ("qcow2", 5 * MiB, 4 * KiB)
    assert info["format-specific"]["data"]["compat"] == "0.10"


def test_what_was_in_the_node_is_gone(tmp_path: Path) -> None:
    with Made() as m:
        node = m.graph.open({"driver": "memory", "size": MiB, "node-name": "m"}, writable=True)
        node.pwrite(0, b"\xff" * MiB)
        finished(m.create(driver="qcow2", file="m", size=MiB))
        image = m.graph.open({"driver": "qcow2", "file": "m"})
        assert not any(image.pread(0, MiB))


def test_what_is_refused(tmp_path: Path) -> None:
    with Made() as m:
        node = m.graph.open({"driver": "memory", "size": MiB, "node-name": "m"}, writable=True)
        m.graph.open({"driver": "memory", "node-name": "ro"})
        for words, error, text in (
            ({}, OptionError, "Parameter 'driver' is missing"),
            ({"driver": "qcow2", "size": 1}, OptionError, "Parameter 'file' is missing"),
            ({"driver": "qcow2", "file": "m", "size": MiB, "colour": "red"}, OptionError, "colour"),
            ({"driver": "throttle", "file": "m"}, OSError, "does not support blockdev-create"),
        ):
            with pytest.raises(error, match=text):
                m.create(**words)
        with m.graph.disk(node, READER):
            for name, text in (("m", "Conflicting uses"), ("nowhere", "node-name='nowhere'"), ("ro", "is read-only")):
                job = m.create(driver="qcow2", file=name, size=MiB)
                job.start()
                assert job.wait(WAIT)
                with pytest.raises(JobError, match=text):
                    job.result(0)
                job.dismiss()


def test_amend(tmp_path: Path) -> None:
    name = str(tmp_path / "a.qcow2")
    create_image(name, "qcow2", {"size": MiB, "compat": "0.10"})
    with Made() as m:
        node = m.graph.open({"driver": "qcow2", "filename": name, "node-name": "q"}, writable=True)
        with pytest.raises(GraphError, match="doesn't support changing the block driver"):
            Amend("a", m.graph, node, {"driver": "luks"})
        with pytest.raises(OptionError, match="Invalid parameter 'colour'"):
            Amend("a", m.graph, node, {"driver": "qcow2", "colour": "red"})
        finished(Amend("a", m.graph, node, {"driver": "qcow2", "compat": "1.1", "lazy-refcounts": "on"}))
        m.graph.release(node)
    specific = info_json(name)["format-specific"]["data"]
    assert (specific["compat"], specific["lazy-refcounts"]) == ("1.1", True)


def test_cancelled_before_it_begins_nothing_is_made(tmp_path: Path) -> None:
    name = tmp_path / "a.raw"
    with Made() as m:
        job = m.create(driver="file", filename=str(name), size=MiB)
        job.cancel()
        assert job.wait(WAIT)
        assert not name.exists()

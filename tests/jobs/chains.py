"""What tests of jobs on backing chains share: images over each other in files, a guest on the topmost, and faults."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diskwright.core.create import create_image
from diskwright.core.driver import Segments, not_supported
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, Node, StorageNode
from diskwright.jobs.job import Job
from diskwright.units import KiB
from tests.jobs.mirrors import GUEST, WAIT, read_all

BLOCK = 4 * KiB

Hook = Callable[[str, int, int], None]


class Chain:
    """Images ``0.qcow2`` (the lowest), ``1.qcow2``, ... and a guest upon the last. ``models[i]`` are the bytes that
    image i reads as when it is made."""

    def __init__(
        self, folder: Path, sizes: list[int], *, seed: int = 1, raw_base: bool = False, **options: Any
    ) -> None:
        # With large clusters each image would soon have something in every one of them.
        self.folder, self.options = folder, {"cluster_size": BLOCK, **options}
        self.names = [str(folder / f"{i}.{'raw' if raw_base and not i else 'qcow2'}") for i in range(len(sizes))]
        self.models: list[bytes] = []
        chance = random.Random(seed)
        for i, size in enumerate(sizes):
            self._make(i, size, chance, raw_base and not i)
        self.graph = Graph()
        self.top = self.graph.open(self.names[-1], writable=True)
        self.guest = self.graph.disk(self.top, GUEST)
        self.events: list[tuple[str, dict[str, object]]] = []
        self.jobs: list[Job] = []

    def _make(self, i: int, size: int, chance: random.Random, raw: bool) -> None:
        options: dict[str, Any] = {"size": size, **({} if raw else self.options)}
        if i:
            below = self.names[i - 1]
            options |= {"backing_file": below, "backing_fmt": "raw" if below.endswith("raw") else "qcow2"}
        create_image(self.names[i], "raw" if raw else "qcow2", options)
        model = bytearray((self.models[-1] if i else b"").ljust(size, b"\0")[:size])
        with open_graph(self.names[i], "raw" if raw else "qcow2") as node:
            for at in range(0, size, BLOCK):
                step = min(BLOCK, size - at)
                what = chance.random()
                if what < 0.25:
                    model[at : at + step] = chance.randbytes(step)
                    node.pwrite(at, model[at : at + step])
                elif what < 0.32:
                    model[at : at + step] = bytes(step)
                    node.write_zeros(at, step, unmap=True)
            node.flush()
        self.models.append(bytes(model))

    def node(self, i: int) -> Node:
        """The node of image ``i``."""
        return next(
            node for node in self.graph.nodes() if isinstance(node, FormatNode) and node.filename == self.names[i]
        )

    def note(self, name: str, data: dict[str, object]) -> None:
        self.events.append((name, data))

    def names_of_events(self) -> list[object]:
        return [data["status"] if name == "JOB_STATUS_CHANGE" else name for name, data in self.events]

    def keep(self, job: Job) -> Any:
        """Notes ``job``, so that it is ended with the test."""
        self.jobs.append(job)
        return job

    def close(self) -> None:
        for job in self.jobs:
            if not job.has_ended:
                job.cancel(force=True)
            assert job.wait(WAIT)
        self.graph.close()


@contextmanager
def chain_of(folder: Path, sizes: list[int], **options: Any) -> Iterator[Chain]:
    made = Chain(folder, sizes, **options)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def open_graph(name: str, format: str | None = None) -> Iterator[Node]:
    graph = Graph()
    try:
        yield graph.open(name, driver=format, writable=True)
    finally:
        graph.close()


def read_file(name: str, format: str | None = None) -> bytes:
    """What an image reads as when it is opened anew, through its own header's chain."""
    graph = Graph()
    try:
        return read_all(graph.open(name, driver=format))
    finally:
        graph.close()


def backing_of(name: str) -> tuple[str, str | None] | None:
    """What the header of an image says of its backing file."""
    graph = Graph()
    try:
        node = graph.open(name, backing=False)
        assert isinstance(node, FormatNode)
        return node.format.backing and (node.format.backing.filename, node.format.backing.format)
    finally:
        graph.close()


def inject(node: Node, hook: Hook) -> Callable[[], None]:
    """``hook(operation, offset, length)`` before each request to the file that ``node``'s image lies in; what it
    raises, the request raises. The kernel copies nothing. Returns what takes it away again."""
    file = node.children().get("file", node)
    assert isinstance(file, StorageNode)
    storage = file.storage
    whole = {name: getattr(storage, name) for name in ("readv", "writev", "write_zeros", "flush", "copy_from")}

    def readv(segments: Segments, *, nowait: bool = False) -> None:
        for offset, buffer in segments:
            hook("read", offset, len(buffer))
        whole["readv"](segments, nowait=nowait)

    def writev(segments: Segments) -> None:
        for offset, buffer in segments:
            hook("write", offset, len(buffer))
        whole["writev"](segments)

    def write_zeros(offset: int, length: int, **how: Any) -> None:
        hook("write", offset, length)
        whole["write_zeros"](offset, length, **how)

    def copy_from(offset: int, source: Any) -> None:
        raise not_supported("copying in the kernel")

    def flush() -> None:
        hook("flush", 0, 0)
        whole["flush"]()

    for name, function in (
        ("readv", readv), ("writev", writev), ("write_zeros", write_zeros), ("flush", flush), ("copy_from", copy_from),
    ):  # fmt: skip
        setattr(storage, name, function)
    file.readv = readv  # type: ignore[method-assign]

    def undo() -> None:
        for name in whole:
            delattr(storage, name)
        file.readv = file.storage.readv  # type: ignore[method-assign]

    return undo

"""A qcow2 image against a bytearray: every operation, reopening in between, over a backing disk, with shared and
compressed clusters to begin with."""

from __future__ import annotations

import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from diskwright.core.driver import runs_of
from diskwright.extents import Extents
from tests.core.ram import raw_node
from tests.formats.qcow2.support import LONG, Image, Tape, checked, contents, created, qemu

BEGINNINGS = (
    "new", "version 2", "backed", "preallocated", "shared and compressed",
    "extended", "extended, backed", "data file", "raw data file",
)  # fmt: skip
APART = ("data file", "raw data file")


@cache
def beginning(kind: str, cluster_size: int) -> tuple[bytes, bytes]:
    """An image and what it reads as."""
    size = 40 * cluster_size + 1536
    if kind.startswith("extended"):  # subclusters of the size
        over = {"backing_file": "b", "backing_fmt": "raw"} if "backed" in kind else {}
        data = created(size=size, cluster_size=32 * cluster_size, extended_l2=True, **over)
        return data, backing_bytes(size) if over else bytes(size)
    if kind in APART:
        raw = kind == "raw data file"
        beside = Tape(filename="data")
        return created(size=size, data=beside, cluster_size=cluster_size, data_file="d", data_file_raw=raw), bytes(size)
    if kind == "version 2":
        return created(size=size, cluster_size=cluster_size, compat="0.10"), bytes(size)
    if kind == "backed":
        return created(size=size, cluster_size=cluster_size, backing_file="b", backing_fmt="raw"), backing_bytes(size)
    if kind == "preallocated":
        return created(size=size, cluster_size=cluster_size, preallocation="metadata"), bytes(size)
    if kind == "shared and compressed" and shutil.which("qemu-img"):
        return shared_and_compressed(size, cluster_size)
    return created(size=size, cluster_size=cluster_size), bytes(size)


def backing_bytes(size: int) -> bytes:
    """The backing disk ends before the image does."""
    return random.Random(1).randbytes(size // 2 + 100).ljust(size, b"\0")


def shared_and_compressed(size: int, cluster_size: int) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        raw, path = Path(folder) / "raw", Path(folder) / "image"
        source = bytearray((b"compressible " * (size // 13 + 1))[:size])
        source[2 * cluster_size : 5 * cluster_size] = bytes(3 * cluster_size)
        source[7 * cluster_size : 9 * cluster_size] = random.Random(2).randbytes(2 * cluster_size)
        raw.write_bytes(source)
        qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"cluster_size={cluster_size}", raw, path)
        qemu("qemu-io", "-c", f"write -P 7 {10 * cluster_size} {6 * cluster_size}", path)
        qemu("qemu-img", "snapshot", "-c", "kept", path)
        qemu("qemu-io", "-c", f"write -P 8 {12 * cluster_size} {2 * cluster_size}", path)
        source[10 * cluster_size : 16 * cluster_size] = b"\7" * (6 * cluster_size)
        source[12 * cluster_size : 14 * cluster_size] = b"\10" * (2 * cluster_size)
        return path.read_bytes(), bytes(source)


class Machine(RuleBasedStateMachine):
    image: Image

    @initialize(kind=st.sampled_from(BEGINNINGS), cluster_size=st.sampled_from([512, 4096]))
    def begin(self, kind: str, cluster_size: int) -> None:
        data, model = beginning(kind, cluster_size)
        self.kind, self.cluster_size = kind, cluster_size
        self.model, self.tape = bytearray(model), Tape(data)
        self.beside = Tape(bytes(len(model)), "data") if kind in APART else None
        self._open()

    def _open(self, cache_size: int = 1 << 20) -> None:
        self.image = Image(self.tape, data=self.beside, cache_size=cache_size)
        if "backed" in self.kind:
            length = len(beginning("backed", self.cluster_size)[1])
            below = raw_node(self.image.graph, length // 2 + 100, "below")
            below.pwrite(0, backing_bytes(length)[: length // 2 + 100])
            self.image.node.backing = below

    def _nothing_wrong(self) -> None:
        if self.beside is not None or self.kind.startswith("extended"):
            return  # another program looks at those elsewhere
        report = checked(bytes(self.tape.data))
        assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0), report.messages

    def _range(self, place: float, length: int, aligned: bool) -> tuple[int, int]:
        size = len(self.model)
        offset = int(place * size)
        if aligned:
            offset -= offset % self.cluster_size
            length += -length % self.cluster_size
        return offset, max(1, min(length, size - offset))

    places = st.floats(0, 1, exclude_max=True)
    lengths = st.one_of(st.integers(1, 600), st.integers(1, 20000))

    @rule(place=places, length=lengths, aligned=st.booleans(), byte=st.integers(1, 255))
    def write(self, place: float, length: int, aligned: bool, byte: int) -> None:
        offset, length = self._range(place, length, aligned)
        data = bytes([byte]) * length
        self.image.disk.pwrite(offset, data)
        self.model[offset : offset + length] = data

    @rule(place=places, length=lengths, aligned=st.booleans(), unmap=st.booleans())
    def zero(self, place: float, length: int, aligned: bool, unmap: bool) -> None:
        offset, length = self._range(place, length, aligned)
        self.image.disk.zero(offset, length, unmap=unmap)
        self.model[offset : offset + length] = bytes(length)

    @rule(place=places, length=lengths, aligned=st.booleans())
    def discard(self, place: float, length: int, aligned: bool) -> None:
        offset, length = self._range(place, length, aligned)
        before = bytes(self.model[offset : offset + length])
        self.image.disk.trim(offset, length)
        after = self.image.disk.pread(offset, length)
        assert all(new in (0, old) for new, old in zip(after, before, strict=True)), "neither zeros nor what was there"
        self.model[offset : offset + length] = after

    @rule(place=places, length=lengths)
    def read(self, place: float, length: int) -> None:
        offset, length = self._range(place, length, False)
        assert self.image.disk.pread(offset, length) == self.model[offset : offset + length]

    @rule(place=places, length=lengths)
    def in_place_is_where_it_is_read(self, place: float, length: int) -> None:
        offset, length = self._range(place, length, False)
        found = self.image.format.in_place(offset, length)
        if found >= 0:
            target = self.tape if self.beside is None else self.beside
            assert (
                bytes(target.data[found : found + length]).ljust(length, b"\0") == self.model[offset : offset + length]
            )

    @rule(place=places, length=st.integers(1, 200000))
    def both_kinds_of_map_agree(self, place: float, length: int) -> None:
        offset, length = self._range(place, length, False)
        single = Extents.of(runs_of(self.image.format.extent_at, offset, length)).merge()
        assert single == self.image.format.extents(offset, length).merge()

    @rule()
    def flush(self) -> None:
        self.image.disk.flush()

    @rule()
    def reserve_and_abort(self) -> None:
        self.image.format.reserve(0, min(len(self.model), 3 * self.cluster_size)).abort()

    @rule(cache_size=st.sampled_from([1, 1 << 20]))
    def reopen(self, cache_size: int) -> None:
        self.image.close()
        self._nothing_wrong()
        self._open(cache_size)

    @rule(more=st.integers(1, 5000))
    def grow(self, more: int) -> None:
        if "backed" in self.kind or len(self.model) > 100 * self.cluster_size:
            return  # what the backing disk has beyond the old end is for others to hide
        if self.kind == "shared and compressed" and self.image.format.header.version < 3:
            return
        self.image.node.resize(len(self.model) + more * 16)
        self.model.extend(bytes(more * 16))

    @rule(less=st.integers(1, 5000))
    def shrink(self, less: int) -> None:
        if len(self.model) - less < 10 * self.cluster_size:
            return
        self.image.node.resize(len(self.model) - less)
        del self.model[len(self.model) - less :]

    @invariant()
    def the_size_is_right(self) -> None:
        if hasattr(self, "image"):
            assert self.image.disk.size == len(self.model)

    def teardown(self) -> None:
        if not hasattr(self, "image"):
            return
        assert self.image.disk.pread(0, len(self.model)) == self.model
        self.image.close()
        self._nothing_wrong()
        if self.kind == "raw data file":
            assert self.beside is not None and self.beside.data == self.model
        if "backed" not in self.kind:
            beside = None if self.beside is None else bytes(self.beside.data)
            assert contents(bytes(self.tape.data), beside=beside) == self.model


Machine.TestCase.settings = settings(
    max_examples=3000 if LONG else 80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestModel = Machine.TestCase

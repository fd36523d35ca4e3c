"""Rebase, commit and a change of the backing file's name, ended at any moment: the images read as before."""

from __future__ import annotations

import random
from typing import Any

import pytest

from diskwright.core.node import FormatNode, Node, StorageNode
from diskwright.engine.commit import Commit
from diskwright.engine.rebase import Rebase
from diskwright.errors import ImageError
from diskwright.formats.qcow2.header import EXT_BACKING_FORMAT, EXT_FEATURE_NAMES, read_header
from diskwright.formats.qcow2.rename import change_backing
from tests.formats.qcow2.support import LONG, Change, Image, Tape, checked, created, header_of
from tests.formats.qcow2.test_crash import after_crash

KiB = 1 << 10


class Over:
    """An image on a tape over another node."""

    def __init__(self, tape: Tape, backing: Node | None, *, writable: bool = True) -> None:
        self.image = Image(tape, writable=writable)
        self.graph, self.node = self.image.graph, self.image.node
        if backing is not None:
            self.graph.adopt(backing)
            self.graph.set_backing(self.node, backing)
            self.graph.release(backing)

    def read(self) -> bytes:
        return self.image.disk.pread(0, self.image.disk.size)

    def __enter__(self) -> Over:
        return self

    def __exit__(self, *_: object) -> None:
        self.image.close()


def raw(data: bytes, name: str) -> Node:
    return StorageNode(name, Tape(data), False)


def read_over(data: bytes, backing: bytes) -> bytes:
    with Over(Tape(data), raw(backing, "below"), writable=False) as image:
        return image.read()


def overlay(chance: random.Random, below: bytes, **options: Any) -> bytes:
    """An image with something of its own over ``below``."""
    tape = Tape(created(backing_file="old", backing_fmt="raw", **options))
    with Over(tape, raw(below, "below")) as image:
        disk, cluster = image.image.disk, image.node.cluster_size
        for _ in range(12):
            offset = chance.randrange(disk.size // 512) * 512
            length = min(disk.size - offset, chance.choice((512, cluster, 3 * cluster)))
            if chance.random() < 0.7:
                disk.pwrite(offset, chance.randbytes(length))
            else:
                disk.zero(offset, length, unmap=True)
    return bytes(tape.data)


def patchy(chance: random.Random, size: int, like: bytes = b"") -> bytes:
    """Data and zeros; some of it as in ``like``."""
    data = bytearray()
    while len(data) < size:
        step = chance.choice((512, 3000, 9000))
        kind = chance.random()
        data += bytes(step) if kind < 0.3 else chance.randbytes(step) if kind < 0.6 else like[len(data) :][:step]
    return bytes(data[:size])


CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "512": ({"size": 100 * KiB, "cluster_size": 512}, 100, 100),
    "4k": ({"size": 301 * KiB, "cluster_size": 4096}, 301, 301),
    "4k version 2": ({"size": 301 * KiB, "cluster_size": 4096, "compat": "0.10"}, 200, 301),
    "64k": ({"size": 1000 * KiB, "cluster_size": 65536}, 1000, 700),
    "old is shorter": ({"size": 300 * KiB, "cluster_size": 4096}, 99, 300),
    "new is shorter": ({"size": 300 * KiB, "cluster_size": 4096}, 300, 99),
    "both are longer": ({"size": 300 * KiB, "cluster_size": 4096}, 500, 400),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(30 if LONG else 2))
def test_rebase(case: str, seed: int) -> None:
    chance = random.Random(f"{case} {seed}")
    options, old_size, new_size = CASES[case]
    old = patchy(chance, old_size * KiB)
    new = patchy(chance, new_size * KiB, old)
    start = overlay(chance, old, **options)
    expected = read_over(start, old)
    tape = Tape(start)
    with Over(tape, raw(old, "old")) as image:
        below = image.node.backing
        assert below is not None
        image.graph.hold(below)
        above = raw(new, "new")
        image.graph.adopt(above)
        image.graph.set_backing(image.node, above)
        Rebase(image.node, below, above, image.graph.leases).run()
        image.node.format.change_backing("new-name", "raw")
    seen = set()
    for position in range(len(tape.changes) + 1):
        data = after_crash(start, tape.changes, position, chance)
        report = checked(data)
        assert not report.corruptions and not report.check_errors, (position, report.messages)
        header = header_of(data)
        assert header.backing is not None and header.backing.format == "raw"
        seen.add(header.backing.filename)
        assert read_over(data, {"old": old, "new-name": new}[header.backing.filename]) == expected, position
    assert seen == {"old", "new-name"}
    assert not checked(bytes(tape.data)).leaks


class Film(Tape):
    """A tape whose changes are also told to a list that several share."""

    def __init__(self, data: bytes, shared: list[tuple[Film, Change]]) -> None:
        super().__init__(data)
        self.shared = shared

    def _record(self, change: Change) -> None:
        super()._record(change)
        self.shared.append((self, change))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("seed", range(30 if LONG else 2))
def test_commit(seed: int, keep: bool) -> None:
    chance = random.Random(seed)
    bottom = patchy(chance, 150 * KiB)
    base = overlay(chance, bottom, size=200 * KiB, cluster_size=512)
    with Over(Tape(base), raw(bottom, "b"), writable=False) as image:
        below = image.read()
    top = overlay(chance, below, size=260 * KiB, cluster_size=4096)

    def chain(base: bytes, top: bytes) -> tuple[bytes, bytes]:
        with Over(Tape(base), raw(bottom, "bottom"), writable=False) as image:
            below = image.read()
        return below, read_over(top, below)

    expected = chain(base, top)[1]
    shared: list[tuple[Film, Change]] = []
    base_film, top_film = Film(base, shared), Film(top, shared)
    with Over(base_film, raw(bottom, "b")) as lower, Over(top_film, None) as upper:
        node = lower.node
        upper.node.backing = node
        try:
            Commit(upper.node, node, upper.graph.leases).run()
            if not keep:
                upper.node.format.make_empty()
        finally:
            upper.node.backing = None
    for position in range(len(shared) + 1):
        states = []
        for film, start in ((base_film, base), (top_film, top)):
            changes = [change for owner, change in shared[:position] if owner is film]
            states.append(after_crash(start, changes, len(changes), chance))
            report = checked(states[-1])
            assert not report.corruptions and not report.check_errors, (position, report.messages)
        assert chain(*states)[1] == expected, position
    below, above = chain(bytes(base_film.data), bytes(top_film.data))
    assert below == above == expected
    if not keep:
        assert len(top_film.data) < len(top)
        assert checked(bytes(top_film.data)).allocated_clusters == 0


# -- the name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_names_of_all_lengths(cluster_size: int, compat: str) -> None:
    chance = random.Random(cluster_size)
    start = created(size=0, cluster_size=cluster_size, compat=compat, backing_file="first", backing_fmt="raw")
    now: tuple[str, str] | None = ("first", "raw")
    changed = 0
    for length in (3, 200, 0, 1, 1023, 12, 900, 40, 300, 301):
        tape = Tape(start)
        then = ("n" * length, chance.choice(("raw", "qcow2", "parallels", "a-very-long-name"))) if length else None
        with Image(tape) as image:
            try:
                change_backing(image.format, *(then or (None, None)))
            except ImageError:
                assert cluster_size < 2 * length + 700 and not tape.changes[1:]
                continue
            assert image.format.backing == then
        changed += 1
        for position in range(len(tape.changes) + 1):
            data = after_crash(start, tape.changes, position, chance)
            header = header_of(data)
            assert header.backing in (now, then), position
            assert header.size == 0 and header.refcount_table_clusters == 1
            formats = [data for kind, data in header.extensions if kind == EXT_BACKING_FORMAT]
            assert len(formats) == (header.backing is not None)
        start, now = bytes(tape.data), then
        header = header_of(start)
        assert header.backing == now
        if cluster_size == 65536 and compat == "1.1":
            assert header.extension(EXT_FEATURE_NAMES), "what was there besides is still there"
    assert changed >= 5


def test_unknown_extensions_are_kept() -> None:
    start = created(size=0, cluster_size=65536, backing_file="first", backing_fmt="raw")
    header = header_of(start)
    header.extensions += [(0x12345678, b"precious"), (0x23456789, bytes(range(256)) * 5)]
    data = bytearray(start)
    encoded = header.encode()
    data[: len(encoded)] = encoded
    tape = Tape(bytes(data))
    for name in ("second", "third" * 50, "x"):
        with Image(tape) as image:
            change_backing(image.format, name, "qcow2")
    found = read_header(StorageNode("n", tape, False))
    assert found.extension(0x12345678) == b"precious"
    assert found.extension(0x23456789) == bytes(range(256)) * 5
    assert found.backing == ("x", "qcow2")
    assert not any(tape.data[len(found.encode()) : 65536]), "nothing of the old names is left"


def test_read_only() -> None:
    with Image(Tape(created(size=0)), writable=False) as image:
        with pytest.raises(ImageError, match="read-only"):
            image.format.change_backing("x", "raw")
        with pytest.raises(ImageError, match="read-only"):
            image.format.make_empty()


def test_format_node_is_what_it_was() -> None:
    with Over(Tape(created(size=1 << 20)), None) as image:
        assert isinstance(image.node, FormatNode)
        image.node.format.make_empty()
        assert image.read() == bytes(1 << 20)

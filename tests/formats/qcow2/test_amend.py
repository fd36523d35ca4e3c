"""Amending: sound at every moment, and after every error the next call works."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from diskwright.core.node import StorageNode
from diskwright.errors import DiskwrightError, OptionError
from diskwright.formats.qcow2.options import Qcow2AmendOptions
from diskwright.formats.qcow2.refcount_width import _layout, _packed
from diskwright.formats.qcow2.refcounts import expand_bytes
from tests.formats.qcow2.support import LONG, Image, Tape, checked, contents, created, header_of, qemu, qemu_check
from tests.formats.qcow2.test_crash import after_crash

K = 4096
Change = Callable[[Image], None]


def amended(**options: object) -> Change:
    return lambda image: image.node.amend(Qcow2AmendOptions(**options))  # type: ignore[arg-type]


def filled(chance: random.Random, **options: object) -> tuple[bytes, bytes]:
    """An image with data, zero clusters with and without space, and holes; and what its guest reads."""
    tape = Tape(created(**{"size": 400 << 10, "cluster_size": K, **options}))
    with Image(tape) as image:
        for at in range(0, 400 << 10, 40 << 10):
            image.disk.pwrite(at, chance.randbytes(24 << 10))
        for at in range(0, 400 << 10, 80 << 10):
            image.disk.zero(at + 2 * K, 2 * K, unmap=False)
            image.disk.zero(at + 20 * 1024 + 5 * K, 2 * K, unmap=True)
    return bytes(tape.data), contents(bytes(tape.data))


CASES: dict[str, tuple[dict[str, object], Change]] = {
    "to version 2": ({}, amended(compat="0.10")),
    "to version 3": ({"compat": "0.10"}, amended(compat="1.1")),
    "wider refcounts": ({}, amended(refcount_bits=64)),
    "narrower refcounts": ({"cluster_size": 512}, amended(refcount_bits=1)),
    "from 2 bits to 32": ({"cluster_size": 512, "refcount_bits": 2}, amended(refcount_bits=32)),
    "lazy refcounts": ({}, amended(lazy_refcounts=True)),
    "everything": ({"refcount_bits": 8}, amended(refcount_bits=16, size=800 << 10, compat="0.10")),
    "growing with space": ({"cluster_size": 512}, lambda i: i.node.resize(500 << 10, preallocation="full")),
}  # fmt: skip


def start_of(case: str, seed: int) -> tuple[bytes, bytes, Change]:
    options, change = CASES[case]
    data, disk = filled(random.Random(f"{case} {seed}"), **options)
    return data, disk, change


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(20 if LONG else 1))
def test_a_crash_leaves_a_sound_image_that_reads_the_same(case: str, seed: int, tmp_path: Path) -> None:
    start, disk, change = start_of(case, seed)
    chance, tape = random.Random(seed), Tape(start)
    with Image(tape) as image:
        change(image)
    every = 1 if LONG else max(1, len(tape.changes) // 60)
    for position in [*range(0, len(tape.changes), every), len(tape.changes)]:
        data = after_crash(start, tape.changes, position, chance)
        report = checked(data)
        assert not report.corruptions and not report.check_errors, (position, report.messages)
        found = contents(data)
        assert found[: len(disk)] == disk and not any(found[len(disk) :]), position
    report = checked(bytes(tape.data))
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    path = tmp_path / "amended"
    path.write_bytes(bytes(tape.data))
    seen = qemu_check(path)
    assert (seen["corruptions"], seen["leaks"]) == (0, 0)


@pytest.mark.parametrize("case", CASES)
def test_an_error_at_any_step_leaves_a_sound_image_and_the_next_call_works(case: str) -> None:
    start, disk, change = start_of(case, 0)
    whole = Tape(start)
    with Image(whole) as image:
        change(image)
    steps = len(whole.changes)
    for step in range(0, steps, 1 if LONG else max(1, steps // 25)):
        tape = Tape(start)
        with Image(tape) as image:
            tape.fail = step
            with pytest.raises(OSError, match="the tape is torn"):
                change(image)
                image.node.flush()
            tape.fail = -1
            report = checked(bytes(tape.data))
            assert not report.corruptions and not report.check_errors, (step, report.messages)
            assert contents(bytes(tape.data))[: len(disk)] == disk, step
            change(image)
            image.disk.pwrite(K, b"after")
        data = bytes(tape.data)
        assert not checked(data).corruptions, step
        expected = bytearray(disk)
        expected[K : K + 5] = b"after"
        assert contents(data)[: len(disk)] == expected, step


def test_version_2_has_no_zero_clusters_and_keeps_space(tmp_path: Path) -> None:
    data, disk = filled(random.Random(1))
    tape = Tape(data)
    with Image(tape) as image:
        before = image.format.extent_at(2 * K, K)
        assert before.file_offset > 0, "space is kept"
        image.node.amend(Qcow2AmendOptions(compat="v2"))
        assert image.format.extent_at(2 * K, K).file_offset == before.file_offset
        assert header_of(bytes(tape.data)).version == 2
        image.disk.pwrite(0, b"still writable")
    assert contents(bytes(tape.data))[14:] == disk[14:]
    path = tmp_path / "image"
    path.write_bytes(bytes(tape.data))
    assert '"compat": "0.10"' in qemu("qemu-img", "info", "--output=json", path)


def test_zeros_over_a_backing_image_are_written_out() -> None:
    tape = Tape(created(size=64 << 10, cluster_size=K, backing_file="b", backing_fmt="raw"))
    backing = StorageNode("b", Tape(b"secret.." * (8 << 10)), False)
    with Image(tape, backing=backing) as image:
        image.graph.adopt(backing)
        image.disk.zero(K, 5 * K)
        before = image.disk.pread(0, 64 << 10)
        assert before[K : 6 * K] == bytes(5 * K) and before[:6] == b"secret"
        image.node.amend(Qcow2AmendOptions(compat="0.10"))
        assert image.disk.pread(0, 64 << 10) == before


@pytest.mark.parametrize("order", range(7))
def test_every_width_to_every_other(order: int) -> None:
    start, disk = filled(random.Random(order), refcount_bits=1 << order, cluster_size=1024)
    for bits in (1, 2, 4, 8, 16, 32, 64):
        tape = Tape(start)
        with Image(tape) as image:
            image.node.amend(Qcow2AmendOptions(refcount_bits=bits))
            image.disk.pwrite(0, disk[:5000])
        data = bytes(tape.data)
        report = checked(data)
        assert (report.corruptions, report.leaks) == (0, 0), (bits, report.messages)
        assert header_of(data).refcount_order == bits.bit_length() - 1
        assert contents(data) == disk


def test_a_count_that_does_not_fit_is_named_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(filled(random.Random(1))[0])
    for name in "abc":
        qemu("qemu-img", "snapshot", "-c", name, path)
    tape = Tape(path.read_bytes())
    with Image(tape) as image:
        tape.changes.clear()
        with pytest.raises(OptionError, match=r"to 2 bits: Cluster at offset 0x[0-9a-f]+ has a refcount of 4"):
            image.node.amend(Qcow2AmendOptions(refcount_bits=2))
        assert not [change for change in tape.changes if change[0] == "write"]
        image.node.amend(Qcow2AmendOptions(refcount_bits=4))
    assert not checked(bytes(tape.data)).corruptions


def test_a_snapshot_with_zero_clusters_prevents_version_2(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(filled(random.Random(1))[0])
    qemu("qemu-img", "snapshot", "-c", "one", path)
    with Image(Tape(path.read_bytes())) as image, pytest.raises(OptionError, match="snapshot has zero clusters"):
        image.node.amend(Qcow2AmendOptions(compat="0.10"))


def test_new_tables_count_themselves() -> None:
    for first in (0, 5, 4000, 100_000):
        for per_block in (8, 64, 4096):
            blocks, table = _layout({0, 3}, first, per_block, 512)
            counted = {c // per_block for c in range(first, first + len(blocks) + table)}
            assert counted | {0, 3} <= set(blocks) and (blocks[-1] + 1) * 8 <= table * 512


@pytest.mark.parametrize("order", range(3))
def test_narrow_counts_are_packed_as_they_are_unpacked(order: int) -> None:
    import numpy as np

    raw = np.frombuffer(random.Random(order).randbytes(64), np.uint8)
    assert _packed(expand_bytes(raw, order).astype(np.uint64), order) == raw.tobytes()


def test_a_read_only_image_is_not_amended() -> None:
    with Image(Tape(created(size=K)), writable=False) as image, pytest.raises(DiskwrightError, match="read-only"):
        image.node.amend(Qcow2AmendOptions(lazy_refcounts=True))

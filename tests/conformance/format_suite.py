"""The suite every format driver passes.

Subclass ``FormatConformance`` as ``Test...`` and set the class attributes; nothing else is needed for a format
that can be created. The suite works through ``Graph`` and ``Disk`` on real files, so it also
holds the nodes to what the driver answers.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diskwright.core import options as opts
from diskwright.core import registry
from diskwright.core.disk import Disk
from diskwright.core.driver import Format, runs_of
from diskwright.core.gate import DirectoryGate
from diskwright.core.graph import Graph
from diskwright.core.node import format_of
from diskwright.core.probe import probe_head
from diskwright.core.secrets import Secrets, bind
from diskwright.errors import DiskwrightError
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, ZERO, Extents

SIZE = 1 << 20


class FormatConformance:
    """What a driver must keep. Attributes say what kind of format it is."""

    format_name: ClassVar[str]
    create_options: ClassVar[dict[str, object]] = {}
    has_backing: ClassVar[bool] = False
    can_grow: ClassVar[bool] = True
    can_check: ClassVar[bool] = True
    sparse: ClassVar[bool] = True
    """Whether a new image says of itself that nothing is in it."""
    header_room = 0
    """Bytes of a new image's file before its data, where that is much."""
    model_examples: ClassVar[int] = 40
    open_options: ClassVar[dict[str, object]] = {}
    secrets: ClassVar[dict[str, bytes | str]] = {}
    """What options name by id."""
    encrypted: ClassVar[bool] = False
    """Whether stored bytes differ from the guest's."""

    # -- making and opening ----------------------------------------------------------------------

    def driver(self) -> type[Format]:
        found = registry.find(self.format_name)
        assert issubclass(found, Format)
        return found

    def make(self, path: Path, size: int = SIZE, **options: object) -> Path:
        """A new image of ``size`` bytes at ``path``."""
        path.write_bytes(b"")
        graph = Graph()
        file = graph.open({"driver": "file", "filename": str(path)}, writable=True)
        driver = self.driver()
        values = {"size": size, **self.create_options, **options}
        typed = opts.parse(driver.create_options, values, owner=driver.name)
        driver.create(file, bind(typed, Secrets(self.secrets)))
        file.flush()
        graph.close()
        return path

    def open(self, path: Path, *, writable: bool = True, **options: Any) -> Disk:
        graph = Graph(DirectoryGate(), Secrets(self.secrets))
        spec = {"driver": self.format_name, "file.filename": str(path), **self.open_options, **options}
        node = graph.open(spec, writable=writable)
        return graph.disk(node, owns_graph=True)

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return self.make(tmp_path / "image")

    @pytest.fixture
    def disk(self, path: Path) -> Iterator[Disk]:
        disk = self.open(path)
        yield disk
        disk.close()

    def check(self, path: Path) -> None:
        """The driver finds nothing wrong with the image."""
        if not self.can_check:
            return
        disk = self.open(path, writable=False)
        report = format_of(disk.node).check("none")
        disk.close()
        assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0), report.messages

    # -- opening ---------------------------------------------------------------------------------

    def test_a_new_image_is_recognised_and_reads_as_zeros(self, path: Path) -> None:
        head = path.read_bytes()[:2048]
        assert probe_head(head, str(path)).name == self.format_name
        disk = self.open(path, writable=False)
        assert disk.size == SIZE and disk.pread(0, SIZE) == bytes(SIZE)
        assert all(row.zero for row in disk.extents()) or not self.sparse
        disk.close()
        self.check(path)

    def test_an_image_opened_for_reading_is_not_changed(self, path: Path) -> None:
        before = path.read_bytes()
        disk = self.open(path, writable=False)
        with pytest.raises(OSError, match="read-only"):
            disk.pwrite(0, b"x")
        with pytest.raises(OSError, match="read-only"):
            disk.trim(0, 512)
        disk.flush()
        disk.close()
        assert path.read_bytes() == before

    def test_an_unknown_option_is_refused_by_name(self, path: Path) -> None:
        with pytest.raises(DiskwrightError, match="no-such-option"):
            self.open(path, **{"no-such-option": "1"})

    @pytest.mark.parametrize("length", [0, 1, 3, 16, 64, 511, 512, 1024])
    def test_a_cut_off_image_is_refused_or_read_with_zeros(self, path: Path, length: int) -> None:
        os.truncate(path, length)
        try:
            disk = self.open(path, writable=False)
        except DiskwrightError as error:
            assert str(path) in str(error) or "image" in str(error)
        else:
            assert not any(disk.pread(0, disk.size))
            disk.close()

    def test_probe_says_no_to_noise(self) -> None:
        rng = random.Random(1)
        for length in (0, 1, 4, 64, 512, 2048):
            assert 0 <= self.driver().probe(rng.randbytes(length), "noise") <= 1

    # -- reading and writing ---------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("offset", "length"),
        [
            (0, 1),
            (0, 512),
            (1, 1),
            (511, 2),
            (4096, 4096),
            (65535, 2),
            (65536, 65536),
            (1000, 200_000),
            (0, SIZE),
            (SIZE - 1, 1),
        ],
    )
    def test_what_is_written_is_read_and_the_rest_stays(self, path: Path, offset: int, length: int) -> None:
        data = random.Random(offset).randbytes(length)
        disk = self.open(path)
        disk.pwrite(offset, data)
        expected = bytes(offset) + data + bytes(SIZE - offset - length)
        assert disk.pread(0, SIZE) == expected
        disk.close()
        again = self.open(path, writable=False)
        assert again.pread(0, SIZE) == expected
        again.close()
        self.check(path)

    def test_many_segments_in_one_call(self, disk: Disk) -> None:
        rng = random.Random(3)
        slots = rng.sample(range(SIZE // 512), 300)
        blocks = {slot: rng.randbytes(512) for slot in slots}
        with disk.request():
            disk.writev([(slot * 512, memoryview(blocks[slot])) for slot in slots])
            buffers = {slot: bytearray(512) for slot in sorted(slots)}
            disk.readv([(slot * 512, memoryview(buffer)) for slot, buffer in buffers.items()])
        assert buffers == blocks

    def test_of_overlapping_segments_in_one_call_the_later_wins(self, disk: Disk) -> None:
        disk.pwrite(65536, b"o" * 4096)
        with disk.request():
            disk.writev(
                [
                    (65536, memoryview(b"a" * 1024)),
                    (65024, memoryview(b"b" * 1024)),
                    (65536, memoryview(b"c" * 16)),
                    (200_000, memoryview(b"d" * 5000)),
                    (201_000, memoryview(b"e" * 10)),
                ]
            )
        assert disk.pread(65536, 1024) == b"c" * 16 + b"b" * 496 + b"a" * 512
        assert disk.pread(200_000, 5000) == b"d" * 1000 + b"e" * 10 + b"d" * 3990

    def test_nothing_beyond_the_end(self, disk: Disk) -> None:
        with pytest.raises(ValueError, match="beyond the end"):
            disk.pwrite(SIZE - 1, b"xy")
        assert disk.pread(0, SIZE) == bytes(SIZE)

    @pytest.mark.parametrize("unmap", [False, True])
    @pytest.mark.parametrize(
        ("offset", "length"), [(0, SIZE), (65536, 65536), (1000, 100_000), (70_000, 10), (SIZE - 513, 513)]
    )
    def test_zeros(self, path: Path, offset: int, length: int, unmap: bool) -> None:
        data = random.Random(5).randbytes(SIZE)
        disk = self.open(path)
        disk.pwrite(0, data)
        disk.zero(offset, length, unmap=unmap)
        expected = data[:offset] + bytes(length) + data[offset + length :]
        assert disk.pread(0, SIZE) == expected
        disk.close()
        again = self.open(path)
        assert again.pread(0, SIZE) == expected
        again.pwrite(offset, b"new")
        assert again.pread(offset, min(length, 5)) == (b"new" + bytes(2))[: min(length, 5)]
        again.close()
        self.check(path)

    def test_a_discard_touches_nothing_outside_its_range(self, path: Path) -> None:
        data = random.Random(6).randbytes(SIZE)
        disk = self.open(path)
        disk.pwrite(0, data)
        disk.trim(100_000, 300_000)
        found = disk.pread(0, SIZE)
        disk.close()
        assert found[:100_000] == data[:100_000] and found[400_000:] == data[400_000:]
        # Inside, each byte is what it was or zero: never something else's.
        assert all(now in (0, old) for now, old in zip(found[100_000:400_000], data[100_000:400_000], strict=True))
        again = self.open(path, writable=False)
        assert again.pread(0, SIZE) == found
        again.close()
        self.check(path)

    def test_writing_again_after_a_discard(self, path: Path) -> None:
        disk = self.open(path)
        for turn in range(8):
            disk.pwrite(0, bytes([turn + 1]) * SIZE)
            disk.trim(0, SIZE)
            disk.flush()
        disk.pwrite(0, b"z" * SIZE)
        assert disk.pread(0, SIZE) == b"z" * SIZE
        allowed = self.header_room + 3 * SIZE + 8 * disk.node.cluster_size
        disk.close()
        self.check(path)
        assert path.stat().st_size <= allowed, "freed space is not used again"

    # -- the map ---------------------------------------------------------------------------------

    def scatter(self, disk: Disk) -> None:
        rng = random.Random(7)
        for _ in range(40):
            offset = rng.randrange(SIZE - 9000)
            action = rng.randrange(4)
            if action < 2:
                disk.pwrite(offset, rng.randbytes(rng.randrange(1, 9000)))
            elif action == 2:
                disk.zero(offset, rng.randrange(1, min(300_000, SIZE - offset)))
            else:
                disk.trim(offset, rng.randrange(1, min(300_000, SIZE - offset)))

    def test_both_ways_of_asking_the_map_agree(self, disk: Disk) -> None:
        self.scatter(disk)
        form = format_of(disk.node)
        rng = random.Random(8)
        for _ in range(100):
            offset = rng.randrange(SIZE)
            length = rng.randrange(1, SIZE - offset + 1)
            single = Extents.of(runs_of(form.extent_at, offset, length)).merge()
            assert form.extents(offset, length).merge() == single

    def test_the_map_is_whole_and_true(self, disk: Disk) -> None:
        self.scatter(disk)
        form = format_of(disk.node)
        at = 0
        for run in form.extents(0, SIZE):
            assert run.offset == at and run.length > 0 and run.kind in (DATA, ZERO, UNALLOCATED, SPECIAL)
            at = run.end
            if run.kind == DATA:
                stored = form.children[run.child].pread(run.file_offset, run.length)
                assert (stored == disk.pread(run.offset, run.length)) is not self.encrypted
            elif run.kind in (ZERO, UNALLOCATED):
                assert not any(disk.pread(run.offset, run.length))
        assert at == SIZE

    def test_in_place_is_where_the_map_says(self, disk: Disk) -> None:
        self.scatter(disk)
        form = format_of(disk.node)
        for offset in range(0, SIZE, 4096):
            place = form.in_place(offset, 4096)
            if place >= 0:
                run = form.extent_at(offset, 4096)
                assert (run.kind, run.child) == (DATA, form.data_child) or form.linear is not None
                assert run.file_offset == place

    def test_a_place_holds_the_bytes(self, disk: Disk) -> None:
        self.scatter(disk)
        disk.flush()
        for offset in range(0, SIZE, 10_000):
            with disk.request():
                place = disk.place(offset, min(5000, SIZE - offset))
            if place is not None:
                assert 0 < place.length <= 5000
                assert os.pread(place.fd, place.length, place.offset) == disk.pread(offset, place.length)

    def test_kernel_copies_land(self, path: Path, tmp_path: Path) -> None:
        from diskwright.core.driver import FilePlace

        data = random.Random(9).randbytes(300_000)
        (tmp_path / "source").write_bytes(data)
        disk = self.open(path)
        disk.pwrite(150_000, b"old" * 1000)
        fd = os.open(tmp_path / "source", os.O_RDONLY)
        try:
            with disk.request():
                disk.node.copy_from(100_000, FilePlace(fd, 0, len(data)))
        except OSError as error:
            pytest.skip(f"this file system does not copy in the kernel: {error}")
        finally:
            os.close(fd)
        expected = bytes(100_000) + data + bytes(SIZE - 400_000)
        assert disk.pread(0, SIZE) == expected
        disk.close()
        self.check(path)

    # -- sizes -----------------------------------------------------------------------------------

    def test_growing(self, path: Path) -> None:
        if not self.can_grow:
            pytest.skip("the format cannot grow")
        disk = self.open(path)
        disk.pwrite(SIZE - 512, b"x" * 512)
        with disk.drained():
            disk.node.resize(3 * SIZE)
        assert disk.size == 3 * SIZE
        assert disk.pread(SIZE - 512, 1024) == b"x" * 512 + bytes(512)
        disk.pwrite(3 * SIZE - 5, b"y" * 5)
        disk.close()
        again = self.open(path, writable=False)
        assert again.size == 3 * SIZE and again.pread(SIZE, 2 * SIZE) == bytes(2 * SIZE - 5) + b"y" * 5
        again.close()
        self.check(path)

    @pytest.mark.parametrize("size", [512, 65536, 65536 + 512, 5 << 20])
    def test_sizes_that_fit_no_cluster(self, tmp_path: Path, size: int) -> None:
        path = self.make(tmp_path / "odd", size)
        disk = self.open(path)
        assert disk.size == size
        data = random.Random(size).randbytes(size)
        disk.pwrite(0, data)
        disk.close()
        again = self.open(path, writable=False)
        assert again.pread(0, size + 10) == data
        again.close()
        self.check(path)

    # -- backing ---------------------------------------------------------------------------------

    def test_unallocated_ranges_come_from_the_backing_image(self, tmp_path: Path) -> None:
        if not self.has_backing:
            pytest.skip("the format has no backing files")
        base = random.Random(10).randbytes(SIZE // 2)
        (tmp_path / "base.raw").write_bytes(base)
        path = self.make(tmp_path / "top", SIZE, **{"backing-file": "base.raw", "backing-fmt": "raw"})
        disk = self.open(path)
        expected = bytearray(base + bytes(SIZE // 2))
        assert disk.pread(0, SIZE) == expected
        for offset, length in ((1000, 10), (65536, 65536), (SIZE // 2 - 5, 10), (SIZE - 7, 7), (300_000, 5000)):
            data = random.Random(offset).randbytes(length)
            disk.pwrite(offset, data)
            expected[offset : offset + length] = data
        assert disk.pread(0, SIZE) == expected
        disk.zero(200_000, 50_000)
        expected[200_000:250_000] = bytes(50_000)
        assert disk.pread(0, SIZE) == expected
        disk.close()
        again = self.open(path, writable=False)
        assert again.pread(0, SIZE) == expected
        again.close()
        assert (tmp_path / "base.raw").read_bytes() == base
        self.check(path)

    def test_growing_does_not_uncover_a_longer_backing_image(self, tmp_path: Path) -> None:
        if not self.has_backing:
            pytest.skip("the format has no backing files")
        (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
        half = SIZE // 2 - 512
        path = self.make(tmp_path / "top", half, **{"backing-file": "base.raw", "backing-fmt": "raw"})
        disk = self.open(path)
        with disk.drained():
            disk.node.resize(2 * SIZE)
        assert disk.pread(0, 2 * SIZE) == b"b" * half + bytes(2 * SIZE - half)
        disk.close()
        again = self.open(path, writable=False)
        assert again.pread(0, 2 * SIZE) == b"b" * half + bytes(2 * SIZE - half)
        again.close()
        self.check(path)

    # -- all of it at once -----------------------------------------------------------------------

    def test_threads_in_parallel(self, path: Path) -> None:
        disk = self.open(path)
        lane_size = SIZE // 8 - 37  # lanes share clusters at their borders
        final: dict[int, bytes] = {}
        errors: list[BaseException] = []

        def work(lane: int) -> None:
            try:
                rng = random.Random(lane)
                model = bytearray(lane_size)
                base = lane * lane_size
                for _ in range(120):
                    offset = rng.randrange(lane_size - 1)
                    length = min(rng.choice((1, 512, 4096, 30_000)), lane_size - offset)
                    action = rng.randrange(5)
                    if action < 3:
                        data = rng.randbytes(length)
                        disk.pwrite(base + offset, data)
                        model[offset : offset + length] = data
                    elif action == 3:
                        disk.zero(base + offset, length)
                        model[offset : offset + length] = bytes(length)
                    elif rng.randrange(4) == 0:
                        disk.flush()
                    assert disk.pread(base + offset, length) == model[offset : offset + length]
                final[lane] = bytes(model)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(lane,)) for lane in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        for lane, model in final.items():
            assert disk.pread(lane * lane_size, lane_size) == model
        disk.close()
        self.check(path)

    def test_a_failing_file_fails_requests_and_damages_nothing(self, path: Path) -> None:
        import errno

        disk = self.open(path)
        disk.pwrite(0, b"k" * 100_000)
        disk.flush()
        files = [(child, child._writev) for child in format_of(disk.node).children]

        def broken(segments: object) -> None:
            raise OSError(errno.ENOSPC, "made to fail")

        for file, _ in files:
            file._writev = broken  # type: ignore[method-assign]
        with pytest.raises(OSError, match="made to fail"):
            disk.pwrite(500_000, b"x" * 100_000)
        for file, genuine in files:
            file._writev = genuine  # type: ignore[method-assign]
        disk.pwrite(700_000, b"y" * 1000)
        assert disk.pread(0, 100_000) == b"k" * 100_000
        disk.close()
        again = self.open(path, writable=False)
        assert again.pread(0, 100_000) == b"k" * 100_000 and again.pread(700_000, 1000) == b"y" * 1000
        again.close()
        if self.can_check:
            disk = self.open(path, writable=False)
            assert format_of(disk.node).check("none").corruptions == 0
            disk.close()

    def test_random_operations_match_a_bytearray(self, tmp_path: Path) -> None:
        step = st.tuples(
            st.sampled_from(["write", "write", "write", "zero", "unmap", "discard", "flush", "reopen"]),
            st.integers(0, SIZE - 1),
            st.sampled_from([1, 511, 512, 4096, 65536, 70_000, 200_000]),
        )
        suite = self

        @settings(
            max_examples=self.model_examples, deadline=None, suppress_health_check=list(HealthCheck), database=None
        )
        @given(st.lists(step, min_size=1, max_size=25), st.integers(0, 1 << 30))
        def run(steps: list[tuple[str, int, int]], seed: int) -> None:
            rng = random.Random(seed)
            path = suite.make(tmp_path / "model")
            disk, model = suite.open(path), bytearray(SIZE)
            for action, offset, length in steps:
                length = min(length, SIZE - offset)
                if action == "write":
                    data = rng.randbytes(length)
                    disk.pwrite(offset, data)
                    model[offset : offset + length] = data
                elif action in ("zero", "unmap"):
                    disk.zero(offset, length, unmap=action == "unmap")
                    model[offset : offset + length] = bytes(length)
                elif action == "discard":
                    disk.trim(offset, length)
                    model[offset : offset + length] = disk.pread(offset, length)
                elif action == "flush":
                    disk.flush()
                else:
                    disk.close()
                    disk = suite.open(path)
            assert disk.pread(0, SIZE) == model
            disk.close()
            suite.check(path)

        run()

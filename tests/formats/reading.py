"""What every format that can only be read has to show: that what it reads is what is there, however it is asked and
whoever else reads it, and that damaged images end in an answer or an error of ours.

Subclass ``Reading`` as ``Test...``, set the class attributes and write ``image``.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import pytest

import diskwright
from diskwright.core.driver import runs_of
from diskwright.extents import Extents
from tests.cli.run import diskwright as ours
from tests.cli.run import qemu_img
from tests.formats.campaign import Campaign

SECTOR = 512


class Reading(Campaign):
    """``image`` and ``disk`` say what is tested."""

    qemu_reads: ClassVar[bool] = True
    """Whether qemu-img as it is usually built reads the image."""

    qemu_says_more: ClassVar[bool] = False
    """Whether qemu-img warns of parts of its own that are not installed."""

    checked_here: ClassVar[bool] = False
    """Whether such images are checked here, and by qemu-img they are not."""

    # What needs writing.
    test_both_read_what_the_other_wrote = None  # type: ignore[assignment]
    test_a_crash_costs_nothing_that_was_flushed = None  # type: ignore[assignment]

    @abstractmethod
    def disk(self) -> bytes:
        """The guest's bytes."""

    @abstractmethod
    def image(self) -> bytes:
        """The image."""

    def filled(self) -> bytes:
        return self.image()

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / f"image.{self.format_name}"
        path.write_bytes(self.image())
        return path

    def test_it_is_recognized(self, path: Path) -> None:
        assert f"file format: {self.format_name}\n" in ours("info", path.name, cwd=path.parent).out

    def test_every_way_of_reading(self, path: Path) -> None:
        expected, chance = self.disk(), random.Random(1)
        with diskwright.open(str(path), format=self.format_name) as disk:
            assert disk.size == len(expected)
            assert disk.pread(0, len(expected)) == expected
            for _ in range(150):
                offset = chance.randrange(len(expected))
                length = min(len(expected) - offset, chance.choice([1, 511, 4096, 70000, 300000]))
                assert disk.pread(offset, length) == expected[offset : offset + length]

    def test_one_run_and_all_runs_agree(self, path: Path) -> None:
        expected, chance = self.disk(), random.Random(2)
        with diskwright.open(str(path), format=self.format_name) as disk:
            form = disk.node.format  # type: ignore[attr-defined]
            for _ in range(30):
                offset = chance.randrange(len(expected) // SECTOR) * SECTOR
                length = chance.randrange(1, len(expected) - offset + 1)
                one = Extents.of(runs_of(form.extent_at, offset, length)).merge()
                assert one == form.extents(offset, length)

    def test_like_qemu(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "raw").write_bytes(self.disk())
        assert ours("convert", "-O", "raw", path.name, "copy", cwd=tmp_path).code == 0
        assert (tmp_path / "copy").read_bytes() == self.disk()
        if self.qemu_reads:
            for words in (["info", path.name], ["check", path.name], ["resize", path.name, "64M"]):
                if self.checked_here and words[0] == "check":
                    continue
                here, there = ours(*words, cwd=tmp_path), qemu_img(*words, cwd=tmp_path)
                assert (here.code, here.out) == (there.code, there.out)
                assert here.err == there.err or (self.qemu_says_more and there.err.endswith(here.err))
            words = ["compare", "-f", self.format_name, "-F", "raw", path.name, "raw"]
            assert qemu_img(*words, cwd=tmp_path).code == 0

    def test_it_is_not_written_to(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(diskwright.DiskwrightError, match="Image is read-only"):
            diskwright.open(str(path), format=self.format_name, writable=True)

    def test_a_file_cut_short_is_an_error(self, path: Path, tmp_path: Path) -> None:
        data = path.read_bytes()
        for length in (0, 1, 100, 511, len(data) // 2):
            (tmp_path / "cut").write_bytes(data[:length])
            done = ours("convert", "-f", self.format_name, "-O", "raw", "cut", "copy", cwd=tmp_path)
            assert done.code == 1 and done.err.count("\n") == 1, (length, done.err)

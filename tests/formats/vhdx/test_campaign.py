"""VHDX in the campaign: both ways with QEMU, crashes, damage."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from typing import Any

from diskwright.core.driver import CheckReport
from diskwright.formats.vhdx.header import with_checksum
from tests.crash.recording import RecordedFile
from tests.formats.campaign import Campaign

MiB = 1 << 20
SEALED = ((64 << 10, 4096), (128 << 10, 4096), (192 << 10, 65536), (256 << 10, 65536))
"""What has a checksum."""


def sealed(data: bytearray) -> bytes:
    """With the checksums put right."""
    for at, length in SEALED:
        data[at : at + length] = with_checksum(bytes(data[at : at + length]))
    return bytes(data)


class TestSmallBlocks(Campaign):
    format_name = "vhdx"
    create_options = {"block-size": MiB}
    qemu_options = "block_size=1M"
    structures = (
        (0, 8), (64 << 10, 80), (128 << 10, 80), (192 << 10, 80), (256 << 10, 80), (MiB, 128), (2 * MiB, 64),
        (3 * MiB, 192), (3 * MiB + (64 << 10), 40),
    )  # fmt: skip

    def opener(self, files: Mapping[str, RecordedFile], writable: bool) -> Any:
        """A check of an image whose log has been left behind says so; that is no damage of a crash's."""
        image = super().opener(files, writable)
        check = image.format.check

        def judged(repair: str) -> CheckReport:
            report = check(repair)
            if "ERROR the log has not been replayed" in report.messages:
                report.corruptions -= 1
            return report

        image.format.check = judged
        return image

    def damaged(self, sound: bytes, chance: random.Random) -> bytes:
        data = bytearray(super().damaged(sound, chance))
        return sealed(data) if chance.random() < 0.8 and len(data) > MiB else bytes(data)


class TestLargeBlocks(TestSmallBlocks):
    test_damage_ends_in_an_answer_or_an_error = None
    create_options = {"block-size": 2 * MiB, "log-size": 3 * MiB}
    qemu_options = "block_size=2M,log_size=3M"


class TestUndefinedBlocks(TestSmallBlocks):
    test_damage_ends_in_an_answer_or_an_error = None
    create_options = {"block-size": MiB, "block-state-zero": False}
    qemu_options = "block_size=1M,block_state_zero=off"


class TestGrowing(TestSmallBlocks):
    crash_actions = "wwwwwwwwzzdfffg"
    crash_size = 2 * MiB
    test_both_read_what_the_other_wrote = None
    test_damage_ends_in_an_answer_or_an_error = None


class TestFixed(TestSmallBlocks):
    create_options = {"block-size": MiB, "subformat": "fixed"}
    qemu_options = "block_size=1M,subformat=fixed"


class TestLargeSectors(TestSmallBlocks):
    create_options = {"block-size": MiB, "logical-sector-size": 4096, "physical-sector-size": 4096}
    qemu_options = None
    test_both_read_what_the_other_wrote = None  # QEMU has no such disks; see test_others.py


def test_checksums_are_put_right() -> None:
    data = bytearray(MiB)
    struct.pack_into("<4s", data, 64 << 10, b"head")
    assert sealed(data)[(64 << 10) + 4 :][:4] != bytes(4)

"""The main job with a real guest: it writes and fsyncs, its disk is mirrored, and what it was promised is there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.interop.guest.hostcheck import check_image
from tests.interop.guest.runner import Guest
from tests.own import Diskwright
from tests.peers import qemu_img

pytestmark = [pytest.mark.guest, pytest.mark.slow]

DISK = 96 << 20


def make(path: Path, format_name: str) -> str:
    qemu_img.create(str(path), DISK, format_name)
    return str(path)


def as_raw(image: str, format_name: str) -> str:
    """The image in raw, converted by a program that is not ours."""
    if format_name == "raw":
        return image
    qemu_img.qemu_img("check", "-f", format_name, image)
    qemu_img.qemu_img("convert", "-f", format_name, "-O", "raw", image, image + ".raw")
    return image + ".raw"


@pytest.mark.parametrize(("source_format", "target_format"), [("raw", "qcow2"), ("qcow2", "raw")])
def test_a_mirror_finished_under_load_has_all_that_was_fsynced(
    tmp_path: Path, sock_dir: str, source_format: str, target_format: str
) -> None:
    source, target, socket = make(tmp_path / "source", source_format), str(tmp_path / "target"), f"{sock_dir}/nbd"
    arguments = ("-f", source_format, "-O", target_format, "--serve", socket, "--keep-serving", "--progress=json")
    # Slow enough that the guest writes through both phases.
    with Diskwright("mirror", *arguments, "--speed", "8M", source, target) as mirror:
        mirror.wait_line("Serving")
        with Guest(socket, slots=1024, seed=21) as guest:
            mirror.wait_event("BLOCK_JOB_READY")
            guest.wait_acked(300)
            before_finish = guest.acked()
            mirror.signal()
            mirror.wait_line("Finished")
            assert before_finish > 0
            guest.wait_acked(100)  # the guest goes on upon the source
            last = guest.stop()
        mirror.signal()
        assert mirror.end() == 0
    assert not check_image(as_raw(target, target_format), acked=before_finish)
    assert not check_image(as_raw(source, source_format), acked=last)


@pytest.mark.parametrize(("source_format", "target_format"), [("raw", "qcow2"), ("qcow2", "raw")])
def test_a_guest_goes_on_upon_the_target_after_a_pivot(
    tmp_path: Path, sock_dir: str, source_format: str, target_format: str
) -> None:
    source, target, socket = make(tmp_path / "source", source_format), str(tmp_path / "target"), f"{sock_dir}/nbd"
    arguments = ("-f", source_format, "-O", target_format, "--serve", socket, "--pivot", "--progress=json")
    with Diskwright("mirror", *arguments, source, target) as mirror:
        mirror.wait_line("Serving")
        with Guest(socket, slots=1024, seed=22) as guest:
            guest.wait_acked(100)
            mirror.wait_event("BLOCK_JOB_READY")
            mirror.signal()
            mirror.wait_line("Serving from the target")
            unchanged = os.stat(source).st_mtime_ns
            pivot = time.monotonic()
            guest.wait_acked(500)
            assert guest.acked(pivot) < guest.acked()
            last = guest.stop()  # raises when the guest met an error or read back anything wrong
        assert os.stat(source).st_mtime_ns == unchanged
        mirror.signal()
        assert mirror.end() == 0
    assert not check_image(as_raw(target, target_format), acked=last)

"""The guest and its judges, against servers that are not ours: a right disk passes, a damaged one does not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.interop.guest import records
from tests.interop.guest.hostcheck import check_image
from tests.interop.guest.runner import Guest, GuestError
from tests.peers import find, nbdkit, qemu_img, qemu_nbd
from tests.peers.process import run

pytestmark = [pytest.mark.guest, pytest.mark.slow]

MIB = 1 << 20
SLOTS = 512
DISK = 64 * MIB


@dataclass
class Killed:
    """The image of a guest whose plug was pulled, and what it had acknowledged."""

    image: str
    acked: int


def sparse(path: Path, size: int = DISK) -> str:
    path.touch()
    os.truncate(path, size)
    return str(path)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    """An ext4 disk served by nbdkit, left by a guest that died while writing."""
    folder = tmp_path_factory.mktemp("killed")
    image = sparse(folder / "disk.raw")
    with nbdkit.serve("file", image) as server, Guest(server.socket, slots=SLOTS, seed=11) as guest:
        guest.wait_for("ready next=1")
        guest.wait_acked(1500)
        guest.kill()
        acked = guest.acked()
    yield Killed(image, acked)
    shutil.rmtree(folder)


@pytest.fixture
def copy(killed: Killed, tmp_path: Path) -> str:
    """A copy of that image, to be damaged."""
    path = str(tmp_path / "copy.raw")
    run("cp", "--sparse=always", killed.image, path)
    return path


def debugfs(image: str, *requests: str) -> None:
    """Writes to a file system from outside, once its journal has been replayed."""
    for request in ("journal_run", *requests):
        done = run("debugfs", "-w", "-R", request, image)
        assert "Command not found" not in done.stderr


def test_a_guest_writes_checks_and_powers_off(tmp_path: Path) -> None:
    image = qemu_img.create(str(tmp_path / "disk.qcow2"), DISK)
    with qemu_nbd.serve(image, "qcow2") as server, Guest(server.uri, slots=SLOTS, seed=2) as guest:
        disk = guest.wait_for(r"disk bytes=(\d+) .*cache=(\S+) discard=(\d+)")
        assert int(disk[1]) == DISK and disk[2] == "write-back" and int(disk[3]) > 0
        guest.wait_acked(500)
        before = time.monotonic()
        assert guest.acked(before) <= guest.wait_acked(100)
        guest.wait_for("verified .*problems=0", since=guest.command("check"))
        guest.wait_for("trimmed bytes=[1-9]", since=guest.command("trim"))
        guest.wait_for("paused", since=guest.command("pause"))
        paused = guest.acked()
        time.sleep(0.3)
        assert guest.acked() == paused
        guest.wait_for("going", since=guest.command("go"))
        guest.wait_acked(100)
        acked = guest.stop()
        assert acked >= 700 and guest.slowest() > 0 and not guest.running
        guest.wait_for("fsck status=0")
    qemu_img.assert_clean(image)
    raw = qemu_img.convert(image, str(tmp_path / "disk.raw"), "raw")
    assert check_image(raw, acked=acked) == []


def test_a_killed_guest_leaves_all_that_it_acknowledged(killed: Killed) -> None:
    assert killed.acked >= 1500
    with open(killed.image, "rb") as file:
        before = os.fstat(file.fileno()).st_mtime_ns
    assert check_image(killed.image, acked=killed.acked) == []
    assert os.stat(killed.image).st_mtime_ns == before


def test_the_next_guest_finds_them_and_goes_on(killed: Killed, copy: str) -> None:
    with Guest(copy, acked=killed.acked, seed=99) as guest:  # its seed gives way to that of the records
        first = int(guest.wait_for(r"ready next=(\d+)")[1])
        assert first >= killed.acked - 16
        guest.wait_acked(200)
        acked = guest.stop()
    assert acked > killed.acked
    assert check_image(copy, acked=acked) == []
    with Guest(copy, action="verify", acked=acked) as guest:
        guest.finish()


def test_a_missing_acknowledged_record_is_seen(killed: Killed, copy: str, tmp_path: Path) -> None:
    """The file system is in order; one record in it is an older one."""
    assert check_image(copy, acked=killed.acked + 16 * 40)  # records that never were
    path = str(tmp_path / "records")
    debugfs(copy, f"dump /records {path}")
    with open(path, "r+b") as file:
        plan = records.Plan.parse(file.read(512))
        assert plan is not None
        latest = plan.latest(killed.acked)
        lost = killed.acked // 2
        lost = next(number for number in range(lost, 0, -1) if latest[plan.slot(number)] == number)
        older = plan.latest(lost - 1)[plan.slot(lost)]
        file.seek(plan.offset(plan.slot(lost)))
        file.write(plan.record(older) if older else bytes(plan.block))
    debugfs(copy, "rm /records", f"write {path} /records")
    problems = check_image(copy)
    assert len(problems) == 1 and f"record {lost} was written and flushed" in problems[0]
    with Guest(copy, action="verify") as guest, pytest.raises(GuestError, match="result 1"):
        guest.finish()


def test_a_damaged_record_is_seen(killed: Killed, copy: str) -> None:
    """One byte of one record, found by its header in the image."""
    with open(copy, "r+b") as file:
        data = file.read()
        at = data.rindex(records.RECORD_MAGIC) // 4096 * 4096 + 1000
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    problems = check_image(copy, acked=killed.acked)
    assert problems and "checksum" in problems[0]


def test_a_damaged_file_system_is_seen(killed: Killed, copy: str) -> None:
    """An inode and a bitmap that the journal does not restore."""
    other = str(copy) + ".bitmap"
    shutil.copyfile(copy, other)
    debugfs(copy, "set_inode_field /records block[0] 0")
    assert check_image(copy, acked=killed.acked)
    debugfs(other, "freeb 40 200")
    problems = check_image(other, acked=killed.acked)
    assert problems and "e2fsck" in problems[0]


def test_a_damaged_journal_is_seen(killed: Killed, copy: str) -> None:
    """A committed transaction in the middle of the journal can't be read: what came after it is lost."""
    blocks = [int(word) for word in run("debugfs", "-R", "blocks <8>", copy).stdout.split()]
    with open(copy, "r+b") as file:
        for block in blocks[1:]:  # the first is the journal's superblock
            file.seek(block * 4096)
            if file.read(8) == bytes.fromhex("c03b3998 00000001"):  # a descriptor block
                file.seek(block * 4096 + 100)
                file.write(b"damage")
    problems = check_image(copy, acked=killed.acked)
    assert problems


def test_lost_metadata_and_lost_disks_are_seen(killed: Killed, copy: str, tmp_path: Path) -> None:
    with open(copy, "r+b") as file:
        file.write(bytes(MIB))
    assert check_image(copy, acked=killed.acked)
    assert check_image(sparse(tmp_path / "empty.raw"), acked=killed.acked)


def test_churn_files_are_judged_too(killed: Killed, copy: str) -> None:
    newest = killed.acked // 16 // 4
    debugfs(copy, f"rm /churn/{newest:08d}")
    problems = check_image(copy, acked=killed.acked)
    assert len(problems) == 1 and f"{newest:08d} is missing" in problems[0]


def test_raw_mode_shows_the_disk_at_one_moment(tmp_path: Path) -> None:
    image = sparse(tmp_path / "disk.raw", 8 * MIB)
    with nbdkit.serve("file", image) as server, Guest(server.socket, mode="raw", slots=SLOTS) as guest:
        guest.wait_acked(1000)
        guest.kill()
        acked = guest.acked()
    assert check_image(image, mode="raw", acked=acked) == []
    report = records.verify_file(image, ordered=True)
    assert report.newest >= acked
    with open(image, "r+b") as file:  # an older state of one block among newer ones
        plan = records.Plan.parse(file.read(512))
        assert plan is not None
        file.seek(plan.offset(plan.slot(report.newest)))
        file.write(plan.record(plan.latest(report.newest - 1)[plan.slot(report.newest)] or report.newest))
        lost = plan.latest(report.newest)
        victim = max(number for number in lost if number < report.newest - 1)
        older = plan.latest(victim - 1)[plan.slot(victim)]
        file.seek(plan.offset(plan.slot(victim)))
        file.write(plan.record(older) if older else bytes(plan.block))
    problems = check_image(image, mode="raw")
    assert problems and "was written and flushed" in problems[0]


def test_a_disk_that_forgets_a_write_is_caught_by_the_guest(tmp_path: Path) -> None:
    """nbdkit's plugin as a shell script: it says yes to each write, and from the 200th on keeps none."""
    image = sparse(tmp_path / "disk.raw", 4 * MIB)
    count = tmp_path / "count"
    count.write_text("0")
    script = tmp_path / "plugin.sh"
    script.write_text(
        f"""#!/bin/sh
case $1 in
get_size) echo 4M;;
pread) dd if={image} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none;;
can_write|can_flush) ;;
flush) ;;
pwrite) n=$(cat {count}); echo $((n + 1)) > {count}
    if [ $n -lt 200 ]; then dd of={image} seek=$4 oflag=seek_bytes conv=notrunc status=none; else cat > /dev/null; fi;;
*) exit 2;;
esac
"""
    )
    script.chmod(0o755)
    with nbdkit.serve("sh", str(script)) as server, Guest(server.socket, mode="raw", slots=64) as guest:
        guest.wait_acked(300)
        with pytest.raises(GuestError, match="result 1"):
            guest.stop()
        guest.wait_for("damaged .*was written and flushed")


def test_a_disk_that_fails_is_reported(tmp_path: Path) -> None:
    arguments = ("--filter=error", "memory", "8M", "error-pwrite-rate=0.02", "error=EIO")
    with nbdkit.serve(*arguments) as server, Guest(server.socket, mode="raw", slots=SLOTS) as guest:
        with pytest.raises(GuestError, match="Input/output error"):
            guest.finish()
        guest.wait_for("error .*Input/output error")


def test_a_guest_outlives_its_server(tmp_path: Path, sock_dir: str) -> None:
    """With ``reconnect`` its requests wait for the next server on the same socket."""
    image, socket = sparse(tmp_path / "disk.raw", 8 * MIB), os.path.join(sock_dir, "s")
    command = [find("qemu-nbd"), "--persistent", "--format=raw", f"--socket={socket}", image]
    server = subprocess.Popen(command)
    try:
        _wait_for(socket)
        with Guest(socket, mode="raw", slots=SLOTS, reconnect=60) as guest:
            guest.wait_acked(200)
            server.send_signal(signal.SIGKILL)
            server.wait()
            os.unlink(socket)
            time.sleep(0.3)
            before = guest.acked()
            server = subprocess.Popen(command)
            _wait_for(socket)
            assert guest.wait_acked(200) > before
            acked = guest.stop()
    finally:
        server.kill()
        server.wait()
    assert check_image(image, mode="raw", acked=acked) == []


def _wait_for(path: str) -> None:
    end = time.monotonic() + 20
    while not os.path.exists(path):
        assert time.monotonic() < end, path
        time.sleep(0.01)

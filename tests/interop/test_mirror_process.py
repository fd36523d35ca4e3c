"""The mirror command as a user runs it: fio on the export, signals, verification, kills, full targets."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.own import Diskwright
from tests.peers import fio, qemu_img
from tests.peers.process import run

MIB = 1 << 20


def image(path: Path, size: int, format_name: str = "raw", seed: int = 5) -> str:
    """A disk of ``size`` bytes, two thirds of it with random contents."""
    rng = random.Random(seed)
    raw = path.with_suffix(".raw")
    with open(raw, "wb") as file:
        for start in range(0, size, MIB):
            if start // MIB % 3:
                file.seek(start)
                file.write(rng.randbytes(MIB))
        file.truncate(size)
    if format_name == "raw":
        return str(raw)
    qemu_img.qemu_img("convert", "-O", format_name, str(raw), str(path))
    return str(path)


def uri(socket: str) -> str:
    return f"nbd+unix:///?socket={socket}"


def digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize(("source_format", "target_format"), [("raw", "qcow2"), ("qcow2", "raw"), ("qcow2", "qcow2")])
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_fio_verifies_while_the_disk_is_mirrored(
    tmp_path: Path, sock_dir: str, source_format: str, target_format: str, copy_mode: str
) -> None:
    source, target, socket = image(tmp_path / "source", 64 * MIB, source_format), str(tmp_path / "t"), f"{sock_dir}/nbd"
    arguments = ["-f", source_format, "-O", target_format, "--serve", socket, "--progress=json"]
    with Diskwright("mirror", *arguments, "--copy-mode", copy_mode, source, target) as mirror:
        mirror.wait_line("Serving")
        fio.verify(uri(socket), size=8 * MIB, connections=4)
        mirror.wait_event("BLOCK_JOB_READY")
        fio.verify(uri(socket), size=4 * MIB, connections=4)
        mirror.signal()
        assert mirror.end() == 0, mirror.errors
    assert "identical" in qemu_img.qemu_img("compare", "-f", source_format, "-F", target_format, source, target).stdout
    if target_format == "qcow2":
        qemu_img.qemu_img("check", target)


def test_when_ready_with_verification_under_load(tmp_path: Path, sock_dir: str) -> None:
    source, target, socket = image(tmp_path / "source", 96 * MIB), str(tmp_path / "target"), f"{sock_dir}/nbd"
    arguments = ("-f", "raw", "-O", "qcow2", "--serve", socket, "--finish", "when-ready", "--verify", "--speed", "30M")
    with Diskwright("mirror", *arguments, source, target) as mirror:
        mirror.wait_line("Serving")
        load = threading.Thread(target=_write_until_gone, args=(socket,))
        load.start()
        assert mirror.end() == 0, mirror.errors
        load.join()
    assert any(line.startswith("Verified") for line in mirror.lines)
    assert not os.path.exists(socket)
    # And nothing the guest sent later has reached the source.
    assert "identical" in qemu_img.qemu_img("compare", "-f", "raw", "-F", "qcow2", source, target).stdout


def _write_until_gone(socket: str) -> None:
    """Writes through libnbd until the server closes."""
    script = (
        "import nbd, os, random, sys\n"
        "h = nbd.NBD(); h.connect_unix(sys.argv[1]); n = h.get_size() // 4096\n"
        "try:\n"
        "    while True: h.pwrite(os.urandom(4096), random.randrange(n) * 4096)\n"
        "except nbd.Error: pass\n"
    )
    subprocess.run(["/usr/bin/python3", "-c", script, socket], check=True, timeout=120)


def test_the_second_interrupt_abandons(tmp_path: Path, sock_dir: str) -> None:
    source, target = image(tmp_path / "source", 32 * MIB), str(tmp_path / "target")
    before = digest(source)
    arguments = ("-f", "raw", "--serve", f"{sock_dir}/nbd", "--speed", "1M", "--progress=json")
    with Diskwright("mirror", *arguments, source, target) as mirror:
        mirror.wait_line("Serving")
        mirror.signal()
        threading.Event().wait(0.3)
        mirror.signal()
        assert mirror.end() == 130
        assert mirror.errors[-1] == "diskwright: Abandoned: the target is not a copy of the source"
    assert digest(source) == before


def test_a_killed_mirror_leaves_the_source_intact(tmp_path: Path, sock_dir: str) -> None:
    """At many moments of both phases; the source is read by a program of others."""
    source = image(tmp_path / "source", 24 * MIB, "qcow2")
    expected = digest(str(tmp_path / "source.raw"))
    rng = random.Random(9)
    for turn in range(6):
        target = str(tmp_path / f"target{turn}")
        arguments = ("-f", "qcow2", "-O", "qcow2", "--serve", f"{sock_dir}/nbd", "--progress=json", "--speed", "40M")
        with Diskwright("mirror", *arguments, source, target) as mirror:
            mirror.wait_line("Serving")
            threading.Event().wait(rng.uniform(0, 1.2))
            mirror.kill()
        os.unlink(f"{sock_dir}/nbd")
        qemu_img.qemu_img("check", source)
        qemu_img.qemu_img("convert", "-O", "raw", source, str(tmp_path / "again"))
        assert digest(str(tmp_path / "again")) == expected


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid():
        pytest.skip("mounting needs root")
    run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder))
    yield folder
    run("umount", str(folder))


def test_a_full_target_ends_the_mirror_and_never_touches_the_guest(tmp_path: Path, sock_dir: str, small: Path) -> None:
    source, socket = image(tmp_path / "source", 64 * MIB), f"{sock_dir}/nbd"
    arguments = ("-f", "raw", "-O", "qcow2", "--serve", socket, "--progress=json", "--speed", "20M")
    with Diskwright("mirror", *arguments, source, str(small / "target")) as mirror:
        mirror.wait_line("Serving")
        assert mirror.end() == 1
    assert "No space left on device" in mirror.errors[-1] and "not a copy" in mirror.errors[-1]
    assert mirror.wait_event("BLOCK_JOB_ERROR")["action"] == "report"


def test_a_full_target_pauses_the_mirror_until_there_is_space(tmp_path: Path, sock_dir: str, small: Path) -> None:
    source, target, socket = image(tmp_path / "source", 64 * MIB), str(small / "target"), f"{sock_dir}/nbd"
    arguments = ["-f", "raw", "-O", "qcow2", "--serve", socket, "--progress=json", "--on-target-error", "enospc"]
    with Diskwright("mirror", *arguments, source, target) as mirror:
        mirror.wait_line("Serving")
        assert mirror.wait_event("BLOCK_JOB_ERROR")["action"] == "stop"
        fio.verify(uri(socket), size=2 * MIB, connections=4)  # the guest notices nothing
        run("mount", "-o", "remount,size=128m", str(small))
        mirror.signal(signal.SIGUSR2)
        mirror.wait_event("BLOCK_JOB_READY")
        mirror.signal()
        assert mirror.end() == 0, mirror.errors
    assert "identical" in qemu_img.qemu_img("compare", "-f", "raw", "-F", "qcow2", source, target).stdout


def test_without_a_place_given_the_socket_is_printed_and_goes_away(tmp_path: Path) -> None:
    source, target = image(tmp_path / "source", 4 * MIB), str(tmp_path / "target")
    with Diskwright("mirror", "-f", "raw", source, target) as mirror:
        line = mirror.wait_line("Serving")
        socket = line.rpartition("socket=")[2].split()[0]
        assert os.path.exists(socket)
        mirror.wait_line("Ready")
        mirror.signal()
        assert mirror.end() == 0, mirror.errors
    assert not os.path.exists(socket)
    assert digest(source) == digest(target)


def test_the_source_must_not_be_in_use(tmp_path: Path) -> None:
    from tests.peers import qemu_nbd

    source = image(tmp_path / "source", 4 * MIB)
    with qemu_nbd.serve(source, "raw"):
        done = subprocess.run(
            [sys.executable, "-m", "diskwright", "mirror", "-f", "raw", source, str(tmp_path / "target")],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1 and "lock" in done.stderr and done.stderr.count("\n") == 2
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_a_guessed_format_is_mirrored_and_pivoted_to_behind_the_guard(
    tmp_path: Path, sock_dir: str, copy_mode: str
) -> None:
    source, target, socket = image(tmp_path / "source", 8 * MIB), str(tmp_path / "target"), f"{sock_dir}/nbd"
    arguments = ("-O", "qcow2", "--serve", socket, "--copy-mode", copy_mode, "--finish", "when-ready", "--pivot")
    with Diskwright("mirror", *arguments, "--verify", source, target) as mirror:
        mirror.wait_line("Serving")
        assert _head_refused(socket)
        mirror.wait_line("Serving from the target")
        assert not _head_refused(socket)  # what the guest writes is not the file's beginning any more
        mirror.signal()
        assert mirror.end() == 0, mirror.errors
    qemu_img.assert_clean(target)
    assert qemu_img.qemu_io(target, "read -P 0x51 0 1").count("read 1/1")


def test_serve_guards_a_disk_whose_format_was_guessed(tmp_path: Path, sock_dir: str) -> None:
    socket = f"{sock_dir}/nbd"
    for stated, refused in ((), True), (("-f", "raw"), False):
        with Diskwright("serve", *stated, "--socket", socket, image(tmp_path / "source", MIB)) as server:
            server.wait_line("Serving")
            assert _head_refused(socket) is refused
            server.signal()
            assert server.end() == 0, server.errors


def _head_refused(socket: str) -> bool:
    """Whether a guest is kept from making its disk look like a qcow2 image."""
    script = (
        "import nbd, sys\n"
        "h = nbd.NBD(); h.connect_unix(sys.argv[1])\n"
        "try: h.pwrite(b'QFI\\xfb\\0\\0\\0\\3' + bytes(504), 0)\n"
        "except nbd.Error as error: print(error.errno)\n"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script, socket], check=True, timeout=120, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout in ("", "EPERM\n")
    return bool(done.stdout)

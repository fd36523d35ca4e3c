"""Locks between processes: ours against QEMU's programs, both ways, and ours against ours."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diskwright.core.permissions import (
    ALL,
    FORCED,
    LIVE_READER,
    READ,
    READER,
    RESIZE,
    WRITE,
    WRITE_UNCHANGED,
    WRITER,
    Access,
)
from diskwright.errors import ImageLocked, OptionError
from diskwright.storage.posix.locks import ImageLocks
from tests.storage.conftest import Opener, create

IMAGE_WRITER = Access(READ | WRITE | RESIZE, READ | WRITE_UNCHANGED)
"""What a format that may grow takes of its file."""

needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-nbd") and shutil.which("qemu-io")), reason="no QEMU programs"
)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    if shutil.which("qemu-img"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "10M"], check=True)
    else:
        path.write_bytes(bytes(1 << 20))
    return path


def held_bytes(path: Path) -> set[int]:
    """The bytes of ``path`` that anybody has locked, as the kernel lists them."""
    inode = path.stat().st_ino
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if "OFDLCK" in fields and fields[-3].endswith(f":{inode}"):
            assert fields[-5] == "READ"
            found.update(range(int(fields[-2]), int(fields[-1]) + 1))
    return found


def qemu_img(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60)


def serve(start: Start, image: Path, *options: str) -> None:
    path = str(image.parent / "socket")
    start(lambda: greets(path), "qemu-nbd", "--persistent", "--socket", path, "-f", "qcow2", *options, str(image))


def greets(path: str) -> bool:
    """Whether an NBD server answers there: only then has it opened, and locked, its image."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        try:
            client.connect(path)
            return client.recv(8) == b"NBDMAGIC"
        except (FileNotFoundError, ConnectionRefusedError):
            return False


@pytest.mark.parametrize(
    ("access", "expected"),
    [
        (READER, {100, 201, 203}),
        (WRITER, {100, 101, 201, 203}),
        (IMAGE_WRITER, {100, 101, 103, 201, 203}),
        (LIVE_READER, {100}),
        (FORCED, set()),
        (Access(ALL, 0), {100, 101, 102, 103, 200, 201, 202, 203}),
    ],
)
def test_locks_the_bytes_that_stand_for_an_access(
    image: Path, opened: Opener, access: Access, expected: set[int]
) -> None:
    storage = opened(image)
    storage.set_access(Access(READ | WRITE_UNCHANGED, WRITE))  # something else first: it must all go
    storage.set_access(access)
    assert held_bytes(image) == expected
    storage.close()
    assert held_bytes(image) == set()


@needs_qemu
def test_locks_the_same_bytes_as_qemu(image: Path, running: Start, opened: Opener) -> None:
    serve(running, image)
    theirs = held_bytes(image)
    running_copy = image.with_name("other")
    shutil.copy(image, running_copy)
    opened(running_copy).set_access(IMAGE_WRITER)
    assert held_bytes(running_copy) == theirs != set()


@needs_qemu
def test_qemu_refuses_what_we_write(image: Path, opened: Opener) -> None:
    opened(image).set_access(IMAGE_WRITER)
    for arguments in (("info", image), ("check", image), ("resize", image, "20M")):
        done = qemu_img(*arguments)
        assert done.returncode == 1
        assert re.search(r'Failed to get (shared )?"write" lock', done.stderr)
    assert qemu_img("info", "-U", image).returncode == 0


@needs_qemu
def test_qemu_reads_but_does_not_write_what_we_read(image: Path, opened: Opener) -> None:
    storage = opened(image, writable=False)
    storage.set_access(READER)
    assert qemu_img("check", image).returncode == 0
    done = qemu_img("resize", image, "20M")
    assert done.returncode == 1 and 'Failed to get "write" lock' in done.stderr
    storage.set_access(LIVE_READER)
    assert qemu_img("resize", image, "20M").returncode == 0


@needs_qemu
def test_qemu_is_free_again_when_we_have_closed(image: Path, opened: Opener) -> None:
    storage = opened(image)
    storage.set_access(IMAGE_WRITER)
    storage.close()
    assert qemu_img("resize", image, "20M").returncode == 0


@needs_qemu
@pytest.mark.parametrize("access", [READER, WRITER, IMAGE_WRITER])
def test_we_refuse_what_qemu_writes_in_its_words(image: Path, running: Start, opened: Opener, access: Access) -> None:
    serve(running, image)
    storage = opened(image)
    with pytest.raises(ImageLocked) as caught:
        storage.set_access(access)
    theirs = qemu_img("info" if access is READER else "resize", image, *([] if access is READER else ["20M"])).stderr
    lock = re.search(r"Failed to get .* lock", theirs)
    assert lock is not None
    if access is READER:
        assert lock[0] in str(caught.value)
    assert f"Is another process using the image [{image}]?" in theirs
    assert f"Is another process using the image [{image}]?" in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_qemu
def test_a_refusal_leaves_no_lock_behind_and_keeps_earlier_ones(image: Path, running: Start, opened: Opener) -> None:
    storage = opened(image)
    storage.set_access(LIVE_READER)
    serve(running, image)
    before = held_bytes(image)
    with pytest.raises(ImageLocked):
        storage.set_access(IMAGE_WRITER)
    assert held_bytes(image) == before
    assert qemu_img("info", "-U", image).returncode == 0


def test_a_refusal_leaves_none_of_the_locks_it_took(image: Path, opened: Opener) -> None:
    opened(image).set_access(Access(WRITE, ALL))
    storage = opened(image)
    storage.set_access(Access(WRITE_UNCHANGED, ALL))
    with pytest.raises(ImageLocked, match='shared "write"'):
        storage.set_access(Access(READ | RESIZE, RESIZE))
    assert held_bytes(image) == {101, 102}


@needs_qemu
def test_we_read_what_qemu_reads_and_do_not_write_it(image: Path, running: Start, opened: Opener) -> None:
    serve(running, image, "--read-only")
    opened(image, writable=False).set_access(READER)
    with pytest.raises(ImageLocked, match='Failed to get "write" lock'):
        opened(image).set_access(WRITER)


@needs_qemu
def test_force_share_reads_what_qemu_writes(image: Path, running: Start, opened: Opener) -> None:
    serve(running, image)
    before = held_bytes(image)
    storage = opened(image, writable=False, **{"force-share": True})
    storage.set_access(READER)
    assert held_bytes(image) == before
    buffer = bytearray(4)
    storage.readv([(0, memoryview(buffer))])
    assert buffer == b"QFI\xfb"


@needs_qemu
def test_create_does_not_touch_an_image_in_use(image: Path, running: Start) -> None:
    serve(running, image)
    before = image.read_bytes()
    with pytest.raises(ImageLocked):
        create(image, size=4096)
    assert image.read_bytes() == before


def test_force_share_is_for_reading(image: Path, opened: Opener) -> None:
    with pytest.raises(OptionError, match="force-share"):
        opened(image, **{"force-share": True})


def test_locking_off_takes_and_sees_no_locks(image: Path, opened: Opener) -> None:
    opened(image).set_access(IMAGE_WRITER)
    other = opened(image, locking="off")
    other.set_access(IMAGE_WRITER)
    assert held_bytes(image) == {100, 101, 103, 201, 203}


def test_two_of_ours_exclude_each_other_even_in_one_process(image: Path, opened: Opener) -> None:
    first = opened(image)
    first.set_access(WRITER)
    second = opened(image)
    with pytest.raises(ImageLocked):
        second.set_access(WRITER)
    first.set_access(FORCED)
    second.set_access(WRITER)


def test_any_number_of_readers(image: Path, opened: Opener) -> None:
    for _ in range(5):
        opened(image, writable=False).set_access(READER)


def test_locks_end_with_the_process(image: Path, opened: Opener) -> None:
    script = (
        "import sys\n"
        "from diskwright.core.permissions import WRITER\n"
        "from diskwright.storage.file import FileOptions, FileStorage\n"
        "storage = FileStorage.open(FileOptions(filename=sys.argv[1]), writable=True)\n"
        "storage.set_access(WRITER)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "locked\n"
        mine = opened(image)
        with pytest.raises(ImageLocked):
            mine.set_access(WRITER)
    finally:
        child.kill()
        child.communicate(timeout=20)
    mine.set_access(WRITER)


def test_a_foreign_write_lock_on_our_bytes_is_a_conflict(image: Path, opened: Opener) -> None:
    with image.open("r+b") as other:
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 100, 1, 0))
        with pytest.raises(ImageLocked, match="consistent read"):
            opened(image).set_access(READER)


@pytest.mark.parametrize("required", [False, True])
def test_a_kernel_without_such_locks(image: Path, monkeypatch: pytest.MonkeyPatch, required: bool) -> None:
    """An unknown command is what the kernel says EINVAL to, as those before 3.15 do for these."""
    monkeypatch.setattr(fcntl, "F_OFD_SETLK", 9999)
    with image.open("r+b") as file:
        locks = ImageLocks(file.fileno(), str(image), required=required)
        if required:
            with pytest.raises(OSError) as caught:
                locks.set(WRITER)
            assert caught.value.filename == str(image)
        else:
            locks.set(WRITER)
            locks.set(READER)

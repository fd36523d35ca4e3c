"""``snapshot``, ``info`` and ``convert -l`` beside qemu-img; both programs on one image in turn; machines' states."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import diskwright as dw
from tests.cli import images
from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same
from tests.formats.qcow2.support import LONG

pytestmark = [needs_qemu, needs_same_texts]

_SNAPSHOTS = (
    "qemu-img snapshot -c one image",
    "qemu-io -f qcow2 -c write~-P~9~0~64k image",
    "qemu-img snapshot -c 1 image",
    "qemu-img snapshot -c two~words image",
    "qemu-io -f qcow2 -c write~-P~8~128k~64k image",
)


def prepared(tmp_path: Path, name: str = "qcow2-data") -> None:
    images.build(name, tmp_path)
    make(tmp_path, *_SNAPSHOTS)


@pytest.mark.parametrize("name", ["qcow2-data", "qcow2-v2", "qcow2-overlay", "qcow2-4k-clusters", "qcow2-compressed"])
def test_lists_are_the_same(name: str, tmp_path: Path) -> None:
    prepared(tmp_path, name)
    same("snapshot", "-l", "image", cwd=tmp_path)
    same("info", "image", cwd=tmp_path)
    same("info", "--output=json", "image", cwd=tmp_path)


def test_dates_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        there = same("snapshot", "-l", "image", cwd=tmp_path).out
        monkeypatch.setenv("TZ", "UTC")
        time.tzset()
        assert same("snapshot", "-l", "image", cwd=tmp_path).out != there
    finally:
        monkeypatch.undo()
        time.tzset()


def test_odd_entries(tmp_path: Path) -> None:
    """Clocks of days, states of GiBs, no icount, names of other scripts, and ids that are no numbers."""
    images.build("qcow2-data", tmp_path)
    for name in ("", "é€", "n" * 30, "a,b=c", 'q"uote'):
        assert qemu_img("snapshot", "-c", name, "image", cwd=tmp_path).code == 0
    data = bytearray((tmp_path / "image").read_bytes())
    at = int.from_bytes(data[64:72], "big")
    fields = [
        (24, 8, 123 * 3600 * 10**9 + 59_999_999_999),  # vm clock
        (40, 8, 5 << 32),
        (56, 8, (1 << 64) - 1),
        (16, 4, 0xF000_0000),  # date: after 2038
        (64, 1, ord("x")),
    ]
    for offset, width, value in fields:
        data[at + offset : at + offset + width] = value.to_bytes(width, "big")
    (tmp_path / "image").write_bytes(data)
    same("snapshot", "-l", "image", cwd=tmp_path)
    same("info", "image", cwd=tmp_path)
    same("info", "--output=json", "image", cwd=tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        "snapshot -l image",
        "snapshot image",
        "snapshot -q -l image",
        "snapshot -U -l image",
        "snapshot -l --image-opts driver=qcow2,file.filename=image",
        "snapshot -l missing",
        "snapshot missing",
        "snapshot -c x missing",
        "snapshot -l image image",
        "snapshot -l",
        "snapshot -l -l image",
        "snapshot -l -c x image",
        "snapshot -a one -d one image",
        "snapshot -c",
        "snapshot -c x -U image",
        "snapshot -a nope image",
        "snapshot -d nope image",
        "snapshot -d 3 image",
        "snapshot -z image",
        "snapshot --image-opts -l image",
        "snapshot -l raw",
        "snapshot -c x --image-opts driver=raw,file.filename=raw",
        "snapshot -a x --image-opts driver=raw,file.filename=raw",
        "snapshot -d x --image-opts driver=raw,file.filename=raw",
        "convert -l nope image out",
        "convert -l snapshot.id=1,snapshot.name=two image out",
        "convert -l one raw out",
        "convert -l one image image out",
    ],
)
def test_ways_to_say_it(words: str, tmp_path: Path) -> None:
    prepared(tmp_path)
    (tmp_path / "raw").write_bytes(bytes(4096))
    theirs = qemu_img(*words.split(), cwd=tmp_path)
    ours = diskwright(*words.split(), cwd=tmp_path)
    assert (ours.code, ours.out) == (theirs.code, theirs.out)
    warning = "WARNING: Image format was not specified"
    assert ours.err.replace(" snapshot --help", " --help") == theirs.err or warning in theirs.err


@pytest.mark.parametrize("choice", ["one", "1", "3", "two words", "snapshot.id=1", "snapshot.name=1",
                                    "snapshot.id=2,snapshot.name=1"])  # fmt: skip
def test_convert_one(choice: str, tmp_path: Path) -> None:
    prepared(tmp_path)
    assert qemu_img("convert", "-l", choice, "image", "theirs", cwd=tmp_path).code == 0
    assert diskwright("convert", "-l", choice, "image", "ours", cwd=tmp_path).code == 0
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_wrong_parameters_of_convert(tmp_path: Path) -> None:
    prepared(tmp_path)
    done = diskwright("convert", "-l", "snapshot.ip=1", "image", "out", cwd=tmp_path)
    assert (done.code, done.err) == (1, "PROGRAM: Failed in parsing snapshot param 'snapshot.ip=1'\n")
    assert qemu_img("convert", "-l", "snapshot.ip=1", "image", "out", cwd=tmp_path).err.endswith(done.err)


def test_snapshots_of_another_size(tmp_path: Path) -> None:
    """A snapshot has the size it was made with; qemu-img shows it with the size of now."""
    prepared(tmp_path)
    before = (tmp_path / "before").name
    make(tmp_path, f"qemu-img convert -l one image {before}", "qemu-img resize -q image 3M")
    assert diskwright("convert", "-l", "one", "image", "ours", cwd=tmp_path).code == 0
    assert (tmp_path / "ours").read_bytes() == (tmp_path / before).read_bytes()
    assert diskwright("snapshot", "-a", "one", "image", cwd=tmp_path).code == 0
    make(tmp_path, "qemu-img check -q image", "qemu-img convert image now")
    assert (tmp_path / "now").read_bytes() == (tmp_path / before).read_bytes()


def test_refcounts_too_narrow(tmp_path: Path) -> None:
    make(tmp_path, "qemu-img create -q -f qcow2 -o refcount_bits=1 image 1M", "qemu-io -f qcow2 -c write~0~64k image")
    before = (tmp_path / "image").read_bytes()
    done = diskwright("snapshot", "-c", "x", "image", cwd=tmp_path)
    assert done.code == 1 and "refcounts of 1 bits" in done.err and done.err.count("\n") == 1
    assert (tmp_path / "image").read_bytes() == before
    assert qemu_img("snapshot", "-c", "x", "image", cwd=tmp_path).code == 1


def test_library(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    dw.create(path, "qcow2", "1M")
    with dw.open(path, writable=True) as disk:
        disk.pwrite(0, b"a" * 1000)
        info = dw.create_snapshot(disk, "first")
        disk.pwrite(0, b"b" * 1000)
        assert dw.snapshots(disk) == [info]
    with dw.open(path, snapshot="first") as disk:
        assert disk.read_only and disk.pread(0, 1000) == b"a" * 1000
    dw.apply_snapshot(path, info.id)
    with dw.open(path) as disk:
        assert disk.pread(0, 1000) == b"a" * 1000
    dw.delete_snapshot(path, "first")
    assert dw.snapshots(path) == []
    with pytest.raises(dw.SnapshotNotFound):
        dw.apply_snapshot(path, "first")


# -- in turn -----------------------------------------------------------------------------------------

_KINDS = {
    "64k": "create -q -f qcow2 -o cluster_size=64k image 3M",
    "4k version 2": "create -q -f qcow2 -o cluster_size=4k,compat=0.10 image 1M",
    "512, 8 bits": "create -q -f qcow2 -o cluster_size=512,refcount_bits=8 image 200k",
    "4k on a backing file": "create -q -f qcow2 -o cluster_size=4k -b base -F raw image 1M",
    "4k compressed": "convert -c -f raw -O qcow2 -o cluster_size=4k base image",
}


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("seed", range(20 if LONG else 1))
def test_in_turn(kind: str, seed: int, tmp_path: Path) -> None:
    """Writes and snapshot operations by either program; after each the image is clean and says the same to both."""
    chance = random.Random(f"{kind} {seed}")
    (tmp_path / "base").write_bytes(bytes(chance.choices(b"abc", k=700_416)))
    make(tmp_path, f"qemu-img {_KINDS[kind]}")
    kept: dict[str, bytes] = {}
    for number in range(12):
        now = _written(tmp_path, chance)
        program = chance.choice((diskwright, qemu_img))
        action = chance.random()
        if not kept or (action < 0.5 and len(kept) < 3):
            flag, name = "-c", f"s{number}"
            kept[name] = now
        else:
            name = chance.choice(list(kept))
            flag = chance.choice(("-a", "-d"))
            now = kept[name] if flag == "-a" else now
            if flag == "-d":
                del kept[name]
        done = program("snapshot", flag, name, "image", cwd=tmp_path)
        assert done.code == 0, (program, done)
        _judge(tmp_path, now, kept)


def _written(directory: Path, chance: random.Random) -> bytes:
    """Some writes by one of both; returns the disk's contents then."""
    path = directory / "image"
    with dw.open(path) as disk:
        size = disk.size
    writes = []
    for _ in range(chance.randrange(4)):
        offset = chance.randrange(size >> 9) << 9
        writes.append((offset, min(size - offset, chance.randrange(1, 400) << 9), chance.randrange(1, 255)))
    if chance.random() < 0.5:
        words = [word for offset, length, byte in writes for word in ("-c", f"write -P {byte} {offset} {length}")]
        if words:
            subprocess.run(["qemu-io", "-f", "qcow2", *words, path], check=True, capture_output=True, timeout=60)
    else:
        with dw.open(path, writable=True) as disk:
            for offset, length, byte in writes:
                disk.pwrite(offset, bytes([byte]) * length)
    with dw.open(path) as disk:
        return disk.pread(0, disk.size)


def _judge(directory: Path, now: bytes, kept: dict[str, bytes]) -> None:
    same("check", "image", cwd=directory)
    assert qemu_img("check", "image", cwd=directory).code == 0
    listed = same("snapshot", "-l", "image", cwd=directory).out
    assert [line.split()[1] for line in listed.splitlines()[2:]] == list(kept)
    same("info", "--output=json", "image", cwd=directory)
    make(directory, "qemu-img convert -f qcow2 image now")
    assert (directory / "now").read_bytes() == now
    for name, held in kept.items():
        make(directory, f"qemu-img convert -f qcow2 -l {name} image held")
        assert (directory / "held").read_bytes() == held
        with dw.open(directory / "image", snapshot=name) as disk:
            assert disk.pread(0, disk.size) == held


# -- a machine's state -------------------------------------------------------------------------------

needs_machine = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64")


def machine(directory: Path, *commands: str, arguments: tuple[str, ...] = ()) -> str:
    """A machine without a guest, given some commands at its monitor. Returns what the monitor said."""
    words = [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-machine",
        "pc",
        "-m",
        "32",
        "-display",
        "none",
        "-S",
        "-nodefaults",
    ]
    words += ["-monitor", "stdio", "-drive", "if=virtio,format=qcow2,file=image", *arguments]
    lines = "\n".join((*commands, "quit", ""))
    done = subprocess.run(
        words,
        cwd=directory,
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0 and "Error" not in done.stdout, done.stdout + done.stderr
    return done.stdout


@needs_machine
def test_state_of_a_machine(tmp_path: Path) -> None:
    """Made by QEMU: listed, kept through our operations, and still what QEMU needs to go on from it."""
    prepared(tmp_path)
    now = (tmp_path / "now").name
    make(tmp_path, f"qemu-img convert image {now}")
    machine(tmp_path, "savevm vm")
    same("snapshot", "-l", "image", cwd=tmp_path)
    same("info", "--output=json", "image", cwd=tmp_path)
    info = next(info for info in dw.snapshots(tmp_path / "image") if info.name == "vm")
    assert info.vm_state_size > 10_000
    state = _state(tmp_path, info.id)
    assert state.startswith(b"QEVM")
    for words in (("-c", "more"), ("-a", "vm"), ("-d", "one"), ("-a", "more"), ("-d", "more")):
        assert diskwright("snapshot", *words, "image", cwd=tmp_path).code == 0
        make(tmp_path, "qemu-img check -q image")
        assert _state(tmp_path, info.id) == state
    assert diskwright("convert", "-l", "vm", "image", "held", cwd=tmp_path).code == 0
    assert (tmp_path / "held").read_bytes() == (tmp_path / now).read_bytes()
    assert "VM status: paused" in machine(tmp_path, "info status", arguments=("-loadvm", "vm"))
    make(tmp_path, "qemu-img check -q image")
    assert diskwright("snapshot", "-d", "vm", "image", cwd=tmp_path).code == 0
    make(tmp_path, "qemu-img check -q image")


@needs_machine
def test_state_given_by_us(tmp_path: Path) -> None:
    """A state that we have written is one that QEMU can load."""
    prepared(tmp_path)
    machine(tmp_path, "savevm vm")
    path = tmp_path / "image"
    first = next(info for info in dw.snapshots(path) if info.name == "vm")
    (tmp_path / "state").write_bytes(_state(tmp_path, first.id))
    dw.delete_snapshot(path, first.id)
    with (tmp_path / "state").open("rb") as data:
        dw.create_snapshot(path, "again", vm_state=dw.VmState(data, first.vm_state_size, first.vm_clock_nsec))
    make(tmp_path, "qemu-img check -q image")
    same("snapshot", "-l", "image", cwd=tmp_path)
    assert "VM status: paused" in machine(tmp_path, "info status", arguments=("-loadvm", "again"))
    make(tmp_path, "qemu-img check -q image")


def _state(directory: Path, id: str) -> bytes:
    with dw.open(directory / "image") as disk:
        from diskwright.core.snapshots import keeper

        found = keeper(disk.node)
        assert found is not None
        with (directory / "state-of-machine").open("wb") as into:
            found.load_vm_state(id, into)
    return (directory / "state-of-machine").read_bytes()

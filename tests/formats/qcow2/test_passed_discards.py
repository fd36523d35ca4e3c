"""Of which clusters that became free the file is told: the space an image takes afterwards, beside QEMU's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diskwright.core import snapshots
from diskwright.core.disk import Disk
from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.errors import OptionError
from tests.formats.luks.peers import needs_qemu, run

MIB = 1 << 20
KIB = 1 << 10


def opened(path: Path, **options: object) -> Disk:
    graph = Graph(OpenGate())
    try:
        node = graph.open({"driver": "qcow2", "file.filename": str(path), **options}, writable=True)
    except BaseException:
        graph.close()
        raise
    return graph.disk(node, owns_graph=True)


def space(path: Path) -> int:
    run("sync", str(path))
    return path.stat().st_blocks * 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A snapshot of 4 MiB, of which half has been written over since; a compressed cluster."""
    path = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "16M")
    run("qemu-io", "-c", "write 0 4M", "-c", "write -c 8M 64k", str(path))
    run("qemu-img", "snapshot", "-c", "a", str(path))
    run("qemu-io", "-c", "write 0 2M", str(path))
    return path


CHOICES = [(), ("pass-discard-snapshot=off",), ("pass-discard-request=off",), ("pass-discard-other=on",),
           ("discard=ignore",), ("discard=ignore", "pass-discard-request=on")]  # fmt: skip


@needs_qemu
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("action", ["delete", "apply", "discard", "unmap"])
def test_as_much_space_as_with_qemu(image: Path, action: str, choice: tuple[str, ...]) -> None:
    theirs = Path(f"{image}.theirs")
    shutil.copyfile(image, theirs)
    before = space(image)
    options = dict(word.split("=") for word in choice)
    disk = opened(image, **options)
    if action in ("delete", "apply"):
        with disk.graph.drained():
            getattr(snapshots, action)(disk.node, "1")
    elif action == "discard":
        disk.trim(0, MIB)
    else:
        disk.zero(0, MIB, unmap=True)
    disk.close()
    words = f"driver=qcow2,file.driver=file,file.filename={theirs},{','.join(choice)}".rstrip(",")
    if action in ("delete", "apply"):
        run("qemu-img", "snapshot", f"-{action[0]}", "a", "--image-opts", words)
    else:
        run("qemu-io", "-c", "discard 0 1M" if action == "discard" else "write -z -u 0 1M", "--image-opts", words)
    # How many tables there are, and whether they are moved, is not what is compared.
    freed, expected = before - space(image), (before - space(theirs))
    assert abs(freed - expected) < 512 * KIB, (freed, expected)
    assert (freed > 512 * KIB) is (expected > 512 * KIB)
    run("qemu-img", "check", str(image))


@needs_qemu
@pytest.mark.parametrize("told", [False, True])
def test_others(image: Path, told: bool) -> None:
    """What is freed by writing over it: nobody asked for that."""
    with_one = opened(image, **{"pass-discard-other": told})
    before = space(image)
    with_one.pwrite(8 * MIB, b"\1" * (64 * KIB))
    with_one.close()
    assert space(image) - before <= 80 * KIB  # one cluster more, for the snapshot keeps the old one
    with_one = opened(image, **{"pass-discard-other": told})
    with with_one.request():
        with_one.node.write_compressed([(9 * MIB, memoryview(b"\2" * MIB))])
    with_one.flush()
    before = space(image)
    with_one.pwrite(9 * MIB, b"\3" * MIB)
    with_one.close()
    grown = space(image) - before
    assert grown <= MIB if told else grown >= MIB
    run("qemu-img", "check", str(image))


@needs_qemu
@pytest.mark.parametrize("options", ["", "extended_l2=on", "data_file={0}.data"])
@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("action", ["discard", "unmap"])
def test_no_unref_keeps_the_place(tmp_path: Path, options: str, passes: bool, action: str) -> None:
    path = tmp_path / "image"
    words = ("-o", options.format(path)) if options else ()
    run("qemu-img", "create", "-q", "-f", "qcow2", *words, str(path), "16M")
    run("qemu-io", "-c", "write 0 4M", str(path))
    before, stored = path.stat().st_size, Path(f"{path}.data") if "data" in options else path
    taken = space(stored)
    disk = opened(path, **{"discard-no-unref": True, "pass-discard-request": passes})
    place = disk.node.format.mapping.extent_at(MIB, 4096).file_offset  # type: ignore[attr-defined]
    if action == "discard":
        disk.trim(MIB, MIB)
    else:
        disk.zero(MIB, MIB, unmap=True)
    assert disk.pread(MIB, MIB) == bytes(MIB)
    disk.close()
    assert (taken - space(stored) >= MIB - 64 * KIB) is passes
    disk = opened(path)
    disk.pwrite(MIB, b"\7" * MIB)
    assert disk.node.format.mapping.extent_at(MIB, 4096).file_offset == place  # type: ignore[attr-defined]
    disk.close()
    assert path.stat().st_size == before
    run("qemu-io", "-c", "read -P 7 1M 1M", str(path))
    run("qemu-img", "check", str(path))


@needs_qemu
def test_no_unref_needs_version_3(tmp_path: Path) -> None:
    path = tmp_path / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", str(path), "1M")
    with pytest.raises(OptionError, match="only supported since qcow2 version 3"):
        opened(path, **{"discard-no-unref": True})

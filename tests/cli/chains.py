"""Backing chains for the differential tests: built by QEMU's own tools, the same for both programs."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.cli.run import Result, diskwright, make, qemu_img

THREE = (
    "qemu-img create -q -f qcow2 base 1M",
    "qemu-img create -q -f qcow2 -b base -F qcow2 mid 2M",
    "qemu-img create -q -f qcow2 -b mid -F qcow2 top 3M",
    "qemu-io -f qcow2 -c write~-P~1~0~128k base",
    "qemu-io -f qcow2 -c write~-P~2~64k~128k -c write~-P~4~1500k~128k mid",
    "qemu-io -f qcow2 -c write~-P~3~128k~128k -c write~-P~5~2500k~128k -c write~-z~0~64k top",
)


def twice(directory: Path, *commands: str) -> tuple[Path, Path]:
    """Two directories with the same images, for qemu-img and for us. Times and names are the same to both."""
    ours, theirs = directory / "ours", directory / "theirs"
    ours.mkdir()
    make(ours, *commands)
    shutil.copytree(ours, theirs, symlinks=True)
    return ours, theirs


def both(directories: tuple[Path, Path], *words: str, err: bool = True) -> Result:
    """Runs both programs, each in its own directory; asserts the same exit code and output."""
    ours, theirs = diskwright(*words, cwd=directories[0]), qemu_img(*words, cwd=directories[1])
    assert (ours.code, ours.out) == (theirs.code, theirs.out), (ours, theirs)
    if err:
        assert ours.err == theirs.err
    else:
        assert bool(ours.err) == bool(theirs.err), (ours, theirs)
    return ours


def alike(directories: tuple[Path, Path], *names: str, maps: bool = True) -> None:
    """Asserts that images in both directories are sound, hold the same, and say the same of themselves."""
    ours, theirs = directories
    for name in names:
        for command in (("info",), ("map", "--output=json")) if maps else (("info",),):
            mine, yours = (_without_places(qemu_img(*command, name, cwd=where)) for where in directories)
            assert mine == yours, (name, mine, yours)
        found = qemu_img("compare", str(ours / name), str(theirs / name), cwd=ours)
        assert found.code == 0, (name, found)
        if (ours / name).read_bytes()[:3] == b"QFI":
            assert qemu_img("check", name, cwd=ours).code == 0


def _without_places(result: Result) -> str:
    """Which host cluster is taken first is each program's own affair, and so is the space on disk."""
    import re

    assert result.code == 0, result
    return re.sub(r'(, "offset": \d+)|(disk size: .*)', "", result.out)

"""What every format that is read and written has to show, beyond the conformance suite: that QEMU reads what we wrote
and the other way round, that a crash at any moment costs nothing that was flushed, and that damaged images end in an
answer or an error of ours.

Subclass ``Campaign`` as ``Test...`` and set the class attributes:

    class TestVdi(Campaign):
        format_name = "vdi"
        structures = ((64, 400), (512, 64))
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import pytest

import diskwright
from diskwright.cli.main import main
from diskwright.core import options as opts
from diskwright.core import registry
from diskwright.core.disk import Disk
from diskwright.core.driver import CheckReport, Format, OpenContext
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, StorageNode
from diskwright.core.permissions import READER, WRITER
from tests.crash.recording import RecordedFile, Recording
from tests.crash.workload import Workload
from tests.formats.qcow2.support import LONG, qemu

SIZE = 6 << 20
SECTOR = 512


class RecordedImage:
    """An image of any format in recorded files, open in a graph of its own."""

    def __init__(
        self, driver: type[Format], files: Mapping[str, RecordedFile], writable: bool, options: Mapping[str, object]
    ) -> None:
        self.graph = Graph()
        nodes = {name: StorageNode(name, file, writable) for name, file in files.items()}
        for node in nodes.values():
            self.graph.adopt(node)
        context = OpenContext(
            nodes["file"], self.graph.leases, lambda role, filename, format: nodes[role], writable, frozenset(files)
        )
        self.format = driver.open(context, opts.parse(driver.options, options, owner=driver.name))
        if driver.check is Format.check:
            self.format.check = lambda repair: CheckReport()  # type: ignore[method-assign]
        self.node = FormatNode("image", self.format, writable)
        self.graph.adopt(self.node)
        self.disk: Disk = self.graph.disk(self.node, WRITER if writable else READER)

    def close(self) -> None:
        self.graph.close()


class Campaign:
    """The attributes say how images of the format are made."""

    format_name: ClassVar[str]
    create_options: ClassVar[dict[str, object]] = {}
    qemu_options: ClassVar[str | None] = ""
    """``-o`` of qemu-img create for the same kind of image; None when it cannot make one."""
    qemu_writes: ClassVar[bool] = True
    """Whether qemu-io can write to such images."""
    qemu_checks: ClassVar[bool] = True
    """Whether qemu-img can check them."""
    structures: ClassVar[tuple[tuple[int, int], ...]] = ((0, 512),)
    """``(offset, length)`` of what in a new image describes it, to be damaged."""
    size: ClassVar[int] = SIZE

    def driver(self) -> type[Format]:
        found = registry.find(self.format_name)
        assert isinstance(found, type) and issubclass(found, Format)
        return found

    def created(self, size: int | None = None, **options: object) -> bytes:
        """The bytes of a new image."""
        driver, recording = self.driver(), Recording(file=b"")
        values = {"size": size or self.size, **self.create_options, **options}
        driver.create(
            StorageNode("new", recording.files["file"], True), opts.parse(driver.create_options, values, owner="test")
        )
        return recording.contents()["file"]

    def created_files(self, size: int | None = None) -> dict[str, bytes]:
        """The bytes of every file of a new image, by role; ``file`` is the image itself."""
        return {"file": self.created(size)}

    def make(self, path: Path, *, by_qemu: bool, size: int | None = None) -> Path:
        if by_qemu:
            words = ["-o", self.qemu_options] if self.qemu_options else []
            qemu("qemu-img", "create", "-q", "-f", self.format_name, *words, str(path), str(size or self.size))
        else:
            path.write_bytes(self.created(size))
        return path

    # -- both ways -----------------------------------------------------------------------------------

    @pytest.mark.parametrize("by_qemu", [False, True], ids=["made here", "made by QEMU"])
    @pytest.mark.parametrize("seed", range(20 if LONG else 2))
    def test_both_read_what_the_other_wrote(self, by_qemu: bool, seed: int, tmp_path: Path) -> None:
        if by_qemu and self.qemu_options is None:
            pytest.skip("qemu-img cannot make such an image")
        chance = random.Random(f"{self.format_name} {seed} {by_qemu}")
        path, raw = self.make(tmp_path / "image", by_qemu=by_qemu), tmp_path / "raw"
        with diskwright.open(str(path), format=self.format_name) as disk:
            disk_size = disk.size
        model = bytearray(disk_size)
        for _ in range(3):
            self._write_here(path, model, chance)
            if self.qemu_writes:
                self._write_there(path, model, chance)
            raw.write_bytes(model)
            qemu("qemu-img", "compare", "-f", self.format_name, "-F", "raw", str(path), str(raw))
            if self.qemu_checks:
                qemu("qemu-img", "check", "-f", self.format_name, str(path))
        with diskwright.open(str(path), format=self.format_name) as disk:
            assert disk.pread(0, disk_size) == model

    def _write_here(self, path: Path, model: bytearray, chance: random.Random) -> None:
        with diskwright.open(str(path), format=self.format_name, writable=True) as disk:
            for _ in range(25):
                offset = chance.randrange(len(model))
                length = min(len(model) - offset, chance.choice([1, 512, 4096, 70000, 1 << 20]))
                if chance.random() < 0.7:
                    data = chance.randbytes(length)
                    disk.pwrite(offset, data)
                    model[offset : offset + length] = data
                else:
                    disk.zero(offset, length, unmap=chance.random() < 0.5)
                    model[offset : offset + length] = bytes(length)
                assert disk.pread(offset, length) == model[offset : offset + length]

    def _write_there(self, path: Path, model: bytearray, chance: random.Random) -> None:
        words = []
        for _ in range(8):
            offset = chance.randrange(len(model) // SECTOR) * SECTOR
            length = min(len(model) - offset, chance.choice([512, 4096, 66560]))
            byte = chance.randrange(256)
            words += ["-c", f"write -P {byte} {offset} {length}"]
            model[offset : offset + length] = bytes([byte]) * length
        done = subprocess.run(
            ["qemu-io", "-f", self.format_name, *words, str(path)], capture_output=True, text=True, check=True
        )
        assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr

    # -- crashes -------------------------------------------------------------------------------------

    crash_actions: ClassVar[str] = "wwwwwzzdff"
    crash_size: ClassVar[int] = SIZE

    def opener(self, files: Mapping[str, RecordedFile], writable: bool) -> Any:
        return RecordedImage(self.driver(), files, writable, {})

    @pytest.mark.parametrize("seed", range(30 if LONG else 2))
    def test_a_crash_costs_nothing_that_was_flushed(self, seed: int) -> None:
        chance = random.Random(f"{self.format_name} {seed}")
        files = self.created_files(self.crash_size)
        with Workload(files.pop("file"), opener=self.opener, **files) as work:
            work.play(chance, 40, actions=self.crash_actions)
        work.verify(chance, most=0 if LONG else 25, each=1)

    # -- damage --------------------------------------------------------------------------------------

    def filled(self) -> bytes:
        """An image with something in it, for damage to begin with."""
        files = self.recorded()
        image = self.opener(files, True)
        chance = random.Random(1)
        for _ in range(12):
            image.disk.pwrite(chance.randrange(self.crash_size - 4096), chance.randbytes(4096))
        image.node.flush()
        image.close()
        return bytes(files["file"].data)

    def recorded(self) -> Mapping[str, RecordedFile]:
        return Recording(file=self.created(self.crash_size)).files

    def test_damage_ends_in_an_answer_or_an_error(self, tmp_path: Path) -> None:
        """In a process of its own, which may take 64 MiB more than it needs for the sound image."""
        chance, sound = random.Random(self.format_name), self.filled()
        paths = [tmp_path / "sound"]
        paths[0].write_bytes(sound)
        for turn in range(200 if LONG else 25):
            paths.append(tmp_path / f"image{turn}")
            paths[-1].write_bytes(self.damaged(sound, chance))
        code = "import sys; from tests.formats.campaign import attack_all; attack_all(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, self.format_name, *map(str, paths)],
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout) < 64 << 10

    def damaged(self, sound: bytes, chance: random.Random) -> bytes:
        data = bytearray(sound)
        for _ in range(chance.choice([1, 1, 2, 4])):
            start, length = chance.choice(self.structures)
            width = chance.choice([1, 2, 4, 8])
            at = start + chance.randrange(max(1, length // width)) * width
            value = chance.choice([0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), chance.randrange(1 << 8 * width)])
            data[at : at + width] = value.to_bytes(width, chance.choice(["little", "big"]))
        if chance.random() < 0.1:
            del data[chance.randrange(len(data)) :]
        return bytes(data)


def attack_all(format_name: str, sound: str, *paths: str) -> None:
    """Every command on all images, in this process. Prints by how many KiB it has grown since the first."""
    import resource

    attack(format_name, sound)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in paths:
        attack(format_name, path)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle))


def attack(format_name: str, path: str) -> None:
    os.truncate(path, min(os.path.getsize(path), 64 << 20))
    for name, *words in (["info"], ["map", "--output=json"], ["check"], ["check", "-r", "all"], ["compare"]):
        if name == "compare" and _size(format_name, path) > 64 << 30:
            continue  # to read all of a sparse disk that large takes its time, and is not damage
        given = [path, path] if name == "compare" else [path]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
            code = main([name, "-f", format_name, *words, *given])
        assert code in (0, 1, 2, 3, 63), (path, name, code, err.getvalue())
        assert "internal error" not in err.getvalue() and "Traceback" not in err.getvalue(), (path, err.getvalue())
    if _size(format_name, path) >= 0:
        try:
            with diskwright.open(path, format=format_name, writable=True) as disk:
                for offset in (0, disk.size // 2, max(0, disk.size - 512)):
                    disk.pwrite(offset, b"x" * min(512, disk.size - offset))
        except (diskwright.DiskwrightError, OSError):
            pass


def _size(format_name: str, path: str) -> int:
    try:
        with diskwright.open(path, format=format_name) as disk:
            return disk.size
    except (diskwright.DiskwrightError, OSError):
        return -1

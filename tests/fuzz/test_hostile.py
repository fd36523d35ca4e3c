"""Hostile images in a process of their own: opened, read, mapped, checked and repaired within 256 MiB above what the
process needs anyway, ending in an answer or an error of ours."""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from diskwright.cli.main import main
from diskwright.formats.qcow2.layout import COPIED
from tests.formats.qcow2.support import created, poked
from tests.fuzz.mutations import mutated
from tests.fuzz.seeds import KINDS, seed
from tests.fuzz.test_check_like_qemu import SCALE

MOST = 256 << 10
"""KiB of memory above the idle process."""

COMMANDS = (
    ("info",), ("map", "--output=json"), ("check",), ("compare",), ("inspect",), ("inspect", "--json"),
    ("check", "-r", "leaks"), ("check", "-r", "all"),
)  # fmt: skip


LARGE = "large"


def attack(path: Path) -> None:
    """Every command on one image, in this process. Anything but an exit code is a failure."""
    # Images of large tables are valid ones of large disks: to map them takes as long as there is to tell.
    for name, *words in (command for command in COMMANDS if LARGE not in path.name or command in CHECKS):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
            code = main([name, *words, str(path), *([str(path)] if name == "compare" else [])])
        assert code in (0, 1, 2, 3, 63), (name, code)
        assert "Traceback" not in err.getvalue(), err.getvalue()


CHECKS = (("info",), ("inspect",), ("check",))


def large_tables(folder: Path) -> list[Path]:
    """Tables as large as is accepted, full of entries that are hard to look at."""
    chance, images = random.Random(1), []
    l1 = bytearray(created(size=1 << 20, cluster_size=512))
    l1.extend(bytes(-len(l1) % (1 << 20)))
    at = len(l1)
    l1 += struct.pack(">Q", at | COPIED) * (4 << 20)
    images.append(poked(poked(poked(bytes(l1), 36, 4 << 20, 4), 40, at), 24, 128 << 30))
    table = bytearray(created(size=1 << 20, cluster_size=4096))
    at = len(table)
    table += chance.randbytes(8 << 20)
    images.append(poked(poked(bytes(table), 48, at), 56, 2048, 4))
    paths = []
    for number, image in enumerate(images):
        paths.append(folder / f"{LARGE}{number}")
        paths[-1].write_bytes(image)
    return paths


def child(paths: list[str]) -> None:
    """Prints by how much the process has grown."""
    sound = Path(paths[0])
    attack(sound)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in paths[1:]:
        attack(Path(path))
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle))


def run_child(paths: list[Path]) -> int:
    code = "import sys; from tests.fuzz.test_hostile import child; child(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, timeout=200 * SCALE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(json.loads(done.stdout))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeds")


@pytest.mark.parametrize("name", KINDS)
def test_mutated_images(name: str, folder: Path, tmp_path: Path) -> None:
    sound, chance = seed(name, folder), random.Random(name)
    paths = [sound.store(tmp_path, "sound")]
    for turn in range(int(6 * SCALE)):
        paths.append(sound._replace(image=mutated(sound.image, chance)).store(tmp_path, f"image{turn}"))
    assert run_child(paths) < MOST


def test_large_tables(tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    sound.write_bytes(created(size=1 << 20))
    assert run_child([sound, *large_tables(tmp_path)]) < MOST

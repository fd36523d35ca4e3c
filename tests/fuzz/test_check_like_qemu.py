"""Damage at random, counted and mended: ``qemu-img`` is the witness.

``DISKWRIGHT_FUZZ`` multiplies the number of images (``make fuzz`` sets it).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diskwright.cli.main import main
from diskwright.errors import DiskwrightError
from tests.crash.recording import recorded
from tests.formats.qcow2.support import LONG, Image
from tests.fuzz.mutations import mutated
from tests.fuzz.seeds import KINDS, Seed, seed
from tests.peers import find

SCALE = float(os.environ.get("DISKWRIGHT_FUZZ") or (20 if LONG else 1))
pytestmark = pytest.mark.timeout(int(120 + 120 * SCALE))

COUNTS = ("corruptions", "leaks", "check-errors", "total-clusters", "allocated-clusters", "fragmented-clusters",
          "compressed-clusters", "image-end-offset")  # fmt: skip

REFUSED_THERE = (
    "bitmap",  # QEMU does not open an image with a damaged bitmap; here it is one more corruption
    "data-file",  # nor without a data file, which a check does not need
    "cannot allocate memory",  # it counts in one piece whatever a table names, however far away
    "snapshot table",  # it bounds the extra data of an entry to 1 KiB, and wants the table within the file
)


class Verdict(NamedTuple):
    code: int
    counts: dict[str, int] | None
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeds")


def ours(path: Path, *words: str) -> Verdict:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["check", "-f", "qcow2", "--output=json", *words, str(path)])
    return Verdict(code, _counts(out.getvalue()), err.getvalue())


def theirs(path: Path, *words: str) -> Verdict:
    command = [find("qemu-img"), "check", "-f", "qcow2", "--output=json", *words, path.name]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=120, check=False)
    return Verdict(done.returncode, _counts(done.stdout), done.stderr)


def _counts(text: str) -> dict[str, int] | None:
    found: dict[str, Any] | None = json.loads(text) if text.startswith("{") else None
    return None if found is None else {name: found.get(name, 0) for name in COUNTS}


@pytest.mark.parametrize("name", KINDS)
def test_sound_images_are_found_sound(name: str, folder: Path, tmp_path: Path) -> None:
    path = seed(name, folder).store(tmp_path)
    found = ours(path)
    assert found.code == 0 and found.counts == theirs(path).counts
    assert ours(path, "-r", "all").code == 0 and path.read_bytes() == seed(name, folder).image


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_counted_alike(name: str, folder: Path, tmp_path: Path) -> None:
    sound, chance = seed(name, folder), random.Random(name)
    for turn in range(int(16 * SCALE)):
        path = Seed(mutated(sound.image, chance), sound.beside).store(tmp_path)
        mine, witness = ours(path), theirs(path)
        if witness.counts is None:
            refused = any(word in witness.err.lower() for word in REFUSED_THERE)
            assert mine.code == 1 or refused, (turn, mine, witness)
            continue
        if mine.counts is None:
            assert mine.code == 1 and "the header itself lies there" in mine.err, (turn, mine, witness)
            continue
        assert mine.code == witness.code, (turn, mine, witness)
        assert bool(mine.counts["corruptions"]) == bool(witness.counts["corruptions"]), (turn, mine, witness)
        assert mine.counts["leaks"] == witness.counts["leaks"], (turn, mine, witness)


def readable(data: bytes) -> dict[int, bytes] | None:
    """What a guest can read, by pieces; None when the image cannot be opened."""
    try:
        image = Image(recorded(data), writable=False)  # type: ignore[arg-type]
    except DiskwrightError:
        return None
    found = {}
    with image:
        for at in range(0, image.disk.size, 4096):
            with contextlib.suppress(DiskwrightError):
                found[at] = image.disk.pread(at, min(4096, image.disk.size - at))
    return found


def mended(data: bytes, repair: str) -> tuple[bytes, Any] | None:
    file = recorded(data)
    try:
        with Image(file, repair=True) as image:  # type: ignore[arg-type]
            report = image.format.check(repair)
    except DiskwrightError:
        return None
    return bytes(file.data), report


@pytest.mark.parametrize("repair", ["leaks", "all"])
@pytest.mark.parametrize("name", KINDS)
def test_a_repair_makes_nothing_worse(name: str, repair: str, folder: Path, tmp_path: Path) -> None:
    """What could be read reads the same, QEMU sees what we say is left, and that is not more than it was."""
    sound, chance = seed(name, folder), random.Random(f"{name} {repair}")
    plain = not sound.beside and "subclusters" not in name
    for turn in range(int(8 * SCALE)):
        data = mutated(sound.image, chance)
        result = mended(data, repair)
        if result is None:
            continue
        after, report = result
        before = readable(data) if plain else None
        if before is not None:
            now = readable(after) or {}
            assert [at for at, piece in before.items() if now.get(at) != piece] == [], turn
        witness = theirs(Seed(after, sound.beside).store(tmp_path))
        if witness.counts is not None and not witness.counts["check-errors"]:
            found = witness.counts["corruptions"], witness.counts["leaks"]
            assert found == (report.corruptions, report.leaks), (turn, witness)
        again = mended(after, repair)
        assert again is not None and again[1].corruptions <= report.corruptions, turn


@pytest.mark.parametrize("name", KINDS)
def test_refcount_damage_is_mended_for_good(name: str, folder: Path, tmp_path: Path) -> None:
    """Whatever is wrong with refcounts alone is all gone after a repair, ours or QEMU's, for both of us."""
    sound, chance = seed(name, folder), random.Random(f"{name} refcounts")
    for turn in range(int(4 * SCALE)):
        data = mutated(sound.image, chance, kinds=("refblock", "reftable"), resize=False)
        result = mended(data, "all")
        assert result is not None and not result[1].corruptions and not result[1].leaks, turn
        path = Seed(result[0], sound.beside).store(tmp_path)
        assert theirs(path).code == 0, turn
        path = Seed(data, sound.beside).store(tmp_path)
        if theirs(path, "-r", "all").code == 0:
            assert ours(path).code == 0, turn

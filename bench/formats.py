"""bench formats: copying out of and into the formats that qemu-img converts too, against qemu-img convert.

Encrypted images (LUKS1) are read and written; dmg, cloop and bochs, which qemu-img only reads, are read. A case whose
image no program at hand can make is told and left out. Neither program flushes (``-t unsafe``, qemu-img's default).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tests.peers.process import PeerError
from tests.peers.process import run as run_peer

from bench import images
from bench.goals import Goal, verdict
from bench.report import Report, say
from bench.rounds import Sample, Series, play, ratio
from bench.servers import OURS
from bench.settings import Settings
from bench.tables import mebibytes, number, table
from bench.timing import CommandFailed
from bench.timing import run as timed
from bench.workspace import diskwright_command, flush, require_room, subfolder

QEMU: Final = "qemu-img"
_TIMEOUT: Final = 600.0
_GEOMETRY: Final = 16 * 63 * 512
"""bximage makes disks of whole cylinders."""
_SECRET: Final = ("--object", "secret,id=key,data=a passphrase")


@dataclass(frozen=True)
class Case:
    """One conversion: the words of ``convert`` but for its options, the same for both programs. ``verify``: those of
    ``qemu-img compare`` that show the copy to be right; ``fresh``: the target is removed after each turn."""

    name: str
    words: tuple[str, ...]
    verify: tuple[str, ...]
    target: str
    fresh: bool
    goal: float

    def command(self, who: str) -> list[str]:
        words = [*_SECRET, "-t", "unsafe", *self.words]
        return ["qemu-img", "convert", *words] if who == QEMU else diskwright_command("convert", *words)


def run(settings: Settings, folder: str, report: Report) -> None:
    """Measures; adds its tables and figures to ``report``."""
    require_room(folder, 4 * settings.compressed_system)
    with subfolder(folder, "formats") as place:
        say("formats: making a file system of real files")
        plain = os.path.join(place, "files.raw")
        images.file_system(plain, settings.compressed_system // _GEOMETRY * _GEOMETRY)
        flush(plain)
        results = {case: _measure(case, settings.rounds, report) for case in _cases(place, plain, settings)}
        _tabulate(settings, results, report)


def _cases(place: str, plain: str, settings: Settings) -> Iterator[Case]:
    """Those that are wanted. The image of each is made when its turn comes, and is gone after it."""
    image, target = os.path.join(place, "image"), os.path.join(place, "target")
    luks = f"driver=luks,file.filename={image},key-secret=key"
    raw = f"driver=raw,file.filename={plain}"
    size = str(os.path.getsize(plain))
    ways: list[tuple[str, tuple[str, ...], list[str]]] = [
        ("dmg, zlib", ("-f", "dmg"), diskwright_command("convert", "-O", "dmg", plain, image)),
        ("dmg, plain", ("-f", "dmg"), diskwright_command("convert", "-O", "dmg", "-o", "subformat=UDRO", plain, image)),
        ("cloop", ("-f", "cloop"), ["create_compressed_fs", "-B", "65536", plain, image]),
        ("bochs", ("-f", "bochs"), ["bximage", "-q", "-func=convert", "-imgmode=growing", plain, image]),
    ]
    create = diskwright_command("create", "-q", *_SECRET, "-f", "luks", "-o", "key-secret=key,iter-time=1", image, size)
    if settings.wanted("raw to luks") or settings.wanted("luks to raw"):
        run_peer(*create, timeout=_TIMEOUT)
        words = ("-n", "--image-opts", raw, "--target-image-opts", luks)
        verify = (*_SECRET, "--image-opts", raw, luks)
        yield Case("raw to luks", words, verify, image, False, 1.0)
        words = ("--image-opts", luks, "-O", "raw", target)
        yield Case("luks to raw", words, ("-f", "raw", plain, target), target, True, 1.0)
        os.unlink(image)
    for name, format, command in ways:
        if not settings.wanted(f"{name} to raw"):
            continue
        if shutil.which(command[0]) is None:
            say(f"formats: {name} is left out: {command[0]} is not installed")
            continue
        run_peer(*command, timeout=_TIMEOUT)
        words = (*format, "-O", "raw", image, target)
        yield Case(
            f"{name} to raw", words, ("-f", "raw", plain, target), target, True, 1.5 if name != "dmg, plain" else 1.0
        )
        os.unlink(image)


def _measure(case: Case, rounds: int, report: Report) -> dict[str, Series]:
    say(f"formats: {case.name}")
    verified: set[str] = set()
    turns: dict[str, Callable[[], Sample]] = {who: partial(_turn, case, who, verified) for who in (QEMU, OURS)}
    results = play(turns, rounds, expected=(CommandFailed, PeerError, OSError))
    for name, series in results.items():
        if series.failure:
            report.failure(f"formats, {case.name}", name, series.failure)
    return results


def _turn(case: Case, who: str, verified: set[str]) -> Sample:
    """One conversion, whose result is compared with the source the first time."""
    try:
        cost = timed(case.command(who))
        if who not in verified:
            verified.add(who)
            run_peer("qemu-img", "compare", *case.verify, timeout=_TIMEOUT)
    finally:
        if case.fresh and os.path.exists(case.target):
            os.unlink(case.target)
    return Sample(cost.seconds, cost.cpu, {"peak": cost.peak})


def _tabulate(settings: Settings, results: dict[Case, dict[str, Series]], report: Report) -> None:
    rows, records = [], []
    for case, series in results.items():
        theirs, ours = series[QEMU], series[OURS]
        speed = ratio(theirs, ours)
        rows.append([
            case.name, number(theirs.median), number(ours.median), str(speed or "-"), number(theirs.cpu),
            number(ours.cpu), mebibytes(theirs.note("peak")), mebibytes(ours.note("peak")),
            verdict(Goal(case.goal), speed, None),
        ])  # fmt: skip
        records.append(_record(case, theirs, ours, speed))
    head = ["seconds", QEMU, OURS, "speed to qemu-img", "qemu CPU", "our CPU", "qemu memory", "our memory", "goal"]
    title = f"other formats, {settings.compressed_system >> 20} MiB ext4, {images.FILL:.0%} full"
    report.table(table(title, head, rows))
    report.add("formats", records)


def _record(case: Case, theirs: Series, ours: Series, speed: Any) -> dict[str, Any]:
    both = (theirs, ours)
    return {
        "case": case.name,
        "seconds": {one.name: one.values for one in both},
        "cpu_seconds": {one.name: one.cpu for one in both},
        "peak_bytes": {one.name: one.note("peak") for one in both},
        "speed_ratio_to_qemu_img": vars(speed) if speed else None,
    }

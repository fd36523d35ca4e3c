"""bench check: checking, mapping and measuring images that are nothing but tables, and how long a command takes to
start."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any, Final

from bench import images
from bench.goals import Goal, verdict
from bench.report import Report, say
from bench.rounds import Ratio, Sample, Series, play, ratio
from bench.servers import OURS
from bench.settings import Settings
from bench.tables import mebibytes, number, table
from bench.timing import CommandFailed
from bench.timing import run as timed
from bench.workspace import diskwright_command, flush, require_room, subfolder

QEMU: Final = "qemu-img"
BARE: Final = "python3 -c pass"


def run(settings: Settings, folder: str, report: Report) -> None:
    """Measures; adds its tables and figures to ``report``."""
    require_room(folder, 2 << 30)
    with subfolder(folder, "check") as place:
        large, small = os.path.join(place, "large.qcow2"), os.path.join(place, "small.qcow2")
        fragmented = os.path.join(place, "fragmented.qcow2")
        say(f"check: making the tables of a disk of {settings.table_disk >> 30} GiB")
        images.tables_only(large, settings.table_disk)
        images.empty_qcow2(small, 1 << 30)
        scattered = os.path.join(place, "scattered.qcow2")
        images.scattered(scattered, settings.table_disk // 10)
        flush(large)
        say(f"check: making one of {settings.table_disk // 10 >> 30} GiB in random order")
        images.tables_only(fragmented, settings.table_disk // 10 & -(1 << 30))
        images.shuffle(fragmented)
        flush(fragmented)
        # (image, words, rounds, how much faster than qemu-img it is to be)
        tasks = {
            "check": (large, ["check"], settings.rounds, 4.0),
            "map, json": (large, ["map", "--output=json"], settings.rounds, 2.0),
            "map": (large, ["map"], settings.rounds, 2.0),
            "measure": (large, ["measure", "-O", "qcow2"], settings.rounds, None),
            "check, fragmented": (fragmented, ["check"], settings.rounds, 4.0),
            "map, json, fragmented": (fragmented, ["map", "--output=json"], settings.rounds, 2.0),
            "map, fragmented": (fragmented, ["map"], settings.rounds, 2.0),
            "map, json, scattered": (scattered, ["map", "--output=json"], settings.rounds, 2.0),
            "measure, scattered": (scattered, ["measure", "-O", "qcow2"], settings.rounds, None),
            "info": (small, ["info"], settings.start_rounds, None),
        }
        results = {}
        for name, (image, words, rounds, _) in tasks.items():
            if not settings.wanted(name):
                continue
            say(f"check: {name}")
            commands = {QEMU: ["qemu-img", *words, image], OURS: diskwright_command(*words, image)}
            if image == small:
                commands[BARE] = [sys.executable, "-c", "pass"]
            turns = {who: partial(_turn, command) for who, command in commands.items()}
            results[name] = play(turns, rounds, expected=(CommandFailed, OSError))
            for who, series in results[name].items():
                if series.failure:
                    report.failure(f"check, {name}", who, series.failure)
        _tabulate(settings, results, {name: task[3] for name, task in tasks.items()}, report)


def _turn(command: list[str]) -> Sample:
    cost = timed(command)
    return Sample(cost.seconds, cost.cpu, {"peak": cost.peak})


def _tabulate(
    settings: Settings, results: dict[str, dict[str, Series]], goals: dict[str, float | None], report: Report
) -> None:
    names = [QEMU, OURS, BARE]
    rows, records = [], []
    for task, series in results.items():
        found = [series.get(name, Series(name)) for name in names]
        speed = ratio(series[QEMU], series[OURS])
        times = [number(_milli(one.median)) for one in found]
        peaks = [mebibytes(one.note("peak")) for one in found[:2]]
        costs = [number(_milli(one.cpu)) for one in found[:2]]
        goal = goals[task]
        reached = verdict(Goal(goal), speed, None) if goal else "-"
        rows.append([task, *times, str(speed or "-"), *costs, *peaks, reached])
        records.append(_record(task, found, speed))
    head = ["milliseconds", *names, "speed to qemu-img", "qemu CPU", "our CPU", "qemu memory", "our memory", "goal"]
    size = settings.table_disk >> 30
    title = (
        f"check, map, measure: a full qcow2 of {size} GiB, one of a tenth in random order (fragmented), one of a tenth "
        "with every other cluster (scattered); info"
    )
    report.table(table(title, head, rows))
    report.add("check", records)


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _record(task: str, found: list[Series], speed: Ratio | None) -> dict[str, Any]:
    return {
        "case": task,
        "seconds": {one.name: one.values for one in found},
        "cpu_seconds": {one.name: one.cpu for one in found},
        "peak_bytes": {one.name: one.note("peak") for one in found},
        "speed_ratio_to_qemu_img": vars(speed) if speed else None,
    }

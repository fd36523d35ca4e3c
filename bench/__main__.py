"""python -m bench: runs the benchmarks and prints their tables as Markdown."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from importlib import import_module
from typing import Final

from bench.report import Report, say
from bench.settings import FULL, QUICK, Settings
from bench.tables import table
from bench.workspace import NoRoom, busy_before, load_average, machine, use_this_tree, workspace

PARTS: Final = ("nbd", "convert", "compress", "formats", "mirror", "check")


def main() -> int:
    """Returns 0 when everything could be measured, 1 when a contender failed, 2 when there was no room."""
    given = _arguments()
    settings = _settings(given)
    if busy_before():
        say(f"this machine is busy (load average {load_average()}): trust no figure, and ratios with care")
    with workspace(given.dir) as folder:
        use_this_tree(folder)
        report = Report(machine(folder), {"part": given.part, **dataclasses.asdict(settings)})
        rows = [[name, value] for name, value in report.machine.items()]
        report.table(table("Machine", ["", "at the start"], rows))
        try:
            for part in PARTS if given.part == "all" else (given.part,):
                import_module(f"bench.{part}").run(settings, folder, report)
        except NoRoom as error:
            say(str(error))
            return 2
        finally:
            report.machine["load average at the end"] = load_average()
            if given.json:
                report.write_json(given.json)
    say(f"done; load average {load_average()}")
    if report.failures:
        print("\n".join(["Failed:", "", *(f"- {text}" for text in report.failures)]))
        return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all", help="what to measure (all)")
    parser.add_argument("--quick", action="store_true", help="smaller and shorter: to see that it works, not to quote")
    parser.add_argument("--json", metavar="FILE", help="write all figures, of every round, to this file")
    parser.add_argument("--dir", metavar="DIR", help="work in a new folder in this one (default: the temporary folder)")
    parser.add_argument("--rounds", metavar="N", type=int, help="rounds of every measurement")
    parser.add_argument("--match", metavar="TEXT", default="", help="only configurations with TEXT in their name")
    parser.add_argument("--structured", action="store_true", help="nbd: negotiate structured replies")
    parser.add_argument("--one-by-one", action="store_true", help="nbd: send each request with its own system call")
    parser.add_argument("--fio", action="store_true", help="nbd: load from fio instead")
    return parser.parse_args()


def _settings(given: argparse.Namespace) -> Settings:
    settings = QUICK if given.quick else FULL
    if given.rounds is not None:
        if given.rounds < 1:
            raise SystemExit("--rounds must be 1 or more")
        settings = dataclasses.replace(settings, rounds=given.rounds, mirror_rounds=given.rounds)
    words = {name: getattr(given, name) for name in ("match", "structured", "one_by_one", "fio")}
    return dataclasses.replace(settings, **words)


if __name__ == "__main__":
    sys.exit(main())

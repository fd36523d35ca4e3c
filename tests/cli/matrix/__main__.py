"""``python -m tests.cli.matrix``: counts the command lines, or runs some and shows what differs. ``=info`` is a group,
``--all`` shows what is meant to differ too."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.cli.matrix import cases, images, twins
from tests.cli.matrix.differences import expected


def main(words: list[str]) -> int:
    if words == ["--count"]:
        print(len(cases.every()))
        return 0
    everything = "--all" in words
    wanted = [word for word in words if word != "--all"]
    place = Path(tempfile.mkdtemp(prefix="matrix-"))
    try:
        (place / "prepared").mkdir()
        (place / "scratch").mkdir()
        images.prepare(place / "prepared")
        with images.in_use(place / "prepared"):
            return _run(wanted, place, everything)
    finally:
        shutil.rmtree(place)


def _run(wanted: list[str], place: Path, everything: bool) -> int:
    begin, count, apart = time.monotonic(), 0, 0
    for group, lines in cases.groups().items():
        for words in lines:
            if not all(word[1:] == group if word.startswith("=") else word in " ".join(words) for word in wanted):
                continue
            start = time.monotonic()
            pair = twins.run(words, place / "prepared", place / "scratch")
            if time.monotonic() - start > 0.5:
                print(f"({time.monotonic() - start:.1f} s: {words})", file=sys.stderr)
            count += 1
            if everything or (pair.differing() and not pair.unlucky() and not expected(pair)):
                apart += bool(pair.differing())
                print(pair, flush=True)
    print(f"{count} command lines, {apart} with other results, {time.monotonic() - begin:.1f} s")
    return 1 if apart else 0


sys.exit(main(sys.argv[1:]))

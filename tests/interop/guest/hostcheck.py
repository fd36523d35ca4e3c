"""Checks a guest's disk image on the host, without a guest: nothing acknowledged may be missing, nothing damaged.

    problems = check_image("/tmp/x/target.raw", mode="ext4", acked=guest_acked)
    assert not problems, problems

    python -m tests.interop.guest.hostcheck IMAGE [--mode raw] [--acked N] [--ordered]

The image is raw and is not changed: the file system check works on a copy. An image in another format is converted
first, by a program that the test trusts.

A file system taken from a running machine is one whose plug was pulled. So the check does what a mount would: it
replays the journal and releases the inodes that were being deleted. After that e2fsck must find nothing at all.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile

from tests.interop.guest import records
from tests.peers import find

TIMEOUT = 300.0  # seconds for one program on one image

# What e2fsck may say when it does no more than a mount: anything else is a repair.
_MOUNT_LIKE = re.compile(
    r"^$|recovering journal|Clearing orphaned inode|: clean, |^Setting free (inodes|blocks) count|"
    r"^\S+: (Truncating|Freeing) orphaned inode"
)


def check_image(
    image: str, *, mode: str = "ext4", acked: int = 0, ordered: bool | None = None, torn: bool = False
) -> list[str]:
    """Returns what is wrong with a raw image, as a list of sentences; an empty list means that nothing is.

    acked    newest record known to have been flushed before the image's moment
    ordered  whether the image is the disk at one moment of raw mode, where there may be no gaps at all; None: True in
             raw mode. False for a disk whose server died with unflushed writes.
    torn     allow half-written blocks where the guest was writing (see records.verify)
    """
    if mode == "raw":
        report = records.verify_file(image, acked, True if ordered is None else ordered, torn)
        return _sentences(report, image)
    with tempfile.TemporaryDirectory(prefix="dwcheck", dir=os.path.dirname(os.path.abspath(image))) as scratch:
        copy = os.path.join(scratch, "image")
        _run("cp", "--sparse=always", "--reflink=auto", image, copy)
        problems = _file_system(copy)
        if problems:
            return problems
        return _records(copy, scratch, acked, torn)


def _file_system(copy: str) -> list[str]:
    """Replays the journal on a copy and has everything checked."""
    fsck, debugfs = find("e2fsck"), find("debugfs")
    # Not e2fsck's journal_only: with -f that goes on to repair what the full check below has to find.
    replay = _run(debugfs, "-w", "-R", "journal_run", copy)
    if said := _first(replay):
        return [f"the journal can't be replayed: {said}"]
    settle = _run(fsck, "-p", copy)  # a volume marked clean is only tidied, as by a mount
    odd = [line for line in settle.stdout.splitlines() if not _MOUNT_LIKE.search(line)]
    if settle.returncode not in (0, 1) or odd:
        return [f"the file system needed repair: {'; '.join(odd[:5]) or settle.returncode}"]
    full = _run(fsck, "-f", "-n", copy)
    if full.returncode:
        return [f"e2fsck found errors after journal replay: {_first(full)}"]
    state = _run(debugfs, "-R", "show_super_stats -h", copy).stdout
    found = re.search(r"^Filesystem state:\s*(.*)$", state, re.MULTILINE)
    if not found or found[1] != "clean" or "FS Error count" in state or "needs_recovery" in state:
        return [f"the guest's kernel met errors: state {found[1] if found else 'unknown'}"]
    return []


def _records(copy: str, scratch: str, acked: int, torn: bool) -> list[str]:
    """Takes the record file and the churn files out of the file system and verifies them."""
    debugfs = find("debugfs")
    path = os.path.join(scratch, "records")
    _run(debugfs, "-R", f'dump /records "{path}"', copy)
    if not os.path.exists(path) or not os.path.getsize(path):
        return [f"there is no record file, and {acked} records were acknowledged"] if acked else []
    report = records.verify_file(path, acked, torn=torn)
    plan = records.Plan.parse(_head(path)) if report.ok else None
    if plan is not None and plan.churn and report.newest:
        _run(debugfs, "-R", f'rdump /churn "{scratch}"', copy)
        records.verify_churn(os.path.join(scratch, "churn"), plan, report)
    return _sentences(report, "/records")


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _sentences(report: records.Report, where: str) -> list[str]:
    if report.ok:
        return []
    text = [f"{where}: {problem}" for problem in report.problems]
    if report.count > len(text):
        text.append(f"{where}: {report.count - len(text)} more problems")
    return text


def _first(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the first lines of what a program had to say."""
    banner = re.compile(r"(e2fsck|debugfs) \d")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line and not banner.match(line)]
    return "; ".join(lines[:5])


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, LC_ALL="C.UTF-8")
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=TIMEOUT,
    )


def main() -> int:
    """Checks an image by hand."""
    parser = argparse.ArgumentParser(prog="python -m tests.interop.guest.hostcheck")
    parser.add_argument("image")
    parser.add_argument("--mode", choices=("ext4", "raw"), default="ext4")
    parser.add_argument("--acked", type=int, default=0)
    parser.add_argument("--ordered", action=argparse.BooleanOptionalAction, default=None)
    given = parser.parse_args()
    if not os.path.isfile(given.image):
        print(f"{given.image}: no such image", file=sys.stderr)
        return 1
    problems = check_image(given.image, mode=given.mode, acked=given.acked, ordered=given.ordered)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

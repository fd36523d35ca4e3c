"""fio with its NBD engine: writes and verifies through several connections at once.

python -m tests.peers.fio URI [--connections 4] [--size 16M]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from typing import Any

from tests.peers import find
from tests.peers.process import PeerError, environment, short_folder


def fio(uri: str, *words: str, connections: int = 1, timeout: float = 300.0) -> dict[str, Any]:
    """Runs one job per connection over NBD; ``words`` are fio's options without dashes. Returns its JSON report.

    Raises PeerError when fio fails, which includes a failed verification.
    """
    with tempfile.TemporaryDirectory(prefix="dw", dir=short_folder()) as scratch:  # fio drops state files where it runs
        report = os.path.join(scratch, "report.json")
        command = [find("fio"), "--name=job", "--ioengine=nbd", f"--uri={uri}", f"--numjobs={connections}", "--thread"]
        command += ["--output-format=json", f"--output={report}", "--group_reporting", *(f"--{word}" for word in words)]
        done = subprocess.run(
            command, cwd=scratch, env=environment(), capture_output=True, text=True, check=False, timeout=timeout
        )
        text = ""
        if os.path.exists(report):
            with open(report, encoding="utf-8") as file:
                text = file.read()
    if done.returncode:
        raise PeerError(f"fio: status {done.returncode}: {(done.stderr or done.stdout or text).strip()[-2000:]}")
    result: dict[str, Any] = json.loads(text[text.index("{") :])  # notes may precede the report
    return result


def verify(uri: str, *, size: int, connections: int = 4, block: str = "4k", depth: int = 16) -> dict[str, Any]:
    """Writes ``size`` bytes per connection at random, each connection in its own part of the disk, and reads back."""
    words = ("rw=randwrite", f"bs={block}", f"iodepth={depth}", f"size={size}", f"offset_increment={size}")
    checks = ("verify=crc32c", "verify_fatal=1", "do_verify=1", "verify_backlog=256", "randseed=42")
    return fio(uri, *words, *checks, connections=connections)


def main() -> None:
    """Verifies a server by hand."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.fio")
    parser.add_argument("uri")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--mebibytes", type=int, default=4, help="per connection")
    given = parser.parse_args()
    report = verify(given.uri, size=given.mebibytes << 20, connections=given.connections)
    job = report["jobs"][0]
    print(f"write {job['write']['iops']:.0f} IOPS, read {job['read']['iops']:.0f} IOPS, errors {job['error']}")


if __name__ == "__main__":
    main()

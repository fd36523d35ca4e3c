"""libnbd, through the Python binding that the distribution's own interpreter has: an NBD client that is not ours.

python -m tests.peers.libnbd URI 'print(h.get_size())'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.peers import MissingPeer
from tests.peers.process import PeerError, environment, run

PYTHON = "/usr/bin/python3"  # the binding is compiled for this one and for no virtual environment
_PRELUDE = """
import json, os, sys, threading, nbd
h = nbd.NBD()
{before}
h.connect_uri({uri!r})
"""


def run_snippet(uri: str, code: str, *, before: str = "", timeout: float = 120.0) -> str:
    """Runs ``code`` with ``h``, an nbd.NBD connected to ``uri``, and returns what it printed.

    ``before`` runs before the connection is made, for instance ``h.add_meta_context("base:allocation")``. Raises
    PeerError when the code raises.
    """
    if not os.path.exists(PYTHON):
        raise MissingPeer(f"{PYTHON} is not installed")
    done = subprocess.run(
        [PYTHON, "-I", "-c", _PRELUDE.format(before=before, uri=uri) + code],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    if "No module named 'nbd'" in done.stderr:
        raise MissingPeer("python3-libnbd is not installed (tools/setup.py test installs it)")
    if done.returncode:
        raise PeerError(f"libnbd: {done.stderr.strip()[-2000:]}")
    return done.stdout


def info_json(uri: str, *arguments: str) -> dict[str, Any]:
    """Returns what nbdinfo says of a server's exports."""
    result: dict[str, Any] = json.loads(run("nbdinfo", "--json", *arguments, uri).stdout)
    return result


def map_json(uri: str, context: str = "base:allocation") -> list[dict[str, Any]]:
    """Returns the extents of a metadata context."""
    result: list[dict[str, Any]] = json.loads(run("nbdinfo", f"--map={context}", "--json", uri).stdout)
    return result


def copy(source: str, target: str, *arguments: str) -> None:
    """Copies between NBD URIs and files with nbdcopy."""
    run("nbdcopy", *arguments, source, target)


if __name__ == "__main__":
    print(run_snippet(sys.argv[1], sys.argv[2]), end="")

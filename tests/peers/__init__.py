"""Other people's programs, as instruments: what they say decides whether we read, wrote and served right.

Each module of this package drives one program and can be run by hand (``python -m tests.peers.qemu_nbd --help``).
A missing program raises MissingPeer; ``tests/conftest.py`` turns that into a skip on a developer's machine, and leaves
it the failure it is where CI is set.
"""

from __future__ import annotations

import os
import shutil

# Programs of e2fsprogs and the like are not on an ordinary user's PATH in Debian.
_EXTRA = ("/usr/sbin", "/sbin")


class MissingPeer(Exception):
    """A program that this test needs is not installed."""


def find(name: str) -> str:
    """Returns the path of a program. Raises MissingPeer."""
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(_EXTRA))
    if path is None:
        raise MissingPeer(f"{name} is not installed (tools/setup.py test installs it)")
    return path

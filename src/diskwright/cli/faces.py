"""Faces: the names this program answers to, and whose command line it takes under each.

Called (linked, copied) as ``qemu-img``, ``qemu-io``, ``qemu-nbd`` or ``qemu-storage-daemon`` it takes that program's
command line and calls itself by that name in everything it prints. Under any other name it is ``diskwright``.
"""

from __future__ import annotations

import os
from typing import Final

OWN_NAME: Final = "diskwright"

FACES: Final[dict[str, str | None]] = {
    "qemu-img": None,
    "qemu-io": "io",
    "qemu-nbd": "nbd",
    "qemu-storage-daemon": "daemon",
}
"""By the name: the one subcommand whose command line is the program's; None: the first word names a subcommand."""

_called = OWN_NAME


def program() -> str:
    """What this program is called, for messages and help."""
    return _called


def put_on(path: str) -> str | None:
    """Takes the face for a program called by ``path``; returns the one subcommand of that face, if it has one."""
    global _called
    name = os.path.basename(path)
    _called = name if name in FACES else OWN_NAME
    return FACES.get(name)

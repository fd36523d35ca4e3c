"""Faces: the names this program answers to, and whose command line it takes under each.

Called (linked, copied) as ``qemu-img``, ``qemu-io``, ``qemu-nbd`` or ``qemu-storage-daemon`` it takes that program's
command line and calls itself by that name in everything it prints. Under any other name it is ``diskwright``.

All that depends on the name is said here, in ``FACES``; whoever needs it asks ``current()``. No command asks which face
it is: it declares its options, and the face changes defaults and takes options away before the words are read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

OWN_NAME: Final = "diskwright"


@dataclass(frozen=True)
class Face:
    """One name, and how the program differs under it."""

    name: str
    only: str | None = None
    """The one subcommand whose command line is the program's; None: the first word names a subcommand."""
    commands: Mapping[str, frozenset[str]] | None = None
    """The subcommands there are, each with the long options that may be shortened. Those that only we have must be
    written in full, so that shortened ones mean what they mean to the program of that name. None: all."""
    defaults: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """By subcommand and destination: what an option is when it is not given."""
    lacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By subcommand: options it has under our own name only."""
    version: str = "{name} {version}"
    """What ``--version`` prints."""
    command_help: bool = True
    """Whether a subcommand's ``--help`` is its own, and not the program's."""

    def help_for(self, command: str | None) -> str:
        """The command line that explains ``command``."""
        return f"{self.name} {command} --help" if command and self.command_help else f"{self.name} --help"


_QEMU_VERSION: Final = "{name} version 7.2.0 ({own} {version})"
"""The version whose behaviour is meant comes first, since that is what programs look for."""

_COMMON: Final = ("object", "image-opts", "help")


def _long(*names: str) -> frozenset[str]:
    return frozenset(f"--{name}" for name in (*_COMMON, *names))


_QEMU_IMG: Final = {
    "amend": _long("force"),
    "bench": _long("flush-interval", "pattern", "no-drain", "force-share"),
    "bitmap": _long(
        "add", "remove", "clear", "enable", "disable", "merge", "source-file", "source-format", "granularity"
    ),
    "check": _long("format", "repair", "output", "force-share"),
    "commit": _long(),
    "compare": _long("force-share"),
    "convert": _long(
        "force-share", "target-image-opts", "salvage", "target-is-zero", "bitmaps", "skip-broken-bitmaps"
    ),
    "create": _long(),
    "dd": _long("force-share"),
    "info": _long("format", "output", "backing-chain", "force-share"),
    "map": _long("format", "output", "force-share", "start-offset", "max-length"),
    "measure": _long("output", "size", "force-share"),
    "rebase": _long("force-share"),
    "resize": _long("preallocation", "shrink"),
    "snapshot": _long("force-share"),
}  # fmt: skip

OWN: Final = Face(OWN_NAME)

FACES: Final[dict[str, Face]] = {
    face.name: face
    for face in (
        Face(
            "qemu-img",
            commands=_QEMU_IMG,
            defaults={"convert": {"target_cache": "unsafe"}},
            lacks={
                "create": ("--backing-format",),
                "map": ("--picture", "-o"),
                "snapshot": ("-f", "--format"),
            },
            version=_QEMU_VERSION,
            command_help=False,
        ),
        Face("qemu-io", only="io", version=_QEMU_VERSION, command_help=False),
        Face("qemu-nbd", only="nbd", version=_QEMU_VERSION, command_help=False),
        Face("qemu-storage-daemon", only="daemon", version=_QEMU_VERSION, command_help=False),
    )
}
"""By the name the program is called by."""

_current = OWN


def current() -> Face:
    """The face the program has put on."""
    return _current


def program() -> str:
    """What this program is called, for messages and help."""
    return _current.name


def put_on(path: str) -> Face:
    """Takes the face for a program called by ``path``."""
    global _current
    _current = FACES.get(os.path.basename(path), OWN)
    return _current

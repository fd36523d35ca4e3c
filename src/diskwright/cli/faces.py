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

OWN_OPTIONS: Final = frozenset({"--gate", "--progress", "--compression-level"})
"""What other programs of the same command line do not have. There it must be written in full, so that shortened options
mean what they mean to those."""


@dataclass(frozen=True)
class Face:
    """One name, and how the program differs under it."""

    name: str
    only: str | None = None
    """The one subcommand whose command line is the program's; None: the first word names a subcommand."""
    commands: frozenset[str] | None = None
    """The subcommands there are; None: all."""
    defaults: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """By subcommand and destination: what an option is when it is not given."""
    lacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By subcommand: options it has under our own name only."""
    unshortened: frozenset[str] = frozenset()
    version: str = "{name} {version}"
    """What ``--version`` prints."""
    command_help: bool = True
    """Whether a subcommand's ``--help`` is its own, and not the program's."""

    def help_for(self, command: str | None) -> str:
        """The command line that explains ``command``."""
        return f"{self.name} {command} --help" if command and self.command_help else f"{self.name} --help"


_QEMU_VERSION: Final = "{name} version 7.2.0 ({own} {version})"
"""The version whose behaviour is meant comes first, since that is what programs look for."""

OWN: Final = Face(OWN_NAME)

FACES: Final[dict[str, Face]] = {
    face.name: face
    for face in (
        Face(
            "qemu-img",
            commands=frozenset(
                (
                    "amend",
                    "bench",
                    "bitmap",
                    "check",
                    "commit",
                    "compare",
                    "convert",
                    "create",
                    "dd",
                    "info",
                    "map",
                    "measure",
                    "rebase",
                    "resize",
                    "snapshot",
                )
            ),  # fmt: skip
            defaults={"convert": {"target_cache": "unsafe"}},
            lacks={"snapshot": ("-f", "--format")},
            unshortened=OWN_OPTIONS,
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

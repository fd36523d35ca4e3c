"""``diskwright tools``: puts this program in the place of qemu-img and its siblings, and takes it away again."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from diskwright.cli import common
from diskwright.cli.common import Failure, UsageError
from diskwright.cli.faces import FACES, OWN_NAME, program

SUMMARY: Final = "install links by which this program is called as qemu-img and its siblings"

_MARK: Final = b"# Made by 'diskwright tools install'."
"""In the first lines of a launcher, so that it is known again."""

_LONGEST_SHEBANG: Final = 120
"""Kernels before 5.1 cut the first line of a script off after 127 bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    common.add_output(parser)
    parser.add_argument("action", metavar="install|uninstall|list")
    parser.add_argument(
        "operands", nargs="*", metavar="DIRECTORY [NAME ...]",
        help=f"where the links go, and which (default: all of {', '.join(FACES)}); for list: where to look too",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    actions = {"install": _install, "uninstall": _uninstall, "list": _list}
    if args.action not in actions:
        raise UsageError(f"Unknown action '{args.action}'; there are {', '.join(actions)}")
    return actions[args.action](args)


# -- installing ----------------------------------------------------------------------------------


def _install(args: argparse.Namespace) -> int:
    """All of the links or none: whatever stands in the way is found before the first is made."""
    directory, names = _operands(args.operands)
    if not os.path.isdir(directory):
        raise Failure(f"'{directory}' is not a directory")
    paths = [os.path.join(directory, name) for name in names]
    for path in paths:
        if os.path.lexists(path) and not is_ours(path):
            raise Failure(f"'{path}' exists and is not one of ours; nothing was installed")
    target = executable()
    for path in paths:
        try:
            _make(path, target)
        except OSError as error:
            raise Failure(f"Could not make '{path}': {error.strerror or error}") from error
        if not args.quiet:
            print(f"{path} -> {target or f'{sys.executable} -m {OWN_NAME}'}")
    for name, path in zip(names, paths, strict=True):
        found = next(_on_path(name), None)
        if found is None or not _same(found, path):
            where = f"'{found}' comes first there" if found else "its directory is not in it"
            print(f"{program()}: warning: PATH does not lead to '{path}': {where}", file=sys.stderr)
    return 0


def _uninstall(args: argparse.Namespace) -> int:
    directory, names = _operands(args.operands)
    for path in (os.path.join(directory, name) for name in names):
        if not os.path.lexists(path):
            continue
        if not is_ours(path):
            print(f"{program()}: warning: '{path}' is not one of ours, and was left alone", file=sys.stderr)
            continue
        try:
            os.unlink(path)
        except OSError as error:
            raise Failure(f"Could not remove '{path}': {error.strerror or error}") from error
        if not args.quiet:
            print(f"{path} removed")
    return 0


def _operands(operands: Sequence[str]) -> tuple[str, list[str]]:
    """The directory, and the names in question."""
    if not operands:
        raise UsageError("Expecting a directory")
    directory, *names = operands
    for name in names:
        if name not in FACES:
            raise UsageError(f"'{name}' is not a name this program answers to; there are {', '.join(FACES)}")
    return os.path.abspath(directory), names or [name for name in FACES if _works(name)]


def _works(name: str) -> bool:
    """Whether what that name stands for is part of this program."""
    from importlib.util import find_spec

    only = FACES[name].only
    return only is None or find_spec(f"diskwright.cli.commands.{only}") is not None


def _make(path: str, target: str | None) -> None:
    """A link to ``target``, or a launcher when there is nothing to link to; in the place of what is there."""
    new = f"{path}.{os.getpid()}.new"
    try:
        if target is not None:
            os.symlink(target, new)
        else:
            with open(new, "wb") as file:
                file.write(launcher())
            os.chmod(new, 0o755)
        os.replace(new, path)
    except BaseException:
        try:
            os.unlink(new)
        except OSError:
            pass
        raise


def executable() -> str | None:
    """The installed program: the script this process was called as; None when it was called as a module."""
    called = sys.argv[0]
    if os.path.basename(called) not in (OWN_NAME, *FACES):
        return None
    path = os.path.realpath(called)
    return path if os.path.isfile(path) and os.access(path, os.X_OK) else None


def launcher() -> bytes:
    """A script that runs this package in this interpreter. Its own directory is nothing Python looks for modules in."""
    python = os.fsencode(sys.executable)
    first = b"#!%s -P" % python
    if len(first) > _LONGEST_SHEBANG or b" " in python:
        # To the shell this is a command, to Python a string.
        first = b"#!/bin/sh\n'''exec' '%s' -P \"$0\" \"$@\"\n'''" % python.replace(b"'", b"'\\''")
    lines = [first, _MARK, b"import sys"]
    home = os.path.dirname(os.path.dirname(os.path.abspath(sys.modules["diskwright"].__file__ or "")))
    if not _is_found_anyway(home):
        lines.append(b"sys.path.insert(0, %s)" % ascii(home).encode())
    lines += [b"from diskwright.cli.main import main", b"sys.exit(main())", b""]
    return b"\n".join(lines)


def _is_found_anyway(directory: str) -> bool:
    import site

    return directory in {os.path.abspath(path) for path in (*site.getsitepackages(), site.getusersitepackages())}


# -- telling ours from others --------------------------------------------------------------------


def is_ours(path: str) -> bool:
    """Whether ``path`` is a link to this program (of any installation, even one that is gone), or a launcher."""
    if os.path.islink(path):
        return os.path.basename(os.path.realpath(path)) == OWN_NAME
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return _MARK in file.read(4096)
    except OSError:
        return False


def _on_path(name: str) -> Iterator[str]:
    """The programs called ``name`` that PATH has, in its order."""
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(directory or os.curdir, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            yield os.path.abspath(path)


def _same(path: str, other: str) -> bool:
    return os.path.realpath(os.path.dirname(path)) == os.path.realpath(os.path.dirname(other))


def _list(args: argparse.Namespace) -> int:
    """What each name leads to, the first of each name being the one that is run."""
    as_json = common.check_output(args)
    rows: list[dict[str, object]] = []
    for name in FACES:
        more = [os.path.join(directory, name) for directory in args.operands]
        for path in dict.fromkeys(
            [*_on_path(name), *(os.path.abspath(path) for path in more if os.path.lexists(path))]
        ):
            rows.append({"name": name, "path": path, "ours": is_ours(path)})
    if as_json:
        from diskwright.cli.output import json_text

        print(json_text(rows))
        return 0
    for row in rows:
        print(f"{row['name']:<20} {OWN_NAME if row['ours'] else 'other':<10} {row['path']}")
    return 0

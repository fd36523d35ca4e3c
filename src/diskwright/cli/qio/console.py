"""The program: its command line, and commands from there or from standard input."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from diskwright.cli.common import Failure
from diskwright.cli.faces import program
from diskwright.cli.objects import Objects, objects_of
from diskwright.cli.qio import arguments, table
from diskwright.cli.qio.control import open_named
from diskwright.cli.qio.language import CommandError, Misuse, Refused, split
from diskwright.cli.qio.session import Session, explain
from diskwright.errors import DiskwrightError, FatalError

_MAX_LINE: Final = 1 << 20
"""Longest line taken from standard input, in bytes."""


def run(words: Sequence[str]) -> int:
    """Carries out a command line; returns the exit code: 1 when any command has failed."""
    try:
        return _run(arguments.parse(words))
    except arguments.Done:
        return 0
    except Misuse:
        return 1
    except Refused as problem:
        raise Failure(problem.message) from problem


def _run(found: arguments.Arguments) -> int:
    objects = _objects(found)
    session = Session(objects.secrets, image_opts=found.image_opts, groups=objects.groups)
    session.how = found.opening
    try:
        if found.image is not None:
            open_named(session, found.image, found.opening)
        lines = found.commands if found.commands else _from_stdin(session)
        good = True
        for line in lines:
            good &= execute(session, line)
            if session.finished:
                break
    except BaseException:
        _abandon(session)
        raise
    try:
        session.end()
    except FatalError:
        raise
    except (DiskwrightError, OSError) as error:
        explain(error)
        good = False
    return 0 if good else 1


def _abandon(session: Session) -> None:
    """Closes what is open after something that was not foreseen, of which is told, not of what follows from it."""
    try:
        session.end()
    except (DiskwrightError, OSError):
        pass


def _objects(found: arguments.Arguments) -> Objects:
    return objects_of(found.objects)


def execute(session: Session, line: str) -> bool:
    """Carries out one line; returns whether that succeeded. What it says of failure has been printed."""
    words = split(line)
    if not words:
        return True
    name, rest = words[0], words[1:]
    command = table.find(name)
    try:
        _dispatch(session, command, name, rest)
    except CommandError as problem:
        if isinstance(problem, Misuse):
            assert command is not None, "only commands can be misused"
            print(command.usage())
        elif isinstance(problem, Refused):
            _say(f"{program()}: {problem.message}")
        elif problem.message:
            print(problem.message)
        return False
    except (BrokenPipeError, FatalError):
        raise
    except (DiskwrightError, OSError, MemoryError) as error:
        explain(error)
        return False
    finally:
        if command is not None and not command.quick:
            session.deliver()
    return True


def _dispatch(session: Session, command: table.Command | None, name: str, words: list[str]) -> None:
    """Raises CommandError, having said what it does not carry."""
    if command is None:
        _say(f'command "{name}" not found')
        raise CommandError()
    if command.needs_disk and session.disk is None:
        _say("no file open, try 'help open'")
        raise CommandError()
    wrong = command.wrong_count(name, len(words))
    if wrong:
        _say(wrong)
        raise CommandError()
    if command.writes and session.open_disk.read_only:
        raise Refused("Block node is read-only")
    command.run(session, words)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


# -- standard input ------------------------------------------------------------------------------


def _from_stdin(session: Session) -> Iterator[str]:
    """Lines, each after a prompt; meanwhile it is told of requests in the background that end."""
    prompt = f"{program()}> "
    if sys.stdin.isatty():
        yield from _typed(prompt)
        return
    pending = b""
    more = True
    while True:
        sys.stdout.write(prompt)
        sys.stdout.flush()
        while more and b"\n" not in pending and len(pending) < _MAX_LINE:
            _await_input(session)
            piece = os.read(sys.stdin.fileno(), 65536)
            pending, more = pending + piece, bool(piece)
        line, _, pending = pending.partition(b"\n")
        if not line and not more and not pending:
            return
        yield os.fsdecode(line)


def _await_input(session: Session) -> None:
    while session.busy:
        ready, _, _ = select.select([sys.stdin, session.background], [], [])
        if sys.stdin in ready:
            return
        session.deliver()
        sys.stdout.flush()


def _typed(prompt: str) -> Iterator[str]:
    """Lines from a terminal, which can be edited."""
    try:
        import readline  # noqa: F401 - input() then uses it
    except ImportError:
        pass
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return

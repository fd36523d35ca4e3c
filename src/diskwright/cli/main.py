"""The entry point: finds the subcommand's module, runs it, and turns every error into one line and an exit code.

A subcommand is a module of ``cli.commands`` with

* ``SUMMARY``, one line for the list of commands, and either
* ``add_arguments(parser)``, which describes its options and operands, and ``run(args)``, which returns the exit code,
* or ``main(words)``, which does it all: for a command line that is a whole program's.

Nothing else names it: adding one is adding a module. Only the module asked for is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from diskwright.cli import faces
from diskwright.cli.common import Failure, Parser, UsageError
from diskwright.cli.faces import program
from diskwright.errors import DiskwrightError, FatalError, message_of

_COMMANDS: Final = "diskwright.cli.commands"

TRACEBACK: Final = "DISKWRIGHT_TRACEBACK"
"""When this environment variable is set, an error ends with Python's traceback: for finding bugs."""

INTERRUPTED: Final = 130  # 128 + SIGINT, as shells count


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Never raises, except under ``DISKWRIGHT_TRACEBACK``."""
    if arguments is None:
        faces.put_on(sys.argv[0])
        _spare_threads()
    words = list(sys.argv[1:] if arguments is None else arguments)
    _let_any_name_through()
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except SystemExit as request:  # argparse's --help
        return request.code if isinstance(request.code, int) else 1
    except BrokenPipeError:
        _abandon_stdout()
        return 1
    except BaseException as error:
        if os.environ.get(TRACEBACK):
            raise
        _flush_or_abandon()
        return _report(error, words)


def _run(words: list[str]) -> int:
    only = faces.current().only
    if only is not None:
        return _perform(only, words)
    if not words:
        raise UsageError("Not enough arguments")
    args, rest = _standard().parse_leading(words)
    for pattern in args.trace or ():
        _no_trace(pattern)
    if args.first is not None:
        print(_overview() if args.first == "help" else _version(), end="")
        return 0
    if not rest:
        raise UsageError("Not enough arguments")
    if rest[0] == "help" and faces.current().command_help:
        print(_overview(), end="")
        return 0
    return _perform(rest[0], rest[1:])


class _First(argparse.Action):
    """Of ``--help`` and ``--version`` the first counts."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.first = namespace.first or self.const


def _standard() -> Parser:
    """The options before the command."""
    parser = Parser(prog=program())
    parser.drop(("-h", "--help"))
    parser.add_argument("-h", "--help", action=_First, nargs=0, const="help", dest="first")
    parser.add_argument("-V", "--version", action=_First, nargs=0, const="version", dest="first")
    parser.add_argument("-T", "--trace", action="append")
    return parser


def _no_trace(pattern: str) -> None:
    """There are no trace events; whoever asks for one by name is told."""
    name = pattern.removeprefix("enable=").split(",")[0]
    if name not in ("help", "?") and "*" not in name and not name.startswith(("events=", "file=")):
        print(f"{program()}: warning: trace event '{name}' does not exist", file=sys.stderr)


def _perform(name: str, words: list[str]) -> int:
    command = _command(name)
    if hasattr(command, "main"):
        return int(command.main(words))
    parser = _parser(name, command)
    if not faces.current().command_help:
        parser.print_help = lambda file=None: print(_overview(), end="")  # type: ignore[method-assign]
    code: int = command.run(parser.parse(words))
    return code


def _parser(name: str, command: Any) -> Parser:
    """The command's options as the present face has them."""
    face = faces.current()
    parser = Parser(prog=f"{face.name} {name}", description=command.SUMMARY)
    command.add_arguments(parser)
    parser.drop(face.lacks.get(name, ()))
    parser.set_defaults(**face.defaults.get(name, {}))
    parser.shortened = face.commands[name] if face.commands is not None else None
    return parser


def _spare_threads() -> None:
    """NumPy's linear algebra starts a thread for each processor as it is loaded, which takes a third of that time;
    nothing here uses any."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _command(name: str) -> Any:
    module = name.replace("-", "_")
    known = faces.current().commands
    if module.isidentifier() and not module.startswith("_") and (known is None or name in known):
        full = f"{_COMMANDS}.{module}"
        if find_spec(full) is not None:
            return import_module(full)
    raise UsageError(f"Command not found: {name}")


def _overview() -> str:
    """The help for everything. Loads all commands, which only this does."""
    from pkgutil import iter_modules

    import diskwright.cli.commands

    face = faces.current()
    names = sorted(info.name.replace("_", "-") for info in iter_modules(diskwright.cli.commands.__path__))
    if face.commands is not None:
        from diskwright.cli.help import page

        return page(face, [(name, _parser_or_why_not(name)) for name in names if name in face.commands])
    rows = [(name, _summary(name)) for name in names]
    width = max(len(name) for name, _ in rows)
    lines = [f"usage: {program()} COMMAND [options] ...", "", "Works on virtual disk images.", "", "commands:"]
    lines += [f"  {name.ljust(width)}  {summary}" for name, summary in rows]
    lines += ["", f"'{program()} COMMAND --help' tells a command's options; '{program()} --version' the version."]
    return "\n".join(lines) + "\n"


def _version() -> str:
    from diskwright.cli.help import version

    return version(faces.current()) + "\n"


def _parser_or_why_not(name: str) -> object:
    try:
        return _parser(name, _command(name))
    except ImportError as error:  # one command's missing library must not hide the others
        return error


def _summary(name: str) -> str:
    try:
        return str(_command(name).SUMMARY)
    except ImportError as error:
        return f"(not available: {error})"


def _report(error: BaseException, words: list[str]) -> int:
    """Says what went wrong, in one line (and a hint where the command line was wrong); returns the exit code."""
    hint = ""
    code = 1
    if isinstance(error, Failure):
        text, code = error.message, error.code
        if isinstance(error, UsageError):
            about = words[0] if words and _is_command(words[0]) else None
            hint = f"\nTry '{faces.current().help_for(about)}' for more information"
    elif isinstance(error, KeyboardInterrupt):
        text, code = "interrupted", INTERRUPTED
    elif isinstance(error, (DiskwrightError, OSError)):
        text = message_of(error)
    elif isinstance(error, MemoryError):
        text = "out of memory"
    elif isinstance(error, RecursionError):
        text = "something in the command line or an image is nested too deeply"
    elif isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("diskwright"):
        text = f"this needs the Python package '{error.name}', which is not installed"
    else:
        detail = " ".join(str(error).split())
        text = f"internal error: {type(error).__name__}: {detail} (set {TRACEBACK}=1 to see where)"
    from diskwright.cli.hints import hint_for  # here: a command that succeeds needs none

    try:
        hint = hint_for(text, words) or hint
        print(text if isinstance(error, FatalError) else f"{program()}: {text}{hint}", file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody is listening; the exit code still tells
    return code


def _is_command(name: str) -> bool:
    try:
        _command(name)
    except UsageError:
        return False
    return True


def _let_any_name_through() -> None:
    """File names are bytes: one that is not text in this locale must still be printable."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="surrogateescape")


def _flush_or_abandon() -> None:
    """What was printed before an error comes out before its message."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _abandon_stdout()


def _abandon_stdout() -> None:
    """Standard output is gone: nothing more goes there, and the interpreter's last flush must not complain."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass


if __name__ == "__main__":
    sys.exit(main())

"""The command line, described: what completion and manual pages are made of.

Nothing is written down twice: all of it comes from the parsers of the commands and the options of the drivers. What an
option's value can be follows from its choices, or from what it is called in the help text (``FMT``, ``FILE``, ...).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Final

from diskwright.cli.common import CACHE_MODES, Parser
from diskwright.cli.faces import OWN_NAME

FORMAT: Final = "format"
FILE: Final = "file"
KEYS: Final = "keys"
WORDS: Final = "words"
OTHER: Final = "other"
"""What a value can be: a format's name, a file's, ``key=value`` pairs of a format, one of ``words``, anything."""

_BY_METAVAR: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "FMT": (FORMAT, ()),
    "FORMAT": (FORMAT, ()),
    "OPTIONS": (KEYS, ()),
    "CACHE": (WORDS, CACHE_MODES),
    "MODE": (WORDS, ("off", "metadata", "falloc", "full")),
    "DEF": (WORDS, ("secret,id=",)),
    **dict.fromkeys(("FILE", "PATH", "IMAGE", "BASE", "DIR", "SOURCE", "TARGET", "FILENAME"), (FILE, ())),
}


@dataclass(frozen=True)
class OptionText:
    """One option. ``value`` is what its value is called, '' when it takes none; ``optional``: it may be left out, and
    otherwise follows an equals sign."""

    names: tuple[str, ...]
    value: str
    help: str
    kind: str = OTHER
    words: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class OperandText:
    """The operands as they are told, and the words they can be (``if=`` with what follows it: FILE or OTHER)."""

    text: str
    help: str
    words: tuple[str, ...] = ()
    pairs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CommandText:
    """One subcommand. ``amends``: its ``-o`` takes the options for amending, not those for creating."""

    name: str
    summary: str
    options: tuple[OptionText, ...]
    operands: tuple[OperandText, ...]
    exit_codes: Mapping[int, str]
    amends: bool = False


def command_names() -> list[str]:
    import diskwright.cli.commands

    return sorted(info.name.replace("_", "-") for info in iter_modules(diskwright.cli.commands.__path__))


def commands() -> list[CommandText]:
    """Every subcommand whose libraries are there."""
    found = []
    for name in command_names():
        try:
            module = import_module(f"diskwright.cli.commands.{name.replace('-', '_')}")
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith("diskwright"):
                raise
            continue
        found.append(describe(name, module))
    return found


def describe(name: str, module: Any) -> CommandText:
    """A subcommand, from its module: from its parser, or where it reads its command line itself, from its help."""
    codes = getattr(module, "EXIT_CODES", {})
    if not hasattr(module, "add_arguments"):
        return CommandText(name, module.SUMMARY, tuple(_from_help(module)), (), codes)
    parser = Parser(prog=f"{OWN_NAME} {name}", description=module.SUMMARY)
    module.add_arguments(parser)
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    options = tuple(_option(action) for action in actions if action.option_strings)
    operands = tuple(_operand(action) for action in actions if not action.option_strings)
    return CommandText(name, module.SUMMARY, options, operands, codes, amends=name == "amend")


_HELP_LINE: Final = re.compile(r" {2,6}(?:(-\w), )?(--[a-z-]+)(?:[ =]([A-Z]{2,}\S*))? +(\S.*)")
"""A line of a help text that begins an option: its short name, its long one, its value and what it does."""

_CHOICE: Final = re.compile(r"((?:[a-z_]+(?: \(\w+\))?, )*[a-z_]+)(?: \(\w+\))? or ([a-z_]+)")
"""``none, writeback (default) or unsafe``"""


def _from_help(module: Any) -> list[OptionText]:
    """The options that ``--help`` tells of."""
    import contextlib
    import io

    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        module.main(["--help"])
    found: list[OptionText] = []
    for line in told.getvalue().splitlines():
        match = _HELP_LINE.fullmatch(line)
        if match:
            short, long, value, text = match.groups()
            found.append(_option_told((short, long) if short else (long,), value or "", text))
        elif found and line.startswith(" " * 20):
            last = found.pop()
            found.append(_option_told(last.names, last.value, f"{last.help} {line.strip()}"))
    return found


def _option_told(names: tuple[str, ...], value: str, help: str) -> OptionText:
    if value == "MODE":
        match = _CHOICE.search(help)
        words = tuple(re.findall(r"[a-z_]+", re.sub(r"\(\w+\)", "", match[0].replace(" or ", ", ")))) if match else ()
        return OptionText(names, value, help, WORDS if words else OTHER, words)
    return OptionText(names, value, help, *_BY_METAVAR.get(value, (OTHER, ())))


def _option(action: argparse.Action) -> OptionText:
    names = tuple(action.option_strings)
    help = _help(action)
    if action.nargs == 0:
        return OptionText(names, "", help)
    if action.choices is not None:
        words = tuple(map(str, action.choices))
        return OptionText(names, "|".join(words), help, WORDS, words, optional=action.nargs == "?")
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper().replace("_", "-")
    if re.fullmatch(r"[a-z0-9]+(\|[a-z0-9]+)+", value):
        return OptionText(names, value, help, WORDS, tuple(value.split("|")))
    kind, words = _BY_METAVAR.get(value, (OTHER, ()))
    return OptionText(names, value, help, kind, words)


def _operand(action: argparse.Action) -> OperandText:
    text = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    words = tuple(map(str, action.choices)) if action.choices is not None else ()
    help = _help(action)
    pairs = {key: FILE if what in ("SOURCE", "TARGET") else OTHER for key, what in re.findall(r"(\w+)=([A-Z]+)", help)}
    return OperandText("|".join(words) or text, help, words, pairs)


def _help(action: argparse.Action) -> str:
    return " ".join((action.help or "").replace("%%", "%").split())


# -- formats -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyText:
    """One key of ``-o``."""

    name: str
    value: str
    help: str
    words: tuple[str, ...]


def format_names() -> list[str]:
    from diskwright.core import registry

    return sorted(driver.name for driver in registry.formats())


def keys(*, amends: bool) -> dict[str, list[KeyText]]:
    """The keys of ``-o`` by format, of those formats that have any."""
    from diskwright.core import registry

    found = {}
    for driver in registry.formats():
        rows = _keys(driver.amend_options if amends else driver.create_options)
        if rows:
            found[driver.name] = rows
    return dict(sorted(found.items()))


def _keys(options: type) -> list[KeyText]:
    from diskwright.core.options import BOOL, OneOf
    from diskwright.core.options import describe as describe_options

    rows = []
    for info in describe_options(options):
        words = info.type.words if isinstance(info.type, OneOf) else ("on", "off") if info.type is BOOL else ()
        rows.append(KeyText(info.name.replace("-", "_"), info.type.label, info.help, tuple(words)))
    return sorted(rows, key=lambda row: row.name)

"""Help that describes the whole program on one page, made from what the subcommands declare."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from diskwright.cli.faces import OWN_NAME, Face
from diskwright.cli.parser import Parser
from diskwright.version import __version__


def version(face: Face) -> str:
    """The line ``--version`` prints."""
    return face.version.format(name=face.name, own=OWN_NAME, version=__version__)


def page(face: Face, commands: Iterable[tuple[str, Any]]) -> str:
    """All subcommands with all their options, and the formats: what programs search for what this one can do.

    ``commands`` are names and parsers, or the error that kept a command from being loaded.
    """
    return "\n".join(
        [
            version(face),
            f"usage: {face.name} [standard options] command [command options]",
            "Works on virtual disk images.",
            "",
            "    '-h', '--help'       this text",
            "    '-V', '--version'    the version",
            "    '-T', '--trace'      accepted; there are no trace events",
            "",
            "Command syntax:",
            *(f"  {syntax(name, parser)}" for name, parser in commands),
            "",
            "Command parameters:",
            *explanations(parser for _, parser in commands if isinstance(parser, Parser)),
            "",
            f"Supported formats: {' '.join(_drivers())}",
            "",
            f"This is {OWN_NAME}: '{OWN_NAME} COMMAND --help' explains a command and its options.",
            "",
        ]
    )


def syntax(name: str, parser: object) -> str:
    """One line: ``info [-f FMT] [--output=human|json] filename``."""
    if not isinstance(parser, Parser):
        return f"{name} (not available: {parser})"
    return " ".join([name, *_words(parser)])


def _words(parser: Parser) -> Iterator[str]:
    for action in _options(parser):
        short = [name for name in action.option_strings if not name.startswith("--")]
        flag = short[0] if short else action.option_strings[0]
        if action.nargs == 0:
            yield f"[{flag}]"
        else:
            yield f"[{flag}{' ' if short else '='}{_value(action)}]"
    for action in parser._get_positional_actions():
        yield str(action.metavar or action.dest)


def explanations(parsers: Iterable[Parser]) -> list[str]:
    """One line for each option and what it is for, in the words of the first command that has it."""
    lines: dict[str, str] = {}
    for parser in parsers:
        for action in _options(parser):
            flag = action.option_strings[0]
            value = "" if action.nargs == 0 else f" {_value(action)}"
            lines.setdefault(flag, f"  '{flag}{value}' {(action.help or '').replace('%%', '%')}")
    return [lines[flag] for flag in sorted(lines, key=lambda flag: (flag.lstrip("-").lower(), flag))]


def _options(parser: Parser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help":
            yield action


def _value(action: argparse.Action) -> str:
    return "|".join(action.choices) if action.choices else str(action.metavar or action.dest.upper())


def _drivers() -> list[str]:
    from diskwright.core import registry

    kinds = (registry.formats, registry.storages, registry.filters)
    return sorted({driver.name for kind in kinds for driver in kind()})

"""Hints: what to do about an error, for people.

They are shown on a terminal only: what scripts see stays one line. ``DISKWRIGHT_HINTS=1`` shows them everywhere,
``DISKWRIGHT_HINTS=0`` nowhere. Under another program's name there are none.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from diskwright.cli.faces import OWN_NAME, program

HINTS: Final = "DISKWRIGHT_HINTS"
"""The environment variable."""

_CLOSE: Final = 0.55
"""How alike a word must be to be offered in another's place; from 0, nothing in common, to 1."""


def hint_for(text: str, words: Sequence[str]) -> str:
    """A line, with the newline in front, to follow the error ``text`` of the command line ``words``; '' for none."""
    setting = os.environ.get(HINTS)
    if program() != OWN_NAME or setting == "0" or (setting != "1" and not sys.stderr.isatty()):
        return ""
    for pattern, advice in _ADVICE:
        match = re.search(pattern, text)
        if match:
            try:
                found = advice(match, words)
            except Exception:  # a hint must never hide what it is about
                found = ""
            return f"\n{found}" if found else ""
    return ""


def _unknown_format(match: re.Match[str], words: Sequence[str]) -> str:
    from diskwright.cli.describe import format_names

    names = format_names()
    return _meant(match[1], names) or f"Formats are {', '.join(names)}."


def _unknown_command(match: re.Match[str], words: Sequence[str]) -> str:
    from diskwright.cli.describe import command_names

    return _meant(match[1], command_names())


def _unknown_option(match: re.Match[str], words: Sequence[str]) -> str:
    return _meant(match[1].partition("=")[0], _options(words))


def _unknown_key(match: re.Match[str], words: Sequence[str]) -> str:
    from diskwright.cli.describe import keys

    found = keys(amends=bool(words) and words[0] == "amend")
    known = sorted({row.name for rows in found.values() for row in rows})
    return _meant(match[1].replace("-", "_"), known) or "'-o help' lists the options of a format."


def _written_to(match: re.Match[str], words: Sequence[str]) -> str:
    others = "Another program has the image open for writing, a running guest perhaps."
    if "-U" in _options(words):
        return f"{others} -U looks at it all the same: what is shown may be out of date, and must not be relied on."
    return f"{others} Let it finish first; to copy a disk in use there is '{OWN_NAME} mirror'."


def _in_use(match: re.Match[str], words: Sequence[str]) -> str:
    return (
        "Another program has the image open, and this command needs it to itself: end that program, or shut the guest "
        "down. -U would not help: it is for reading."
    )


def _needs_format(match: re.Match[str], words: Sequence[str]) -> str:
    detected = re.search(r"detected as (\w+)", match.string)
    return f"Say which format the backing file is in: -F {detected[1] if detected else 'FMT'}."


def _not_a_size(match: re.Match[str], words: Sequence[str]) -> str:
    return "Sizes are like 10737418240, 10G or 1.5T: no space, no 'GB', no 'GiB'; G is 1024 x 1024 x 1024."


def _backing_gone(match: re.Match[str], words: Sequence[str]) -> str:
    return (
        f"'{OWN_NAME} inspect' tells what the image names without opening it; if the backing file was moved, "
        f"'{OWN_NAME} rebase -u -b NEW -F FMT IMAGE' corrects the name."
    )


def _gate(match: re.Match[str], words: Sequence[str]) -> str:
    return "If you trust the image's maker: --gate directory follows names within its directory, --gate open all."


_Advice = Callable[[re.Match[str], Sequence[str]], str]

_ADVICE: Final[tuple[tuple[str, _Advice], ...]] = (
    (r"Unknown (?:driver|file format) '([^']*)'", _unknown_format),
    (r"^Command not found: (\S+)", _unknown_command),
    (r"^unrecognized option '([^']*)'", _unknown_option),
    (r"(?:Invalid parameter|has no option) '([^']*)'", _unknown_key),
    (r'Failed to get shared "\w+" lock', _written_to),
    (r'Failed to get "\w+" lock', _in_use),
    (r"without backing format|backing format must be specified", _needs_format),
    (r"is not a size|expects a non-negative number|Invalid size|suffixes for", _not_a_size),
    (r"references are not followed here|not a file in the image's own directory", _gate),
    (r"Could not open backing file", _backing_gone),
)
"""What a message says, and who knows what to do about it. The first that fits is asked."""


def _meant(word: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=_CLOSE)
    return f"Did you mean '{close[0]}'?" if close else ""


def _options(words: Sequence[str]) -> list[str]:
    """The options of the subcommand that ``words`` begin with."""
    from importlib import import_module

    from diskwright.cli.describe import command_names, describe

    if not words or words[0] not in command_names():
        return ["--help", "--version"]
    module = import_module(f"diskwright.cli.commands.{words[0].replace('-', '_')}")
    return [name for option in describe(words[0], module).options for name in option.names]

"""blkdebug's configuration file: groups of ``name = "value"`` lines.

# a comment
[inject-error]
event = "read_aio"
errno = "5"

[set-state "any name"]
event = "write_aio"
new_state = "2"
"""

from __future__ import annotations

import re
from typing import Any, Final

from diskwright.core.options import parse
from diskwright.errors import OptionError
from diskwright.filters.blkdebug.rules import InjectError, SetState
from diskwright.units import KiB

MAX_BYTES: Final = 256 * KiB
"""Longest file accepted: thousands of rules."""

_GROUP: Final = re.compile(r'\[\s*([^\s"\]]+)(?:\s+"([^"]*)")?\s*\]\Z')
_VALUE: Final = re.compile(r'([^\s="\[\]]+)\s*=\s*"([^"]*)"\Z')
_KINDS: Final[dict[str, type]] = {"inject-error": InjectError, "set-state": SetState}


class _Group:
    def __init__(self, kind: str, line: int) -> None:
        self.kind, self.line = kind, line
        self.values: dict[str, object] = {}
        self.lines: dict[str, int] = {}


def read_config(path: str) -> tuple[list[InjectError], list[SetState]]:
    """The rules of the file. Raises OptionError, which names the line, or OSError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        text = f"Could not read blkdebug config file: {error.strerror}"
        raise OSError(error.errno, text, path) from error
    if len(raw) > MAX_BYTES:
        raise OptionError(f"{path}: is longer than {MAX_BYTES} bytes, the longest configuration accepted")
    rules: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
    for group in _groups(path, raw.decode("utf-8", "surrogateescape")):
        rules[group.kind].append(_rule(path, group))
    return rules["inject-error"], rules["set-state"]


def _groups(path: str, text: str) -> list[_Group]:
    groups: list[_Group] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if found := _GROUP.match(line):
            if found[1] not in _KINDS:
                raise _wrong(
                    path, number, f"there is no option group '{_shown(found[1])}'; there are {', '.join(_KINDS)}"
                )
            groups.append(_Group(found[1], number))
        elif found := _VALUE.match(line):
            if not groups:
                raise _wrong(path, number, "no group defined before this line")
            name = found[1].replace("-", "_")
            groups[-1].values[name] = found[2]  # the last of several counts
            groups[-1].lines[name] = number
        else:
            # The line itself is not shown: by mistake, or by an image's choice, this may be any file.
            raise _wrong(path, number, 'this is neither [group] nor name = "value"')
    return groups


def _rule(path: str, group: _Group) -> Any:
    """The rule of a group. Which line is to blame is found by looking at one value after the other."""
    options = _KINDS[group.kind]
    for name, value in group.values.items():
        try:
            parse(options, {"event": "none", name: value}, owner=group.kind)
        except OptionError as error:
            raise _wrong(path, group.lines[name], str(error)) from None
    try:
        return parse(options, group.values, owner=group.kind)
    except OptionError as error:
        raise _wrong(path, group.line, str(error)) from None


def _wrong(path: str, line: int, why: str) -> OptionError:
    return OptionError(f"{path}:{line}: {why}")


def _shown(text: str) -> str:
    """Something out of the file, fit for a message of one line."""
    return "".join(c if c.isprintable() else "?" for c in text[:80])

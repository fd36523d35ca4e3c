"""Authorization: which of those who have proved who they are may come in.

The rules are those of QEMU's objects ``authz-simple``, ``authz-list`` and ``authz-list-file``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Final, NamedTuple

from diskwright.core.options import BOOL
from diskwright.errors import DiskwrightError, OptionError

MAX_RULES: Final = 4096
MAX_FILE: Final = 4 << 20

Allows = Callable[[str], bool]
"""Whether an identity may come in."""


class Rule(NamedTuple):
    """``allow`` decides for identities that are ``match``, or, with ``glob``, fit it as a file name fits a pattern."""

    match: str
    allow: bool
    glob: bool

    def fits(self, identity: str) -> bool:
        return fnmatchcase(identity, self.match) if self.glob else identity == self.match


def from_object(kind: str, options: Mapping[str, str]) -> Allows:
    """The check an object of ``kind`` describes. Raises OptionError."""
    if kind == "authz-simple":
        _only(options, "identity")
        if "identity" not in options:
            raise OptionError("Parameter 'identity' is missing")
        return options["identity"].__eq__
    if kind == "authz-list":
        return _from_list(options)
    _only(options, "filename", "refresh")
    if "filename" not in options:
        raise OptionError("Parameter 'filename' is missing")
    return _ListFile(options["filename"], BOOL.parse("refresh", options.get("refresh", "on")))


KINDS: Final = ("authz-simple", "authz-list", "authz-list-file")


def _only(options: Mapping[str, str], *known: str) -> None:
    for name in options:
        if name not in ("id", *known):
            raise OptionError(f"Parameter '{name}' is unexpected")


def _policy(text: object, name: str = "policy") -> bool:
    if text not in ("allow", "deny"):
        raise OptionError(f"Parameter '{name}' does not accept value '{text}'")
    return text == "allow"


_RULE: Final = re.compile(r"rules\.([0-9]{1,4})\.(match|policy|format)")


def _from_list(options: Mapping[str, str]) -> Allows:
    parts: dict[int, dict[str, object]] = {}
    for name, value in options.items():
        if found := _RULE.fullmatch(name):
            parts.setdefault(int(found[1]), {})[found[2]] = value
        elif name not in ("id", "policy"):
            raise OptionError(f"Parameter '{name}' is unexpected")
    if sorted(parts) != list(range(len(parts))):
        raise OptionError("The rules of an authz-list are numbered from 0 on without gaps")
    return _Rules([parts[number] for number in sorted(parts)], options.get("policy", "deny")).allows


class _Rules:
    """The first rule that fits decides; ``policy`` where none does."""

    def __init__(self, rules: list[dict[str, object]], policy: object) -> None:
        if len(rules) > MAX_RULES:
            raise OptionError(f"{len(rules)} rules are more than the {MAX_RULES} accepted")
        self._default = _policy(policy)
        self._rules = [_rule(number, each) for number, each in enumerate(rules)]

    def allows(self, identity: str) -> bool:
        for rule in self._rules:
            if rule.fits(identity):
                return rule.allow
        return self._default


def _rule(number: int, given: Mapping[str, object]) -> Rule:
    match = given.get("match")
    if not isinstance(match, str):
        raise OptionError(f"Parameter 'rules.{number}.match' is missing")
    form = given.get("format", "exact")
    if form not in ("exact", "glob"):
        raise OptionError(f"Parameter 'rules.{number}.format' does not accept value '{form}'")
    if "policy" not in given:
        raise OptionError(f"Parameter 'rules.{number}.policy' is missing")
    return Rule(match, _policy(given["policy"], f"rules.{number}.policy"), form == "glob")


class _ListFile:
    """Rules in a file of JSON, read again when it has changed (with ``refresh``). A change that cannot be read lets
    nobody in."""

    def __init__(self, path: str, refresh: bool) -> None:
        self._path, self._refresh = path, refresh
        self._seen = self._state()
        self._rules: _Rules | None = self._read()

    def __call__(self, identity: str) -> bool:
        if self._refresh:
            try:
                state = self._state()
                if state != self._seen or self._rules is None:
                    self._rules, self._seen = self._read(), state
            except DiskwrightError:
                self._rules = None
        return self._rules is not None and self._rules.allows(identity)

    def _state(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise OptionError(f"Unable to read {self._path}: {error.strerror}") from None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _read(self) -> _Rules:
        try:
            with open(self._path, "rb") as file:
                found = json.loads(file.read(MAX_FILE))
        except OSError as error:
            raise OptionError(f"Unable to read {self._path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{self._path} is no JSON: {error}") from None
        rules = found.get("rules", []) if isinstance(found, dict) else None
        if not isinstance(rules, list) or not all(isinstance(each, dict) for each in rules):
            raise OptionError(f"{self._path} is no JSON object with 'policy' and a list of 'rules'")
        return _Rules(rules, found.get("policy", "deny"))

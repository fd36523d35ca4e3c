"""Typed options: one description per driver, from which parsing, help texts, docs and QMP are derived.

A driver declares a frozen dataclass whose fields are made with ``option``::

    @dataclass(frozen=True, kw_only=True)
    class RawOptions:
        offset: int = option(SIZE, "where the disk begins in the file, in bytes", default=0)

Field names use underscores; users write them with hyphens or, as some tools do, with underscores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Final, TypeVar

from diskwright.errors import OptionError
from diskwright.units import parse_size

T = TypeVar("T")

MAX_OPTIONS_TEXT: Final = 1 << 20
"""Longest ``key=value`` or JSON option text accepted, in characters: far above any real use."""

MAX_LIST: Final = 4096
"""Most items of an option that is a list."""


class OptionType:
    """How one kind of value is read from text or JSON. ``label`` is what help shows for it."""

    label = "str"

    def parse(self, name: str, value: object) -> Any:
        """The typed value. Raises OptionError naming ``name`` and what would be accepted."""
        if isinstance(value, str):
            return value
        raise OptionError(f"Option '{name}' needs a string, not {value!r}")


class _Bool(OptionType):
    label = "on|off"
    _words: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}

    def parse(self, name: str, value: object) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value in self._words:
            return self._words[value]
        raise OptionError(f"Parameter '{name}' expects 'on' or 'off'")


class _Int(OptionType):
    label = "int"

    def parse(self, name: str, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            try:
                return int(value, 0)
            except ValueError:
                pass
        raise OptionError(f"Parameter '{name}' expects a number")


class _Size(OptionType):
    label = "size"

    def parse(self, name: str, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        if isinstance(value, str):
            try:
                return parse_size(value)
            except OptionError as error:
                raise OptionError(f"Parameter '{name}' expects a non-negative number below 2^64: {error}") from None
        raise OptionError(f"Parameter '{name}' expects a size")


class OneOf(OptionType):
    """A value out of a fixed list of words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.label = "|".join(words)

    def parse(self, name: str, value: object) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        raise OptionError(f"Parameter '{name}' does not accept value '{value}'; use one of {', '.join(self.words)}")


class ListOf(OptionType):
    """Values of one type: a list, or, as command lines spell it, ``name.0=...,name.1=...``."""

    label = "list"

    def __init__(self, item: OptionType) -> None:
        self.item = item

    def parse(self, name: str, value: object) -> tuple[Any, ...]:
        if isinstance(value, Mapping):
            value = self._in_order(name, value)
        if not isinstance(value, list | tuple):
            raise OptionError(f"Option '{name}' needs a list, not {value!r}")
        if len(value) > MAX_LIST:
            raise OptionError(f"Option '{name}' has {len(value)} items, more than the {MAX_LIST} accepted")
        return tuple(self.item.parse(f"{name}.{i}", each) for i, each in enumerate(value))

    @staticmethod
    def _in_order(name: str, value: Mapping[str, object]) -> list[object]:
        """``{"0.a": x, "0.b": y, "1": z}`` as a list."""
        found: dict[str, object] = {}
        for key, each in value.items():
            number, dot, rest = key.partition(".")
            if not dot:
                found[key] = each
                continue
            inner = found.setdefault(number, {})
            if not isinstance(inner, dict):
                raise OptionError(f"'{name}.{number}' cannot be both a value and the beginning of '{name}.{key}'")
            inner[rest] = each
        for key in found:
            if not key.isdecimal() or int(key) >= len(found):
                raise OptionError(f"Unused option '{key}' for [{name}]")
        return [found[str(i)] for i in range(len(found)) if str(i) in found]


class Struct(OptionType):
    """Options within an option."""

    label = "options"

    def __init__(self, options: type) -> None:
        self.options = options

    def parse(self, name: str, value: object) -> Any:
        if not isinstance(value, Mapping):
            raise OptionError(f"Option '{name}' needs options of its own, not {value!r}")
        return parse(self.options, value, owner=name)


STR: Final = OptionType()
BOOL: Final = _Bool()
INT: Final = _Int()
SIZE: Final = _Size()


@dataclass(frozen=True)
class OptionInfo:
    """What help, docs and QMP need to know of one option. ``default`` is MISSING when it must be given."""

    name: str
    type: OptionType
    help: str
    default: object
    field: str = ""
    """The dataclass's field."""

    @property
    def required(self) -> bool:
        return self.default is MISSING


def option(type: OptionType, help: str, *, default: Any = MISSING, name: str | None = None) -> Any:
    """A dataclass field that ``parse`` and ``describe`` understand. ``name`` is what users write, where that is not
    the field's name with hyphens: ``encrypt.key-secret``."""
    return dataclasses.field(default=default, metadata={"type": type, "help": help, "name": name})


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """For a driver that takes none."""


def describe(options: type) -> tuple[OptionInfo, ...]:
    """The options of a driver's dataclass, in declaration order, under the names users write."""
    return tuple(
        OptionInfo(
            f.metadata["name"] or f.name.replace("_", "-"), f.metadata["type"], f.metadata["help"], f.default, f.name
        )
        for f in dataclasses.fields(options)
    )


def parse(options: type[T], values: Mapping[str, object], *, owner: str) -> T:
    """An instance of ``options`` from names and raw values. ``owner`` names the driver in errors.

    Raises OptionError for a name that is unknown, one given twice in two spellings, a missing required
    option, or a bad value.
    """
    known = {info.name: info for info in describe(options)}
    typed: dict[str, object] = {}
    for key, value in values.items():
        info = known.get(key.replace("_", "-"))
        if info is None:
            raise OptionError(f"Driver '{owner}' has no option '{key}'" + _choices(known))
        if info.field in typed:
            raise OptionError(f"Option '{info.name}' is given twice")
        typed[info.field] = info.type.parse(key, value)
    for info in known.values():
        if info.required and info.field not in typed:
            raise OptionError(f"Driver '{owner}' needs the option '{info.name}' ({info.help})")
    return options(**typed)


def flatten(options: type, values: Mapping[str, object]) -> dict[str, object]:
    """``values``, in which a mapping whose name begins option names with a dot (``encrypt`` of ``encrypt.format``) is
    dissolved into those; other mappings stay as they are."""
    groups = {info.name.partition(".")[0] for info in describe(options) if "." in info.name}
    flat: dict[str, object] = {}
    for key, value in values.items():
        if key in groups and isinstance(value, Mapping):
            flat.update((f"{key}.{inner}", item) for inner, item in value.items())
        else:
            flat[key] = value
    return flat


def split_pairs(text: str) -> dict[str, str]:
    """``a=1,b=x,,y`` as a dict; a doubled comma is a comma in the value; a bare word means ``word=on``.

    Raises OptionError for an empty key or a text above ``MAX_OPTIONS_TEXT``.
    """
    if len(text) > MAX_OPTIONS_TEXT:
        raise OptionError(f"Option text of {len(text)} characters is longer than the {MAX_OPTIONS_TEXT} accepted")
    pairs: dict[str, str] = {}
    for part in text.replace(",,", "\0").split(","):
        if not part:
            continue
        key, equals, value = part.replace("\0", ",").partition("=")
        if not key:
            raise OptionError(f"Option text '{text}' has a value without a name")
        pairs[key] = value if equals else "on"
    return pairs


def _choices(known: Iterable[str]) -> str:
    names = ", ".join(known)
    return f"; it has {names}" if names else "; it has none"

"""Manual pages, in the man macros every Unix knows, made of the command line's description."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from diskwright.cli import describe
from diskwright.cli.describe import CommandText, KeyText, OptionText
from diskwright.cli.faces import FACES, OWN_NAME
from diskwright.version import __version__

EXIT_CODES: Final = {
    0: "done",
    1: "it failed; what went wrong is one line on standard error",
    130: "ended by SIGINT",
    143: "ended by SIGTERM",
}
"""What every command's codes mean, unless its own page tells otherwise."""

_WRITTEN: Final = {
    "\\": "\\e", "-": "\\-", '"': "\\(dq", "'": "\\(aq", "^": "\\(ha", "~": "\\(ti", "`": "\\(ga",
    "|": "|\\:",  # a line may be broken there: lists of words may be longer than one
}  # fmt: skip
"""What roff would not show as it is, or not as the character that can be copied and typed."""


def pages() -> dict[str, str]:
    """Every page by its file name: the program's, and one for each subcommand."""
    found = describe.commands()
    result = {f"{OWN_NAME}.1": overview(found)}
    for command in found:
        result[f"{OWN_NAME}-{command.name}.1"] = page(command, found)
    return result


def overview(found: Iterable[CommandText]) -> str:
    """The page of the program itself."""
    rows = [(f"{_bold(command.name)}", _text(command.summary)) for command in found]
    faces = ", ".join(FACES)
    return "\n".join(
        (
            _head(OWN_NAME),
            *_section("NAME", f"{OWN_NAME} \\- work on virtual disk images"),
            *_section("SYNOPSIS", f"{_bold(OWN_NAME)} {_italic('COMMAND')} [{_italic('options')}] ..."),
            *_section(
                "DESCRIPTION",
                _text("Creates, converts, checks, repairs, serves and mirrors images of virtual disks."),
                ".PP",
                _text(f"Called as {faces} it takes that program's command line."),
                ".PP",
                _text(
                    "Options and names may come in any order; what follows -- is a name even if it begins with a "
                    "hyphen. Sizes are bytes, or a number with one of the suffixes k, M, G, T, P, E (powers of 1024)."
                ),
            ),
            *_section("COMMANDS", *_terms(rows)),
            *_section("EXIT STATUS", *_codes(EXIT_CODES)),
            *_section("SEE ALSO", ",\n".join(_page_name(f"{OWN_NAME}-{command.name}") for command in found)),
            "",
        )
    )


def page(command: CommandText, found: Iterable[CommandText]) -> str:
    """The page of one subcommand."""
    name = f"{OWN_NAME}-{command.name}"
    lines = [
        _head(name),
        *_section("NAME", f"{_text(name)} \\- {_text(command.summary)}"),
        *_section("SYNOPSIS", _synopsis(command)),
        *_section("DESCRIPTION", _text(f"{command.summary[:1].upper()}{command.summary[1:]}.")),
    ]
    operands = [(_italic(operand.text), _text(operand.help)) for operand in command.operands if operand.help]
    if operands:
        lines += _section("OPERANDS", *_terms(operands))
    if command.options:
        lines += _section("OPTIONS", *_terms((_option(option), _text(option.help)) for option in command.options))
    if any(option.kind == describe.KEYS for option in command.options):
        lines += _section("FORMAT OPTIONS", _text("What -o takes, by format:"))
        for format, rows in describe.keys(amends=command.amends).items():
            lines += [f'.SS "{_text(format)}"', *_terms((_key(row), _text(row.help)) for row in rows)]
    lines += _section("EXIT STATUS", *_codes({**EXIT_CODES, **command.exit_codes}))
    others = [OWN_NAME, *(f"{OWN_NAME}-{other.name}" for other in found if other.name != command.name)]
    lines += _section("SEE ALSO", ",\n".join(map(_page_name, others)))
    return "\n".join((*lines, ""))


def _head(name: str) -> str:
    return f'.TH "{name.upper()}" "1" "" "{OWN_NAME} {__version__}" "User Commands"\n.nh\n.ad l'


def _section(title: str, *lines: str) -> list[str]:
    return [f'.SH "{title}"', *lines]


def _synopsis(command: CommandText) -> str:
    parts = [_bold(f"{OWN_NAME} {command.name}")]
    if command.options:
        parts.append(f"[{_italic('options')}]")
    parts += [_italic(operand.text) for operand in command.operands]
    return " ".join(parts)


def _option(option: OptionText) -> str:
    names = ", ".join(_bold(name) for name in option.names)
    if option.optional:
        return f"{names}[={_italic(option.value)}]"
    return f"{names} {_italic(option.value)}" if option.value else names


def _key(row: KeyText) -> str:
    return f"{_bold(row.name)}={_italic(row.value)}"


def _codes(codes: Mapping[int, str]) -> list[str]:
    return _terms((_bold(str(code)), _text(meaning)) for code, meaning in sorted(codes.items()))


def _terms(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [line for term, text in rows for line in (".TP", term, text or "\\&")]


def _page_name(name: str) -> str:
    return f"{_bold(name)}(1)"


def _bold(text: str) -> str:
    return f"\\fB{_text(text)}\\fR"


def _italic(text: str) -> str:
    return f"\\fI{_text(text)}\\fR"


def _text(text: str) -> str:
    """``text`` so that roff shows it as it is."""
    safe = "".join(_WRITTEN.get(character, character) for character in text)
    return f"\\&{safe}" if safe.startswith(".") else safe

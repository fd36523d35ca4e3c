"""Command lines as getopt_long(3) reads them: for programs whose users have scripts that rely on it.

Options may be abbreviated as long as it is clear which is meant, come in any order with operands, and are acted on one
after the other, so that the first wrong one is what is complained about. Complaints are worded as the C library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from diskwright.cli.common import Failure


class Option(NamedTuple):
    """One option. ``letter`` is its short form, or empty. An ``exact`` one cannot be abbreviated: what we
    add to somebody else's options must not make theirs ambiguous."""

    name: str
    letter: str = ""
    takes_value: bool = False
    exact: bool = False


OPERAND = ""
"""What stands in the place of an option's name for a word that is none."""


def scan(words: Sequence[str], options: Sequence[Option], hint: str) -> Iterator[tuple[str, str]]:
    """``(long name, value)`` of each option in order, then ``(OPERAND, word)`` of each operand. Raises Failure, with
    ``hint`` as a second line."""
    operands: list[str] = []
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        if word == "--":
            operands += reversed(rest)
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found = _by_name(name, word, options, hint)
            if equals and not found.takes_value:
                raise _wrong(f"option '--{found.name}' doesn't allow an argument", hint)
            if found.takes_value and not equals:
                if not rest:
                    raise _wrong(f"option '--{found.name}' requires an argument", hint)
                value = rest.pop()
            yield found.name, value
        elif len(word) > 1 and word[0] == "-":
            yield from _letters(word[1:], rest, options, hint)
        else:
            operands.append(word)
    for operand in operands:
        yield OPERAND, operand


def _letters(word: str, rest: list[str], options: Sequence[Option], hint: str) -> Iterator[tuple[str, str]]:
    """Short options behind one hyphen; one with a value takes what is left of the word, or the next."""
    for at, letter in enumerate(word):
        found = next((each for each in options if each.letter == letter), None)
        if found is None:
            raise _wrong(f"invalid option -- '{letter}'", hint)
        if not found.takes_value:
            yield found.name, ""
            continue
        value = word[at + 1 :]
        if not value:
            if not rest:
                raise _wrong(f"option requires an argument -- '{letter}'", hint)
            value = rest.pop()
        yield found.name, value
        return


def _by_name(name: str, word: str, options: Sequence[Option], hint: str) -> Option:
    fitting = [each for each in options if each.name.startswith(name) and (each.name == name or not each.exact)]
    exact = [each for each in fitting if each.name == name]
    if exact or len(fitting) == 1:
        return (exact or fitting)[0]
    if not fitting:
        raise _wrong(f"unrecognized option '{word}'", hint)
    possible = " ".join(f"'--{each.name}'" for each in fitting)
    raise _wrong(f"option '--{name}' is ambiguous; possibilities: {possible}", hint)


def _wrong(message: str, hint: str) -> Failure:
    return Failure(f"{message}\n{hint}")

"""Options as getopt reads them: single letters that may be joined, long names that may be shortened, in any order with
operands.

Not argparse, nor the standard library's getopt: users of the commands know these complaints, and see them often.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from diskwright.cli.qio.language import Misuse


class Options:
    """The words of one command line, or of one command, on their way through.

    Iterating yields ``(option, value)``, one after the other, so that the first thing wrong is what is told;
    afterwards ``operands`` has the rest.
    """

    def __init__(self, name: str, words: Sequence[str], letters: str, long: Mapping[str, str] | None = None) -> None:
        """``name`` is whose options they are, in complaints. In ``letters`` a colon follows those with a value; in
        ``long`` names stand for a letter, or for themselves, with a colon behind if there is a value."""
        self._name, self._words, self._long = name, list(words), long or {}
        self._valued = {letter: letters[i + 1 : i + 2] == ":" for i, letter in enumerate(letters) if letter != ":"}
        self.operands: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Raises Misuse, having said on standard error what is wrong."""
        words = iter(self._words)
        for word in words:
            if word == "--":
                self.operands.extend(words)
            elif word.startswith("--") and self._long:
                yield self._named(word[2:], words)
            elif word.startswith("-") and word != "-":
                yield from self._letters(word[1:], words)
            else:
                self.operands.append(word)

    def _letters(self, text: str, words: Iterator[str]) -> Iterator[tuple[str, str]]:
        while text:
            letter, text = text[0], text[1:]
            valued = self._valued.get(letter)
            if valued is None:
                raise self._wrong(f"invalid option -- '{letter}'")
            if not valued:
                yield letter, ""
                continue
            value = text or next(words, None)
            if value is None:
                raise self._wrong(f"option requires an argument -- '{letter}'")
            yield letter, value
            return

    def _named(self, text: str, words: Iterator[str]) -> tuple[str, str]:
        given, equals, value = text.partition("=")
        name = given if given in self._long else self._whole(given)
        meaning = self._long[name]
        letter = meaning.rstrip(":")
        if not meaning.endswith(":"):
            if equals:
                raise self._wrong(f"option '--{name}' doesn't allow an argument")
            return letter, ""
        if not equals:
            following = next(words, None)
            if following is None:
                raise self._wrong(f"option '--{name}' requires an argument")
            value = following
        return letter, value

    def _whole(self, given: str) -> str:
        found = [name for name in self._long if name.startswith(given)]
        if not found:
            raise self._wrong(f"unrecognized option '--{given}'")
        if len(found) > 1:
            names = " ".join(f"'--{name}'" for name in found)
            raise self._wrong(f"option '--{given}' is ambiguous; possibilities: {names}")
        return found[0]

    def _wrong(self, text: str) -> Misuse:
        print(f"{self._name}: {text}", file=sys.stderr)
        return Misuse()

"""Command lines, taken the way getopt_long takes them: argparse declares the options, and prints the help.

argparse itself reads command lines otherwise than C programs do: it takes no value that looks like an option, reports
the last mistake before the first, and knows names and options in any order only in part. So the reading is done here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from diskwright.cli.failure import UsageError


class Parser(argparse.ArgumentParser):
    """The options and operands of one command."""

    last_is_operand = False
    """Whether the last word is an operand whatever it looks like: sizes may begin with a hyphen."""

    shortened: frozenset[str] | None = None
    """The long options that may be shortened; None: all. The others do not stand in these ones' way."""

    def __init__(self, *, prog: str | None = None, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=_formatter)
        self._given: dict[int, str] = {}  # by action, as it was written

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The parsed command line: options and operands in any order; what follows ``--`` is never an option.

        Options act in the order in which they are given, so that the first mistake is the one that is told. Raises
        UsageError, and whatever an option's ``type`` raises for its value.
        """
        words, last = list(arguments), []
        if self.last_is_operand and words and words[-1] not in ("-h", "--help"):
            last = [words.pop()]
        args = self._defaults_only()
        self._given = {}
        operands: list[str] = []
        at = 0
        while at < len(words):
            word = words[at]
            if not _is_option(word):
                operands.append(word)
                at += 1
            elif word == "--":
                operands += words[at + 1 :]
                break
            else:
                at = self._option(args, words, at)
        self._check_together()
        self._distribute(args, operands + last)
        return args

    def _check_together(self) -> None:
        """Raises UsageError for options that exclude each other, and for one that has to be given and is not."""
        for group in self._mutually_exclusive_groups:
            given = [self._given[id(action)] for action in group._group_actions if id(action) in self._given]
            if len(given) > 1:
                raise UsageError(f"{given[0]} and {given[1]} exclude each other")
        for action in self._actions:
            if action.option_strings and action.required and id(action) not in self._given:
                raise UsageError(f"{action.option_strings[0]} is missing")

    def parse_leading(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options before the first operand, and what is left from that operand on."""
        words, args, at = list(arguments), self._defaults_only(), 0
        self._given = {}
        while at < len(words) and _is_option(words[at]):
            if words[at] == "--":
                return args, words[at + 1 :]
            at = self._option(args, words, at)
        return args, words[at:]

    def drop(self, options: Sequence[str]) -> None:
        """Takes options away again."""
        for option in options:
            action = self._option_string_actions.pop(option, None)
            if action is None:
                continue
            action.option_strings = [name for name in action.option_strings if name != option]
            if not action.option_strings:
                self._remove_action(action)
                self.set_defaults(**{action.dest: action.default})

    def _defaults_only(self) -> argparse.Namespace:
        args = argparse.Namespace()
        for action in self._actions:
            if argparse.SUPPRESS not in (action.dest, action.default):
                setattr(args, action.dest, action.default)
        for name, value in self._defaults.items():
            setattr(args, name, value)
        return args

    def _option(self, args: argparse.Namespace, words: list[str], at: int) -> int:
        """Carries out the option (or the cluster of short ones) at ``words[at]``; returns where to go on."""
        word = words[at]
        if word.startswith("--"):
            return self._long(args, words, at)
        for index in range(1, len(word)):
            action = self._option_string_actions.get(f"-{word[index]}")
            if action is None:
                raise UsageError(f"unrecognized option '{word}'")
            if action.nargs == 0:
                self._act(action, args, None, f"-{word[index]}")
                continue
            value = word[index + 1 :]
            if value:
                self._act(action, args, value, f"-{word[index]}")
                return at + 1
            return self._with_next(action, args, words, at)
        return at + 1

    def _long(self, args: argparse.Namespace, words: list[str], at: int) -> int:
        name, equals, value = words[at].partition("=")
        action = self._named(name)
        if action is None or (equals and action.nargs == 0):
            raise UsageError(f"unrecognized option '{words[at]}'")
        if action.nargs == 0 or (action.nargs == "?" and not equals):
            self._act(action, args, None, name)
        elif equals:
            self._act(action, args, value, name)
        else:
            return self._with_next(action, args, words, at)
        return at + 1

    def _with_next(self, action: argparse.Action, args: argparse.Namespace, words: list[str], at: int) -> int:
        if at + 1 >= len(words):
            raise UsageError(f"missing argument for option '{words[at]}'")
        self._act(action, args, words[at + 1], words[at])
        return at + 2

    def _named(self, name: str) -> argparse.Action | None:
        """The long option of this name, or the only one it is the beginning of."""
        known = self._option_string_actions
        if name in known:
            return known[name]
        found = {
            id(action): action
            for full, action in known.items()
            if full.startswith(name) and full.startswith("--") and (self.shortened is None or full in self.shortened)
        }
        return next(iter(found.values())) if len(found) == 1 else None

    def _act(self, action: argparse.Action, args: argparse.Namespace, text: str | None, given: str) -> None:
        self._given[id(action)] = given
        if text is None:
            # A value that may be left out follows an equals sign, as in getopt_long: the next word is an operand.
            action(self, args, action.const if action.nargs == "?" else [], given)
            return
        try:
            action(self, args, self._value(action, text), given)
        except argparse.ArgumentError as error:
            raise UsageError(f"{given}: {error.message}") from None

    def _value(self, action: argparse.Action, text: str) -> Any:
        value: Any = self._get_value(action, text)
        self._check_value(action, value)
        return value

    def _distribute(self, args: argparse.Namespace, operands: list[str]) -> None:
        """Gives the operands to those that were declared: one each, and to a ``*`` all that are left."""
        left = list(operands)
        for action in self._get_positional_actions():
            if action.nargs == "*":
                setattr(args, action.dest, [self._value(action, word) for word in left])
                left = []
            elif left:
                setattr(args, action.dest, self._value(action, left.pop(0)))
            elif action.nargs != "?":
                raise UsageError(f"{action.metavar or action.dest} is missing")
        if left:
            raise UsageError(f"Unexpected argument: {left[0]}")


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _formatter(prog: str) -> argparse.HelpFormatter:
    # One is made for every option that is declared. Left to find the width itself, it would load the
    # compression libraries on the way (through shutil), which takes longer than reading an image's header.
    try:
        width = os.get_terminal_size().columns - 2
    except OSError:
        width = 78
    return argparse.HelpFormatter(prog, width=max(width, 40))

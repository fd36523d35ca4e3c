"""The commands: their names, how many words each takes, what it needs, and its usage line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from diskwright.cli.qio.session import Session

ANY: Final = -1
"""No limit to the number of words."""


@dataclass(frozen=True)
class Command:
    """One command. ``place`` is ``module.function`` within this package, found when it is first called."""

    name: str
    short: str
    place: str
    least: int
    most: int
    words: str | None
    does: str
    writes: bool = False
    needs_disk: bool = True
    quick: bool = False
    """It waits for nothing, so nothing is told after it of requests in the background that have ended."""

    def usage(self, called: str = "") -> str:
        """One line: what it takes, and what it does."""
        words = "" if self.words is None else f"{self.words} "
        return f"{called or self.name} {words}-- {self.does}"

    def run(self, session: Session, words: list[str]) -> None:
        module, _, function = self.place.partition(".")
        action: Callable[..., Any] = getattr(import_module(f"diskwright.cli.qio.{module}"), function)
        action(session, words)

    def wrong_count(self, called: str, count: int) -> str:
        """What to say when ``count`` words are not as many as it takes; empty when they are."""
        if self.least <= count and (self.most == ANY or count <= self.most):
            return ""
        if self.most == ANY:
            expected = f"at least {self.least}"
        elif self.least == self.most:
            expected = str(self.least)
        else:
            expected = f"between {self.least} and {self.most}"
        return f"bad argument count {count} to {called}, expected {expected} arguments"


_READS = "reads a number of bytes at a specified offset"
_WRITES = "writes a number of bytes at a specified offset"

COMMANDS: Final = (
    Command("abort", "", "control.abort", 0, 0, None, "simulate a program crash using abort(3)", needs_disk=False),
    Command("aio_flush", "", "transfers.aio_flush", 0, 0, None, "completes all outstanding aio requests"),
    Command("aio_read", "", "transfers.aio_read", 2, ANY, "[-Ciqv] [-P pattern] off len [len..]",
            "asynchronously reads a number of bytes", quick=True),
    Command("aio_write", "", "transfers.aio_write", 2, ANY, "[-Cfiquz] [-P pattern] off len [len..]",
            "asynchronously writes a number of bytes", writes=True, quick=True),
    Command("alloc", "a", "space.alloc", 1, 2, "offset [count]", "checks if offset is allocated in the file"),
    Command("break", "", "breakpoints.set_breakpoint", 2, 2, "event tag",
            "sets a breakpoint on event and tags the stopped request as tag", quick=True),
    Command("close", "c", "control.close", 0, 0, None, "close the current open file"),
    Command("discard", "d", "transfers.discard", 2, ANY, "[-Cq] off len",
            "discards a number of bytes at a specified offset", writes=True),
    Command("flush", "f", "control.flush", 0, 0, None, "flush all in-core file state to disk"),
    Command("help", "?", "help.help_", 0, 1, "[command]", "help for one or all commands", needs_disk=False, quick=True),
    Command("info", "i", "control.info", 0, 0, None, "prints information about the current file", quick=True),
    Command("length", "l", "space.length", 0, 0, None, "gets the length of the current file", quick=True),
    Command("map", "", "space.map_", 0, 0, "", "prints the allocated areas of a file"),
    Command("open", "o", "control.open_", 1, ANY, "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
            "open the file specified by path", needs_disk=False),
    Command("quit", "q", "control.quit_", 0, ANY, None, "exit the program", needs_disk=False, quick=True),
    Command("read", "r", "transfers.read", 2, ANY, "[-abCqv] [-P pattern [-s off] [-l len]] off len", _READS),
    Command("readv", "", "transfers.readv", 2, ANY, "[-Cqv] [-P pattern] off len [len..]", _READS),
    Command("remove_break", "", "breakpoints.remove_breakpoint", 1, 1, "tag", "remove a breakpoint by tag", quick=True),
    Command("reopen", "", "control.reopen", 0, ANY, "[(-r|-w)] [-c cache] [-o options]",
            "reopens an image with new options"),
    Command("resume", "", "breakpoints.resume", 1, 1, "tag", "resumes the request tagged as tag", quick=True),
    Command("sigraise", "", "control.sigraise", 1, 1, "signal", "raises a signal", needs_disk=False),
    Command("sleep", "", "control.sleep", 1, 1, None, "waits for the given value in milliseconds", needs_disk=False),
    Command("truncate", "t", "space.truncate", 1, 3, "[-m prealloc_mode] off",
            "truncates the current file at the given offset", writes=True),
    Command("wait_break", "", "breakpoints.wait_break", 1, 1, "tag", "waits for the suspension of a request"),
    Command("write", "w", "transfers.write", 2, ANY, "[-bcCfnquz] [-P pattern | -s source_file] off len", _WRITES,
            writes=True),
    Command("writev", "", "transfers.writev", 2, ANY, "[-Cfq] [-P pattern] off len [len..]", _WRITES, writes=True),
)  # fmt: skip

_BY_NAME: Final = {name: command for command in COMMANDS for name in (command.name, command.short) if name}


def find(name: str) -> Command | None:
    return _BY_NAME.get(name)

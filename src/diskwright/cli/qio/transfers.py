"""The commands that move bytes: read, write, and those of several buffers, in the foreground and in the background."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from diskwright.cli.qio import report
from diskwright.cli.qio.getopt import Options
from diskwright.cli.qio.language import MAX_REQUEST, CommandError, Misuse, pattern, request_sizes, size
from diskwright.cli.qio.session import Session, attempt, cut, failure, own_buffer

_DEFAULT = 0xCD
"""What is written when no pattern is asked for."""

_SECTOR = 512

_CHUNK = 1 << 20


@dataclass
class Flags:
    """The options of one transfer."""

    letters: set[str]
    pattern: int | None = None
    start: int | None = None
    """Where within what is read the pattern begins, and ``length`` how long it is."""
    length: int | None = None
    source: str | None = None

    @property
    def quiet(self) -> bool:
        return "q" in self.letters

    @property
    def condensed(self) -> bool:
        return "C" in self.letters


def _flags(name: str, words: list[str], letters: str) -> tuple[Flags, list[str]]:
    """The options and the operands. Raises CommandError."""
    options = Options(name, words, letters)
    flags = Flags(set())
    for option, value in options:
        flags.letters.add(option)
        if option == "P":
            flags.pattern = pattern(value)
        elif option == "s" and name.startswith("r"):
            flags.start = size(value)
        elif option == "l":
            flags.length = size(value)
        elif option == "s":
            flags.source = value
        elif option == "i":
            break  # whatever else is said, nothing is done
    return flags, options.operands


def _range(operands: list[str], *, unless: str = "", exempt: bool = False) -> tuple[int, int]:
    """An offset and a length a request can have; ``exempt`` from the limit of the latter."""
    offset, length = size(operands[0]), size(operands[1])
    if length > MAX_REQUEST and not exempt:
        raise CommandError(f"length cannot exceed {MAX_REQUEST}{unless}, given {operands[1]}")
    return offset, length


def _in_sectors(offset: int, length: int) -> None:
    for what, value in (("offset", offset), ("count", length)):
        if value % _SECTOR:
            raise CommandError(f"{value} is not a sector-aligned value for '{what}'")


def _timed(what: str, action: Callable[[], None]) -> float:
    """Seconds that ``action`` took. Raises CommandError when it fails."""
    start = perf_counter()
    attempt(what, action)
    return perf_counter() - start


# -- reading -------------------------------------------------------------------------------------


def read(session: Session, words: list[str]) -> None:
    flags, operands = _flags("read", words, "bCl:pP:qs:v")
    if len(operands) != 2:
        raise Misuse()
    offset, length = _range(operands)
    if flags.pattern is None and (flags.start is not None or flags.length is not None):
        raise Misuse()
    start = flags.start or 0
    expected = length - start if flags.length is None else flags.length
    if expected < 0 or start + expected > length:
        raise CommandError("pattern verification range exceeds end of read data")
    of_machine = "b" in flags.letters
    if of_machine:
        _in_sectors(offset, length)
    data = session.buffer(length)

    def action() -> None:
        if of_machine:
            from diskwright.core.snapshots import read_vm_state

            with session.open_disk.request():
                read_vm_state(session.node, offset, data)
        else:
            session.check(offset, length)
            session.read(cut(data, offset, [length]))

    took = _timed("read", action)
    _tell_of_read(flags, data, offset, took, data[start : start + expected], offset + start)


def _tell_of_read(
    flags: Flags, data: memoryview, offset: int, took: float, checked: memoryview, checked_at: int
) -> None:
    """What is printed of bytes read. Raises CommandError when they are not as expected."""
    right = flags.pattern is None or report.verify(checked, flags.pattern, checked_at)
    if not flags.quiet:
        if "v" in flags.letters:
            report.dump(data, offset)
        report.timing("read", took, offset, len(data), len(data), condensed=flags.condensed)
    if not right:
        raise CommandError()


def readv(session: Session, words: list[str]) -> None:
    flags, operands = _flags("readv", words, "CP:qv")
    if len(operands) < 2:
        raise Misuse()
    offset, lengths = size(operands[0]), request_sizes(operands[1:])
    total = sum(lengths)
    data = session.buffer(total)

    def action() -> None:
        session.check(offset, total)
        session.read(cut(data, offset, lengths))

    _tell_of_read(flags, data, offset, _timed("readv", action), data, offset)


def aio_read(session: Session, words: list[str]) -> None:
    flags, operands = _flags("aio_read", words, "CP:iqv")
    if "i" in flags.letters:
        print("injecting invalid read request")
        return
    if len(operands) < 2:
        raise Misuse()
    offset, lengths = size(operands[0]), request_sizes(operands[1:])
    total = sum(lengths)
    data = own_buffer(total)

    def action() -> None:
        session.check(offset, total)
        session.read(cut(data, offset, lengths))

    def finish(took: float) -> None:
        _tell_of_read(flags, data, offset, took, data, offset)

    _in_background(session, "readv", action, finish)


# -- writing -------------------------------------------------------------------------------------


def write(session: Session, words: list[str]) -> None:
    flags, operands = _flags("write", words, "bcCfnpP:qs:uz")
    given = flags.letters
    if len(operands) != 2:
        raise Misuse()
    _refuse_contradictions(flags)
    offset, length = _range(operands, unless=" without -n", exempt="n" in given)
    if given & {"b", "c"}:
        _in_sectors(offset, length)
    action = _zeroing(session, flags, offset, length) if "z" in given else _writing(session, flags, offset, length)
    took = _timed("write", action)
    if not flags.quiet:
        report.timing("wrote", took, offset, length, length, condensed=flags.condensed)


def _refuse_contradictions(flags: Flags) -> None:
    given = flags.letters
    if {"b", "z"} <= given:
        raise CommandError("-b and -z cannot be specified at the same time")
    if "f" in given and given & {"b", "c"}:
        raise CommandError("-f and -b or -c cannot be specified at the same time")
    for letter in "nu":
        if letter in given and "z" not in given:
            raise CommandError(f"-{letter} requires -z to be specified")
    if len(given & {"z", "P", "s"}) > 1:
        raise CommandError("Only one of -z, -P, and -s can be specified at the same time")


def _zeroing(session: Session, flags: Flags, offset: int, length: int) -> Callable[[], None]:
    given = flags.letters

    def action() -> None:
        session.check(offset, length)
        session.write_zeros(offset, length, unmap="u" in given, fast="n" in given, durably="f" in given)

    return action


def _writing(session: Session, flags: Flags, offset: int, length: int) -> Callable[[], None]:
    data = session.buffer(length)
    if flags.source is not None:
        _fill_from_file(data, flags.source)
    else:
        fill(data, _DEFAULT if flags.pattern is None else flags.pattern)
    segments = cut(data, offset, [length])

    def plain() -> None:
        session.check(offset, length)
        session.write(segments, durably="f" in flags.letters)

    def compressed() -> None:
        session.check(offset, length)
        session.write_compressed(segments)

    def of_machine() -> None:
        from diskwright.core.snapshots import write_vm_state

        session.settle()
        with session.open_disk.drained():
            write_vm_state(session.node, offset, data)

    return of_machine if "b" in flags.letters else compressed if "c" in flags.letters else plain


def fill(data: memoryview, byte: int) -> None:
    """Overwrites ``data`` with ``byte``."""
    _repeat(data, bytes((byte,)) * min(len(data), _CHUNK))


def _repeat(data: memoryview, piece: bytes) -> None:
    for start in range(0, len(data), max(len(piece), 1)):
        rest = len(data) - start
        data[start : start + len(piece)] = piece if rest >= len(piece) else piece[:rest]


def _fill_from_file(data: memoryview, path: str) -> None:
    """Overwrites ``data`` with what a file begins with, over and over. Raises CommandError."""
    try:
        with open(path, "rb") as file:
            piece = file.read(len(data))
            if not piece and file.read(1):
                return  # nothing is to be filled
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr)
        raise CommandError() from error
    if not piece:
        print(f"{path}: file is empty", file=sys.stderr)
        raise CommandError()
    if len(piece) < len(data):
        piece *= max(1, min(len(data), _CHUNK) // len(piece))  # a long piece is copied faster than many short ones
    _repeat(data, piece)


def writev(session: Session, words: list[str]) -> None:
    flags, operands = _flags("writev", words, "CfP:q")
    if len(operands) < 2:
        raise Misuse()
    offset, lengths = size(operands[0]), request_sizes(operands[1:])
    total = sum(lengths)
    data = session.buffer(total)
    fill(data, _DEFAULT if flags.pattern is None else flags.pattern)

    def action() -> None:
        session.check(offset, total)
        session.write(cut(data, offset, lengths), durably="f" in flags.letters)

    took = _timed("writev", action)
    if not flags.quiet:
        report.timing("wrote", took, offset, total, total, condensed=flags.condensed)


def aio_write(session: Session, words: list[str]) -> None:
    flags, operands = _flags("aio_write", words, "CfiP:quz")
    given = flags.letters
    if "i" in given:
        print("injecting invalid write request")
        return
    if len(operands) < 2:
        raise Misuse()
    if "z" in given and len(operands) != 2:
        raise CommandError("-z supports only a single length parameter")
    if "u" in given and "z" not in given:
        raise CommandError("-u requires -z to be specified")
    offset = size(operands[0])
    if "z" in given:
        total = size(operands[1])
        action = _zeroing(session, flags, offset, total)
    else:
        lengths = request_sizes(operands[1:])
        total = sum(lengths)
        data = own_buffer(total)
        fill(data, _DEFAULT if flags.pattern is None else flags.pattern)

        def action() -> None:
            session.check(offset, total)
            session.write(cut(data, offset, lengths), durably="f" in given)

    def finish(took: float) -> None:
        if not flags.quiet:
            report.timing("wrote", took, offset, total, total, condensed=flags.condensed)

    _in_background(session, "aio_write", action, finish)


# -- the background ------------------------------------------------------------------------------


def _in_background(session: Session, what: str, action: Callable[[], None], finish: Callable[[float], None]) -> None:
    """Has ``action`` done while commands go on. The command has succeeded once it is under way, however it ends."""
    start = perf_counter()
    took = 0.0

    def timed() -> None:
        nonlocal took
        try:
            action()
        finally:
            took = perf_counter() - start

    def ended(error: BaseException | None) -> None:
        try:
            if error is not None:
                raise failure(what, error)
            finish(took)
        except CommandError as problem:
            if problem.message:
                print(problem.message)

    session.background.submit(timed, ended)


def aio_flush(session: Session, words: list[str]) -> None:
    session.background.finish_all()


# -- discards ------------------------------------------------------------------------------------


def discard(session: Session, words: list[str]) -> None:
    flags, operands = _flags("discard", words, "Cq")
    if len(operands) != 2:
        raise Misuse()
    offset, length = _range(operands)

    def action() -> None:
        session.check(offset, length)
        with session.open_disk.request():
            if length:
                session.node.discard(offset, min(length, max(0, session.node.size - offset)))

    took = _timed("discard", action)
    if not flags.quiet:
        report.timing("discard", took, offset, length, length, condensed=flags.condensed)

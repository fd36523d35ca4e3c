"""The client's side of NBD's handshake, without a socket.

``Incoming`` cuts what a server sends into its greeting and its replies. What a client wants to know is written as
functions of ``Ask``, something that sends an option and returns the ``Answer``: over a socket, over TLS, or, in a
test, over this package's own server side. A server need not be friendly: everything it sends is bounded and checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from struct import pack, unpack_from
from typing import Final, NamedTuple

from diskwright.errors import ProtocolError
from diskwright.units import is_power_of_two
from diskwright.wire.nbd import constants as c

MAX_REPLY_DATA: Final = 64 << 10
"""Longest data of one reply: a name and a description of the longest length take 8 KiB."""
MAX_REPLIES: Final = 16384
"""Replies to one option: a server may have that many exports, or bitmaps of one."""

_GREETING: Final = 18
_OLDSTYLE: Final = 152  # both magics, size, flags, and 124 bytes of nothing
_TRANSMISSION_MASK: Final = 0xFFFF


class Greeting(NamedTuple):
    """A server's first words. ``old`` tells of its only export when it negotiates nothing."""

    fixed: bool
    no_zeroes: bool
    old: ExportDetails | None = None


class Reply(NamedTuple):
    """One reply to an option."""

    option: int
    kind: int
    data: bytes

    @property
    def last(self) -> bool:
        return self.kind == c.REP_ACK or bool(self.kind & c.REP_ERROR)


class Answer(NamedTuple):
    """All replies to an option; ``final`` is ACK or an error."""

    final: Reply
    replies: tuple[Reply, ...]

    @property
    def refused(self) -> bool:
        return self.final.kind != c.REP_ACK

    @property
    def unsupported(self) -> bool:
        return self.final.kind == c.REP_ERR_UNSUP


Ask = Callable[[int, bytes], Answer]


@dataclass
class ExportDetails:
    """What a server tells of an export. Sizes in bytes; 0 where it does not say."""

    size: int
    flags: int
    name: str | None = None
    description: str = ""
    minimum_block: int = 0
    preferred_block: int = 0
    maximum_block: int = 0


class Incoming:
    """What a server sends during the handshake, message by message. Raises ProtocolError."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        self._data += data

    @property
    def rest(self) -> bytes:
        """What has come behind the last message taken."""
        return bytes(self._data)

    def greeting(self) -> Greeting | None:
        """The greeting, once it is whole. Its kind decides how long it is."""
        data = self._data
        if len(data) >= 8 and unpack_from(">Q", data)[0] != c.INIT_MAGIC:
            raise ProtocolError(f"Bad initial magic received: 0x{data[:8].hex()}")
        if len(data) < _GREETING:
            return None
        (magic,) = unpack_from(">Q", data, 8)
        if magic == c.OPTION_MAGIC:
            (flags,) = unpack_from(">H", data, 16)
            del data[:_GREETING]
            return Greeting(bool(flags & c.FIXED_NEWSTYLE), bool(flags & c.NO_ZEROES))
        if magic != c.OLDSTYLE_MAGIC:
            raise ProtocolError(f"Bad server magic received: {magic:#x}")
        if len(data) < _OLDSTYLE:
            return None
        size, flags = unpack_from(">QI", data, 16)
        del data[:_OLDSTYLE]
        return Greeting(False, False, ExportDetails(size, flags & _TRANSMISSION_MASK))

    def reply(self) -> Reply | None:
        """The next reply to an option, once it is whole."""
        data = self._data
        if len(data) < c.OPTION_REPLY.size:
            return None
        magic, option, kind, length = c.OPTION_REPLY.unpack_from(data)
        if magic != c.OPTION_REPLY_MAGIC:
            raise ProtocolError(f"NBD reply magic is {magic:#x}")
        if length > MAX_REPLY_DATA:
            raise ProtocolError(f"NBD reply to option {option} has {length} bytes, more than {MAX_REPLY_DATA}")
        end = c.OPTION_REPLY.size + length
        if len(data) < end:
            return None
        body = bytes(data[c.OPTION_REPLY.size : end])
        del data[:end]
        return Reply(option, kind, body)

    def export(self, no_zeroes: bool) -> ExportDetails | None:
        """What follows EXPORT_NAME, once it is whole; ``no_zeroes`` when both sides agreed to leave them out."""
        data = self._data
        length = 10 if no_zeroes else 134
        if len(data) < length:
            return None
        size, flags = unpack_from(">QH", data)
        del data[:length]
        return ExportDetails(size, flags)


def client_flags(greeting: Greeting) -> bytes:
    """The client's answer to a greeting: all it offers that we know."""
    return pack(">I", (c.FIXED_NEWSTYLE if greeting.fixed else 0) | (c.NO_ZEROES if greeting.no_zeroes else 0))


def option(number: int, data: bytes = b"") -> bytes:
    """An option as it is sent."""
    return c.OPTION.pack(c.OPTION_MAGIC, number, len(data)) + data


class Collector:
    """Gathers the replies to one option."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._replies: list[Reply] = []

    def add(self, reply: Reply) -> Answer | None:
        """The answer, when this was the last reply. Raises ProtocolError."""
        if reply.option != self._number:
            raise ProtocolError(f"NBD server answered option {reply.option} when {self._number} was asked")
        if reply.last:
            return Answer(reply, tuple(self._replies))
        if len(self._replies) >= MAX_REPLIES:
            raise ProtocolError(f"NBD server sent more than {MAX_REPLIES} replies to option {self._number}")
        self._replies.append(reply)
        return None


# -- questions ---------------------------------------------------------------------------------------


class Refused(ProtocolError):
    """A server refused an option. ``kind`` is its reply type, ``said`` its own words, fit to be printed."""

    def __init__(self, number: int, answer: Answer) -> None:
        self.number, self.kind, self.said = number, answer.final.kind, _text(answer.final.data)
        why = _REASONS.get(self.kind, f"refused with error {self.kind & ~c.REP_ERROR}")
        more = f": {self.said}" if self.said else ""
        super().__init__(f"NBD server refused option {number} ({OPTION_NAMES.get(number, 'unknown')}): {why}{more}")


OPTION_NAMES: Final = {
    c.OPT_EXPORT_NAME: "export name",
    c.OPT_ABORT: "abort",
    c.OPT_LIST: "list",
    c.OPT_STARTTLS: "starttls",
    c.OPT_INFO: "info",
    c.OPT_GO: "go",
    c.OPT_STRUCTURED_REPLY: "structured reply",
    c.OPT_LIST_META_CONTEXT: "list meta context",
    c.OPT_SET_META_CONTEXT: "set meta context",
}

_REASONS: Final = {
    c.REP_ERR_UNSUP: "it does not know it",
    c.REP_ERR_POLICY: "its policy forbids it",
    c.REP_ERR_INVALID: "it takes it for invalid",
    c.REP_ERR_PLATFORM: "its platform does not support it",
    c.REP_ERR_TLS_REQD: "it wants TLS first",
    c.REP_ERR_UNKNOWN: "it has no such export",
    c.REP_ERR_SHUTDOWN: "it is shutting down",
    c.REP_ERR_BLOCK_SIZE_REQD: "it wants its block sizes asked for",
    c.REP_ERR_TOO_BIG: "it is too much for it",
}


def start_tls(ask: Ask) -> None:
    """Asks for TLS, which is to be set up when this returns. Raises Refused."""
    _accepted(ask, c.OPT_STARTTLS)


def structured_replies(ask: Ask) -> bool:
    """Asks for structured replies. False when the server has none."""
    return not ask(c.OPT_STRUCTURED_REPLY, b"").refused


def list_exports(ask: Ask) -> list[tuple[str, str]]:
    """Names and descriptions of all exports. Raises Refused."""
    exports: list[tuple[str, str]] = []
    for reply in _accepted(ask, c.OPT_LIST).replies:
        if reply.kind != c.REP_SERVER:
            raise ProtocolError(f"NBD server sent reply type {reply.kind} in its list of exports")
        name, end = _string(reply.data, "export's name")
        exports.append((name, _text(reply.data[end:])))
    return exports


def info(ask: Ask, name: str, wanted: Iterable[int] = (), *, go: bool = False) -> ExportDetails:
    """What the server tells of an export; with ``go`` transmission begins with that. Raises Refused."""
    kinds = tuple(wanted)
    encoded = name.encode("utf-8", "surrogateescape")
    data = pack(">I", len(encoded)) + encoded + pack(f">H{len(kinds)}H", len(kinds), *kinds)
    details: ExportDetails | None = None
    found = ExportDetails(0, 0)
    for reply in _accepted(ask, c.OPT_GO if go else c.OPT_INFO, data).replies:
        if reply.kind != c.REP_INFO or len(reply.data) < 2:
            raise ProtocolError(f"NBD server described export '{name}' with reply type {reply.kind}")
        if _take_info(found, reply.data):
            details = found
    if details is None:
        raise ProtocolError(f"NBD server did not tell the size of export '{name}'")
    return details


def _take_info(found: ExportDetails, data: bytes) -> bool:
    """Adds one piece of information; whether it was the one that has to come."""
    (kind,) = unpack_from(">H", data)
    if kind == c.INFO_EXPORT:
        if len(data) != 12:
            raise ProtocolError(f"NBD server's export information has {len(data)} bytes, not 12")
        found.size, found.flags = unpack_from(">QH", data, 2)
        return True
    if kind == c.INFO_NAME:
        found.name = _text(data[2:])
    elif kind == c.INFO_DESCRIPTION:
        found.description = _text(data[2:])
    elif kind == c.INFO_BLOCK_SIZE:
        if len(data) != 14:
            raise ProtocolError(f"NBD server's block size information has {len(data)} bytes, not 14")
        sizes = unpack_from(">III", data, 2)
        _check_block_sizes(*sizes)
        found.minimum_block, found.preferred_block, found.maximum_block = sizes
    return False


def _check_block_sizes(minimum: int, preferred: int, maximum: int) -> None:
    """Section "Block size constraints" of the protocol."""
    if not is_power_of_two(minimum) or minimum > 64 << 10:
        raise ProtocolError(f"NBD server's minimum block size is {minimum}")
    if not is_power_of_two(preferred) or preferred < minimum:
        raise ProtocolError(f"NBD server's preferred block size is {preferred}, its minimum {minimum}")
    if maximum < minimum or (maximum != 0xFFFFFFFF and maximum % minimum):
        raise ProtocolError(f"NBD server's maximum block size is {maximum}, its minimum {minimum}")


def meta_contexts(ask: Ask, name: str, queries: Iterable[str] = (), *, choose: bool = False) -> dict[str, int]:
    """The metadata contexts of an export that fit ``queries`` (none: all), with their ids; with ``choose`` block status
    will tell them. Structured replies have to be agreed on before. Raises Refused."""
    strings = [each.encode("utf-8", "surrogateescape") for each in (name, *queries)]
    body = b"".join(pack(">I", len(each)) + each for each in strings[1:])
    data = pack(">I", len(strings[0])) + strings[0] + pack(">I", len(strings) - 1) + body
    number = c.OPT_SET_META_CONTEXT if choose else c.OPT_LIST_META_CONTEXT
    contexts: dict[str, int] = {}
    for reply in _accepted(ask, number, data).replies:
        if reply.kind != c.REP_META_CONTEXT or len(reply.data) < 5:
            raise ProtocolError(f"NBD server sent reply type {reply.kind} in its list of metadata contexts")
        contexts[_text(reply.data[4:])] = unpack_from(">I", reply.data)[0]
    return contexts


def _accepted(ask: Ask, number: int, data: bytes = b"") -> Answer:
    answer = ask(number, data)
    if answer.refused:
        raise Refused(number, answer)
    return answer


def _string(data: bytes, what: str) -> tuple[str, int]:
    if len(data) < 4:
        raise ProtocolError(f"NBD server cut off an {what}")
    (length,) = unpack_from(">I", data)
    if length > len(data) - 4 or length > c.MAX_STRING:
        raise ProtocolError(f"NBD server's {what} has {length} bytes, of {len(data) - 4} sent")
    return _text(data[4 : 4 + length]), 4 + length


def _text(data: bytes) -> str:
    """Text of a server. Bytes that are no UTF-8 stay what they are, so that a name can be sent back."""
    if len(data) > c.MAX_STRING:
        raise ProtocolError(f"NBD server sent a string of {len(data)} bytes, more than {c.MAX_STRING}")
    return data.decode("utf-8", "surrogateescape")

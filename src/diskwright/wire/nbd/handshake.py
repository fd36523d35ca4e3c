"""The server's side of NBD's fixed newstyle handshake, as a machine of bytes.

Feed it what the client sends; send what it returns. It ends in ``TRANSMISSION`` (then ``chosen`` tells what was
agreed, and ``rest`` holds bytes that came after the handshake) or in ``CLOSED``. In between it may come to
``SECURING``: then TLS is to be set up, and ``secured`` called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from struct import pack, unpack_from
from typing import Final, NamedTuple

from diskwright.errors import ProtocolError
from diskwright.units import MAX_REQUEST
from diskwright.wire.nbd import constants as c

GREETED: Final = "greeted"
OPTIONS: Final = "options"
TRANSMISSION: Final = "transmission"
CLOSED: Final = "closed"
SECURING: Final = "securing"


class Tls(Enum):
    """Whether a server has TLS."""

    NONE = "none"
    OPTIONAL = "optional"
    """For clients that ask for it."""
    REQUIRED = "required"
    """Who does not ask for it learns nothing."""


class ExportInfo(NamedTuple):
    """What a client is told of an export. Sizes in bytes."""

    size: int
    flags: int
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4096
    contexts: tuple[str, ...] = (c.BASE_ALLOCATION,)
    """What block status can tell of it."""


@dataclass
class Chosen:
    """What client and server agreed upon. ``contexts`` are those block status is to tell."""

    name: str
    structured: bool
    contexts: tuple[str, ...] = ()


class ServerHandshake:
    """One client's handshake. Raises ProtocolError when the client breaks the protocol or a limit."""

    def __init__(self, exports: Mapping[str, ExportInfo], tls: Tls = Tls.NONE) -> None:
        self._exports, self._tls = exports, tls
        self._secure = False
        self._data = bytearray()
        self._options = 0
        self._no_zeroes = False
        self._structured = False
        self._contexts: tuple[str, tuple[str, ...]] | None = None  # an export, and what was chosen of it
        self.state = GREETED
        self.chosen: Chosen | None = None

    @property
    def rest(self) -> bytes:
        """What the client sent after its last option."""
        return bytes(self._data)

    def greeting(self) -> bytes:
        """The first bytes of the conversation."""
        return c.GREETING + pack(">H", c.FIXED_NEWSTYLE | c.NO_ZEROES)

    def feed(self, data: bytes) -> bytes:
        """Takes in bytes of the client; returns what to answer, possibly nothing."""
        self._data += data
        out = bytearray()
        while self.state in (GREETED, OPTIONS) and self._step(out):
            pass
        return bytes(out)

    def secured(self) -> None:
        """TLS has been set up: what is fed from now on came through it. What was agreed upon before is forgotten, since
        somebody else may have had a hand in it."""
        self._secure, self._structured, self._contexts = True, False, None
        self.state = OPTIONS

    def _step(self, out: bytearray) -> bool:
        """One message, when it is whole. False when more bytes are needed."""
        if self.state == GREETED:
            if len(self._data) < 4:
                return False
            (flags,) = unpack_from(">I", self._data)
            del self._data[:4]
            if flags & ~(c.FIXED_NEWSTYLE | c.NO_ZEROES):
                raise ProtocolError(f"NBD client flags {flags:#x} are unknown")
            self._no_zeroes = bool(flags & c.NO_ZEROES)
            self.state = OPTIONS
            return True
        if len(self._data) < c.OPTION.size:
            return False
        magic, option, length = c.OPTION.unpack_from(self._data)
        if magic != c.OPTION_MAGIC:
            raise ProtocolError(f"NBD option magic is {magic:#x}")
        if length > c.MAX_OPTION_DATA:
            raise ProtocolError(f"NBD option {option} has {length} bytes of data, more than {c.MAX_OPTION_DATA}")
        if len(self._data) < c.OPTION.size + length:
            return False
        data = bytes(self._data[c.OPTION.size : c.OPTION.size + length])
        del self._data[: c.OPTION.size + length]
        self._options += 1
        if self._options > c.MAX_OPTIONS:
            raise ProtocolError(f"NBD client sent more than {c.MAX_OPTIONS} options")
        self._option(option, data, out)
        return True

    def _option(self, option: int, data: bytes, out: bytearray) -> None:
        if option == c.OPT_ABORT:
            self._reply(out, option, c.REP_ACK)
            self.state = CLOSED
        elif option == c.OPT_STARTTLS:
            self._start_tls(data, out)
        elif self._tls is Tls.REQUIRED and not self._secure:
            if option == c.OPT_EXPORT_NAME:
                self.state = CLOSED
            else:
                self._refuse(out, option, c.REP_ERR_TLS_REQD, f"option {option} needs TLS, which was not begun")
        elif option == c.OPT_EXPORT_NAME:
            self._export_name(data, out)
        elif option == c.OPT_LIST:
            self._list(data, out)
        elif option in (c.OPT_INFO, c.OPT_GO):
            self._info(option, data, out)
        elif option == c.OPT_STRUCTURED_REPLY:
            if data:
                self._refuse(out, option, c.REP_ERR_INVALID, "this option has no data")
            else:
                self._structured = True
                self._reply(out, option, c.REP_ACK)
        elif option in (c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT):
            self._meta_context(option, data, out)
        else:
            self._refuse(out, option, c.REP_ERR_UNSUP, f"option {option} is not supported")

    def _start_tls(self, data: bytes, out: bytearray) -> None:
        if data:
            self._refuse(out, c.OPT_STARTTLS, c.REP_ERR_INVALID, "this option has no data")
        elif self._tls is Tls.NONE:
            self._refuse(out, c.OPT_STARTTLS, c.REP_ERR_POLICY, "this server has no TLS")
        elif self._secure:
            self._refuse(out, c.OPT_STARTTLS, c.REP_ERR_INVALID, "TLS was begun already")
        elif self._data:
            # A client waits for the answer. Who slips in bytes here wants them taken for what came through TLS.
            raise ProtocolError(f"NBD client sent {len(self._data)} bytes between STARTTLS and its answer")
        else:
            self._reply(out, c.OPT_STARTTLS, c.REP_ACK)
            self.state = SECURING

    def _export_name(self, data: bytes, out: bytearray) -> None:
        """The old way in; it has no way to refuse but to hang up."""
        name = data.decode("utf-8", "replace")
        info = self._exports.get(name)
        if info is None:
            self.state = CLOSED
            return
        out += pack(">QH", info.size, self._flags(info))
        if not self._no_zeroes:
            out += bytes(124)
        self._enter(name)

    def _enter(self, name: str) -> None:
        contexts: tuple[str, ...] = ()
        if self._structured and self._contexts is not None and self._contexts[0] == name:
            contexts = self._contexts[1]
        self.chosen = Chosen(name, self._structured, contexts)
        self.state = TRANSMISSION

    def _flags(self, info: ExportInfo) -> int:
        return info.flags | (c.FLAG_SEND_DF if self._structured else 0)

    def _list(self, data: bytes, out: bytearray) -> None:
        if data:
            self._refuse(out, c.OPT_LIST, c.REP_ERR_INVALID, "this option has no data")
            return
        for name, info in self._exports.items():
            encoded = name.encode()
            body = pack(">I", len(encoded)) + encoded + info.description.encode()[: c.MAX_STRING]
            self._reply(out, c.OPT_LIST, c.REP_SERVER, body)
        self._reply(out, c.OPT_LIST, c.REP_ACK)

    def _info(self, option: int, data: bytes, out: bytearray) -> None:
        parsed = _parse_info(data)
        if parsed is None:
            self._refuse(out, option, c.REP_ERR_INVALID, "malformed request")
            return
        name, wanted = parsed
        info = self._exports.get(name)
        if info is None:
            self._refuse(out, option, c.REP_ERR_UNKNOWN, f"export '{name}' not present")
            return
        if c.INFO_NAME in wanted:
            self._reply(out, option, c.REP_INFO, pack(">H", c.INFO_NAME) + name.encode())
        if c.INFO_DESCRIPTION in wanted and info.description:
            text = info.description.encode()[: c.MAX_STRING]
            self._reply(out, option, c.REP_INFO, pack(">H", c.INFO_DESCRIPTION) + text)
        # Block sizes also unasked: smaller requests work as well, so nobody is misled.
        sizes = pack(">HIII", c.INFO_BLOCK_SIZE, info.minimum_block, info.preferred_block, MAX_REQUEST)
        self._reply(out, option, c.REP_INFO, sizes)
        self._reply(out, option, c.REP_INFO, pack(">HQH", c.INFO_EXPORT, info.size, self._flags(info)))
        self._reply(out, option, c.REP_ACK)
        if option == c.OPT_GO:
            self._enter(name)

    def _meta_context(self, option: int, data: bytes, out: bytearray) -> None:
        listing = option == c.OPT_LIST_META_CONTEXT
        if not listing:
            self._contexts = None  # what was set before is gone, also when this fails
        parsed = _parse_meta(data)
        if parsed is None or not self._structured:
            why = "malformed request" if parsed is None else "negotiate structured replies first"
            self._refuse(out, option, c.REP_ERR_INVALID, why)
            return
        name, queries = parsed
        if name not in self._exports:
            self._refuse(out, option, c.REP_ERR_UNKNOWN, f"export '{name}' not present")
            return
        there = self._exports[name].contexts
        found = _matching(there, queries, listing)
        if not listing:
            self._contexts = name, found
        for context in found:
            number = 0 if listing else there.index(context) + 1
            self._reply(out, option, c.REP_META_CONTEXT, pack(">I", number) + context.encode())
        self._reply(out, option, c.REP_ACK)

    def _reply(self, out: bytearray, option: int, kind: int, data: bytes = b"") -> None:
        out += c.OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, option, kind, len(data)) + data

    def _refuse(self, out: bytearray, option: int, kind: int, why: str) -> None:
        self._reply(out, option, kind, why.encode()[: c.MAX_STRING])


_GROUPS: Final = ("base:", "qemu:", c.DIRTY_BITMAP)
"""Queries that, in a list, stand for all contexts that begin so."""


def _matching(contexts: tuple[str, ...], queries: list[str], listing: bool) -> tuple[str, ...]:
    """The contexts that were asked for, in their own order. To set one it has to be named in full."""
    if listing and not queries:
        return contexts
    wanted = set(queries)
    groups = tuple(wanted.intersection(_GROUPS)) if listing else ()
    return tuple(each for each in contexts if each in wanted or each.startswith(groups))


def _parse_info(data: bytes) -> tuple[str, list[int]] | None:
    """Name and wanted information of INFO and GO; None when the lengths do not fit."""
    if len(data) < 6:
        return None
    (length,) = unpack_from(">I", data)
    if length > c.MAX_STRING or len(data) < 6 + length:
        return None
    name = data[4 : 4 + length].decode("utf-8", "replace")
    (count,) = unpack_from(">H", data, 4 + length)
    if len(data) != 6 + length + 2 * count:
        return None
    return name, list(unpack_from(f">{count}H", data, 6 + length))


def _parse_meta(data: bytes) -> tuple[str, list[str]] | None:
    """Export name and queries; None when the lengths do not fit."""
    strings: list[str] = []
    at, left = 0, 1
    counted = False
    while left:
        if len(data) < at + 4:
            return None
        (length,) = unpack_from(">I", data, at)
        if length > c.MAX_STRING or len(data) < at + 4 + length:
            return None
        strings.append(data[at + 4 : at + 4 + length].decode("utf-8", "replace"))
        at += 4 + length
        left -= 1
        if not counted:
            counted = True
            if len(data) < at + 4:
                return None
            (left,) = unpack_from(">I", data, at)
            at += 4
            if left * 4 > len(data) - at:
                return None
    return (strings[0], strings[1:]) if at == len(data) else None

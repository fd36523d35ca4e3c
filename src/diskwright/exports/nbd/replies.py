"""Replies: how each is laid out for a client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from diskwright.wire.nbd import constants as c

_ERROR: Final = c.ERROR_CHUNK
_simple = c.SIMPLE_REPLY.pack
_simple_into = c.SIMPLE_REPLY.pack_into
_data_chunk = c.DATA_CHUNK.pack
_data_chunk_into = c.DATA_CHUNK.pack_into


class Replies:
    """Lays replies out, simple or structured, as agreed with one client."""

    def __init__(self, structured: bool) -> None:
        self.structured = structured
        self.read_header_size: Final = c.DATA_CHUNK.size if structured else c.SIMPLE_REPLY.size
        self.put_read_header: Final = _put_data_chunk if structured else _put_simple
        """Puts what goes before the data of a read, all of it, into a buffer: (buffer, at, cookie, offset, length)."""

    def done(self, cookie: int) -> bytes:
        """A request without data has succeeded. Simple replies are allowed for these even when structured ones
        are agreed."""
        return _simple(c.SIMPLE_REPLY_MAGIC, 0, cookie)

    def failed(self, cookie: int, error: int, is_read: bool) -> bytes:
        """A request has failed with a wire error. A structured read or block status fails with a chunk."""
        if self.structured and is_read:
            return _ERROR.pack(c.CHUNK_MAGIC, c.CHUNK_DONE, c.CHUNK_ERROR, cookie, 6, error, 0)
        return _simple(c.SIMPLE_REPLY_MAGIC, error, cookie)

    def read_header(self, cookie: int, offset: int, length: int, last: bool = True) -> bytes:
        """What goes before ``length`` bytes of data."""
        if self.structured:
            flags = c.CHUNK_DONE if last else 0
            return _data_chunk(c.CHUNK_MAGIC, flags, c.CHUNK_OFFSET_DATA, cookie, 8 + length, offset)
        return _simple(c.SIMPLE_REPLY_MAGIC, 0, cookie)

    def hole(self, cookie: int, offset: int, length: int, last: bool) -> bytes:
        flags = c.CHUNK_DONE if last else 0
        return c.HOLE_CHUNK.pack(c.CHUNK_MAGIC, flags, c.CHUNK_OFFSET_HOLE, cookie, 12, offset, length)

    def end_of_read(self, cookie: int) -> bytes:
        """After chunks of which none was the last; also the whole reply to a read of nothing."""
        if self.structured:
            return c.CHUNK.pack(c.CHUNK_MAGIC, c.CHUNK_DONE, c.CHUNK_NONE, cookie, 0)
        return _simple(c.SIMPLE_REPLY_MAGIC, 0, cookie)

    def status(self, cookie: int, context: int, runs: Sequence[tuple[int, int]], last: bool) -> bytes:
        """``runs`` are (length, state flags) of the context with that id."""
        flags = c.CHUNK_DONE if last else 0
        head = c.STATUS_CHUNK.pack(c.CHUNK_MAGIC, flags, c.CHUNK_BLOCK_STATUS, cookie, 4 + 8 * len(runs), context)
        return head + b"".join(c.DESCRIPTOR.pack(*run) for run in runs)


def _put_simple(buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
    _simple_into(buffer, at, c.SIMPLE_REPLY_MAGIC, 0, cookie)


def _put_data_chunk(buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
    _data_chunk_into(buffer, at, c.CHUNK_MAGIC, c.CHUNK_DONE, c.CHUNK_OFFSET_DATA, cookie, 8 + length, offset)

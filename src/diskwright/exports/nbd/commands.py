"""What an NBD connection does besides small reads and writes: large reads, zeroing, trimming, flushes, block status.

What would have to wait for a medium goes to the connection's own workers, so that requests behind it go on; replies may
then come in another order, as the protocol allows. The workers are the connection's own because a client that does
not take its replies blocks whoever sends them: that must hurt nobody else.
"""

from __future__ import annotations

import errno
import io
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from diskwright.core.disk import Disk
from diskwright.errors import DiskwrightError, errno_of
from diskwright.exports.nbd.channel import Channel
from diskwright.exports.nbd.contexts import MAX_DESCRIPTORS, Context, Look
from diskwright.exports.nbd.places import Found, Places
from diskwright.exports.nbd.replies import Replies
from diskwright.units import MAX_REQUEST, KiB, MiB
from diskwright.wire.nbd import constants as c

if TYPE_CHECKING:
    from diskwright.core.status import Status

_log: Final = logging.getLogger(__name__)

SHORTEST_HOLE: Final = 32 * KiB
"""Zeros that are told as a hole rather than sent."""
WORKERS: Final = 16
"""Requests of one client that wait for media at a time: what a disk's own queue makes use of."""
MAX_AWAY: Final = 64
"""Requests of one client with its workers or waiting for one; more wait in its socket."""
PIECE: Final = 64 * MiB
"""Zeroing and trimming are requests of the disk of at most this length, so that draining need not wait for long.
A multiple of every format's cluster size."""
SHORT: Final = 1 * MiB
"""Zeroing and trimming of more than this goes to a worker."""
COPIED: Final = 1 * MiB
"""A piece of a large read that goes through memory."""

FAILURES: Final = (OSError, DiskwrightError, ValueError, MemoryError)
"""What a disk may raise; the client is told, and the connection goes on."""

_FLAGS: Final = {
    c.CMD_READ: c.CMD_FLAG_FUA | c.CMD_FLAG_DF,
    c.CMD_FLUSH: c.CMD_FLAG_FUA,
    c.CMD_TRIM: c.CMD_FLAG_FUA,
    c.CMD_CACHE: c.CMD_FLAG_FUA,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_FUA | c.CMD_FLAG_REQ_ONE,
}
"""Flags a command may carry. FUA means nothing for those that do not write, and is allowed for all."""


class Commands:
    """The commands of one connection. Called by its own thread, which may wait."""

    def __init__(
        self,
        channel: Channel,
        places: Places,
        disk: Disk,
        replies: Replies,
        *,
        read_only: bool,
        contexts: Sequence[tuple[int, Context]],
    ) -> None:
        self._channel, self._places, self._disk, self._replies = channel, places, disk, replies
        self._structured, self._read_only, self._contexts = replies.structured, read_only, contexts
        self._workers: ThreadPoolExecutor | None = None
        self._away = threading.Semaphore(MAX_AWAY)

    def run(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> None:
        """Serves one request of any kind but a write, or sees to it that it will be. Raises OSError when the client is
        gone."""
        if flags & ~_FLAGS.get(kind, 0) or (flags & c.CMD_FLAG_DF and not self._structured):
            self._refuse(kind, cookie, errno.EINVAL)
        elif kind == c.CMD_READ:
            if length:
                self._large_read(flags, cookie, offset, length)
            else:
                self._channel.put(self._replies.end_of_read(cookie))
        elif kind == c.CMD_BLOCK_STATUS:
            self._block_status(flags, cookie, offset, length)
        elif kind == c.CMD_FLUSH:
            # Out of the way of reads: a flush takes milliseconds.
            self.send_away(self._answer, cookie, self._flush)
        elif kind in (c.CMD_TRIM, c.CMD_WRITE_ZEROES):
            self._zero_or_trim(flags, kind, cookie, offset, length)
        elif kind == c.CMD_CACHE and offset + length <= self._disk.size:
            self._channel.put(self._replies.done(cookie))
        else:
            self._refuse(kind, cookie, errno.EINVAL)

    def end(self) -> None:
        """Returns when the workers have done what they were given."""
        if self._workers is not None:
            self._workers.shutdown()

    def _refuse(self, kind: int, cookie: int, number: int) -> None:
        chunk = kind in (c.CMD_READ, c.CMD_BLOCK_STATUS)
        self._channel.put(self._replies.failed(cookie, c.wire_error(number), chunk))

    # -- reads -----------------------------------------------------------------------------------

    def read_alone(self, cookie: int, offset: int, length: int) -> None:
        """One read with a buffer of its own, waiting for the medium."""
        try:
            buffer = memoryview(bytearray(length))
            with self._disk.request():
                self._disk.readv([(offset, buffer)])
        except FAILURES as error:
            self._channel.put(self._replies.failed(cookie, wire_error(error), True))
            return
        self._channel.put_all([self._replies.read_header(cookie, offset, length), buffer])

    def _large_read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """In pieces: holes as such, bytes of a file from that file, the rest through memory."""
        if length > MAX_REQUEST or offset + length > self._disk.size:
            self._channel.put(self._replies.failed(cookie, c.wire_error(errno.EINVAL), True))
            return
        if not self._structured or flags & c.CMD_FLAG_DF:
            self._whole_read(cookie, offset, length)
            return
        try:
            with self._disk.request():
                runs = _worthwhile(self._disk.status(offset, length))
        except FAILURES as error:
            self._channel.put(self._replies.failed(cookie, wire_error(error), True))
            return
        for at, size, zero in runs:
            last = at + size == offset + length
            if zero:
                self._channel.put(self._replies.hole(cookie, at, size, last))
            elif not self._data_chunks(cookie, at, size, last):
                return

    def _whole_read(self, cookie: int, offset: int, length: int) -> None:
        """A simple reply, or one chunk."""
        found = self._find_place(offset, length)
        if found is not None and found.place.length < length:
            self._places.give_up(found)
            found = None
        if found is None:
            self.read_alone(cookie, offset, length)
        else:
            self._send_place(cookie, offset, found, True)

    def _data_chunks(self, cookie: int, offset: int, length: int, last: bool) -> bool:
        """One run of data as chunks. False when it ended with an error chunk."""
        end = offset + length
        while offset < end:
            found = self._find_place(offset, end - offset)
            if found is None:
                size = min(end - offset, COPIED)
                sent = self._send_copied(cookie, offset, size, last and offset + size == end)
            else:
                size = found.place.length
                sent = self._send_place(cookie, offset, found, last and offset + size == end)
            if not sent:
                return False
            offset += size
        return True

    def _send_copied(self, cookie: int, offset: int, length: int, last: bool) -> bool:
        """A chunk of data, through memory. False when it was an error chunk."""
        try:
            buffer = memoryview(bytearray(length))
            with self._disk.request():
                self._disk.readv([(offset, buffer)])
        except FAILURES as error:
            self._channel.put(self._replies.failed(cookie, wire_error(error), True))
            return False
        self._channel.put_all([self._replies.read_header(cookie, offset, length, last), buffer])
        return True

    def _send_place(self, cookie: int, offset: int, found: Found, last: bool) -> bool:
        """A chunk of data, or a simple reply, straight from a file. False when the file failed and the client was
        told so. Raises OSError when it failed in a simple reply: then only hanging up tells the client."""
        # Never itself the last chunk: an error may still show while it is sent, and needs a chunk to be told in.
        header = self._replies.read_header(cookie, offset, found.place.length, False)
        channel = self._channel
        with channel.lock:
            error = self._places.send(header, found, pad=self._structured)
            if error is not None:
                channel.socket.sendall(self._replies.failed(cookie, wire_error(error), True))
            elif last and self._structured:
                channel.socket.sendall(self._replies.end_of_read(cookie))
        return error is None

    def _find_place(self, offset: int, length: int) -> Found | None:
        try:
            return self._places.find(offset, length)
        except FAILURES:
            return None  # reading it will fail too, and tell why

    # -- zeroing, trimming, flushing ---------------------------------------------------------------

    def _zero_or_trim(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> None:
        if self._read_only:
            self._refuse(kind, cookie, errno.EPERM)
        elif offset + length > self._disk.size:
            self._refuse(kind, cookie, errno.EINVAL if kind == c.CMD_TRIM else errno.ENOSPC)
        elif length <= SHORT:
            self._answer(cookie, self._change, flags, kind, offset, length)
        else:
            self.send_away(self._answer, cookie, self._change, flags, kind, offset, length)

    def _change(self, flags: int, kind: int, offset: int, length: int) -> None:
        disk, end = self._disk, offset + length
        unmap, fast = not flags & c.CMD_FLAG_NO_HOLE, bool(flags & c.CMD_FLAG_FAST_ZERO)
        # What is fast needs no pieces, and has to be refused before anything has changed.
        piece = length if fast else PIECE
        while offset < end:
            stop = end if fast else min(end, offset - offset % piece + piece)
            with disk.request():
                if kind == c.CMD_TRIM:
                    disk.discard(offset, stop - offset)
                else:
                    disk.write_zeros(offset, stop - offset, unmap=unmap, fast=fast)
            offset = stop
        if flags & c.CMD_FLAG_FUA:
            self._flush()

    def _flush(self) -> None:
        with self._disk.request():
            self._disk.flush_node()

    def _answer(self, cookie: int, work: Callable[..., None], *arguments: object) -> None:
        """Does ``work``, and answers."""
        try:
            work(*arguments)
            reply = self._replies.done(cookie)
        except FAILURES as error:
            reply = self._replies.failed(cookie, wire_error(error, errno.ENOSPC), False)
        self._channel.put(reply)

    # -- block status ------------------------------------------------------------------------------

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        size = self._disk.size
        if not self._contexts or not length or offset + length > size:
            self._channel.put(self._replies.failed(cookie, c.wire_error(errno.EINVAL), True))
            return
        most = 1 if flags & c.CMD_FLAG_REQ_ONE else MAX_DESCRIPTORS
        try:
            with self._disk.request():
                look = Look(self._disk, offset, length, most)
                told = [(number, context.runs(look)) for number, context in self._contexts]
        except FAILURES as error:
            self._channel.put(self._replies.failed(cookie, wire_error(error), True))
            return
        last = told[-1][0]
        self._channel.put(
            b"".join([self._replies.status(cookie, number, runs, number == last) for number, runs in told])
        )

    # -- workers -----------------------------------------------------------------------------------

    def send_away(self, work: Callable[..., None], *arguments: object) -> None:
        """Hands work to the workers; waits while this client has too much with them already. Never call it inside
        the disk's gate."""
        self._away.acquire()
        try:
            if self._workers is None:
                self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="nbd-worker")
            self._workers.submit(self._work, work, arguments)
        except BaseException:
            self._away.release()
            raise

    def _work(self, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
        try:
            work(*arguments)
        except OSError:
            pass  # the client is gone; its own thread finds out too
        except BaseException:
            # A request without an answer would keep the client waiting for ever.
            _log.exception("An NBD request failed")
            self._channel.hang_up()
        finally:
            self._away.release()


def _worthwhile(rows: list[Status]) -> list[tuple[int, int, bool]]:
    """``(offset, length, is a hole)``, where short holes count as data: sending them costs less than saying so."""
    runs: list[tuple[int, int, bool]] = []
    for row in rows:
        hole = row.zero and row.length >= SHORTEST_HOLE
        if runs and runs[-1][2] == hole:
            runs[-1] = (runs[-1][0], runs[-1][1] + row.length, hole)
        else:
            runs.append((row.offset, row.length, hole))
    return runs


def wire_error(error: BaseException, beyond_end: int = errno.EINVAL) -> int:
    """The number on the wire for what a disk raised; ``beyond_end`` for a request that goes beyond its end."""
    if isinstance(error, io.UnsupportedOperation):
        return c.wire_error(errno.EPERM)
    if isinstance(error, ValueError):
        return c.wire_error(beyond_end)
    return c.wire_error(errno_of(error))

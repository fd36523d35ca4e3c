"""One NBD client: its thread receives requests and serves them in batches.

All requests in the receive buffer are parsed at once. Reads that follow each other become one ``readv`` and
one ``send``, writes one ``writev``. What would have to wait for a medium (a read that is not cached, a flush,
a long zeroing) goes to the connection's own workers, so that requests behind it go on; replies may then come in
another order, as the protocol allows. The workers are the connection's own because a client that does not take its
replies blocks whoever sends them: that must hurt nobody else.

A connection takes at most ``RECEIVE`` + ``REPLY`` + one longest request (``units.MAX_REQUEST``) bytes, and
``MAX_AWAY`` requests of less than ``SENDFILE`` bytes with its workers.
"""

from __future__ import annotations

import errno
import io
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from diskwright.core.disk import Disk
from diskwright.errors import DiskwrightError, ProtocolError, errno_of
from diskwright.exports.nbd.places import SENDFILE, Found, Places
from diskwright.exports.nbd.replies import Buffers, Replies, send_all
from diskwright.extents import WINDOW
from diskwright.units import MAX_REQUEST, KiB, MiB
from diskwright.wire.nbd import constants as c
from diskwright.wire.nbd.handshake import Chosen

if TYPE_CHECKING:
    from diskwright.core.status import Status

_log: Final = logging.getLogger(__name__)

RECEIVE: Final = 2 * MiB
"""Receive buffer: a 1 MiB write fits, and 400 writes of 4 KiB."""
REPLY: Final = 1 * MiB
"""Answers to reads gathered for one send."""
SHORTEST_HOLE: Final = 32 * KiB
"""Zeros that are told as a hole rather than sent."""
WORKERS: Final = 16
"""Requests of one client that wait for media at a time: what a disk's own queue makes use of."""
MAX_AWAY: Final = 64
"""Requests of one client with its workers or waiting for one; more wait in its socket."""
MAX_DESCRIPTORS: Final = 4096
"""Runs in one block status reply; a client asks again for what is left out."""
LAST_ROUNDS: Final = 4
"""Times a connection still receives when the server closes; a TCP client could go on for ever."""
PIECE: Final = 64 * MiB
"""Zeroing and trimming are requests of the disk of at most this length, so that draining need not wait for long.
A multiple of every format's cluster size."""
SHORT: Final = 1 * MiB
"""Zeroing and trimming of more than this goes to a worker."""

_HEADER: Final = c.REQUEST.size
_READ_HEADER: Final = c.DATA_CHUNK.size  # the longer of the two kinds
_FAILURES: Final = (OSError, DiskwrightError, ValueError, MemoryError)
_FLAGS: Final = {
    c.CMD_READ: c.CMD_FLAG_FUA | c.CMD_FLAG_DF,
    c.CMD_WRITE: c.CMD_FLAG_FUA,
    c.CMD_FLUSH: c.CMD_FLAG_FUA,
    c.CMD_TRIM: c.CMD_FLAG_FUA,
    c.CMD_CACHE: c.CMD_FLAG_FUA,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_FUA | c.CMD_FLAG_REQ_ONE,
}
"""Flags a command may carry. FUA means nothing for those that do not write, and is allowed for all."""

_Read = tuple[int, int, int]  # cookie, offset, length
_Write = tuple[int, int, memoryview]  # cookie, offset, payload


class Ending:
    """How far a server's end has come: ``closing`` (serve what has arrived), then ``cut`` (wait for no client)."""

    def __init__(self) -> None:
        self.closing = False
        self.cut = threading.Event()


class Connection:
    """One client in its transmission phase. ``serve`` is its whole life."""

    def __init__(self, sock: socket.socket, disk: Disk, read_only: bool, chosen: Chosen, ending: Ending) -> None:
        self._sock, self._disk, self._read_only, self._ending = sock, disk, read_only, ending
        self._replies = Replies(chosen.structured)
        self._structured, self._contexts = chosen.structured, chosen.base_allocation
        self._send_lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None
        self._away = threading.Semaphore(MAX_AWAY)
        self._buffer = bytearray(RECEIVE)
        self._reply = memoryview(bytearray(REPLY))
        self._reply_used = 0
        self._reads: list[_Read] = []
        self._writes: list[_Write] = []
        self._write_flush = False
        self._places = Places(sock, disk)

    # -- receiving -------------------------------------------------------------------------------

    def serve(self, rest: bytes) -> None:
        """Serves until the client leaves or breaks the protocol. Raises OSError or ProtocolError; replies to all
        requests that were received whole have been sent then, as far as the client took them."""
        try:
            self._receive(rest)
        finally:
            if self._workers is not None:
                self._workers.shutdown()
            self._places.end(self._ending.cut)

    def _receive(self, rest: bytes) -> None:
        buffer, view = self._buffer, memoryview(self._buffer)
        receive = self._sock.recv_into
        ending, rounds, pending = self._ending, LAST_ROUNDS, self._places.pending
        have = len(rest)
        buffer[:have] = rest
        while True:
            at = self._parse(view, have)
            if at < 0:
                return
            left = have - at
            if left and at:
                buffer[:left] = buffer[at:have]
            if pending:
                self._places.wait_for_client()
            if ending.closing:
                rounds -= 1
                if rounds < 0:
                    return
            got = receive(view[left:])
            if not got:
                if left:
                    raise ProtocolError("The client left in the middle of a request")
                return
            have = left + got

    def _parse(self, view: memoryview, have: int) -> int:
        """Serves every whole request in the first ``have`` bytes; returns where the next begins, or -1 at the end."""
        at = 0
        unpack = c.REQUEST.unpack_from
        while have - at >= _HEADER:
            magic, flags, kind, cookie, offset, length = unpack(view, at)
            if magic != c.REQUEST_MAGIC:
                self._flush_batches()
                raise ProtocolError(f"NBD request magic is {magic:#x}")
            at += _HEADER
            if kind == c.CMD_READ and 0 < length < SENDFILE and flags <= c.CMD_FLAG_FUA:
                if self._writes:
                    self._do_writes()
                if self._reply_used + length + _READ_HEADER > REPLY:
                    self._do_reads()
                self._reply_used += length + _READ_HEADER
                self._reads.append((cookie, offset, length))
            elif kind == c.CMD_WRITE:
                if have - at >= length:
                    self._add_write(flags, cookie, offset, view[at : at + length])
                    at += length
                elif _HEADER + length <= RECEIVE:
                    at -= _HEADER
                    break
                else:
                    self._large_write(flags, cookie, offset, length, view[at:have])
                    return have
            elif kind == c.CMD_DISC:
                self._flush_batches()
                return -1
            else:
                self._flush_batches()
                self._other(flags, kind, cookie, offset, length)
        self._flush_batches()
        return at

    def _flush_batches(self) -> None:
        if self._reads:
            self._do_reads()
        if self._writes:
            self._do_writes()

    def _large_write(self, flags: int, cookie: int, offset: int, length: int, begun: memoryview) -> None:
        """A write longer than the receive buffer, of which ``begun`` is here. It is applied when it is whole."""
        self._flush_batches()
        if length > MAX_REQUEST:
            raise ProtocolError(f"NBD write of {length} bytes, more than the {MAX_REQUEST} announced")
        payload = memoryview(bytearray(length))
        done = len(begun)
        payload[:done] = begun
        while done < length:
            got = self._sock.recv_into(payload[done:])
            if not got:
                raise ProtocolError("The client left in the middle of a write")
            done += got
        self._add_write(flags, cookie, offset, payload)
        self._do_writes()

    # -- reads -----------------------------------------------------------------------------------

    def _do_reads(self) -> None:
        reads, self._reads = self._reads, []
        self._reply_used = 0
        data, gap = self._reply, self._replies.read_header_size
        # Each answer right behind the other, as they go out: one buffer costs less to send than a list of them.
        segments = []
        at = gap
        for _, offset, length in reads:
            segments.append((offset, data[at : at + length]))
            at += length + gap
        disk = self._disk
        try:
            token = disk.begin()
            try:
                disk.readv(segments, nowait=True)
            finally:
                disk.end(token)
        except BlockingIOError:
            # Outside the gate: whoever waits for a worker inside it would keep a drain waiting for those behind it.
            for read in reads:
                self._send_away(self._read_alone, *read)
            return
        except _FAILURES as error:
            self._reads_failed(reads, error)
            return
        put_header = self._replies.put_read_header
        at = 0
        for cookie, offset, length in reads:
            put_header(data, at, cookie, offset, length)
            at += length + gap
        with self._send_lock:
            self._sock.sendall(data[:at])

    def _reads_failed(self, reads: list[_Read], error: BaseException) -> None:
        """Answers reads of a batch that failed: one by one, to tell whose fault it is."""
        if len(reads) == 1:
            self._send(self._replies.failed(reads[0][0], _wire_error(error), True))
            return
        for read in reads:
            self._read_alone(*read)

    def _read_alone(self, cookie: int, offset: int, length: int) -> None:
        """One read with a buffer of its own, waiting for the medium."""
        out: Buffers
        try:
            buffer = memoryview(bytearray(length))
            with self._disk.request():
                self._disk.readv([(offset, buffer)])
            out = [self._replies.read_header(cookie, offset, length), buffer]
        except _FAILURES as error:
            out = [self._replies.failed(cookie, _wire_error(error), True)]
        with self._send_lock:
            send_all(self._sock, out)

    def _large_read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """In pieces: holes as such, bytes of a file from that file, the rest through memory."""
        if length > MAX_REQUEST or offset + length > self._disk.size:
            self._send(self._replies.failed(cookie, c.wire_error(errno.EINVAL), True))
            return
        if not self._structured or flags & c.CMD_FLAG_DF:
            self._whole_read(cookie, offset, length)
            return
        try:
            with self._disk.request():
                runs = _worthwhile(self._disk.status(offset, length))
        except _FAILURES as error:
            self._send(self._replies.failed(cookie, _wire_error(error), True))
            return
        for at, size, zero in runs:
            last = at + size == offset + length
            if zero:
                self._send(self._replies.hole(cookie, at, size, last))
            elif not self._data_chunks(cookie, at, size, last):
                return

    def _whole_read(self, cookie: int, offset: int, length: int) -> None:
        """A simple reply, or one chunk."""
        found = self._find_place(offset, length)
        if found is not None and found.place.length < length:
            self._places.give_up(found)
            found = None
        if found is None:
            self._read_alone(cookie, offset, length)
        else:
            self._send_place(cookie, offset, found, True)

    def _data_chunks(self, cookie: int, offset: int, length: int, last: bool) -> bool:
        """One run of data as chunks. False when it ended with an error chunk."""
        end = offset + length
        while offset < end:
            found = self._find_place(offset, end - offset)
            if found is None:
                size = min(end - offset, REPLY)
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
        except _FAILURES as error:
            self._send(self._replies.failed(cookie, _wire_error(error), True))
            return False
        with self._send_lock:
            send_all(self._sock, [self._replies.read_header(cookie, offset, length, last), buffer])
        return True

    def _send_place(self, cookie: int, offset: int, found: Found, last: bool) -> bool:
        """A chunk of data, or a simple reply, straight from a file. False when the file failed and the client was
        told so. Raises OSError when it failed in a simple reply: then only hanging up tells the client."""
        # Never itself the last chunk: an error may still show while it is sent, and needs a chunk to be told in.
        header = self._replies.read_header(cookie, offset, found.place.length, False)
        with self._send_lock:
            error = self._places.send(header, found, pad=self._structured)
            if error is not None:
                self._sock.sendall(self._replies.failed(cookie, _wire_error(error), True))
            elif last and self._structured:
                self._sock.sendall(self._replies.end_of_read(cookie))
        return error is None

    def _find_place(self, offset: int, length: int) -> Found | None:
        try:
            return self._places.find(offset, length)
        except _FAILURES:
            return None  # reading it will fail too, and tell why

    # -- writes ----------------------------------------------------------------------------------

    def _add_write(self, flags: int, cookie: int, offset: int, payload: memoryview) -> None:
        if self._reads:
            self._do_reads()
        if flags:
            if flags != c.CMD_FLAG_FUA:
                self._do_writes()
                self._send(self._replies.failed(cookie, c.wire_error(errno.EINVAL), False))
                return
            self._write_flush = True
        self._writes.append((cookie, offset, payload))

    def _do_writes(self) -> None:
        writes, self._writes = self._writes, []
        flush, self._write_flush = self._write_flush, False
        if not writes:
            return
        disk = self._disk
        done = self._replies.done
        if self._read_only:
            denied = c.wire_error(errno.EPERM)
            out = [self._replies.failed(cookie, denied, False) for cookie, _, _ in writes]
        else:
            try:
                token = disk.begin()
                try:
                    disk.writev([(offset, payload) for _, offset, payload in writes if len(payload)])
                    if flush:
                        disk.flush_node()
                finally:
                    disk.end(token)
                out = [done(cookie) for cookie, _, _ in writes]
            except _FAILURES as error:
                out = self._writes_failed(writes, flush, error)
        with self._send_lock:
            self._sock.sendall(b"".join(out))

    def _writes_failed(self, writes: list[_Write], flush: bool, error: BaseException) -> list[bytes]:
        """Answers for writes of a batch that failed: each is done once more by itself, to tell whose fault it is."""
        if len(writes) == 1:
            return [self._replies.failed(writes[0][0], _wire_error(error, errno.ENOSPC), False)]
        return [self._write_alone(write, flush) for write in writes]

    def _write_alone(self, write: _Write, flush: bool) -> bytes:
        cookie, offset, payload = write
        try:
            with self._disk.request():
                if len(payload):
                    self._disk.writev([(offset, payload)])
                if flush:
                    self._disk.flush_node()
            return self._replies.done(cookie)
        except _FAILURES as error:
            return self._replies.failed(cookie, _wire_error(error, errno.ENOSPC), False)

    # -- the other commands ----------------------------------------------------------------------

    def _other(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> None:
        if flags & ~_FLAGS.get(kind, 0) or (flags & c.CMD_FLAG_DF and not self._structured):
            self._refuse(kind, cookie, errno.EINVAL)
        elif kind == c.CMD_READ:
            if length:
                self._large_read(flags, cookie, offset, length)
            else:
                self._send(self._replies.end_of_read(cookie))
        elif kind == c.CMD_BLOCK_STATUS:
            self._block_status(flags, cookie, offset, length)
        elif kind == c.CMD_FLUSH:
            # Out of the way of reads: a flush takes milliseconds.
            self._send_away(self._run, cookie, self._flush)
        elif kind in (c.CMD_TRIM, c.CMD_WRITE_ZEROES):
            self._zero_or_trim(flags, kind, cookie, offset, length)
        elif kind == c.CMD_CACHE and offset + length <= self._disk.size:
            self._send(self._replies.done(cookie))
        else:
            self._refuse(kind, cookie, errno.EINVAL)

    def _refuse(self, kind: int, cookie: int, number: int) -> None:
        chunk = kind in (c.CMD_READ, c.CMD_BLOCK_STATUS)
        self._send(self._replies.failed(cookie, c.wire_error(number), chunk))

    def _zero_or_trim(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> None:
        if self._read_only:
            self._refuse(kind, cookie, errno.EPERM)
        elif offset + length > self._disk.size:
            self._refuse(kind, cookie, errno.EINVAL if kind == c.CMD_TRIM else errno.ENOSPC)
        elif length <= SHORT:
            self._run(cookie, self._change, flags, kind, offset, length)
        else:
            self._send_away(self._run, cookie, self._change, flags, kind, offset, length)

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

    def _run(self, cookie: int, work: Callable[..., None], *arguments: object) -> None:
        """Does ``work``, and answers."""
        try:
            work(*arguments)
            reply = self._replies.done(cookie)
        except _FAILURES as error:
            reply = self._replies.failed(cookie, _wire_error(error, errno.ENOSPC), False)
        self._send(reply)

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        size = self._disk.size
        if not self._contexts or not length or offset + length > size:
            self._send(self._replies.failed(cookie, c.wire_error(errno.EINVAL), True))
            return
        most = 1 if flags & c.CMD_FLAG_REQ_ONE else MAX_DESCRIPTORS
        try:
            with self._disk.request():
                rows = self._disk.status(offset, min(length, WINDOW))
        except _FAILURES as error:
            self._send(self._replies.failed(cookie, _wire_error(error), True))
            return
        runs: list[tuple[int, int]] = []
        for row in rows:
            state = (c.STATE_ZERO if row.zero else 0) | (0 if row.data else c.STATE_HOLE)
            if runs and runs[-1][1] == state:
                runs[-1] = (runs[-1][0] + row.length, state)
            elif len(runs) == most:
                break
            else:
                runs.append((row.length, state))
        self._send(self._replies.status(cookie, runs))

    # -- sending ---------------------------------------------------------------------------------

    def _send(self, reply: bytes) -> None:
        with self._send_lock:
            self._sock.sendall(reply)

    def _send_away(self, work: Callable[..., None], *arguments: object) -> None:
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
            self._hang_up()
        finally:
            self._away.release()

    def _hang_up(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is gone already


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


def _wire_error(error: BaseException, beyond_end: int = errno.EINVAL) -> int:
    if isinstance(error, io.UnsupportedOperation):
        return c.wire_error(errno.EPERM)
    if isinstance(error, ValueError):
        return c.wire_error(beyond_end)
    return c.wire_error(errno_of(error))

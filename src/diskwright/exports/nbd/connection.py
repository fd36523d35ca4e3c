"""One NBD client: its thread receives requests and serves them in batches.

All requests in the receive buffer are parsed at once. Reads that follow each other become one ``readv`` and
one ``sendmsg``, writes one ``writev``. A read that would have to wait for a medium goes to the server's workers,
so that requests behind it go on; replies may then come in another order, as the protocol allows.

A connection takes at most ``RECEIVE`` + ``REPLY`` + one longest request (``units.MAX_REQUEST``) bytes, and
``MAX_AWAY`` requests of at most ``SENDFILE`` bytes with the workers.
"""

from __future__ import annotations

import errno
import fcntl
import io
import socket
import struct
import termios
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from diskwright.core.disk import Disk
from diskwright.core.driver import FilePlace
from diskwright.errors import DiskwrightError, ProtocolError, errno_of
from diskwright.exports.nbd.replies import Buffers, Replies, send_all, send_place
from diskwright.extents import WINDOW
from diskwright.units import MAX_REQUEST, KiB, MiB
from diskwright.wire.nbd import constants as c
from diskwright.wire.nbd.handshake import Chosen

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from diskwright.core.status import Status

RECEIVE: Final = 2 * MiB
"""Receive buffer: a 1 MiB write fits, and 400 writes of 4 KiB."""
REPLY: Final = 1 * MiB
"""Read data gathered for one sendmsg."""
SENDFILE: Final = 64 * KiB
"""Reads from this length on are sent from the file itself; below it copying costs less than the calls."""
SHORTEST_HOLE: Final = 32 * KiB
"""Zeros that are told as a hole rather than sent."""
MAX_AWAY: Final = 64
"""Requests of one client with the workers at a time; more wait in its socket."""
MAX_DESCRIPTORS: Final = 4096
"""Runs in one block status reply; a client asks again for what is left out."""

_HEADER: Final = c.REQUEST.size
_FAILURES: Final = (OSError, DiskwrightError, ValueError, MemoryError)

_Read = tuple[int, int, int]  # cookie, offset, length
_Write = tuple[int, int, memoryview]  # cookie, offset, payload


class Connection:
    """One client in its transmission phase. ``serve`` is its whole life; ``hang_up`` may come from any thread."""

    def __init__(
        self, sock: socket.socket, disk: Disk, read_only: bool, chosen: Chosen, workers: ThreadPoolExecutor
    ) -> None:
        self._sock, self._disk, self._read_only = sock, disk, read_only
        self._workers = workers
        self._replies = Replies(chosen.structured)
        self._structured, self._contexts = chosen.structured, chosen.base_allocation
        self._send_lock = threading.Lock()
        self._away = threading.Semaphore(MAX_AWAY)
        self._buffer = bytearray(RECEIVE)
        self._reply = memoryview(bytearray(REPLY))
        self._reply_used = 0
        self._reads: list[_Read] = []
        self._writes: list[_Write] = []
        self._write_flush = False
        self._outgoing: list[int] = []  # leases of places whose bytes may still lie in the socket

    # -- receiving -------------------------------------------------------------------------------

    def serve(self, rest: bytes) -> None:
        """Serves until the client leaves or breaks the protocol. Raises OSError or ProtocolError; replies to all
        requests that were received whole have been sent then, as far as the client took them."""
        try:
            self._receive(rest)
        finally:
            for _ in range(MAX_AWAY):
                self._away.acquire()  # all of them: nobody works for this client any more
            for lease in self._outgoing:
                self._disk.graph.leases.end(lease)

    def _receive(self, rest: bytes) -> None:
        buffer, view = self._buffer, memoryview(self._buffer)
        receive = self._sock.recv_into
        have = len(rest)
        buffer[:have] = rest
        while True:
            at = self._parse(view, have)
            if at < 0:
                return
            left = have - at
            if left and at:
                buffer[:left] = buffer[at:have]
            if self._outgoing:
                self._end_leases()
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
                raise ProtocolError(f"NBD request magic is {magic:#x}")
            at += _HEADER
            if kind == c.CMD_READ and 0 < length < SENDFILE:
                if self._writes:
                    self._do_writes()
                if self._reply_used + length > REPLY:
                    self._do_reads()
                self._reply_used += length
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
        used, self._reply_used = self._reply_used, 0
        data = self._reply[:used]
        segments = []
        at = 0
        for _, offset, length in reads:
            segments.append((offset, data[at : at + length]))
            at += length
        disk = self._disk
        token = disk.begin()
        try:
            disk.readv(segments, nowait=True)
        except BlockingIOError:
            for read in reads:
                self._send_away(self._read_alone, *read)
            return
        except _FAILURES:
            for read in reads:  # one by one, to tell whose fault it is
                self._read_alone(*read)
            return
        finally:
            disk.end(token)
        out: Buffers = []
        header = self._replies.read_header
        for (cookie, offset, length), (_, buffer) in zip(reads, segments, strict=True):
            out.append(header(cookie, offset, length))
            out.append(buffer)
        with self._send_lock:
            send_all(self._sock, out)

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
        """A simple reply, or one chunk: nothing may be sent before all is known to be readable."""
        place, lease = self._find_place(offset, length)
        if place is not None and place.length == length:
            with self._send_lock:
                self._outgoing.append(lease)
                send_place(self._sock, self._replies.read_header(cookie, offset, length), place)
            return
        self._disk.graph.leases.end(lease)
        self._read_alone(cookie, offset, length)

    def _data_chunks(self, cookie: int, offset: int, length: int, last: bool) -> bool:
        """One run of data as chunks. False when it ended with an error chunk."""
        end = offset + length
        while offset < end:
            place, lease = self._find_place(offset, end - offset)
            if place is None or place.length < SENDFILE:
                self._disk.graph.leases.end(lease)
                size = min(end - offset, REPLY)
                buffer = memoryview(bytearray(size))
                try:
                    with self._disk.request():
                        self._disk.readv([(offset, buffer)])
                except _FAILURES as error:
                    self._send(self._replies.failed(cookie, _wire_error(error), True))
                    return False
                done = last and offset + size == end
                with self._send_lock:
                    send_all(self._sock, [self._replies.read_header(cookie, offset, size, done), buffer])
            else:
                size = place.length
                done = last and offset + size == end
                with self._send_lock:
                    self._outgoing.append(lease)
                    send_place(self._sock, self._replies.read_header(cookie, offset, size, done), place)
            offset += size
        return True

    def _find_place(self, offset: int, length: int) -> tuple[FilePlace | None, int]:
        """Where the bytes lie, with a lease under which that stays so."""
        lease = self._disk.graph.leases.take()
        try:
            with self._disk.request():
                return self._disk.place(offset, length), lease
        except _FAILURES:
            return None, lease
        except BaseException:
            self._disk.graph.leases.end(lease)
            raise

    def _end_leases(self) -> None:
        """sendfile queues the file's own pages, not copies of them. As long as some are in the socket, what they
        hold must not become another guest range's data, so their leases end only when the queue is empty."""
        queued = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, bytes(4))
        if struct.unpack("i", queued)[0] == 0 or len(self._outgoing) > MAX_AWAY:
            with self._send_lock:
                leases, self._outgoing = self._outgoing, []
            for lease in leases:
                self._disk.graph.leases.end(lease)

    # -- writes ----------------------------------------------------------------------------------

    def _add_write(self, flags: int, cookie: int, offset: int, payload: memoryview) -> None:
        if self._reads:
            self._do_reads()
        if flags & c.CMD_FLAG_FUA:
            self._write_flush = True
        self._writes.append((cookie, offset, payload))

    def _do_writes(self) -> None:
        writes, self._writes = self._writes, []
        flush, self._write_flush = self._write_flush, False
        disk = self._disk
        done = self._replies.done
        out: Buffers
        if self._read_only:
            denied = c.wire_error(errno.EPERM)
            out = [self._replies.failed(cookie, denied, False) for cookie, _, _ in writes]
        else:
            token = disk.begin()
            try:
                disk.writev([(offset, payload) for _, offset, payload in writes if len(payload)])
                if flush:
                    disk.flush_node()
                out = [done(cookie) for cookie, _, _ in writes]
            except _FAILURES:
                out = [self._write_alone(write, flush) for write in writes]
            finally:
                disk.end(token)
        with self._send_lock:
            send_all(self._sock, [b"".join(out)])

    def _write_alone(self, write: _Write, flush: bool) -> bytes:
        """One write of a batch that failed, once more, to tell whose fault it is; between begin and end."""
        cookie, offset, payload = write
        try:
            if len(payload):
                self._disk.writev([(offset, payload)])
            if flush:
                self._disk.flush_node()
            return self._replies.done(cookie)
        except _FAILURES as error:
            return self._replies.failed(cookie, _wire_error(error, errno.ENOSPC), False)

    # -- the other commands ----------------------------------------------------------------------

    def _other(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> None:
        if kind == c.CMD_READ:
            if length:
                self._large_read(flags, cookie, offset, length)
            else:
                self._send(self._replies.empty_read(cookie))
        elif kind == c.CMD_BLOCK_STATUS:
            self._block_status(flags, cookie, offset, length)
        elif kind == c.CMD_FLUSH:
            # Out of the way of reads: a flush takes milliseconds.
            self._send_away(self._run, cookie, self._disk.flush_node)
        elif kind in (c.CMD_TRIM, c.CMD_WRITE_ZEROES):
            self._zero_or_trim(flags, kind, cookie, offset, length)
        elif kind == c.CMD_CACHE:
            fits = offset + length <= self._disk.size
            self._send(
                self._replies.done(cookie)
                if fits
                else self._replies.failed(cookie, c.wire_error(errno.EINVAL), False)
            )
        else:
            self._send(self._replies.failed(cookie, c.wire_error(errno.EINVAL), False))

    def _zero_or_trim(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> None:
        def work() -> None:
            if self._read_only:
                raise io.UnsupportedOperation("read-only")
            if kind == c.CMD_TRIM:
                self._disk.discard(offset, length)
            else:
                unmap, fast = not flags & c.CMD_FLAG_NO_HOLE, bool(flags & c.CMD_FLAG_FAST_ZERO)
                self._disk.write_zeros(offset, length, unmap=unmap, fast=fast)
            if flags & c.CMD_FLAG_FUA:
                self._disk.flush_node()

        self._run(cookie, work)

    def _run(self, cookie: int, work: Callable[[], None]) -> None:
        """Does ``work`` as a request of the disk, and answers."""
        try:
            with self._disk.request():
                work()
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
        """Hands work to the server's workers; waits while this client has too much with them already."""
        self._away.acquire()

        def run() -> None:
            try:
                work(*arguments)
            except OSError:
                pass  # the client is gone; its own thread finds out too
            finally:
                self._away.release()

        try:
            self._workers.submit(run)
        except BaseException:
            self._away.release()
            raise


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

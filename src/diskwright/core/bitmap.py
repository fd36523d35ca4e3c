"""Dirty bitmaps: which parts of a disk have been written since somebody last looked.

One bit stands for ``granularity`` bytes. A node sets bits when a write has *ended*, whether it succeeded
or not; a copier clears a bit *before* it reads what the bit stands for. A write that lands between the two
then leaves its bit set and is copied again: that order is all there is to a correct live copy.

The bits lie in one buffer in the layout of qcow2's persistent bitmaps (bit 0 of byte 0 is the first
granule), so that NumPy can look at them and an image can store them without a conversion.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from bitarray import bitarray

from diskwright.errors import GraphError, LimitExceeded, OptionError
from diskwright.extents import windows
from diskwright.units import GiB, KiB, is_power_of_two

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.driver import Segments

MIN_GRANULARITY: Final = 512
"""A sector: nothing smaller is ever written by itself."""
MAX_GRANULARITY: Final = 2 * GiB
"""The coarsest that qcow2's programs store."""
DEFAULT_GRANULARITY: Final = 64 * KiB

MAX_GRANULES: Final = 1 << 33
"""Bounds a bitmap to 1 GiB of memory: 512 TiB of disk at the default granularity."""

RUN_WINDOW: Final = 1 << 20
"""Granules turned into columns of runs at a time: at most some 20 MiB of arrays whatever the pattern."""


class InconsistentBitmap(GraphError):
    """A bitmap was not stored properly: all that can be done with it is to remove it."""


class DirtyBitmap:
    """Which granules of a disk of ``size`` bytes are dirty. Thread-safe. Offsets and lengths are bytes.

    ``granularity`` is a power of two from 512 bytes to 2 GiB. Ranges are widened to whole granules, and
    cut at the disk's end. Raises OptionError for a bad granularity, LimitExceeded for one too small for
    the size (see ``MAX_GRANULES``).

    ``enabled``       whether ``set`` and ``set_segments`` record; everything else works regardless
    ``readonly``      it belongs to an image that may not be changed
    ``inconsistent``  it was not stored properly, and says nothing any more
    ``persistent``    it is to be stored in its image
    ``guard``         called once, before it first departs from what its image has stored (None: nothing to do);
                      when that raises, nothing has changed
    """

    __slots__ = (
        "_bits",
        "_busy",
        "_bytes",
        "_dirty",
        "_enabled",
        "_lock",
        "_shift",
        "_size",
        "granularity",
        "guard",
        "inconsistent",
        "name",
        "persistent",
        "readonly",
    )

    def __init__(
        self, size: int, granularity: int = DEFAULT_GRANULARITY, *, name: str | None = None, enabled: bool = True
    ) -> None:
        if granularity < MIN_GRANULARITY or not is_power_of_two(granularity):
            raise OptionError("Granularity must be power of 2 and at least 512")
        if granularity > MAX_GRANULARITY:
            raise OptionError(f"Granularity {granularity} is larger than {MAX_GRANULARITY}")
        self.name, self.granularity, self._enabled = name, granularity, enabled
        self.guard: Callable[[], None] | None = None
        self.readonly = self.inconsistent = self.persistent = self._busy = False
        self._shift = granularity.bit_length() - 1
        self._lock = threading.Lock()
        self._dirty = 0  # granules, kept in step with the bits
        self._size = size
        self._bytes, self._bits = self._allocate(size)

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.name or 'anonymous'} {self._dirty} of {len(self._bits)} x {self.granularity}>"

    def _allocate(self, size: int) -> tuple[bytearray, bitarray]:
        granules = -(-size >> self._shift)
        if granules > MAX_GRANULES:
            raise LimitExceeded(
                f"A bitmap of granularity {self.granularity} for {size} bytes would have {granules} bits, "
                f"more than {MAX_GRANULES}"
            )
        memory = bytearray((granules + 7) // 8)
        bits = bitarray(buffer=memory, endian="little")
        # A bitarray over a buffer has whole bytes; the bits beyond the last granule are never set.
        return memory, bits

    # -- facts -----------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if value != self._enabled:
            self.depart()
            self._enabled = value

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self._size

    @property
    def granules(self) -> int:
        """How many granules are dirty."""
        return self._dirty

    @property
    def count(self) -> int:
        """Dirty granules times the granularity, in bytes: what QMP calls ``count``."""
        return self._dirty << self._shift

    @property
    def dirty_bytes(self) -> int:
        """Bytes of the disk that are dirty: as ``count``, but without what lies beyond the disk's end."""
        with self._lock:
            total = self._dirty << self._shift
            last = (self._size - 1) >> self._shift
            if self._dirty and self._bits[last]:
                total -= ((last + 1) << self._shift) - self._size
            return total

    @property
    def buffer(self) -> memoryview:
        """The bits themselves, read-only, valid until the next ``resize``. They change while one looks."""
        return memoryview(self._bytes).toreadonly()

    def depart(self) -> None:
        """Lets ``guard`` know, as every change does, that this is about to differ from what is stored."""
        guard = self.guard
        if guard is not None:
            guard()
            self.guard = None

    # -- use by one at a time --------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._busy

    def check(self, *, allow_readonly: bool = False, allow_inconsistent: bool = False) -> None:
        """Raises GraphError when some operation holds the bitmap, or its state forbids a change."""
        if self._busy:
            raise GraphError(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")
        if self.readonly and not allow_readonly:
            raise GraphError(f"Bitmap '{self.name}' is readonly and cannot be modified")
        if self.inconsistent and not allow_inconsistent:
            raise InconsistentBitmap(f"Bitmap '{self.name}' is inconsistent and cannot be used")

    def hold(self, *, allow_readonly: bool = False) -> None:
        """Marks the bitmap as in use by an operation; the same errors as ``check``."""
        with self._lock:
            self.check(allow_readonly=allow_readonly)
            self._busy = True

    def reserve(self) -> None:
        """Marks the bitmap as in use whatever its state: by one that is going to remove it."""
        self._busy = True

    def release(self) -> None:
        self._busy = False

    # -- marking ---------------------------------------------------------------------------------

    def set(self, offset: int, length: int) -> None:
        """Marks a range that has been written. Does nothing while the bitmap is disabled. Never raises:
        it is called as a guest's write ends, which must not fail because of it."""
        if not self._enabled:
            return
        first = offset >> self._shift
        last = (offset + length - 1) >> self._shift
        if first == last:
            bits = self._bits
            # Without the lock this is still right: the write has ended, so whoever clears this bit after
            # we saw it set will read what was written.
            if first < len(bits) and bits[first]:
                return
        with self._lock:
            self._fill(first, last + 1)

    def set_segments(self, segments: Segments) -> None:
        """``set`` for each segment of a batch, under one lock."""
        if not self._enabled:
            return
        shift = self._shift
        with self._lock:
            bits = self._bits
            end = len(bits)
            for offset, buffer in segments:
                first = offset >> shift
                last = (offset + len(buffer) - 1) >> shift
                if first != last or first >= end or not bits[first]:
                    self._fill(first, last + 1)

    def mark(self, offset: int, length: int) -> None:
        """Marks a range whether enabled or not: for operations that hold the bitmap, not for writes."""
        self.depart()
        with self._lock:
            self._fill(offset >> self._shift, (offset + length - 1 >> self._shift) + 1)

    def set_all(self) -> None:
        """Marks the whole disk."""
        self.mark(0, self._size)

    def clear(self, offset: int, length: int) -> None:
        """Unmarks the granules a range touches, whole granules: they must all be the caller's to clear."""
        self.depart()
        with self._lock:
            self._empty(offset >> self._shift, (offset + length - 1 >> self._shift) + 1)

    def clear_all(self) -> None:
        self.clear(0, self._size)

    def _fill(self, first: int, stop: int) -> None:
        """Sets granules ``[first, stop)``, as far as there are such; the lock is held."""
        stop = min(stop, self._granule_count())
        if first >= stop:
            return
        bits = self._bits
        if stop - first == 1:
            if not bits[first]:
                bits[first] = 1
                self._dirty += 1
            return
        self._dirty += stop - first - bits.count(1, first, stop)
        bits[first:stop] = 1

    def _empty(self, first: int, stop: int) -> None:
        stop = min(stop, self._granule_count())
        if first < stop:
            self._dirty -= self._bits.count(1, first, stop)
            self._bits[first:stop] = 0

    def _granule_count(self) -> int:
        return -(-self._size >> self._shift)

    # -- looking ---------------------------------------------------------------------------------

    def get(self, offset: int) -> bool:
        """Whether the granule at ``offset`` is dirty."""
        return bool(self._bits[offset >> self._shift])

    def count_in(self, offset: int, length: int) -> int:
        """How many of the granules a range touches are dirty."""
        if length <= 0:
            return 0
        return self._bits.count(1, offset >> self._shift, (offset + length - 1 >> self._shift) + 1)

    def next_dirty(self, offset: int, max_length: int | None = None) -> tuple[int, int] | None:
        """The first dirty run at or after the granule of ``offset``: ``(offset, length)``, or None.

        The run begins on a granule; it is at most ``max_length`` long (but at least one granule) and ends
        with the disk. It may be longer than what is returned.
        """
        with self._lock:
            run = self._next(offset, max_length)
            return run and self._range(*run)

    def take(self, offset: int, max_length: int | None = None) -> tuple[int, int] | None:
        """As ``next_dirty``, and the run is no longer dirty: its finder now has to copy it, or to mark it again."""
        self.depart()
        with self._lock:
            run = self._next(offset, max_length)
            if run is None:
                return None
            first, stop = run
            self._bits[first:stop] = 0
            self._dirty -= stop - first
            return self._range(first, stop)

    def _next(self, offset: int, max_length: int | None) -> tuple[int, int] | None:
        bits = self._bits
        first = bits.find(1, offset >> self._shift)
        if first < 0:
            return None
        end = len(bits)
        if max_length is not None:
            end = min(end, first + max(1, max_length >> self._shift))
        stop = bits.find(0, first + 1, end)
        return first, end if stop < 0 else stop

    def _range(self, first: int, stop: int) -> tuple[int, int]:
        offset = first << self._shift
        return offset, min(stop << self._shift, self._size) - offset

    def runs(self, offset: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The dirty runs of a range as columns: offsets and lengths, both int64 of shape ``(n,)``, cut at the
        range's ends. The range may touch at most ``RUN_WINDOW`` granules (ValueError): see ``run_windows``."""
        import numpy as np

        first, stop = offset >> self._shift, (offset + length - 1 >> self._shift) + 1
        if stop - first > RUN_WINDOW:
            raise ValueError(f"{stop - first} granules are more than the {RUN_WINDOW} that are looked at at a time")
        with self._lock:
            packed = bytes(self._bytes[first // 8 : (stop + 7) // 8])
        flags = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")[first % 8 :][: stop - first]
        # Edges of the 0/1 sequence, with a 0 before and after it: they come in pairs of begin and end.
        edges = np.flatnonzero(np.diff(flags, prepend=np.uint8(0), append=np.uint8(0)))
        edges = (edges + first) << self._shift
        begins = np.maximum(edges[0::2], offset)
        ends = np.minimum(edges[1::2], min(offset + length, self._size))
        return begins, ends - begins

    def run_windows(self, offset: int, length: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """``runs`` of a range of any length, window by window. A run that crosses windows comes in parts."""
        for start, step in windows(offset, length, RUN_WINDOW // 2 << self._shift):
            yield self.runs(start, step)

    # -- whole bitmaps ---------------------------------------------------------------------------

    def merge(self, other: DirtyBitmap) -> None:
        """Marks here what is dirty in ``other``; granularities may differ. Raises GraphError when sizes do."""
        if other is self:
            return
        if other.size != self._size:
            raise GraphError(
                f"Bitmaps are of different sizes (destination size is {self._size}, source size is {other.size}) "
                "and can't be merged"
            )
        self.depart()
        if other.granularity == self.granularity:
            for start, step in windows(0, self._size, RUN_WINDOW << self._shift):
                self._merge_bits(start >> self._shift, other.read_bits(start, step))
            return
        for offsets, lengths in other.run_windows(0, self._size):
            for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
                self.mark(offset, length)

    def _merge_bits(self, first: int, packed: bytes) -> None:
        theirs = bitarray(buffer=packed, endian="little")
        stop = first + len(theirs)
        with self._lock:
            ours = self._bits[first:stop]
            before = ours.count(1)
            ours |= theirs
            self._bits[first:stop] = ours
            self._dirty += ours.count(1) - before

    def resize(self, size: int) -> None:
        """Follows the disk to a new size: what is new is clean, what is cut off is forgotten."""
        self.depart()
        with self._lock:
            memory, bits = self._allocate(size)
            kept = min(len(memory), len(self._bytes))
            memory[:kept] = self._bytes[:kept]
            self._size, self._bytes, self._bits = size, memory, bits
            self._cut_padding()
            self._dirty = bits.count(1)

    # -- storing and loading ---------------------------------------------------------------------

    def read_bits(self, offset: int, length: int) -> bytes:
        """The packed bits of a range, as qcow2 stores them: 8 granules a byte, the first in bit 0.

        ``offset`` must be a multiple of 8 granules (ValueError).
        """
        first = self._first_byte(offset)
        with self._lock:
            return bytes(self._bytes[first : (offset + length - 1 >> self._shift) // 8 + 1])

    def load_bits(self, offset: int, packed: bytes | bytearray | memoryview) -> None:
        """Replaces the bits from ``offset`` (a multiple of 8 granules) on. Bits beyond the disk's end are
        ignored, as what a file says of them is; so are bytes beyond the bitmap's end."""
        first = self._first_byte(offset)
        with self._lock:
            stop = min(first + len(packed), len(self._bytes))
            if first >= stop:
                return
            self._dirty -= self._bits.count(1, first * 8, stop * 8)
            self._bytes[first:stop] = packed[: stop - first]
            self._cut_padding()
            self._dirty += self._bits.count(1, first * 8, stop * 8)

    def _first_byte(self, offset: int) -> int:
        byte, rest = divmod(offset, 8 << self._shift)
        if rest:
            raise ValueError(f"Offset {offset} is not a multiple of 8 granules of {self.granularity} bytes")
        return byte

    def _cut_padding(self) -> None:
        self._bits[self._granule_count() :] = 0

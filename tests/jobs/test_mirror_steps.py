"""Mirror in one thread, step by step: guest requests are put between any two of the job's own, and the target
must end up as the source is at the moment of the end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.jobs.mirrors import rig

UNIT = 512
GRANULARITY = 2048
SIZE = 40 * UNIT - 100

request = st.tuples(
    st.sampled_from(["write", "write", "write", "zero", "zero unmap", "discard", "flush"]),
    st.integers(0, SIZE - 1),
    st.integers(1, 9 * UNIT),
)
between = st.lists(st.lists(request, max_size=2), max_size=25)


class Guest:
    """Does the requests of one gap whenever a hook of the storages is reached."""

    def __init__(self, disk: object, gaps: list[list[tuple[str, int, int]]]) -> None:
        self.disk, self.gaps = disk, list(gaps)
        self.model = bytearray(SIZE)
        self.certain = bytearray(b"\1" * SIZE)
        self.count = 0
        self.busy = False

    def __call__(self, operation: str, offset: int, length: int) -> None:
        if self.busy or not self.gaps:
            return
        self.busy = True
        try:
            for what, at, long in self.gaps.pop(0):
                self.one(what, at, min(long, SIZE - at))
        finally:
            self.busy = False

    def one(self, what: str, at: int, long: int) -> None:
        disk, place = self.disk, slice(at, at + long)
        self.count += 1
        if what == "write":
            data = bytes((self.count * 31 + i) % 255 + 1 for i in range(long))
            disk.pwrite(at, data)  # type: ignore[attr-defined]
            self.model[place], self.certain[place] = data, b"\1" * long
        elif what.startswith("zero"):
            disk.zero(at, long, unmap=what == "zero unmap")  # type: ignore[attr-defined]
            self.model[place], self.certain[place] = bytes(long), b"\1" * long
        elif what == "discard":
            disk.trim(at, long)  # type: ignore[attr-defined]
            self.certain[place] = bytes(long)
        else:
            disk.flush()  # type: ignore[attr-defined]


@given(
    before=between,
    gaps=between,
    passes=st.integers(0, 3),
    new=st.booleans(),
    zeroes=st.booleans(),
    buffer=st.sampled_from([1, 1 << 20]),
    pivot=st.booleans(),
    sync=st.sampled_from(["full", "full", "none"]),
)
def test_whatever_the_guest_does_in_between(
    before: list[list[tuple[str, int, int]]],
    gaps: list[list[tuple[str, int, int]]],
    passes: int,
    new: bool,
    zeroes: bool,
    buffer: int,
    pivot: bool,
    sync: str,
) -> None:
    with rig(SIZE, zeroes=zeroes) as r:
        guest = Guest(r.guest, before)
        while guest.gaps:
            guest("", 0, 0)
        if not new:
            r.target_ram.data[:] = b"\xee" * SIZE
        if sync == "none":
            r.target_ram.data[:] = r.source_ram.data
        guest.gaps = list(gaps)
        job = r.mirror(target_is_zero=new and sync == "full", granularity=GRANULARITY, buf_size=buffer, sync=sync)
        job._finishing = "pivot" if pivot else "keep"
        for ram in (r.source_ram, r.target_ram):
            ram.hook = ram.after = guest
        job._begin()
        for _ in range(passes):
            job._pass()
            offset, length = job.progress()
            assert length - offset == job.bitmap.dirty_bytes
            guest("", 0, 0)
        for ram in (r.source_ram, r.target_ram):
            ram.hook = ram.after = None  # drained now: nobody writes any more
        assert job._finish_drained()
        offset, length = job.progress()
        assert offset == length
        assert r.target_bytes() == r.frozen == bytes(r.source_ram.data)
        assert r.guest.node is (r.target if pivot else r.source)
        while guest.gaps:
            guest("", 0, 0)
        found = r.guest.pread(0, SIZE)
        assert all(a == b for a, b, sure in zip(found, guest.model, guest.certain, strict=True) if sure)

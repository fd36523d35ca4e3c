"""Convert: everything one or several nodes hold, one after the other, into another node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from diskwright.core.leases import Leases
from diskwright.core.node import Node
from diskwright.engine.clock import Clocks
from diskwright.engine.copy import CHUNK, WORKERS, Copier, Range, ReadFailed, data_plan, run_plan
from diskwright.engine.progress import Progress
from diskwright.engine.rate import RateLimit
from diskwright.engine.zeros import SPARSE
from diskwright.errors import JobError


@dataclass
class Conversion:
    """One conversion. ``run`` does it; ``progress`` may be asked from other threads meanwhile.

    ``target_is_zero``  the target reads as zeros everywhere: a new image, or the user says so
    ``sparse``          see ``Copier``
    ``in_order``        write the target from its beginning to its end, with one worker
    ``salvage``         what cannot be read becomes zeros; ``on_unreadable(offset, length)`` is told
    ``flush``           the target is durable when ``run`` returns
    """

    sources: Sequence[Node]
    target: Node
    leases: Leases
    target_is_zero: bool = False
    sparse: int = SPARSE
    workers: int = WORKERS
    in_order: bool = False
    rate: RateLimit = field(default_factory=RateLimit)
    salvage: bool = False
    flush: bool = True
    on_unreadable: Callable[[int, int], None] = lambda offset, length: None
    stop: Callable[[], bool] = lambda: False
    clocks: Clocks = field(default_factory=Clocks)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(sum(node.size for node in self.sources))

    @property
    def size(self) -> int:
        """Bytes the target has to hold."""
        return sum(node.size for node in self.sources)

    def run(self) -> None:
        """Raises OSError or ImageError, whichever met first, or JobError when it was stopped; the target is then
        incomplete."""
        if self.target.size < self.size:
            raise JobError(f"The target has {self.target.size} bytes, fewer than the {self.size} to be copied")
        starts = [0, *accumulate(node.size for node in self.sources)]
        for source, start in zip(self.sources, starts, strict=False):
            self._one(source, start)
        rest = self.target.size - self.size
        if rest and not self.target_is_zero:
            self.target.write_zeros(self.size, rest, unmap=True)
        if self.flush:
            self.target.flush()

    def _one(self, source: Node, start: int) -> None:
        copier = Copier(
            source,
            self.target,
            self.leases,
            sparse=self.sparse,
            target_zero=self.target_is_zero,
            offset_in_target=start,
        )
        began, _ = self.progress.snapshot()
        done = 0

        def failed(offset: int, length: int, error: Exception) -> None:
            cause = error.__cause__ or error
            if not self.salvage or not isinstance(error, ReadFailed):
                raise cause
            self._salvage(source, start, offset, length)
            self.progress.advance(length)

        run_plan(
            copier,
            self._plan(source),
            workers=1 if self.in_order else self.workers,
            rate=self.rate,
            stop=self.stop,
            done=lambda offset, length: self.progress.advance(length),
            failed=failed,
            clocks=self.clocks,
        )
        if self.stop():
            raise JobError("The conversion was stopped")
        done, _ = self.progress.snapshot()
        self.progress.advance(began + source.size - done)  # zeros that the plan left out

    def _plan(self, source: Node) -> Iterator[Range]:
        return data_plan(source, self.leases, source.size, zeros=not self.target_is_zero, chunk=CHUNK)

    def _salvage(self, source: Node, start: int, offset: int, length: int) -> None:
        """Sector by sector: what can be read is copied, the rest becomes zeros."""
        buffer = memoryview(bytearray(512))
        for at in range(offset, offset + length, 512):
            piece = buffer[: min(512, offset + length - at)]
            try:
                with self.leases.held():
                    source.readv([(at, piece)])
            except OSError:
                piece[:] = bytes(len(piece))
                self.on_unreadable(at, len(piece))
            self.target.writev([(start + at, piece)])

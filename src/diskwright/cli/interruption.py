"""SIGINT and SIGTERM during a long command: it ends in good order, or at the second signal at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from diskwright.cli.failure import Failure


class Interruption:
    """Within its block SIGINT and SIGTERM are only noted, in ``signal``: the work looks between two pieces, so that
    the target is closed in good order. The second one raises KeyboardInterrupt where it is."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def check(self, target: str) -> None:
        """Raises Failure after a signal; ``target`` is what is then incomplete."""
        if self.signal:
            raise Failure(f"interrupted; '{target}' is incomplete", 128 + self.signal)

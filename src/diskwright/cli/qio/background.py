"""Requests in the background: threads carry them out; how they went is printed by the thread that runs commands."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

MAX_THREADS: Final = 64
"""Requests under way at once; as many may be held at breakpoints."""

MAX_WAITING: Final = 4096
"""Requests that wait for a thread. One more than that waits until there is room."""

Finish = Callable[[BaseException | None], None]
"""Called with what a request raised, or None, on the thread of commands."""


class Background:
    """A pool of threads that grows as needed."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._waiting: deque[tuple[Callable[[], None], Finish]] = deque()
        self._ended: deque[tuple[Finish, BaseException | None]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._under_way = 0  # submitted, and not yet delivered
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Readable when there may be something to deliver."""
        return self._wake_read

    @property
    def busy(self) -> bool:
        """Whether requests have been submitted of which nothing has been told yet."""
        return self._under_way > 0

    def submit(self, action: Callable[[], None], finish: Finish) -> None:
        """Has ``action`` carried out by another thread."""
        with self._changed:
            while len(self._waiting) >= MAX_WAITING:
                self._changed.wait()
            self._waiting.append((action, finish))
            self._under_way += 1
            if self._idle < len(self._waiting) and len(self._threads) < MAX_THREADS:
                thread = threading.Thread(target=self._work, name=f"request-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._waiting:
                    if self._stopping:
                        return
                    self._changed.wait()
                self._idle -= 1
                action, finish = self._waiting.popleft()
            error: BaseException | None = None
            try:
                action()
            except BaseException as raised:
                error = raised
            with self._changed:
                self._ended.append((finish, error))
                self._changed.notify_all()
            try:
                os.write(self._wake_write, b"!")
            except BlockingIOError:
                pass  # it is readable already

    def deliver(self) -> bool:
        """Tells of the requests that have ended; returns whether any are left."""
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            pass
        while True:
            with self._changed:
                if not self._ended:
                    return self._under_way > 0
                finish, error = self._ended.popleft()
                self._under_way -= 1
            finish(error)

    def finish_all(self) -> None:
        """Waits for all requests."""
        while self.deliver():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Waits until another request has ended, at most so long."""
        with self._changed:
            if not self._ended and self._under_way:
                self._changed.wait(seconds)

    def end(self) -> None:
        """Ends the threads; all requests have ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

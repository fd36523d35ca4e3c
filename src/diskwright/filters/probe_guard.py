"""probe_guard: keeps a guest from turning a raw disk whose format was guessed into an image of another format.

A raw image has no mark of its own, so it is only ever recognised by not looking like anything else. A
guest that writes, say, a qcow2 header with a backing file to its first sector would at the next
guess be given that file's contents. So when raw was guessed, not stated, writes to the head that would
make it look like another format are refused. Whoever states the format needs no guard.
"""

from __future__ import annotations

import errno
import threading

from diskwright.core.driver import Filter, Segments
from diskwright.core.node import Node, below_filters
from diskwright.core.probe import HEAD, probe_head


class ProbeGuard(Filter):
    """Refuses with EPERM what would change the answer of the next probe."""

    name = "probe_guard"

    def __init__(self, child: Node) -> None:
        self.child = child
        self._lock = threading.Lock()

    def writev(self, segments: Segments) -> None:
        # A mirror may have put another format beneath, and then the guest's bytes are not the file's.
        if all(offset >= HEAD for offset, _ in segments) or below_filters(self.child).driver_name != "raw":
            self.child.writev(segments)
            return
        # Held over check and write: two writes, each harmless, must not make a header between them.
        with self._lock:
            head = bytearray(self.child.pread(0, min(HEAD, self.child.size)))
            for offset, buffer in segments:
                if offset < len(head):
                    piece = buffer[: len(head) - offset]
                    head[offset : offset + len(piece)] = piece
            found = probe_head(bytes(head), self.child.filename).name
            if found != "raw":
                raise OSError(
                    errno.EPERM,
                    f"this write would make the disk look like {found}, and its format raw was only guessed; "
                    "state the format (-f raw) to allow it",
                    self.child.filename,
                )
            self.child.writev(segments)


DRIVERS: tuple[type[Filter], ...] = ()  # never asked for by name

"""Commit: what the images above a base have goes into the base.

The images above keep all they have until the base is durable, and read the same meanwhile whatever part of it the base
has got: where they have something themselves the base does not show. So a crash at any moment costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from diskwright.core.chain import chain
from diskwright.engine.convert import Conversion
from diskwright.errors import GraphError

if TYPE_CHECKING:
    from diskwright.core.leases import Leases
    from diskwright.core.node import Node


class Commit:
    """Copies what ``top`` and the images between have into ``base``, a node of ``top``'s backing chain that is open
    for writing."""

    def __init__(
        self,
        top: Node,
        base: Node,
        leases: Leases,
        *,
        speed: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Raises GraphError when ``base`` is not below ``top``. ``speed`` in bytes a second, 0 for no limit."""
        if not any(image is base for image in list(chain(top))[1:]):
            raise GraphError(f"'{base.filename}' is not in the backing chain of '{top.filename}'")
        self.top, self.base = top, base
        # The base is seen through by itself: what it shows as zeros before it is written to, it shows afterwards.
        self._work = Conversion(base, leases, top.size, target_is_zero=False, speed=speed, stop=stop)

    def progress(self) -> tuple[int, int]:
        """``(bytes of the top image that are done, all)``."""
        return self._work.progress()

    def run(self) -> None:
        """Makes the base as large as the top image if it is smaller, copies, and makes the base durable. Raises
        CopyFailed, OSError or ImageError; the top image reads as before then."""
        if self.base.size < self.top.size:
            self.base.resize(self.top.size)
        self._work.copy(self.top, 0, base=self.base)
        self.base.flush()

"""blkdebug: injects errors and suspends requests where the drivers above announce events (see ``docs/filters.md``)."""

from __future__ import annotations

from diskwright.filters.blkdebug.driver import Blkdebug

DRIVERS = (Blkdebug,)

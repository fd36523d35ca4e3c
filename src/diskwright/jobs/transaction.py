"""Transactions: several actions at one moment of all disks, all or none.

``run`` prepares each action in turn while no disk has a request in flight. When all could be prepared they are
committed, which cannot fail; else those prepared are undone, in the opposite order, and nothing has happened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final

from diskwright.core import bitmaps
from diskwright.core.bitmap import DirtyBitmap
from diskwright.core.graph import Graph
from diskwright.core.node import Node
from diskwright.errors import DiskwrightError, GraphError, LimitExceeded
from diskwright.jobs.group import JobGroup
from diskwright.jobs.job import Job

MAX_ACTIONS: Final = 1024


class Action(ABC):
    """One action. ``prepare`` does what can be undone, or raises with nothing changed; exactly one of ``commit`` and
    ``abort`` follows a ``prepare`` that returned. Neither should fail: nothing is undone then."""

    @abstractmethod
    def prepare(self) -> None: ...

    def commit(self) -> None:
        """Makes it final."""

    def abort(self) -> None:
        """Undoes it."""

    def after(self) -> None:
        """Called once all is committed and requests go on: jobs are started here."""


def run(graph: Graph, actions: Sequence[Action]) -> None:
    """Carries out all actions, or none. Raises what the one raised that could not be prepared; or, when all are done,
    what a commit raised, as that of a persistent bitmap's removal may when the image cannot be written to."""
    if len(actions) > MAX_ACTIONS:
        raise LimitExceeded(f"{len(actions)} actions are more than the {MAX_ACTIONS} a transaction can have")
    prepared: list[Action] = []
    with graph.drained():
        try:
            for action in actions:
                action.prepare()
                prepared.append(action)
        except BaseException:
            for action in reversed(prepared):
                action.abort()
            raise
        errors: list[Exception] = []
        for action in actions:
            try:
                action.commit()
            except (OSError, DiskwrightError) as error:
                errors.append(error)  # too late to undo: the others are committed all the same
    for action in actions:
        action.after()
    if errors:
        raise errors[0]


class StartJob(Action):
    """Makes a job, and starts it. A backup is of the moment of the transaction. With ``group`` it succeeds with the
    others of that group only."""

    def __init__(self, make: Callable[[], Job], group: JobGroup | None = None) -> None:
        self._make, self._group = make, group
        self.job: Job | None = None

    def prepare(self) -> None:
        self.job = self._make()
        if self._group is not None:
            try:
                self._group.add(self.job)
            except DiskwrightError:
                self.job.cancel(force=True)
                raise

    def abort(self) -> None:
        assert self.job is not None
        self.job.auto_dismiss = True
        self.job.cancel(force=True)

    def after(self) -> None:
        assert self.job is not None
        if not self.job.has_ended:
            self.job.start()


class AddBitmap(Action):
    """``block-dirty-bitmap-add``."""

    def __init__(
        self, node: Node, name: str, granularity: int | None = None, *, persistent: bool = False, disabled: bool = False
    ) -> None:
        self._node, self._name, self._granularity = node, name, granularity
        self._persistent, self._disabled = persistent, disabled

    def prepare(self) -> None:
        bitmaps.add(self._node, self._name, self._granularity, persistent=self._persistent, enabled=not self._disabled)

    def abort(self) -> None:
        bitmaps.remove(self._node, self._name)


class RemoveBitmap(Action):
    """``block-dirty-bitmap-remove``: until all is certain the bitmap is only kept from others."""

    def __init__(self, node: Node, name: str) -> None:
        self._node, self._name = node, name
        self._bitmap: DirtyBitmap | None = None

    def prepare(self) -> None:
        bitmap = bitmaps.find(self._node, self._name)
        bitmap.check(allow_inconsistent=True)
        if bitmap.persistent and not self._node.writable:
            raise GraphError(f"Bitmap '{self._name}' is readonly and cannot be modified")
        bitmap.reserve()
        self._bitmap = bitmap

    def commit(self) -> None:
        assert self._bitmap is not None
        self._bitmap.release()
        bitmaps.remove(self._node, self._name)

    def abort(self) -> None:
        assert self._bitmap is not None
        self._bitmap.release()


class _ChangeBits(Action):
    """A change of what a bitmap has: the bits that were there are kept until all is certain."""

    def __init__(self, node: Node, name: str) -> None:
        self._node, self._name = node, name
        self._bitmap: DirtyBitmap | None = None
        self._before = b""

    def prepare(self) -> None:
        bitmap = bitmaps.find(self._node, self._name)
        bitmap.check()
        before = bitmap.read_bits(0, bitmap.size) if bitmap.size else b""
        self.change()
        self._bitmap, self._before = bitmap, before

    @abstractmethod
    def change(self) -> None:
        """Changes the bitmap, or raises with nothing changed."""

    def commit(self) -> None:
        self._before = b""

    def abort(self) -> None:
        assert self._bitmap is not None
        self._bitmap.load_bits(0, self._before)


class ClearBitmap(_ChangeBits):
    """``block-dirty-bitmap-clear``."""

    def change(self) -> None:
        bitmaps.clear(self._node, self._name)


class MergeBitmaps(_ChangeBits):
    """``block-dirty-bitmap-merge``: marks in ``name`` what is dirty in the ``(node, name)`` bitmaps ``sources``."""

    def __init__(self, node: Node, name: str, sources: Sequence[tuple[Node, str]]) -> None:
        super().__init__(node, name)
        self._sources = sources

    def change(self) -> None:
        bitmaps.merge(self._node, self._name, self._sources)


class SwitchBitmap(Action):
    """``block-dirty-bitmap-enable`` and ``-disable``."""

    def __init__(self, node: Node, name: str, *, enabled: bool) -> None:
        self._node, self._name, self._enabled = node, name, enabled
        self._was = enabled

    def prepare(self) -> None:
        self._was = bitmaps.find(self._node, self._name).enabled
        (bitmaps.enable if self._enabled else bitmaps.disable)(self._node, self._name)

    def abort(self) -> None:
        bitmaps.find(self._node, self._name).enabled = self._was

"""Create and amend: making an image, and changing what was chosen when it was made, as jobs (QMP's ``blockdev-create``
and ``x-blockdev-amend``). They are no block jobs: they send no events but of their states, and cannot be paused midway.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Final

from diskwright.core import registry
from diskwright.core.driver import Filter, Format, Storage, not_supported
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, Node, below_filters
from diskwright.core.options import describe, flatten, parse
from diskwright.core.permissions import READ, RESIZE, WRITE, Access
from diskwright.core.secrets import bind
from diskwright.errors import GraphError, OptionError
from diskwright.jobs.job import EventSink, Job

_ALONE: Final = Access(READ | WRITE | RESIZE, 0)

_VERSIONS: Final = {"v2": "0.10", "v3": "1.1"}


class _Step(Job):
    """One long step. It can be cancelled before it begins."""

    block = False

    def __init__(self, id: str, *, on_event: EventSink | None = None) -> None:
        self._done = 0, 1
        super().__init__(id, auto_dismiss=False, on_event=on_event)

    def progress(self) -> tuple[int, int]:
        return self._done

    def run(self) -> None:
        self.pause_point()
        self.work()
        self._done = self._done[1], self._done[1]

    def work(self) -> None:
        raise NotImplementedError


class Create(_Step):
    """Makes an image. ``options`` are QMP's ``BlockdevCreateOptions``: ``driver`` and that driver's. A storage's are
    what it takes to create (``filename``, ``size``); a format's name the node to make the image in as ``file``, and
    further files as nodes too. Whatever the nodes hold is lost.

    Raises OptionError for options that do not fit. That a node is not there, or in use, is the job's error, as it is
    with QEMU; what is wrong with a backing file is found out when the image is opened.
    """

    type = "create"

    def __init__(
        self, id: str, graph: Graph, options: Mapping[str, object], *, on_event: EventSink | None = None
    ) -> None:
        self.graph = graph
        given = dict(options)
        name = given.pop("driver", None)
        if not isinstance(name, str):
            raise OptionError("Parameter 'driver' is missing")
        self._driver = registry.find(name)
        if issubclass(self._driver, Filter) or not _creates(self._driver):
            raise not_supported("Driver does not support blockdev-create")
        self._files: dict[str, str] = {}
        if issubclass(self._driver, Format):
            for role in ("file", "data-file"):
                if role in given or role == "file":
                    self._files[role] = _name_of(given.pop(role, None), role)
            if "version" in given:  # QMP's word for it
                version = given.pop("version")
                given["compat"] = _VERSIONS.get(str(version), version)
        known: Any = parse(self._driver.create_options, flatten(self._driver.create_options, given), owner=name)
        self._options = bind(known, graph.secrets) if issubclass(self._driver, Format) else known
        super().__init__(id, on_event=on_event)

    def _node(self, name: str) -> Node:
        node = self.graph.node(name)
        if not node.writable:
            raise GraphError(f"Block node '{name}' is read-only")
        return node

    def work(self) -> None:
        driver = self._driver
        if issubclass(driver, Storage):
            driver.create(self._options)
            return
        assert issubclass(driver, Format)
        nodes = {role: self._node(name) for role, name in self._files.items()}
        with ExitStack() as stack:
            for node in nodes.values():
                stack.enter_context(self.graph.disk(node, _ALONE))
            for node in nodes.values():
                _empty(node)
            parts = {role: node for role, node in nodes.items() if role != "file"}
            driver.create_from(nodes["file"], self._options, parts)
            for node in nodes.values():
                node.flush()


class Amend(_Step):
    """Changes the image of ``node``. ``options`` are QMP's ``BlockdevAmendOptions``, with ``driver``; ``force`` allows
    what may lose access to data. Raises OptionError and GraphError."""

    type = "amend"

    def __init__(
        self,
        id: str,
        graph: Graph,
        node: Node,
        options: Mapping[str, object],
        *,
        force: bool = False,
        on_event: EventSink | None = None,
    ) -> None:
        self.graph, self.force = graph, force
        image = below_filters(node)
        given = dict(options)
        if given.pop("driver", None) != image.driver_name:
            raise GraphError("x-blockdev-amend doesn't support changing the block driver")
        if not isinstance(image, FormatNode) or not _amends(type(image.format)):
            raise not_supported(f"Driver '{image.driver_name}' does not support x-blockdev-amend")
        cls = type(image.format)
        unknown = set(flatten(cls.amend_options, given)) - {info.name for info in describe(cls.amend_options)}
        if unknown:
            raise OptionError(f"Invalid parameter '{min(unknown)}'")
        parsed: Any = parse(cls.amend_options, flatten(cls.amend_options, given), owner=image.driver_name)
        self._options = bind(parsed, graph.secrets)
        self.node = image
        graph.hold(image)
        super().__init__(id, on_event=on_event)

    def work(self) -> None:
        with self.quiet(), self.graph.drained():
            self.node.amend(self._options, force=self.force, progress=self._note)
            self.node.flush()

    def _note(self, done: int, total: int) -> None:
        self._done = done, total

    def clean(self) -> None:
        self.graph.release(self.node)


def _name_of(value: object, role: str) -> str:
    if not isinstance(value, str):
        raise OptionError(f"Parameter '{role}' is missing")
    return value


def _creates(driver: type[Format] | type[Storage]) -> bool:
    return any(
        name in vars(cls)
        for cls in driver.__mro__
        if cls not in (Format, Storage)
        for name in ("create", "create_from")
    )


def _amends(driver: type[Format]) -> bool:
    return any("amend" in vars(cls) for cls in driver.__mro__ if cls is not Format)


def _empty(node: Node) -> None:
    """A device keeps its size; whoever creates on it writes over what matters."""
    try:
        node.resize(0)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
            raise

"""The graph: opens images into nodes, knows who uses what, and changes only while nothing is in flight.

A *specification* of a node is a file name, or a mapping of options as QEMU's ``blockdev-add`` takes them:
``driver``, ``node-name``, the driver's own options, and for children either a nested mapping, the name
of a node that is open already, or ``file.filename``-style dotted keys.

A file name is short for options: its prefix, or else the kind of file it is, says which storage or filter it belongs
to, and that driver says the rest. Without ``driver`` the format of what a name stands for is probed, except where
bytes are wanted: formats and filters lie over bytes.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from diskwright.core import options as opts
from diskwright.core import probe, registry
from diskwright.core.disk import Disk
from diskwright.core.draining import Draining
from diskwright.core.driver import Filter, Format, OpenContext, Storage
from diskwright.core.gate import DirectoryGate, Gate, has_prefix, resolve
from diskwright.core.leases import Leases
from diskwright.core.node import FilterNode, FormatNode, Node, StorageNode, below_filters
from diskwright.core.permissions import (
    ALL,
    FORCED,
    READ,
    READER,
    RESIZE,
    WRITE,
    WRITE_UNCHANGED,
    WRITER,
    Access,
    combine,
)
from diskwright.core.secrets import Secrets, bind
from diskwright.errors import DiskwrightError, GraphError, ImageError, LimitExceeded, OptionError
from diskwright.units import MAX_CHAIN

Spec = str | Mapping[str, object]

Follower = Callable[[Node], None]

_COMMON = ("driver", "node-name", "read-only", "force-share", "cache", "discard", "detect-zeroes")

MAX_NESTED: Final = 64
"""How deep options may name nodes within nodes: opening them is nested calls."""

_NOT_STORAGES = ("driver", "node-name", "read-only", "discard", "detect-zeroes")

_DISCARD = {"ignore": False, "off": False, "unmap": True, "on": True}
_DETECT = opts.OneOf("off", "on", "unmap")


@dataclass(frozen=True)
class Mode:
    """How a tree of nodes is opened."""

    writable: bool
    force_share: bool
    cache: str | None = None
    backing: bool = True
    """Whether backing files are opened at all."""
    guest_data: bool = True
    """Whether anybody will read or write the guest's bytes: when not, files that hold nothing else stay closed, and
    encrypted images open without their key."""
    writable_backing: int = 0
    """How far down the backing chain lies an image that is to be written to as well; 0: none."""
    bytes: bool = False
    """Whether a format or a filter lies over this node: then nobody guesses what format it has itself."""
    depth: int = 0
    """How many children within children this is."""

    def child_access(self) -> Access:
        """What a storage's locks should say: a format's file may grow, so its size is its own too."""
        if self.force_share:
            return FORCED
        if not self.writable:
            return READER
        if self.bytes:
            return Access(READ | WRITE | RESIZE, READ | WRITE_UNCHANGED)
        return WRITER


class Graph:
    """All nodes of one process that may meet. Thread-safe; changes happen one at a time."""

    def __init__(
        self, gate: Gate | None = None, secrets: Secrets | None = None, objects: Mapping[str, object] | None = None
    ) -> None:
        """``objects`` are what options may refer to by id beside secrets: throttle groups."""
        self.gate = gate if gate is not None else DirectoryGate()
        self.secrets = secrets if secrets is not None else Secrets()
        self.objects: Mapping[str, object] = objects if objects is not None else {}
        self.leases = Leases()
        self.draining = Draining()
        self._lock = threading.RLock()
        self._drained_by = threading.RLock()  # taken before the other
        self._nodes: dict[str, Node] = {}
        self._owners: dict[str, int] = {}  # node name -> how many parents, disks and openers hold it
        self._uses: list[tuple[object, Node, Access]] = []
        self._disks: list[Disk] = []
        self._followers: list[tuple[Follower, Node]] = []
        self._counter = 0

    # -- opening ---------------------------------------------------------------------------------

    def open(
        self,
        spec: Spec,
        *,
        driver: str | None = None,
        writable: bool = False,
        force_share: bool = False,
        cache: str | None = None,
        backing: bool = True,
        guest_data: bool = True,
        writable_backing: int = 0,
    ) -> Node:
        """Opens ``spec`` and everything below it; returns the root node, which the caller owns (``release``).
        ``backing`` and ``guest_data`` say whether backing files and files of nothing but guest data are opened.

        Backing files are opened for reading only, except the one that many images further down the chain
        (``writable_backing``; 1 is the root's own).
        ``driver`` names the format of a file name (None: probe). ``cache`` is a cache mode for the storages. Without
        ``guest_data`` nobody may read or write the guest's bytes, and encrypted images open without their key.
        Raises OptionError, ImageError or OSError, with nothing left open.
        """
        with self._lock, self._undo_on_error() as made:
            mode = Mode(writable, force_share, cache, backing, guest_data, writable_backing)
            node = self._whole(made, lambda: self._open_any(spec, driver, mode, made, ()))
            self._hold(node)
            return node

    def _whole(self, made: _Made, opener: Callable[[], Node]) -> Node:
        """A node with its backing chain. One image of a chain after the other, rather than each within the one above:
        chains are longer than calls can be nested."""
        before = len(made.waiting)
        node = opener()
        while len(made.waiting) > before:
            made.waiting.pop()()
        return node

    def _open_any(self, spec: Spec, driver: str | None, mode: Mode, made: _Made, above: tuple[str, ...]) -> Node:
        options = _as_options(spec)
        named = options.get("driver", driver)
        if named is None and "filename" not in options and "file" not in options:
            raise OptionError("A node needs 'driver' or 'filename'")
        if named is not None and not isinstance(named, str):
            raise OptionError(f"'driver' must be a string, not {named!r}")
        return self._open_options(named, options, mode, made, above)

    def _open_options(
        self, driver: str | None, options: dict[str, object], mode: Mode, made: _Made, above: tuple[str, ...]
    ) -> Node:
        if driver is None and mode.bytes:
            options = {**_named(_taken_name(options)), **options}
            driver = cast(str, options["driver"])
        unmaps, detect_zeroes = _write_policy(options)
        node = self._open_by_driver(driver, options, mode, made, above)
        node.unmaps, node.detect_zeroes = unmaps, detect_zeroes
        return node

    def _open_by_driver(
        self, driver: str | None, options: dict[str, object], mode: Mode, made: _Made, above: tuple[str, ...]
    ) -> Node:
        mode = _with_own_mode(mode, options)
        if driver is None:
            file = self._open_file(options, mode, made, above)
            return self._open_format(probe.probe(file), file, options, mode, made, above)
        found = registry.find(driver)
        if issubclass(found, Storage):
            return self._open_storage(found, options, mode, made)
        if issubclass(found, Filter):
            return self._open_filter(found, options, mode, made, above)
        file = self._open_file(options, mode, made, above)
        return self._open_format(found, file, options, mode, made, above)

    def _open_file(self, options: dict[str, object], mode: Mode, made: _Made, above: tuple[str, ...]) -> Node:
        """A format's child ``file``: given as such, or by the plain ``filename``."""
        if "filename" in options:
            if options.get("file") is not None:
                raise OptionError("Give either 'file' or 'filename', not both")
            options["file"] = {"filename": options.pop("filename")}
        child = self._open_child("file", options, replace(mode, bytes=True), made, above)
        if child is None:
            raise OptionError("A format needs the option 'file'")
        return child

    def _open_child(
        self, role: str, options: dict[str, object], mode: Mode, made: _Made, above: tuple[str, ...]
    ) -> Node | None:
        """Takes the child ``role`` out of ``options`` and opens it; None when it is not given."""
        given = options.pop(role, None)
        if given is None:
            return None
        if isinstance(given, str):
            return self.node(given)
        if not isinstance(given, Mapping):
            raise OptionError(f"'{role}' must be the name of a node or the options of one, not {given!r}")
        if mode.depth >= MAX_NESTED:
            raise LimitExceeded(f"Nodes are nested more than {MAX_NESTED} deep, the most accepted")
        deeper = replace(mode, depth=mode.depth + 1)
        return self._whole(made, lambda: self._open_any(given, None, deeper, made, above))

    def _open_storage(self, cls: type[Storage], options: dict[str, object], mode: Mode, made: _Made) -> Node:
        own = {key: value for key, value in options.items() if key not in _NOT_STORAGES}
        known = {info.name for info in opts.describe(cls.options)}
        if mode.cache is not None and "cache" in known:
            own.setdefault("cache", mode.cache)
        if mode.force_share and "force-share" in known:
            own.setdefault("force-share", True)
        parsed: Any = opts.parse(cls.options, own, owner=cls.name)
        storage = cls.open(parsed, writable=mode.writable)
        with _closed_on_error(storage):
            storage.set_access(mode.child_access())
            node = StorageNode(self._name(options), storage, mode.writable)
            node.reopened = lambda writable: node.storage.reopened(parsed, writable=writable)
            node.access_when = lambda writable: replace(mode, writable=writable).child_access()
            return self._add(node, made)

    def _open_filter(
        self, cls: type[Filter], options: dict[str, object], mode: Mode, made: _Made, above: tuple[str, ...]
    ) -> Node:
        if "filename" in options:
            options = {**cls.parse_filename(_taken_name(options)), **options}
        children: dict[str, Node] = {}
        roles = cls.child_roles(options)
        for role in roles:
            child = self._open_child(role.name, options, replace(mode, bytes=not role.image), made, above)
            if child is not None:
                children[role.name] = child
            elif not role.optional:
                raise OptionError(f'A block device must be specified for "{role.name}"')
        first = children[roles[0].name]
        context = OpenContext(
            first,
            self.leases,
            self._reference_opener(first, {}, mode, made, above),
            mode.writable,
            secrets=self.secrets,
            children=children,
            objects=self.objects,
            draining=self.draining,
            find_node=self.node,
        )
        own: Any = opts.parse(cls.options, _own(opts.flatten(cls.options, options)), owner=cls.name)
        filter = cls.open(context, bind(own, self.secrets))
        filter.further = {role: child for role, child in children.items() if child is not first}
        with _closed_on_error(filter):
            node = FilterNode(self._name(options), filter, mode.writable)
            self._add(node, made)
        for child in children.values():
            self._hold(child)
        self._claim(node, filter, mode)
        return node

    def _claim(self, node: FilterNode, filter: Filter, mode: Mode) -> None:
        """Makes known what a filter does with its child beyond what its users do."""
        children = node.children()
        for role, access in filter.needs.items():
            if role in children:
                self.use(node, children[role], access)
        nothing = Access(0, ALL)
        own = filter.access(nothing)
        if own == nothing:
            return
        if isinstance(filter.child, StorageNode):
            filter.child.storage.set_access(filter.access(mode.child_access()))
        self.use(node, filter.child, own)

    def _open_format(
        self,
        cls: type[Format],
        file: Node,
        options: dict[str, object],
        mode: Mode,
        made: _Made,
        above: tuple[str, ...],
    ) -> Node:
        options = opts.flatten(cls.options, options)
        named = ("backing", *cls.roles)
        roles = [key for key, value in options.items() if key in named or isinstance(value, Mapping)]
        given = {role: options.pop(role) for role in roles}
        opener = self._reference_opener(file, given, mode, made, above)
        deeper = replace(mode, backing=False, depth=mode.depth + 1)
        context = OpenContext(
            file, self.leases, opener, mode.writable, frozenset(given), mode.guest_data, self.secrets,
            open_within=lambda _, inner: self._open_within(inner, deeper, made, above),
        )  # fmt: skip
        own = _own(options)
        if "pass-discard-request" in {info.name for info in opts.describe(cls.options)}:
            own.setdefault("pass-discard-request", _write_policy(options)[0])
        parsed: Any = bind(opts.parse(cls.options, own, owner=cls.name), self.secrets)
        form = cls.open(context, parsed)
        with _closed_on_error(form):
            node = _format_node(self._name(options), form, mode.writable)
            node.reopened = lambda writable: cls.open(
                replace(context, writable=writable, open_reference=opener.again), parsed
            )
            self._add(node, made)
        for child in form.children:
            self._hold(child)
        if cls.has_backing and mode.backing:
            made.waiting.append(lambda: self._open_backing(node, given, mode, made, above))
        return node

    def _open_backing(
        self, node: FormatNode, given: dict[str, object], mode: Mode, made: _Made, above: tuple[str, ...]
    ) -> None:
        hint = node.format.backing
        chain = (*above, identity(node.filename))
        if len(chain) > MAX_CHAIN:
            raise LimitExceeded(f"{node.filename}: its backing chain is longer than {MAX_CHAIN} images")
        depth = max(0, mode.writable_backing - 1)
        below = replace(mode, writable=mode.writable_backing == 1, writable_backing=depth, bytes=False, depth=0)
        if "backing" in given:
            choice = given["backing"]
            if choice is None or choice == "":
                return
            backing = (
                self.node(choice)
                if isinstance(choice, str)
                else self._open_any(cast(Mapping[str, object], choice), None, below, made, chain)
            )
        elif hint is None:
            return
        else:
            name = resolve(hint.filename, node.filename)
            try:
                self.gate.admit(name, named_by=node.filename, role="backing file")
            except DiskwrightError as error:
                _below(error, len(above))
                raise
            if identity(name) in chain:
                raise ImageError(f"{node.filename}: its backing chain comes back to '{name}'")
            try:
                backing = self._open_any(name, hint.format, below, made, chain)
            except OSError as error:
                text = f"{_BACKING_FAILED * len(chain)}{error.strerror}"
                raise OSError(error.errno, text, error.filename or name) from error
            except DiskwrightError as error:
                _below(error, len(chain))
                raise
        node.format.accept_backing(backing)
        node.backing = backing
        self._hold(backing)

    def _reference_opener(
        self, file: Node, given: dict[str, object], mode: Mode, made: _Made, above: tuple[str, ...]
    ) -> _References:
        below = replace(mode, bytes=True)

        def open_reference(role: str, filename: str, driver: str | None) -> Node:
            choice = given.pop(role, None)
            if isinstance(choice, str):
                return self.node(choice)
            if isinstance(choice, Mapping):
                return self._whole(made, lambda: self._open_any(choice, driver, below, made, above))
            name = resolve(filename, file.filename)
            self.gate.admit(name, named_by=file.filename, role=role)
            return self._whole(made, lambda: self._open_options(driver, {"filename": name}, below, made, above))

        return _References(open_reference)

    def _open_within(self, options: Mapping[str, object], mode: Mode, made: _Made, above: tuple[str, ...]) -> Node:
        if mode.depth >= MAX_NESTED:
            raise LimitExceeded(f"Nodes are nested more than {MAX_NESTED} deep, the most accepted")
        return self._whole(made, lambda: self._open_any(options, None, mode, made, above))

    # -- nodes -----------------------------------------------------------------------------------

    def node(self, name: str) -> Node:
        """The open node of that name. Raises GraphError when there is none."""
        with self._lock:
            try:
                return self._nodes[name]
            except KeyError:
                raise GraphError(f"Cannot find device='' nor node-name='{name}'") from None

    def nodes(self) -> list[Node]:
        with self._lock:
            return list(self._nodes.values())

    def adopt(self, node: Node) -> None:
        """Takes in a node that was made outside, with one hold for the caller. Its children keep the hold
        their makers had, and it is released by the node. Raises GraphError when the name is taken."""
        with self._lock:
            if node.name in self._nodes:
                raise GraphError(f"Duplicate nodes with node-name='{node.name}'")
            self._nodes[node.name] = node
            self._owners[node.name] = 1

    def insert_filter(self, filter: Filter, *, name: str | None = None) -> FilterNode:
        """Puts ``filter`` between its child and every disk and parent that uses the child. Drains meanwhile."""
        with self.drained(), self._lock:
            child = filter.child
            node = FilterNode(self._name({"node-name": name}), filter, child.writable)
            self._nodes[node.name] = node
            self._owners[node.name] = 0
            for below in node.children().values():
                self._hold(below)
            self._redirect(child, node, skip=node)
            return node

    def put_over(self, node: FilterNode) -> None:
        """Puts a filter that is open already between its child and every disk and parent that uses the child. Drains
        meanwhile."""
        with self.drained(), self._lock:
            self._redirect(node.child, node, skip=node)

    def remove_filter(self, node: FilterNode) -> None:
        """Takes a filter out: its users go on upon its child. Drains meanwhile."""
        with self.drained(), self._lock:
            self._hold(node)  # so that it outlives its last user's leaving
            self._redirect(node, node.child, skip=node)
            self.release(node)

    def replace(self, old: Node, new: Node) -> None:
        """Every disk and parent of ``old`` goes on upon ``new``. Sizes must be equal. Drains meanwhile.

        Only disks, filters and overlays can be redirected: a format's own file cannot be exchanged.
        """
        if old.size != new.size:
            raise GraphError(f"Cannot replace '{old.name}' ({old.size} bytes) by '{new.name}' ({new.size} bytes)")
        with self.drained(), self._lock:
            self._redirect(old, new, skip=new)
            for follow, node in list(self._followers):
                if node is old:
                    follow(new)
            self._followers = [(follow, new if node is old else node) for follow, node in self._followers]

    def follow(self, node: Node, follow: Follower) -> None:
        """``follow(new)`` is called when the users of ``node`` go on upon another node, which has the same contents:
        who watches what they write has to watch that one from then on. It is called with nothing in flight, and the
        follower stays one of ``new``."""
        with self._lock:
            self._followers.append((follow, node))

    def unfollow(self, follow: Follower) -> None:
        with self._lock:
            self._followers = [item for item in self._followers if item[0] != follow]

    def set_writable(self, node: Node, writable: bool) -> list[Node]:
        """Opens ``node``'s image, not its backing files, for writing, or for reading only, as the same node. Returns
        the nodes that changed. Drains meanwhile. See ``core.reopen`` for the errors."""
        from diskwright.core.reopen import set_writable

        with self.drained(), self._lock:
            return set_writable(node, writable)

    def set_backing(self, node: Node, backing: Node | None) -> None:
        """``node`` reads from ``backing`` where it has nothing itself. Drains meanwhile; what the image's header says
        stays as it is. Raises GraphError when ``node`` would be its own backing."""
        below = backing
        while below is not None:
            if below is node:
                raise GraphError(f"Making '{node.name}' a backing file of itself would create a cycle")
            below = below_filters(below).backing
        with self.drained(), self._lock:
            if isinstance(node, FormatNode):
                node.format.backing_changes(backing)
            old, node.backing = node.backing, backing
            if backing is not None:
                self._hold(backing)
            if old is not None:
                self.release(old)

    def _redirect(self, old: Node, new: Node, *, skip: Node) -> None:
        below = _all_below(skip)  # what ``new`` stands on must not come to stand on it
        for disk in self._disks:
            if disk.node is old:
                disk.switch(new)
        for parent in list(self._nodes.values()):
            if parent is skip or parent in below:
                continue
            if isinstance(parent, FilterNode) and parent.child is old:
                self._hold(new)
                parent.filter.child = new
                self.release(old)
            elif isinstance(parent, FilterNode) and old in parent.filter.further.values():
                further = parent.filter.further.items()
                parent.filter.further = {role: new if child is old else child for role, child in further}
                self._hold(new)
                self.release(old)
            elif parent.backing is old:
                self._hold(new)
                parent.backing = new
                self.release(old)
            elif isinstance(parent, FormatNode) and old in parent.format.children:
                raise GraphError(f"The file of '{parent.name}' cannot be exchanged while it is open")

    def release(self, node: Node) -> None:
        """Gives up one hold of ``node``; with the last one it is closed, and so are children nobody else holds."""
        with self._lock:
            left = self._owners[node.name] - 1
            self._owners[node.name] = left
            if left > 0:
                return
            with ExitStack() as rest:  # children are released in their order, whatever fails
                for child in reversed(node.children().values()):
                    rest.callback(self.release, child)
                rest.callback(self._forget, node)
                node.close()

    def _forget(self, node: Node) -> None:
        self._nodes.pop(node.name, None)
        self._owners.pop(node.name, None)
        self._uses = [use for use in self._uses if use[1] is not node and use[0] is not node]

    def hold(self, node: Node) -> None:
        """One more hold of ``node``: it stays open until as many ``release`` calls."""
        with self._lock:
            self._hold(node)

    def _hold(self, node: Node) -> None:
        self._owners[node.name] += 1

    def _name(self, options: Mapping[str, object]) -> str:
        given = options.get("node-name")
        if isinstance(given, str) and given:
            if given in self._nodes:
                raise GraphError(f"Duplicate nodes with node-name='{given}'")
            return given
        self._counter += 1
        return f"#block{self._counter:03d}"

    def _add(self, node: Node, made: _Made) -> Node:
        self._nodes[node.name] = node
        self._owners[node.name] = 0
        made.append(node)
        return node

    @contextmanager
    def _undo_on_error(self) -> Iterator[_Made]:
        """Collects the nodes an open makes; when it fails they are closed, parents first."""
        made = _Made()
        try:
            yield made
        except BaseException:
            for node in reversed(made):
                children = list(node.children().values())
                self._forget(node)
                with suppress(OSError, DiskwrightError):  # the first error is the one to tell
                    node.close()
                for child in children:
                    if child not in made:
                        with suppress(OSError, DiskwrightError):
                            self.release(child)
            raise

    # -- uses ------------------------------------------------------------------------------------

    def use(self, user: object, node: Node, access: Access) -> None:
        """Notes that ``user`` uses ``node`` so. Raises GraphError when another use conflicts."""
        with self._lock:
            root = below_filters(node)
            between = _filters_from(node)  # what these do they do for this user
            others = [a for u, n, a in self._uses if below_filters(n) is root and u not in between]
            combine([*others, access])
            self._uses.append((user, node, access))

    def parents(self, node: Node) -> list[Node]:
        """The nodes that have ``node`` as a child."""
        return [parent for parent in self.nodes() if node in parent.children().values()]

    def is_written(self, node: Node) -> bool:
        """Whether somebody may write to ``node``, be it through filters."""
        with self._lock:
            root = below_filters(node)
            return any(access.needs & WRITE for _, used, access in self._uses if below_filters(used) is root)

    def hold_exclusively(self, node: Node) -> None:
        """Keeps everybody else from the files of ``node`` (backing files not among them), readers too, until it is
        closed: for changes that one who reads could not follow. Raises ImageLocked."""
        if isinstance(node, StorageNode):
            node.storage.set_access(Access(READ | WRITE | RESIZE, 0))
        for role, child in node.children().items():
            if role != "backing":
                self.hold_exclusively(child)

    def end_use(self, user: object) -> None:
        with self._lock:
            self._uses = [use for use in self._uses if use[0] is not user]

    def move_use(self, user: object, old: Node, new: Node) -> None:
        """A disk's root changes from ``old`` to ``new``."""
        with self._lock:
            self._uses = [(u, new if u is user and n is old else n, a) for u, n, a in self._uses]
            self._hold(new)
            self.release(old)

    # -- disks -----------------------------------------------------------------------------------

    def disk(self, node: Node, access: Access | None = None, *, owns_graph: bool = False) -> Disk:
        """A handle on ``node``. Default access: a writer's on a writable node, else a reader's."""
        if access is None:
            access = WRITER if node.writable else READER
        with self._lock:
            disk = Disk(self, node, access, owns_graph=owns_graph)
            self.use(disk, node, access)
            self._hold(node)
            self._disks.append(disk)
            return disk

    def drop_disk(self, disk: Disk) -> None:
        """Called by a disk that has closed."""
        with self._lock:
            if disk in self._disks:
                self._disks.remove(disk)
                self.end_use(disk)
                self.release(disk.node)

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Inside, no disk of the graph has a request in flight. Holds new ones first, all of them, so that
        waiting for one disk's requests does not leave room for another's. One thread at a time: who reads within such
        a section must not meet the changes of another. Never enter it from within a request."""
        with self._drained_by, ExitStack() as stack:
            with self._lock:
                disks = list(self._disks)
            for disk in disks:
                disk.start_drain()
                stack.callback(disk.end_drain)
            for disk in disks:
                disk.await_drained()
            for node in self.nodes():
                if isinstance(node, FilterNode):
                    node.filter.settle()
            yield

    def close(self) -> None:
        """Closes every disk and node that is left, and raises the first error of them when all are closed."""
        errors: list[Exception] = []
        for disk in list(self._disks):
            try:
                disk.close()
            except Exception as error:
                errors.append(error)
        with self._lock:
            while self._nodes:  # again for nodes below others that somebody held as well
                inner = {child.name for node in self._nodes.values() for child in node.children().values()}
                for node in list(self._nodes.values()):
                    if node.name not in inner and node.name in self._owners:
                        self._owners[node.name] = 1
                        try:
                            self.release(node)
                        except Exception as error:
                            errors.append(error)
        if errors:
            raise errors[0]


class _References:
    """Opens the files an image names, and knows them when the image is opened again."""

    def __init__(self, opener: Callable[[str, str, str | None], Node]) -> None:
        self._opener = opener
        self._known: dict[str, Node] = {}

    def __call__(self, role: str, filename: str, driver: str | None) -> Node:
        node = self._known[role] = self._opener(role, filename, driver)
        return node

    def again(self, role: str, filename: str, driver: str | None) -> Node:
        """The node of that role; GraphError when the image named no such file before."""
        try:
            return self._known[role]
        except KeyError:
            raise GraphError(f"'{filename}', which was not named before, is named as '{role}'") from None


class _Made(list["Node"]):
    """The nodes an open has made so far, and what is still to be done for them: opening their backing files."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], None]] = []


@contextmanager
def _closed_on_error(driver: Storage | Format | Filter) -> Iterator[None]:
    """For the time in which a driver is open and no node has it yet."""
    try:
        yield
    except BaseException:
        with suppress(OSError, DiskwrightError):  # the first error is the one to tell
            driver.close()
        raise


def _below(error: DiskwrightError, layers: int) -> None:
    """Words an error of a backing file as the overlay's. Every layer above adds the same words, as users of the classic
    tools know it."""
    error.args = (f"{_BACKING_FAILED * layers}{error}",)


_BACKING_FAILED = "Could not open backing file: "


def _all_below(node: Node) -> list[Node]:
    """Everything ``node`` reads through."""
    found: list[Node] = []
    waiting = [node]
    while waiting:
        for child in waiting.pop().children().values():
            if child not in found:
                found.append(child)
                waiting.append(child)
    return found


def _filters_from(node: Node) -> list[Node]:
    """``node`` and those below it down to the first that is not a filter, which is left out."""
    found = []
    while isinstance(node, FilterNode) and not node.filter.opaque:
        found.append(cast(Node, node))
        node = node.child
    return found


def storage_for(filename: str) -> type[Storage]:
    """The storage driver a file name belongs to. Raises OptionError for a filter's: nothing can be made there."""
    found = driver_for(filename)
    if issubclass(found, Filter):
        raise OptionError(f"Protocol driver '{found.name}' does not support image creation")
    return found


def driver_for(filename: str) -> type[Storage] | type[Filter]:
    """The driver a file name belongs to: by its prefix, else by what kind of file it is."""
    if has_prefix(filename):
        prefix = filename.partition(":")[0]
        found = registry.for_prefix(prefix)
        if found is None and not os.path.exists(filename):
            raise OptionError(f"Unknown protocol '{prefix}'")
        if found is not None:
            return found
    try:
        is_block = stat.S_ISBLK(os.stat(filename).st_mode)
    except OSError:
        is_block = False  # opening it will tell what is wrong
    return cast(type[Storage], registry.find("host_device" if is_block else "file"))


def _as_options(spec: Spec) -> dict[str, object]:
    """What a specification stands for, as nested options."""
    if isinstance(spec, str):
        return nest(parse_json(spec[5:])) if spec.startswith("json:") else {"filename": spec}
    return nest(spec)


def _named(filename: str) -> dict[str, object]:
    """The options that ``filename`` is short for, ``driver`` among them."""
    if filename.startswith("json:"):
        options = nest(parse_json(filename[5:]))
        if not isinstance(options.get("driver"), str):
            return {**_named(_taken_name(options)), **options}
        return options
    found = driver_for(filename)
    return {"driver": found.name, **found.parse_filename(filename)}


def _taken_name(options: dict[str, object]) -> str:
    filename = options.pop("filename", None)
    if not isinstance(filename, str):
        raise OptionError("A node needs 'driver' or 'filename'")
    return filename


def identity(filename: str) -> str:
    """A name that two ways of writing one local file share."""
    return filename if has_prefix(filename) else os.path.realpath(filename)


def parse_json(text: str) -> dict[str, object]:
    """The mapping in a ``json:`` pseudo file name. Raises OptionError."""
    import json

    if len(text) > opts.MAX_OPTIONS_TEXT:
        raise OptionError(f"Options of {len(text)} characters are longer than the {opts.MAX_OPTIONS_TEXT} accepted")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"Could not parse the JSON options: {error}") from None
    if not isinstance(found, dict):
        raise OptionError("Invalid JSON options: an object is needed")
    return found


def nest(options: Mapping[str, object]) -> dict[str, object]:
    """``{"file.filename": x}`` as ``{"file": {"filename": x}}``; nested mappings likewise."""
    result: dict[str, object] = {}
    for key, value in options.items():
        head, dot, rest = key.partition(".")
        if not dot:
            if isinstance(value, Mapping) and isinstance(result.get(key), dict):
                cast(dict[str, object], result[key]).update(value)
            else:
                result[key] = dict(value) if isinstance(value, Mapping) else value
            continue
        inner = result.setdefault(head, {})
        if not isinstance(inner, dict):
            raise OptionError(f"'{head}' cannot be both a value and the beginning of '{key}'")
        inner[rest] = value
    return result


def _write_policy(options: dict[str, object]) -> tuple[bool, str]:
    """``(whether space is given back, whether zeros are looked for)``, from a node's options."""
    discard = options.get("discard", "unmap")
    if not isinstance(discard, str) or discard not in _DISCARD:
        raise OptionError(f"Invalid discard option: '{discard}'; use one of {', '.join(_DISCARD)}")
    detect: str = _DETECT.parse("detect-zeroes", options.get("detect-zeroes", "off"))
    if detect == "unmap" and not _DISCARD[discard]:
        raise OptionError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
    return _DISCARD[discard], detect


def _own(options: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in options.items() if key not in _COMMON}


def _with_own_mode(mode: Mode, options: dict[str, object]) -> Mode:
    """``read-only`` and ``force-share`` given for one node hold for it and what is below."""
    read_only = opts.BOOL.parse("read-only", options.pop("read-only", not mode.writable))
    force = opts.BOOL.parse("force-share", options.pop("force-share", mode.force_share))
    cache = options.get("cache", mode.cache)
    cache = cache if isinstance(cache, str) else None
    return replace(mode, writable=not read_only and mode.writable, force_share=force, cache=cache)


def _format_node(name: str, form: Format, writable: bool) -> FormatNode:
    """The kind of node a format needs; those that encrypt nothing know nothing of it."""
    if form.cipher is None:
        return FormatNode(name, form, writable)
    from diskwright.core.ciphered import CipheredNode

    return CipheredNode(name, form, writable)

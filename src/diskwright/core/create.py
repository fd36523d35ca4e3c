"""Creating images: what is asked for is checked first, and only then is anything touched.

Making an image has two parts: its storage (a file, say) comes into being or is emptied, and its format
writes the first metadata into it. ``plan`` checks the options of both and the backing file; ``Plan.make``
does it. An image that another process is using is never emptied, and of a creation that fails no new file
is left behind.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from diskwright.core import options as opts
from diskwright.core import registry
from diskwright.core.driver import Filter, Format, Storage, not_supported
from diskwright.core.gate import Gate, resolve
from diskwright.core.graph import Graph, identity, storage_for
from diskwright.core.node import StorageNode
from diskwright.core.secrets import Secrets, bind
from diskwright.errors import DiskwrightError, GraphError, ImageError, ImageLocked, OptionError
from diskwright.units import MAX_BACKING_NAME, SECTOR, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diskwright.core.node import Node

_MODE = 0o644

_TIMES: Final = ("iter_time", "encrypt_iter_time")
"""Create options that say how long something shall take."""


@dataclass(frozen=True)
class Plan:
    """A creation whose options are known to be well formed. Nothing has happened yet."""

    filename: str
    driver: type[Format] | type[Storage]
    storage: type[Storage]
    given: Mapping[str, object]
    """What was asked for, typed, under the names of the options with underscores; ``size`` is always there."""
    format_options: Any
    storage_options: Mapping[str, object]

    @property
    def size(self) -> int:
        return cast(int, self.given["size"])

    def make(self, *, sparing: Graph | None = None) -> None:
        """Creates the image. Existing contents are lost, unless another process holds them (ImageLocked), or a file of
        it is open in ``sparing`` (GraphError)."""
        if sparing is not None:
            for filename in self.filenames():
                refuse_to_overwrite(sparing, filename)
        if issubclass(self.driver, Format):
            self._rehearse(self.driver)
        parts = self._parts(self.driver) if issubclass(self.driver, Format) else {}
        with _removed_on_failure(self._local_path()):
            self._make_storage()
            if issubclass(self.driver, Format) and not self._is_plain():
                with ExitStack() as stack:
                    for storage, values in parts.values():
                        stack.enter_context(_removed_on_failure(_path_of(storage, values)))
                        storage.create(opts.parse(storage.create_options, values, owner=storage.name))
                    self._make_format(self.driver, parts)

    def _parts(self, driver: type[Format]) -> dict[str, tuple[type[Storage], dict[str, object]]]:
        """What is made beside the image, by role: each storage and the options of its creation."""
        parts: dict[str, tuple[type[Storage], dict[str, object]]] = {}
        taken = {identity(self.filename)}
        if self.given.get("backing_file"):
            taken.add(identity(resolve(str(self.given["backing_file"]), self.filename)))
        for part in driver.create_parts(self.format_options):
            if not part.filename:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "")
            name = resolve(part.filename, self.filename)
            if identity(name) in taken:
                raise OptionError(f"'{part.filename}' cannot be the {part.role} of '{self.filename}'")
            taken.add(identity(name))
            storage = storage_for(name)
            if not _overrides_create(storage):
                raise not_supported(f"Driver '{storage.name}' cannot create the {part.role} '{part.filename}'")
            parts[part.role] = storage, {**storage.parse_filename(name), "size": 0}
        return parts

    def filenames(self) -> list[str]:
        """The image, and the further files that are made with it."""
        if not issubclass(self.driver, Format):
            return [self.filename]
        parts = self.driver.create_parts(self.format_options)
        return [self.filename, *(resolve(part.filename, self.filename) for part in parts)]

    def _is_plain(self) -> bool:
        """Whether the image is its storage and nothing else."""
        return self.driver.name == "raw" or issubclass(self.driver, Storage)

    def _local_path(self) -> str | None:
        """The file that is made, where it is a file of this machine."""
        return _path_of(self.storage, self.storage.parse_filename(self.filename))

    def _rehearse(self, driver: type[Format]) -> None:
        """Finds out, before existing contents are lost, whether the format accepts its options."""
        path = self._local_path()
        if self._is_plain() or path is None or not os.path.isfile(path) or not os.path.getsize(path):
            return
        rehearsed = self.format_options
        cheap: dict[str, object] = {name: 1 for name in _TIMES if (getattr(rehearsed, name, None) or 0) > 1}
        if hasattr(rehearsed, "preallocation"):
            cheap["preallocation"] = "off"
        if cheap:
            from dataclasses import replace

            rehearsed = replace(rehearsed, **cheap)
        with _own_graph(None) as graph:
            parts = {role: graph.open({"driver": "memory"}, writable=True) for role in self._parts(driver)}
            parts.update(self._consulted(graph, driver))
            driver.create_from(graph.open({"driver": "memory"}, writable=True), rehearsed, parts)

    def _make_storage(self) -> None:
        if not _overrides_create(self.storage):
            self._expect_existing()
            return
        values: dict[str, object] = dict(self.storage.parse_filename(self.filename))
        values.update(self.storage_options)
        if self._is_plain():
            values["size"] = self.size
            if "preallocation" in self.given:
                values["preallocation"] = self.given["preallocation"]
        self.storage.create(opts.parse(self.storage.create_options, values, owner=self.storage.name))

    def _expect_existing(self) -> None:
        """For storages that only others can create: there must be one, large enough for a plain image."""
        with _own_graph(None) as graph:
            node = self._open_storage(graph)
            if self._is_plain() and node.size < self.size:
                raise OSError(
                    errno.ENOSPC,
                    f"It exists with {node.size} bytes, fewer than the {self.size} wanted, and '{self.storage.name}' "
                    "cannot create another",
                    self.filename,
                )

    def _make_format(self, driver: type[Format], parts: Mapping[str, tuple[type[Storage], dict[str, object]]]) -> None:
        with _own_graph(None) as graph:
            node = self._open_storage(graph)
            made = {
                role: graph.open({"driver": storage.name, **_without_size(values)}, writable=True)
                for role, (storage, values) in parts.items()
            }
            driver.create_from(node, self.format_options, {**made, **self._consulted(graph, driver)})
            for part in made.values():
                part.flush()
            node.flush()

    def _consulted(self, graph: Graph, driver: type[Format]) -> dict[str, Node]:
        """The backing image, open, for a format that looks into it."""
        name = self.given.get("backing_file")
        if not name or not driver.consults_backing:
            return {}
        format = cast("str | None", self.given.get("backing_fmt"))
        spec = resolve(str(name), self.filename)
        return {"backing": graph.open(spec, driver=format, force_share=True, backing=False, guest_data=False)}

    def _open_storage(self, graph: Graph) -> Node:
        values = {"driver": self.storage.name, **self.storage.parse_filename(self.filename)}
        return graph.open(values, writable=True)


def refuse_to_overwrite(graph: Graph, filename: str) -> None:
    """Raises GraphError when making an image called ``filename`` would empty a file that is open in ``graph``. Locks
    see to that where they are used; a source opened with force-share has none."""
    if not os.path.exists(filename):
        return
    for node in graph.nodes():
        local = isinstance(node, StorageNode) and os.path.exists(node.filename)
        if local and os.path.samefile(filename, node.filename):
            raise GraphError(f"'{filename}' is the source, or part of it: creating it anew would destroy it")


def create_image(
    filename: str,
    format: str = "raw",
    options: Mapping[str, object] | None = None,
    *,
    gate: Gate | None = None,
    secrets: Secrets | None = None,
    check_backing: bool = True,
    sparing: Graph | None = None,
) -> None:
    """Creates the image ``filename`` with the format's ``options`` (``size`` among them), given as typed values
    or as text. See ``plan`` for what is checked and raised."""
    creation = plan(filename, format, options or {}, gate=gate, secrets=secrets, check_backing=check_backing)
    creation.make(sparing=sparing)


def plan(
    filename: str,
    format: str,
    options: Mapping[str, object],
    *,
    gate: Gate | None = None,
    secrets: Secrets | None = None,
    check_backing: bool = True,
) -> Plan:
    """Checks what a creation is asked for. What its options call secrets are looked up in ``secrets``.

    Without ``size`` it is that of the backing file, which is opened for this and, unless ``check_backing``
    is false, to see that it is usable; what it refers to itself goes through ``gate``. Raises OptionError
    for options that do not fit, ImageError or OSError for a backing file that cannot be opened.
    """
    driver = _creatable(format)
    storage = driver if issubclass(driver, Storage) else storage_for(filename)
    secrets = secrets if secrets is not None else Secrets()
    own, below = _divide(driver, storage, opts.flatten(driver.create_options, options))
    _check_backing_options(driver, filename, own)
    if "backing_file" in own:
        _look_at_backing(filename, own, gate, secrets, check_backing)
    if "size" not in own:
        raise OptionError("Image creation needs a size parameter")
    typed: Any = bind(opts.parse(driver.create_options, _with_name(driver, filename, own), owner=driver.name), secrets)
    fields = {_spelled(info.name): info.field for info in opts.describe(driver.create_options)}
    given = {name: getattr(typed, fields[name]) for name in own}
    names = storage.parse_filename(filename)
    below_typed: Any = opts.parse(storage.create_options, {**names, **below}, owner=storage.name)
    given.update((name, getattr(below_typed, name)) for name in below)
    return Plan(filename, driver, storage, given, typed, below)


def _creatable(format: str) -> type[Format] | type[Storage]:
    try:
        driver = registry.find(format)
    except OptionError:
        raise OptionError(f"Unknown file format '{format}'") from None
    if issubclass(driver, Filter):
        raise OptionError(f"Unknown file format '{format}'")
    if not _overrides_create(driver):
        raise not_supported(f"Format driver '{format}' does not support image creation")
    return driver


def _overrides_create(driver: type[Format] | type[Storage]) -> bool:
    """Whether a driver can create at all: what it inherits only refuses, and that is too late once a file is made."""
    return any("create" in vars(cls) for cls in driver.__mro__ if cls not in (Format, Storage))


def _divide(
    driver: type[Format] | type[Storage], storage: type[Storage], options: Mapping[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    """The format's options and, among those it does not know, the storage's; by names with underscores."""
    ours, theirs = _names(driver.create_options), _names(storage.create_options) - {"filename", "size"}
    own: dict[str, object] = {}
    below: dict[str, object] = {}
    for key, value in options.items():
        if value is None:
            continue
        name = key.replace("-", "_")
        part = own if name in ours else below
        if name == "filename" or (name not in ours and name not in theirs):
            if name in ("backing_file", "backing_fmt"):
                what = "Backing file" if name == "backing_file" else "Backing file format"
                raise OptionError(f"{what} not supported for file format '{driver.name}'")
            raise OptionError(f"Invalid parameter '{key}'")
        if name in part:
            raise OptionError(f"Option '{key}' is given twice")
        part[name] = value
    return own, below


def _names(options: type) -> set[str]:
    return {_spelled(info.name) for info in opts.describe(options)}


def _spelled(name: str) -> str:
    return name.replace("-", "_")


def _with_name(driver: type[Format] | type[Storage], filename: str, own: dict[str, object]) -> dict[str, object]:
    return {**driver.parse_filename(filename), **own} if issubclass(driver, Storage) else own


def _check_backing_options(driver: type[Format] | type[Storage], filename: str, own: Mapping[str, object]) -> None:
    name = own.get("backing_file")
    if name is None:
        if own.get("backing_fmt") is not None:
            raise OptionError("Backing format cannot be used without backing file")
        return
    if not isinstance(name, str) or not name:
        raise OptionError("Expected backing file name, got empty string")
    if len(os.fsencode(name)) > MAX_BACKING_NAME:
        raise OptionError(f"Backing file name is longer than the {MAX_BACKING_NAME} bytes an image can hold")
    if identity(resolve(name, filename)) == identity(filename):
        raise OptionError("Error: Trying to create an image with the same filename as the backing file")


def _look_at_backing(filename: str, own: dict[str, object], gate: Gate | None, secrets: Secrets, check: bool) -> None:
    """Opens the backing file to see that it is there and, when no size is given, how large it is."""
    name, format = cast(str, own["backing_file"]), cast("str | None", own.get("backing_fmt"))
    if not check:
        if format is None:
            raise OptionError("Backing file specified without backing format")
        return
    try:
        with _own_graph(gate, secrets) as graph:
            # Only its size is read, so somebody else may be writing to it meanwhile.
            node = graph.open(resolve(name, filename), driver=format, force_share=True)
            size, found = align_up(node.size, SECTOR), node.driver_name
    except OSError as error:
        raise OSError(error.errno, f"Could not open backing image: {error.strerror}", error.filename or name) from error
    except DiskwrightError as error:
        raise ImageError(f"Could not open backing image: {error}") from error
    if format is None:
        raise OptionError(f"Backing file specified without backing format; it was detected as {found}")
    own.setdefault("size", size)


def _path_of(storage: type[Storage], values: Mapping[str, object]) -> str | None:
    """The file of this machine that a storage with these options is, or None."""
    return str(values["filename"]) if storage.name == "file" else None


def _without_size(values: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if name != "size"}


@contextmanager
def _own_graph(gate: Gate | None, secrets: Secrets | None = None) -> Iterator[Graph]:
    graph = Graph(gate, secrets)
    try:
        yield graph
    finally:
        graph.close()


@contextmanager
def _removed_on_failure(path: str | None) -> Iterator[None]:
    """Inside, the file ``path`` is made; when that fails and there was none before, there is none afterwards."""
    made = None if path is None else _claim(path)
    try:
        yield
    except ImageLocked:
        raise  # somebody else has begun to use the new file, so it is no longer only ours
    except BaseException:
        if path is not None and made is not None:
            _remove(path, made)
        raise


def _claim(path: str) -> os.stat_result | None:
    """Makes the file when there is none, and tells which one it is. Making it exclusively is the only way to
    know later that nobody else did."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    except FileExistsError:
        return None
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _remove(path: str, made: os.stat_result) -> None:
    try:
        if os.path.samestat(os.lstat(path), made):
            os.unlink(path)
    except OSError:
        pass  # the failure that led here is the one to tell

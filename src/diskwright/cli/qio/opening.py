"""How an image is opened: the options that the command line and ``open`` share, and what ``reopen`` may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from diskwright.cli.common import CACHE_MODES, Failure, opening_error, warn_guessed_raw
from diskwright.cli.qio.language import Refused
from diskwright.errors import DiskwrightError, OptionError

if TYPE_CHECKING:
    from diskwright.core.disk import Disk
    from diskwright.core.graph import Graph
    from diskwright.core.node import Node
    from diskwright.core.secrets import Secrets

_AIO: Final = ("threads", "native", "io_uring")
_DISCARD: Final = {"ignore": "ignore", "off": "ignore", "unmap": "unmap", "on": "unmap"}
_DIRECT: Final = ("none", "directsync")

WRITE_THROUGH: Final = ("writethrough", "directsync")

_CACHE_SWITCHES: Final = ("cache.direct", "cache.no-flush", "cache.writeback")

_CHANGEABLE: Final = (
    "read-only", "auto-read-only", "discard", "detect-zeroes", "cache", "cache.direct", "cache.no-flush",
    "lazy-refcounts",
)  # fmt: skip
"""Options of every image that ``reopen`` may change, or change to what they are."""


@dataclass
class Opening:
    """Choices. ``options`` are those of ``-o``, as text, and go before the others."""

    format: str | None = None
    read_only: bool = False
    temporary: bool = False
    """Writes go to an overlay that is gone afterwards."""
    copy_on_read: bool = False
    force_share: bool = False
    cache: str = "writeback"
    discard: str = "unmap"
    aio: str = "threads"
    options: dict[str, object] = field(default_factory=dict)

    def take(self, option: str, value: str) -> None:
        """One option of the command line or of ``open``. Raises Refused."""
        if option == "r":
            self.read_only = True
        elif option == "s":
            self.temporary = True
        elif option == "C":
            self.copy_on_read = True
        elif option == "U":
            self.force_share = True
        elif option == "n":
            self.cache = "none"
        elif option == "t":
            self.cache = cache_mode(value)
        elif option == "k":
            self.aio = "native"
        elif option == "i":
            if value not in _AIO:
                raise Refused(f"Invalid aio option: {value}")
            self.aio = value
        elif option == "d":
            if value not in _DISCARD:
                raise Refused(f"Invalid discard option: {value}")
            self.discard = _DISCARD[value]

    def take_text(self, text: str) -> None:
        """Options of ``-o``: ``driver=raw,size=1M``. Raises Refused."""
        self.options.update(pairs(text))


def cache_mode(text: str) -> str:
    """A cache mode. Raises Refused."""
    if text == "off":
        return "none"
    if text not in CACHE_MODES:
        raise Refused(f"Invalid cache option: {text}")
    return text


def pairs(text: str) -> dict[str, str]:
    """``a=1,b=2`` by name. Raises Refused."""
    from diskwright.core.options import split_pairs

    try:
        return split_pairs(text)
    except OptionError as error:
        raise Refused(str(error)) from None


def open_disk(name: str | None, how: Opening, secrets: Secrets, groups: Mapping[str, object] | None = None) -> Disk:
    """Opens an image as ``how`` says. Raises Refused."""
    from diskwright.core.gate import OpenGate
    from diskwright.core.graph import Graph

    graph = Graph(OpenGate(), secrets, groups)
    try:
        node = _open_node(graph, name, how)
        guessed = _was_guessed_raw(name, node, how)
        if how.temporary:
            from diskwright.cli.qio.overlay import temporary_overlay

            node = temporary_overlay(graph, node, writable=not how.read_only)
        if how.copy_on_read:
            node = _copying_on_read(graph, node)
        disk = graph.disk(node, owns_graph=True)
        graph.release(node)
        if guessed and disk.node.writable and not how.temporary:
            from diskwright.filters.probe_guard import ProbeGuard

            graph.insert_filter(ProbeGuard(disk.node))
        return disk
    except (DiskwrightError, OSError, Failure) as error:
        try:
            graph.close()
        except (DiskwrightError, OSError):
            pass  # a consequence of what led here, and that is to be told
        place = f"can't open device {name}" if name is not None else "can't open"
        reason = error.message if isinstance(error, Failure) else opening_error(error)
        raise Refused(f"{place}: {reason.removeprefix(f'{name}: ')}") from error


def _open_node(graph: Graph, name: str | None, how: Opening) -> Node:
    """The image itself; for a temporary overlay only to be read."""
    if how.copy_on_read and how.read_only:
        raise OptionError("Can't use copy-on-read on read-only device")
    if how.force_share and not how.read_only:
        raise OptionError("force-share=on can only be used with read-only images")
    options = dict(how.options)
    cache = _cache_of(options, how.cache)
    if how.aio == "native" and cache not in _DIRECT:
        raise OptionError("aio=native was specified, but it requires cache.direct=on, which was not specified.")
    options.setdefault("discard", how.discard)
    if name is not None and name.startswith("json:"):
        from diskwright.core.graph import parse_json

        options = {**parse_json(name[5:]), **options}
    elif name == "":
        raise OptionError("The 'file' block driver requires a file name")
    elif name is not None:
        if any(key == "file" or key.startswith("file.") for key in options):
            raise OptionError("Can't specify 'file' and 'filename' options at the same time")
        options["filename"] = name
    writable = not how.read_only and not how.temporary
    return graph.open(options, driver=how.format, writable=writable, force_share=how.force_share, cache=cache)


def _copying_on_read(graph: Graph, node: Node) -> Node:
    """The filter that keeps what is read from a backing file, over ``node``, whose hold passes to it."""
    above = graph.open({"driver": "copy-on-read", "file": node.name}, writable=True)
    graph.release(node)
    return above


def effective_cache(how: Opening) -> str:
    """The cache mode an image is opened with."""
    return _cache_of(dict(how.options), how.cache)


def _cache_of(options: dict[str, object], default: str) -> str:
    """The cache mode that ``cache.direct`` and its kin among the options ask for; takes them out."""
    from diskwright.core.options import BOOL

    options.pop("auto-read-only", None)
    direct, no_flush, writeback = (
        BOOL.parse(key, options.pop(key)) if key in options else None for key in _CACHE_SWITCHES
    )
    if direct is no_flush is writeback is None:
        return default
    if no_flush:
        return "unsafe"
    if writeback is None:
        writeback = default not in WRITE_THROUGH
    if default in _DIRECT if direct is None else direct:
        return "none" if writeback else "directsync"
    return "writeback" if writeback else "writethrough"


def _was_guessed_raw(name: str | None, node: Node, how: Opening) -> bool:
    """Whether an image was taken for raw only because nothing else fits; says so. It must not be made to look like
    another format by what is written to it."""
    stated = how.format is not None or "driver" in how.options
    if stated or name is None or name.startswith("json:") or node.driver_name != "raw":
        return False
    warn_guessed_raw(name, node, None, False)
    return True


def check_changes(disk: Disk, options: Mapping[str, object]) -> None:
    """Raises Refused for an option that cannot be changed while the image is open."""
    from diskwright.core.node import FormatNode, below_filters
    from diskwright.core.options import describe

    node = below_filters(disk.node)
    known = {info.name for info in describe(type(node.format).options)} if isinstance(node, FormatNode) else set()
    for key in options:
        key = key.removeprefix("file.")
        if node.backing is not None:
            key = key.removeprefix("backing.").removeprefix("file.")
        if key in _CHANGEABLE and (key != "lazy-refcounts" or node.driver_name == "qcow2"):
            continue
        if key == "backing":
            raise Refused(f"Cannot find device='' nor node-name='{options[key]}'")
        if key not in known or key.startswith("snapshot"):
            raise Refused(f"Cannot change the option '{key}'")

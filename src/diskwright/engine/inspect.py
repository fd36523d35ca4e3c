"""Inspecting a file of unknown origin: what it is and what it names, with nothing of that followed.

The gate is closed for good: no backing file, data file or extent is opened. At most ``signatures.HEAD`` bytes of the
file and of the guest's disk are read, ``signatures.TAIL`` of the file's end, and what the format's own inspection and
opening read within their limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diskwright.core.driver import Format
from diskwright.core.inspection import MAX_ROWS, MAX_TEXT, Fact, Inspection, Reference, pread_up_to
from diskwright.engine.disk_content import Content, look
from diskwright.engine.signatures import CONTENT, FILES, HEAD, IMAGE, TAIL, WRAPPED, Found, matches
from diskwright.errors import (
    DiskwrightError,
    GraphError,
    OptionError,
    UnsafeReference,
    UnsupportedFeature,
    message_of,
)

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.node import FormatNode, Node


@dataclass
class Findings:
    """What was found of one file. Sizes and offsets in bytes."""

    filename: str
    file_size: int
    allocated: int | None
    format: str
    """The driver that would be taken for it, or was asked for."""
    score: int
    """How sure that driver's probe is, 0 to 100."""
    signatures: list[Found] = field(default_factory=list)
    drivers: frozenset[str] = frozenset()
    """The formats there are drivers for."""
    details: Inspection = field(default_factory=Inspection)
    content: Content | None = None
    """None: the guest's bytes could not be read; ``unreadable`` says why."""
    unreadable: str | None = None
    incomplete: bool = False
    """Whether some of what ``content`` was looked for in lies in a backing file, which is not followed."""
    error: str | None = None
    """Why the image cannot be opened here."""
    wrong: bool = False
    """Whether ``error`` is for something that contradicts the specification or a limit."""
    unsupported: bool = False
    """Whether it is for something this program does not know."""
    risks: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Everything that contradicts a specification."""
        rows = [f"{fact.name} is {fact.value}: {fact.problem}" for fact in self.details.facts if fact.problem]
        rows += self.details.problems
        if self.error is not None and self.wrong:
            rows.append(self.error)
        return rows

    @property
    def without_driver(self) -> list[Found]:
        """Image formats, compressions and archives that were recognised and cannot be opened here."""
        return [
            found
            for found in self.signatures
            if found.signature.kind in (IMAGE, WRAPPED) and found.signature.name not in self.drivers
        ]

    @property
    def trailing(self) -> int | None:
        """Bytes behind the end of the image; None when that is not known."""
        return None if self.details.end is None else max(0, self.file_size - self.details.end)


def inspect(filename: str, *, format: str | None = None, force_share: bool = False) -> Findings:
    """Looks at ``filename``. ``format`` is the driver to look with (None: the one that is surest).

    Raises OSError when the file cannot be read, OptionError for a format there is not, ImageLocked.
    """
    from diskwright.core import registry
    from diskwright.core.gate import ClosedGate
    from diskwright.core.graph import Graph
    from diskwright.core.node import StorageNode
    from diskwright.core.probe import HEAD as PROBED
    from diskwright.core.probe import probe_head

    graph = Graph(ClosedGate())
    try:
        file = graph.open(filename, driver="raw", force_share=force_share).children()["file"]
        head = pread_up_to(file, 0, HEAD)
        tail = pread_up_to(file, max(0, file.size - TAIL), TAIL)
        driver = probe_head(head[:PROBED], file.filename) if format is None else _format(format)
        allocated = file.storage.allocated_size() if isinstance(file, StorageNode) else None
        found = Findings(filename, file.size, allocated, driver.name, driver.probe(head[:PROBED], file.filename))
        found.signatures = matches(FILES, head, tail, file.size)
        found.drivers = frozenset(each.name for each in registry.formats())
        found.details = driver.inspect(file) or Inspection()
        _open(graph, found, force_share)
        found.risks = _risks(found)
        return found
    finally:
        graph.close()


def _format(name: str) -> type[Format]:
    from diskwright.core.registry import find

    driver = find(name)
    if not issubclass(driver, Format):
        raise OptionError(f"'{name}' is not an image format")
    return driver


def _open(graph: Graph, found: Findings, force_share: bool) -> None:
    """What opening the image adds. First for its metadata alone: then neither keys nor data files are needed."""
    node: Node | None = None
    for guest_data in (False, True):
        try:
            node = graph.open(
                found.filename, driver=found.format, force_share=force_share, backing=False, guest_data=guest_data
            )
            if guest_data:
                _look_inside(found, node)
            else:
                _facts_of_open(found, node)
        except (DiskwrightError, OSError) as error:
            text = message_of(error).removeprefix(f"{found.filename}: ")
            found.unreadable = text
            if not guest_data:
                found.error = text
                found.unsupported = isinstance(error, UnsupportedFeature)
                found.wrong = not isinstance(error, (UnsupportedFeature, UnsafeReference, GraphError))
                return
        if found.details.encrypted:
            found.unreadable = "encrypted"
            return


def _facts_of_open(found: Findings, node: Node) -> None:
    from diskwright.core.node import FormatNode, below_filters

    bottom = below_filters(node)
    details = found.details
    if details.virtual_size is None:
        details.virtual_size = bottom.size
    if not isinstance(bottom, FormatNode):
        return
    info = bottom.format.info()
    if details.encrypted is None:
        details.encrypted = bool(info.encrypted)
    if not details.facts:
        _flatten("", info.specific or {}, details.facts)
        if info.cluster_size:
            details.facts.insert(0, Fact("cluster-size", info.cluster_size))
    if not details.references and bottom.format.backing is not None:
        details.references.append(Reference("backing file", *bottom.format.backing))
    if details.snapshots is None:
        details.snapshots = _snapshots(bottom)


def _snapshots(node: FormatNode) -> int | None:
    from diskwright.core import snapshots

    keeper = snapshots.keeper(node)
    return None if keeper is None else len(keeper.snapshots())


def _flatten(prefix: str, value: object, facts: list[Fact]) -> None:
    """Nested facts as a list, names joined by dots."""
    if len(facts) >= MAX_ROWS:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), item, facts)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value):
            _flatten(f"{prefix}[{number}]", item, facts)
    elif isinstance(value, (bool, int)):
        facts.append(Fact(prefix, value))
    elif value is not None:
        facts.append(Fact(prefix, str(value)[:MAX_TEXT]))


def _look_inside(found: Findings, node: Node) -> None:
    from diskwright.extents import UNALLOCATED

    length = min(HEAD, node.size)
    head = node.pread(0, length)
    found.content = look(head, node.size)
    if length and any(reference.role == "backing file" for reference in found.details.references):
        found.incomplete = any(run.kind == UNALLOCATED for run in node.extents(0, length))


def _risks(found: Findings) -> list[str]:
    """Why it matters that the format is stated when this file is used, rather than guessed."""
    risks: list[str] = []
    raw = found.format == "raw"
    if raw:
        risks.append("raw: who writes to this disk can make it look like another format; state -f raw")
    for signature, offset, _ in found.signatures:
        if signature.kind == CONTENT or signature.name == found.format:
            continue
        text = f"other programs may take it for {signature.name}: {signature.what} at offset {offset:#x}"
        risks.append(text)
    if not raw and found.content is not None:
        for signature, _, _ in found.content.images:
            risks.append(
                f"the disk inside begins like {signature.name}: converted to raw, it would be taken for that; "
                "state -f raw for the copy"
            )
    return risks

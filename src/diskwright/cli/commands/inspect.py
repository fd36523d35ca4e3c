"""``diskwright inspect``: what a file of unknown origin is, with nothing followed that it names."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import Failure
from diskwright.cli.output import escaped, json_text
from diskwright.errors import DiskwrightError
from diskwright.units import human_size

if TYPE_CHECKING:
    from diskwright.core.inspection import Fact, Reference
    from diskwright.engine.disk_content import Content
    from diskwright.engine.inspect import Findings
    from diskwright.engine.signatures import Found

SUMMARY: Final = "tell what a file of unknown origin is, and follow nothing it names"

DAMAGED: Final = 2
"""The exit code when something contradicts the format's specification."""
NO_DRIVER: Final = 3
"""The exit code when the file is recognised as something that cannot be opened here."""

EXIT_CODES: Final = {
    0: "nothing found that contradicts a specification",
    1: "the file cannot be read",
    DAMAGED: "something in it contradicts the format's specification",
    NO_DRIVER: "recognised as something that cannot be opened here",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--format", metavar="FMT", help="look at it as this format; probed when not given")
    common.add_force_share(parser)
    common.add_output(parser)
    parser.add_argument("filename", nargs="*", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    as_json = common.check_output(args)
    filename = common.one_operand(args.filename)
    from diskwright.engine.inspect import inspect

    try:
        found = inspect(filename, format=args.format, force_share=args.force_share)
    except (DiskwrightError, OSError) as error:
        prefix = f"Could not open '{filename}': "
        raise Failure(
            prefix + common.opening_error(error).removeprefix(prefix).removeprefix(f"{filename}: ")
        ) from error
    print(json_text(as_mapping(found)) if as_json else "\n".join(as_lines(found)))
    if found.without_driver:
        return NO_DRIVER
    if found.problems:
        return DAMAGED
    return NO_DRIVER if found.unsupported else 0


# -- JSON ----------------------------------------------------------------------------------------


def as_mapping(found: Findings) -> dict[str, object]:
    """The findings under the names documented in docs/cli.md. All keys are always there."""
    details = found.details
    return {
        "filename": found.filename,
        "file-size": found.file_size,
        "allocated-size": found.allocated,
        "format": found.format,
        "version": details.version,
        "probe": {"score": found.score, "risks": found.risks},
        "recognised": [_signature(each, found) for each in found.signatures],
        "virtual-size": details.virtual_size,
        "encrypted": details.encrypted,
        "snapshots": details.snapshots,
        "bitmaps": details.bitmaps,
        "image-end": details.end,
        "trailing-bytes": found.trailing,
        "facts": [_fact(fact) for fact in details.facts],
        "features": [
            {"kind": kind, "bit": bit, "name": escaped(name), "known": known}
            for kind, bit, name, known in details.features
        ],
        "references": [_reference(each) for each in details.references],
        "content": None if found.content is None else _content(found.content, incomplete=found.incomplete),
        "unreadable": _escaped(found.unreadable),
        "error": _escaped(found.error),
        "problems": [escaped(text) for text in found.problems],
    }


def _signature(found: Found, findings: Findings) -> dict[str, object]:
    signature, offset, version = found
    return {
        "name": signature.name,
        "description": signature.what,
        "kind": signature.kind,
        "driver": signature.name in findings.drivers,
        "magic": signature.magic.hex(),
        "offset": offset,
        "version": version,
        "source": signature.source,
    }


def _fact(fact: Fact) -> dict[str, object]:
    value = escaped(fact.value) if isinstance(fact.value, str) else fact.value
    return {"name": escaped(fact.name), "value": value, "offset": fact.offset, "problem": _escaped(fact.problem)}


def _reference(reference: Reference) -> dict[str, object]:
    role, name, format, offset = reference
    return {"role": role, "name": escaped(name), "format": _escaped(format), "offset": offset}


def _content(content: Content, *, incomplete: bool) -> dict[str, object]:
    return {
        "bytes-looked-at": content.looked_at,
        "incomplete": incomplete,
        "blank": content.blank,
        "partition-table": content.table,
        "partitions": [row._asdict() for row in content.partitions],
        "signatures": [
            {"name": each.signature.name, "description": each.signature.what, "offset": each.offset}
            for each in content.signatures
        ],
        "problems": content.problems,
    }


def _escaped(text: str | None) -> str | None:
    return None if text is None else escaped(text)


# -- text ----------------------------------------------------------------------------------------


def as_lines(found: Findings) -> list[str]:
    """The findings for a person, with nothing in them that a terminal would act on."""
    details = found.details
    allocated = "" if found.allocated is None else f", {human_size(found.allocated)} in use"
    lines = [
        f"file: {escaped(found.filename)}",
        f"file size: {human_size(found.file_size)} ({found.file_size} bytes){allocated}",
        f"format: {_title(found)}",
    ]
    for each in found.signatures:
        driver = "" if each.signature.name in found.drivers or each.signature.kind == "content" else "; no driver"
        version = "" if each.version is None else f", version {each.version}"
        lines.append(
            f"recognised: {each.signature.name} ({each.signature.what}{version}): "
            f"{_magic(each.signature.magic)} at offset {each.offset:#x}{driver}"
        )
    if details.virtual_size is not None:
        lines.append(f"virtual size: {human_size(details.virtual_size)} ({details.virtual_size} bytes)")
    for name, value in (
        ("encrypted", details.encrypted),
        ("snapshots", details.snapshots),
        ("bitmaps", details.bitmaps),
    ):
        if value is not None:
            lines.append(f"{name}: {_plain(value)}")
    for reference in details.references:
        format = f" (format {escaped(reference.format)})" if reference.format else ""
        lines.append(f"names as its {reference.role}: {escaped(reference.name)}{format}; not followed")
    if found.trailing:
        lines.append(f"behind the image's end at {details.end:#x}: {found.trailing} bytes")
    lines += _content_lines(found)
    if details.facts:
        lines.append("facts:")
        lines += [_fact_line(fact) for fact in details.facts]
    if details.features:
        lines.append("features:")
        for kind, bit, name, known in details.features:
            lines.append(f"    {kind} {bit}: {escaped(name) or 'without a name'}{'' if known else ' (unknown)'}")
    for title, rows in (("risks", found.risks), ("problems", found.problems)):
        if rows:
            lines += [f"{title}:", *(f"    {escaped(row)}" for row in rows)]
    if found.error is not None and not found.wrong:
        lines.append(f"not opened: {escaped(found.error)}")
    return lines


def _magic(magic: bytes) -> str:
    return escaped(magic.decode("ascii")) if magic.isascii() else f"0x{magic.hex()}"


def _title(found: Findings) -> str:
    if found.format == "raw" and not found.signatures:
        return "raw (nothing else fits)"
    version = "" if found.details.version is None else f", version {found.details.version}"
    return f"{found.format}{version}"


def _fact_line(fact: Fact) -> str:
    value = escaped(fact.value) if isinstance(fact.value, str) else _plain(fact.value)
    if isinstance(fact.value, int) and not isinstance(fact.value, bool) and fact.value > 4095:
        value += f" ({fact.value:#x})"
    place = "" if fact.offset is None else f" [at {fact.offset:#x}]"
    problem = f"  <-- {escaped(fact.problem)}" if fact.problem else ""
    return f"    {escaped(fact.name)}: {value}{place}{problem}"


def _plain(value: int | bool | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _content_lines(found: Findings) -> list[str]:
    content = found.content
    if content is None:
        return [] if found.unreadable is None else [f"the disk inside: not read ({escaped(found.unreadable)})"]
    what = [f"{content.table.upper()} with {len(content.partitions)} partitions"] if content.table else []
    what += [each.signature.what for each in content.signatures]
    text = ", ".join(what) or ("zeros" if content.blank else "nothing that is known")
    rest = "; part of it lies in the backing file" if found.incomplete else ""
    lines = [f"the disk inside begins with: {text}{rest}"]
    lines += [
        f"    partition {row.number}: type {row.type}, {human_size(row.length)} at {row.start:#x}"
        for row in content.partitions
    ]
    return lines + [f"    {text}" for text in content.problems]

"""Inspection of a qcow2 header, field by field, right or wrong (specification: sections Header, Header extensions,
Host cluster management)."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Final

from diskwright.core.inspection import (
    MAX_ROWS,
    Fact,
    Feature,
    Field,
    Inspection,
    Reference,
    between,
    one_of,
    pread_up_to,
    read_fields,
)
from diskwright.core.node import Node
from diskwright.formats.qcow2 import header as fields
from diskwright.formats.qcow2.layout import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFTABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    REFTABLE_OFFSET_MASK,
)
from diskwright.units import MAX_BACKING_NAME, MAX_DISK_SIZE

_COMMON: Final = (
    Field("version", 4, ">I", one_of(2, 3)),
    Field("backing_file_offset", 8, ">Q"),
    Field("backing_file_size", 16, ">I", between(0, MAX_BACKING_NAME)),
    Field("cluster_bits", 20, ">I", between(MIN_CLUSTER_BITS, MAX_CLUSTER_BITS)),
    Field("size", 24, ">Q", between(0, MAX_DISK_SIZE)),
    Field("crypt_method", 32, ">I", between(0, 2)),
    Field("l1_size", 36, ">I", between(0, MAX_L1_BYTES // 8)),
    Field("l1_table_offset", 40, ">Q"),
    Field("refcount_table_offset", 48, ">Q"),
    Field("refcount_table_clusters", 56, ">I"),
    Field("nb_snapshots", 60, ">I", between(0, MAX_SNAPSHOTS)),
    Field("snapshots_offset", 64, ">Q"),
)
_VERSION_3: Final = (
    Field("incompatible_features", 72, ">Q"),
    Field("compatible_features", 80, ">Q"),
    Field("autoclear_features", 88, ">Q"),
    Field("refcount_order", 96, ">I", between(0, 6)),
    Field("header_length", 100, ">I"),
)
_KINDS: Final = ("incompatible", "compatible", "autoclear")
_EXTENSIONS: Final = {
    fields.EXT_BACKING_FORMAT: "backing file format",
    fields.EXT_FEATURE_NAMES: "feature name table",
    fields.EXT_BITMAPS: "bitmaps",
    fields.EXT_ENCRYPTION: "full disk encryption header",
    fields.EXT_DATA_FILE: "external data file name",
}

_BLOCKS_TRIED: Final = 16
"""Refcount blocks that are looked at, from the last one on, for the last cluster in use."""


def inspect(file: Node) -> Inspection:
    """See ``Format.inspect``. Reads the first cluster, the refcount table and a few of its blocks, at most."""
    head = pread_up_to(file, 0, 1 << MAX_CLUSTER_BITS)
    facts = read_fields(head, _COMMON)
    version = _number(facts, "version")
    later = read_fields(head, _VERSION_3) if version >= 3 else []
    found = Inspection(version=version, virtual_size=_number(facts, "size"))
    found.encrypted = _number(facts, "crypt_method") != 0
    found.snapshots = _number(facts, "nb_snapshots")
    found.bitmaps = 0
    cluster = 1 << min(max(_number(facts, "cluster_bits"), MIN_CLUSTER_BITS), MAX_CLUSTER_BITS)
    known = {fact.name: _number([fact], fact.name) for fact in (*facts, *later)}
    found.facts = [_judged(fact, known, cluster, file.size) for fact in (*facts, *later)]
    if known.get("header_length", 0) > fields.V3_LENGTH:
        found.facts += read_fields(
            head, [Field("compression_type", fields.V3_LENGTH, ">B", between(0, len(fields.COMPRESSION_NAMES) - 1))]
        )
    names = {(kind, bit): name for kind, bit, name in fields.FEATURE_NAMES}
    start = known.get("header_length", fields.V2_LENGTH)
    own_names = _read_extensions(head[:cluster], start, known["backing_file_offset"], found)
    for kind, word in enumerate(_KINDS):
        bits = known.get(f"{word}_features", 0)
        for bit in range(64):
            if bits >> bit & 1:
                name = names.get((kind, bit)) or own_names.get((kind, bit), "")
                found.features.append(Feature(word, bit, name, (kind, bit) in names))
                if kind == 0 and (kind, bit) not in names:
                    found.problems.append(f"incompatible feature {bit} is not known: the image cannot be read")
    _read_backing(head[:cluster], known, found)
    # In this order: a version 2 image has 16 bits a refcount whatever lies where version 3 tells it.
    order = known.get("refcount_order", 4)
    if order <= 6:
        found.end = _end(file, known, cluster, order)
    return found


def _number(facts: Sequence[Fact], name: str) -> int:
    """A field's value; 0 when the file ends before it."""
    return next((fact.value for fact in facts if fact.name == name and isinstance(fact.value, int)), 0)


def _judged(fact: Fact, known: dict[str, int], cluster: int, size: int) -> Fact:
    """The fact with what other fields say of it."""
    value, problem = known[fact.name], fact.problem
    users = {
        "l1_table_offset": known["l1_size"] * 8,
        "refcount_table_offset": known["refcount_table_clusters"] * cluster,
        "snapshots_offset": known["nb_snapshots"] * 40,
    }
    if problem is None and users.get(fact.name):
        if value % cluster:
            problem = "not aligned to a cluster"
        elif value == 0:
            problem = "the header itself lies there"
        elif value + users[fact.name] > size:
            problem = f"what lies there ends beyond the file's end, {size}"
    if problem is None and fact.name == "refcount_table_clusters" and value * cluster > MAX_REFTABLE_BYTES:
        problem = f"at most {MAX_REFTABLE_BYTES // cluster} are accepted"
    if fact.name == "header_length" and not fields.V3_LENGTH <= value <= cluster:
        problem = f"must be {fields.V3_LENGTH} to the size of a cluster"
    if fact.name == "backing_file_offset" and value > cluster:
        problem = "not in the first cluster"
    return fact._replace(problem=problem)


def _read_extensions(head: bytes, start: int, end: int, found: Inspection) -> dict[tuple[int, int], str]:
    """Tells of the extensions; returns the feature names the image has itself."""
    names: dict[tuple[int, int], str] = {}
    at, end = start, min(len(head), end or len(head))
    while at + 8 <= end and len(found.facts) < MAX_ROWS:
        kind, length = struct.unpack_from(">II", head, at)
        if kind == fields.EXT_END:
            return names
        name = _EXTENSIONS.get(kind, f"unknown extension {kind:#010x}")
        if length > end - at - 8:
            why = "reaches beyond the area for extensions"
            found.facts.append(Fact(f"length of {name}", length, at + 4, why))
            return names
        data = head[at + 8 : at + 8 + length]
        found.facts.append(Fact("header extension", name, at))
        if kind == fields.EXT_BITMAPS and length >= 4:
            (found.bitmaps,) = struct.unpack_from(">I", data)
        elif kind == fields.EXT_DATA_FILE:
            found.references.append(Reference("data file", os.fsdecode(data[:MAX_BACKING_NAME]), None, at + 8))
        elif kind == fields.EXT_BACKING_FORMAT:
            found.facts.append(Fact("backing_format", os.fsdecode(data[:MAX_BACKING_NAME]), at + 8))
        elif kind == fields.EXT_FEATURE_NAMES:
            for row in range(0, min(length, 48 * MAX_ROWS) - 47, 48):
                text = data[row + 2 : row + 48].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
                names[data[row], data[row + 1]] = text
        at += 8 + (length + 7 & ~7)
    return names


def _read_backing(head: bytes, known: dict[str, int], found: Inspection) -> None:
    at, length = known["backing_file_offset"], known["backing_file_size"]
    if not at:
        return
    raw = head[at : at + min(length, MAX_BACKING_NAME)]
    if len(raw) < length:
        found.problems.append(f"the backing file name of {length} bytes at offset {at:#x} is not within its cluster")
    if b"\0" in raw:
        found.problems.append("the backing file name contains NUL")
    format = next((str(fact.value) for fact in found.facts if fact.name == "backing_format"), None)
    found.references.append(Reference("backing file", os.fsdecode(raw), format, at))


def _end(file: Node, known: dict[str, int], cluster: int, order: int) -> int | None:
    """Where the last cluster in use ends, by the refcounts; None when these do not tell."""
    place, length = known["refcount_table_offset"], known["refcount_table_clusters"] * cluster
    if known.get("incompatible_features", 0) & fields.DIRTY or length > MAX_REFTABLE_BYTES or place >= 1 << 63:
        return None
    # From the back, and by bytes: what is not in use is zeros, and nothing is as quick as rstrip at those.
    table = pread_up_to(file, place, length).rstrip(b"\0")
    table += bytes(-len(table) % 8)
    per_block = cluster * 8 >> order
    for index in range(len(table) // 8 - 1, max(-1, len(table) // 8 - 1 - _BLOCKS_TRIED), -1):
        (entry,) = struct.unpack_from(">Q", table, index * 8)
        entry &= REFTABLE_OFFSET_MASK
        if not entry or entry >= file.size:
            continue
        block = pread_up_to(file, entry, cluster).rstrip(b"\0")
        if not block:
            continue
        if order >= 3:
            last = (len(block) - 1) * 8 >> order
        else:
            last = ((len(block) - 1 << 3) + block[-1].bit_length() - 1) >> order
        return (index * per_block + last + 1) * cluster
    return None

"""vhdx: the parent locator: by which names and which identity a differencing image knows its parent. MS-VHDX 2.6.2.6.

A parent is the one an image was made over as long as its DataWriteGuid is ``parent_linkage``, or ``parent_linkage2``:
that one is written before a parent gets a new one because its children's data is merged into it.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Mapping
from typing import Final

from diskwright.core.gate import has_prefix
from diskwright.errors import CorruptImage, OptionError, UnsupportedFeature
from diskwright.formats.vhdx.header import guid_text

VHDX_TYPE: Final = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913").bytes_le
_HEAD: Final = struct.Struct("<16sHH")
_ENTRY: Final = struct.Struct("<IIHH")
_MOST_KEYS: Final = 256
"""Pairs of a locator at most; the specification names five."""

LINKAGE, LINKAGE2 = "parent_linkage", "parent_linkage2"
RELATIVE, VOLUME, ABSOLUTE = "relative_path", "volume_path", "absolute_win32_path"


def decode(path: str, data: bytes) -> dict[str, str]:
    """The pairs of a locator. Raises CorruptImage, UnsupportedFeature."""
    if len(data) < _HEAD.size:
        raise CorruptImage(path, "length of Parent Locator", len(data), None, f"at least {_HEAD.size}")
    kind, _, count = _HEAD.unpack_from(data)
    if kind != VHDX_TYPE:
        raise UnsupportedFeature(f"{path}: has a parent of the type {guid_text(kind)}, which is not known")
    if count > _MOST_KEYS or _HEAD.size + count * _ENTRY.size > len(data):
        raise CorruptImage(path, "KeyValueCount", count, None, "the locator has no room for so many")
    pairs: dict[str, str] = {}
    for number in range(count):
        key_at, value_at, key_length, value_length = _ENTRY.unpack_from(data, _HEAD.size + number * _ENTRY.size)
        key = _text(path, data, key_at, key_length)
        if key in pairs:
            raise CorruptImage(path, "Parent Locator", "damaged", None, f"{key} is there twice")
        pairs[key] = _text(path, data, value_at, value_length)
    for name in (LINKAGE, LINKAGE2):
        if name in pairs:
            _guid(path, name, pairs[name])
    if LINKAGE not in pairs:
        raise CorruptImage(path, "Parent Locator", "damaged", None, f"{LINKAGE} is missing")
    return pairs


def _text(path: str, data: bytes, at: int, length: int) -> str:
    raw = data[at : at + length]
    if not at or not length or length % 2 or len(raw) < length:
        raise CorruptImage(path, "Parent Locator", "damaged", None, f"no text of {length} bytes can lie at {at:#x}")
    return raw.decode("utf-16-le", "surrogatepass")


def _guid(path: str, name: str, text: str) -> bytes:
    try:
        return uuid.UUID(text.strip("{}")).bytes_le
    except ValueError:
        raise CorruptImage(path, name, repr(text[:80]), None, "it should be a GUID in braces") from None


def encode(pairs: Mapping[str, str]) -> bytes:
    """The locator with these pairs."""
    table, body = b"", b""
    start = _HEAD.size + len(pairs) * _ENTRY.size
    for key, value in pairs.items():
        raw_key, raw_value = (text.encode("utf-16-le", "surrogatepass") for text in (key, value))
        at = start + len(body)
        table += _ENTRY.pack(at, at + len(raw_key), len(raw_key), len(raw_value))
        body += raw_key + raw_value
    return _HEAD.pack(VHDX_TYPE, 0, len(pairs)) + table + body


def links(pairs: Mapping[str, str]) -> set[bytes]:
    """Which identities the parent may have."""
    return {uuid.UUID(pairs[name].strip("{}")).bytes_le for name in (LINKAGE, LINKAGE2) if name in pairs}


def braced(guid: bytes) -> str:
    return f"{{{guid_text(guid)}}}"


def file_name(pairs: Mapping[str, str]) -> str | None:
    """The parent's name as it is looked for here: relative to the image; None when the locator has no name at all.

    Volumes and drive letters mean nothing here, so of an absolute path only its last part is used: the parent is looked
    for beside the image. That it is the right one, its identity has to show.
    """
    relative = pairs.get(RELATIVE)
    if relative:
        return "/".join(relative.split("\\")).removeprefix("./")
    for name in (VOLUME, ABSOLUTE):
        last = pairs.get(name, "").rpartition("\\")[2]
        if last:
            return f"./{last}" if has_prefix(last) else last
    return None


def pairs_for(image: str, parent: str, guid: bytes) -> dict[str, str]:
    """The pairs by which the image in the file ``image`` finds ``parent``, as seen from where it is itself. Raises
    OptionError for a name that cannot be written so."""
    if has_prefix(parent):
        raise OptionError(f"'{parent}' cannot be the parent of a VHDX image: it must be a file")
    folder = "" if has_prefix(image) else os.path.dirname(image)
    base = os.path.realpath(folder or ".")
    name = os.path.relpath(os.path.join(base, parent), base)
    if "\\" in name:
        raise OptionError(f"'{parent}' cannot be written as the name of a parent: it has a backslash")
    relative = "\\".join(name.split("/"))
    if not relative.startswith("..\\"):
        relative = f".\\{relative}"
    return {LINKAGE: braced(guid), RELATIVE: relative}

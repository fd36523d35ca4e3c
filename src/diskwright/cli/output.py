"""How results are printed: JSON as qemu-img lays it out, and facts of a format as indented text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def json_text(value: object, indent: int = 0) -> str:
    """``value`` as JSON, four spaces a level, keys in the mapping's own order, pure ASCII.

    Takes what information about an image consists of: mappings, sequences, strings, ints, bools and None.
    """
    inner = "\n" + "    " * (indent + 1)
    outer = "\n" + "    " * indent
    if isinstance(value, Mapping):
        rows = [f"{_quote(str(key))}: {json_text(item, indent + 1)}" for key, item in value.items()]
        return "{" + inner + ("," + inner).join(rows) + outer + "}" if rows else "{" + outer + "}"
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Sequence):
        rows = [json_text(item, indent + 1) for item in value]
        return "[" + inner + ("," + inner).join(rows) + outer + "]" if rows else "[" + outer + "]"
    raise TypeError(f"{type(value).__name__} has no place in JSON output")


def _quote(text: str) -> str:
    return '"' + "".join(map(_escape, text)) + '"'


def _escape(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    code = ord(character)
    if 0x20 <= code < 0x7F:
        return character
    if 0xD800 <= code < 0xE000:
        return "\\uFFFD"  # a byte of a file name that is not UTF-8
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
    return f"\\u{code:04X}"


def indented(value: object, level: int) -> list[str]:
    """Nested facts as lines: ``key: value``, lists with ``[0]:`` for keys, four spaces a level."""
    if isinstance(value, Mapping):
        pairs = [(str(key).replace("-", " "), item) for key, item in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        pairs = [(f"[{index}]", item) for index, item in enumerate(value)]
    else:
        raise TypeError(f"{type(value).__name__} is not made of named facts")
    lines: list[str] = []
    for key, item in pairs:
        if isinstance(item, str) or not isinstance(item, (Mapping, Sequence)):
            lines.append(f"{'    ' * level}{key}: {_plain(item)}")
        else:
            lines.append(f"{'    ' * level}{key}:")
            lines.extend(indented(item, level + 1))
    return lines


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def escaped(text: str) -> str:
    """``text`` as one line without anything a terminal would act on: what cannot be printed, and what changes the
    direction of writing, becomes ``\\xNN``, ``\\uNNNN`` or ``\\UNNNNNNNN``; a backslash is doubled."""
    if text.isascii() and text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_harmless, text))


def _harmless(character: str) -> str:
    code = ord(character)
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

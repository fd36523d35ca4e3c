"""Gates: whether a file name found inside an image may be opened.

An image names other files: its backing file, data files, extents. Whoever wrote the image chose those
names, and that need not be somebody the user trusts. So every such name goes through a ``Gate``.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod

from diskwright.errors import UnsafeReference


class Gate(ABC):
    """Decides about references. Names given by the user directly never come here."""

    @abstractmethod
    def admit(self, reference: str, *, named_by: str, role: str) -> None:
        """Returns when ``reference`` (resolved, as it would be opened), which the image ``named_by`` names
        as its ``role``, may be opened. Raises UnsafeReference when not."""


class OpenGate(Gate):
    """Admits every name, as the classic tools do: for images whose makers are trusted."""

    def admit(self, reference: str, *, named_by: str, role: str) -> None:
        return


class ClosedGate(Gate):
    """Admits none: an image has to stand on its own, or the user names its parts."""

    def admit(self, reference: str, *, named_by: str, role: str) -> None:
        raise UnsafeReference(
            f"{named_by}: names '{reference}' as its {role}, and references are not followed here; "
            f"name the {role} yourself if it is to be used"
        )


class DirectoryGate(Gate):
    """Admits regular local files in the directory of the image that names them, or in ``roots``.

    Symbolic links are resolved first, so a link does not lead out. Directories below are included.
    """

    def __init__(self, *roots: str) -> None:
        self._roots = tuple(os.path.realpath(root) for root in roots)

    def admit(self, reference: str, *, named_by: str, role: str) -> None:
        target = os.path.realpath(reference)
        roots = (os.path.realpath(os.path.dirname(named_by) or "."), *self._roots)
        inside = any(os.path.commonpath((root, target)) == root for root in roots)
        if not inside or has_prefix(reference) or (os.path.exists(target) and not os.path.isfile(target)):
            raise UnsafeReference(
                f"{named_by}: names '{reference}' as its {role}, which is not a file in the image's own directory; "
                f"allow its directory, or name the {role} yourself"
            )


def has_prefix(filename: str) -> bool:
    """Whether ``filename`` begins with ``word:``, which names a driver, rather than being a path."""
    colon, slash = filename.find(":"), filename.find("/")
    return colon > 0 and not 0 <= slash < colon


def resolve(reference: str, base: str) -> str:
    """``reference`` as seen from the image ``base``: absolute paths and prefixed names stay as they are,
    others are relative to the directory of ``base``."""
    if not reference or os.path.isabs(reference) or has_prefix(reference):
        return reference
    if has_prefix(base):
        prefix, _, rest = base.partition(":")
        if prefix not in ("file", "host_device"):
            return f"{base[: base.rfind('/') + 1]}{reference}" if "/" in base else reference
        base = rest
    return os.path.join(os.path.dirname(base), reference)

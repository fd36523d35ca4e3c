"""The exceptions Diskwright raises, and the one table that maps them outwards.

Every error a caller may want to tell apart has a class here. ``OSError`` is not wrapped: what the
kernel refused passes through with its errno.
"""

from __future__ import annotations

import errno


class DiskwrightError(Exception):
    """Base of every error this package raises itself. ``str()`` is one line fit for a user."""


class ImageError(DiskwrightError):
    """Something is wrong with an image, or with what was asked of it."""


class CorruptImage(ImageError):
    """An image contradicts its specification.

    ``path`` is the image's name, ``field`` the specification's name for the damaged item, ``value``
    what was found, and ``offset`` its place in the file in bytes (None when it has no single place).
    """

    def __init__(self, path: str, field: str, value: object, offset: int | None = None, why: str = "") -> None:
        self.path, self.field, self.value, self.offset, self.why = path, field, value, offset, why
        where = "" if offset is None else f" at offset {offset:#x}"
        reason = f": {why}" if why else ""
        super().__init__(f"{path}: {field} is {value}{where}{reason}")


class UnsupportedFeature(ImageError):
    """The image is well formed but needs something this version, or this build, does not have."""


class UnsafeReference(ImageError):
    """A gate refused a file name that was found inside an image."""


class LimitExceeded(ImageError):
    """A stated limit (see ``units``) would be exceeded; the message names the limit and the value."""


class ImageLocked(ImageError):
    """Another process holds the image in a way that conflicts with this use."""


class SnapshotNotFound(ImageError):
    """The image has no internal snapshot of that id or name."""


class GraphError(DiskwrightError):
    """A wrong or conflicting use of nodes, options or permissions."""


class OptionError(GraphError):
    """An option is unknown, missing, or has a value outside its type."""


class OutOfRange(OptionError):
    """A number is larger than what asks for it can take."""


class FatalError(DiskwrightError):
    """A program that meets this has to end: a check has failed that it was told to rely upon. ``str()`` is the whole
    line to show."""


class JobError(DiskwrightError):
    """A job failed or was asked for something its state does not allow; the cause is chained."""


class ProtocolError(DiskwrightError):
    """A peer broke its protocol, or refused what we asked."""


def errno_of(error: BaseException) -> int:
    """The errno that best tells a block-device user what happened."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    for kind, number in _ERRNO:
        if isinstance(error, kind):
            return number
    return errno.EIO


def message_of(error: BaseException) -> str:
    """One line for a person: our own text, or the kernel's with the file it speaks of."""
    if isinstance(error, OSError) and error.errno is not None:
        text = error.strerror or errno.errorcode.get(error.errno, str(error.errno))
        return f"{error.filename}: {text}" if error.filename is not None else text
    return " ".join(str(error).split()) or type(error).__name__


# The order matters: the first class that fits decides.
_ERRNO: tuple[tuple[type[BaseException], int], ...] = (
    (ImageLocked, errno.EBUSY),
    (SnapshotNotFound, errno.ENOENT),
    (UnsafeReference, errno.EACCES),
    (UnsupportedFeature, errno.ENOTSUP),
    (LimitExceeded, errno.EINVAL),
    (GraphError, errno.EINVAL),
    (ProtocolError, errno.EPROTO),
    (MemoryError, errno.ENOMEM),
    (ValueError, errno.EINVAL),
)

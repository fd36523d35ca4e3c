"""``diskwright snapshot``: list, make, apply and delete an image's internal snapshots."""

from __future__ import annotations

import argparse
import errno
import os
import time
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import Failure, UsageError
from diskwright.errors import DiskwrightError, SnapshotNotFound, message_of
from diskwright.units import human_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskwright.core.node import Node
    from diskwright.core.snapshots import SnapshotInfo

SUMMARY: Final = "list, make, apply or delete internal snapshots"

_HEADING: Final = "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser)
    group = parser.add_argument_group("what to do (one of)")
    group.add_argument("-l", dest="list", action="append_const", const="", help="list all snapshots")
    group.add_argument("-c", dest="create", action="append", metavar="NAME", help="keep the disk's present state")
    group.add_argument(
        "-a", dest="apply", action="append", metavar="SNAPSHOT", help="go back to a snapshot, given by id or name"
    )
    group.add_argument("-d", dest="delete", action="append", metavar="NAME", help="delete a snapshot")
    parser.add_argument("-q", "--quiet", action="store_true", help="accepted; nothing but errors is printed anyway")
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[Node, str], None]] = {
        "list": _list, "create": _create, "apply": _apply, "delete": _delete,
    }  # fmt: skip
    asked = [(action, value) for action in actions for value in getattr(args, action) or ()]
    if len(asked) > 1:
        raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
    filename = common.one_operand(args.filename)
    action, value = asked[0] if asked else ("", "")
    with common.graph_of(args) as graph:
        node = common.open_image(
            graph,
            filename,
            format=args.format,
            image_opts=args.image_opts,
            writable=action != "list",
            force_share=args.force_share,
        )
        if action:
            actions[action](node, value)
    return 0


def _list(node: Node, _: str) -> None:
    from diskwright.core import snapshots

    found = snapshots.list_of(node)
    if found:
        print("\n".join(listing(found)))


def _create(node: Node, name: str) -> None:
    from diskwright.core import snapshots

    try:
        snapshots.create(node, name)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"Could not create snapshot '{name}': {_numbered(error)}") from error


def _apply(node: Node, wanted: str) -> None:
    from diskwright.core import snapshots

    try:
        if snapshots.keeper(node) is None:
            raise Failure(f"Could not apply snapshot '{wanted}': Block driver does not support snapshots")
        snapshots.apply(node, snapshots.find_any(snapshots.list_of(node), wanted).id)
    except (DiskwrightError, OSError) as error:
        reason = os.strerror(errno.ENOENT) if isinstance(error, SnapshotNotFound) else message_of(error)
        raise Failure(f"Could not apply snapshot '{wanted}': Failed to load snapshot: {reason}") from error


def _delete(node: Node, name: str) -> None:
    from diskwright.core import snapshots

    try:
        snapshots.delete(node, snapshots.find(snapshots.list_of(node), name=name).id)
    except (DiskwrightError, OSError) as error:
        reason = "snapshot not found" if isinstance(error, SnapshotNotFound) else message_of(error)
        raise Failure(f"Could not delete snapshot '{name}': {reason}") from error


def _numbered(error: BaseException) -> str:
    """The kernel's errors as qemu-img puts them; our own say more."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"-{error.errno} ({os.strerror(error.errno)})"
    return message_of(error)


def listing(found: Sequence[SnapshotInfo]) -> list[str]:
    """The list of snapshots as qemu-img shows it, with dates in local time."""
    return ["Snapshot list:", _HEADING, *map(_row, found)]


def _row(info: SnapshotInfo) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.date_sec))
    seconds, milli = info.vm_clock_nsec // 10**9, info.vm_clock_nsec // 10**6 % 1000
    clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milli:03d}"
    icount = "" if info.icount is None else str(info.icount)
    start = f"{_padded(info.id, 9)} {_padded(info.name, 16)}"
    return f"{start} {human_size(info.vm_state_size):>8}{date:>20}{clock:>13}{icount:>11}"


def _padded(text: str, width: int) -> str:
    """Columns are counted in bytes, as C does."""
    return text + " " * (width - len(os.fsencode(text)))


def as_json(info: SnapshotInfo) -> dict[str, object]:
    """The order of the keys is that of qemu-img."""
    rows: dict[str, object] = {} if info.icount is None else {"icount": info.icount}
    return {
        **rows,
        "vm-clock-nsec": info.vm_clock_nsec % 10**9,
        "name": info.name,
        "date-sec": info.date_sec,
        "date-nsec": info.date_nsec,
        "vm-clock-sec": info.vm_clock_nsec // 10**9,
        "id": info.id,
        "vm-state-size": info.vm_state_size,
    }

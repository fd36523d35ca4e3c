"""What ``convert --bitmaps`` adds to a copy: the source's persistent dirty bitmaps."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from diskwright.cli.common import Failure
from diskwright.cli.faces import program
from diskwright.errors import DiskwrightError, message_of

if TYPE_CHECKING:
    from diskwright.core.bitmap import DirtyBitmap
    from diskwright.core.node import Node


def check_source(source: Node, *, skip_broken: bool) -> None:
    """Raises Failure, before anything has been made, when the source's bitmaps cannot be copied."""
    from diskwright.core.bitmaps import store_of

    if store_of(source) is None:
        raise Failure("Source lacks bitmap support")
    for bitmap in reversed(_persistent(source)):
        if bitmap.inconsistent and not skip_broken:
            raise Failure(
                f"Cannot copy inconsistent bitmap '{bitmap.name}'\n"
                f"Try --skip-broken-bitmaps, or use '{program()} bitmap --remove' to delete it"
            )


def check_target(target: Node) -> None:
    """Raises Failure when the target cannot keep bitmaps."""
    from diskwright.core.bitmaps import store_of

    if store_of(target) is None:
        raise Failure(f"Format driver '{target.driver_name}' does not support bitmaps")


def copy_bitmaps(source: Node, target: Node, *, skip_broken: bool) -> None:
    """Gives the finished copy the source's bitmaps, as they were. Raises Failure."""
    from diskwright.core import bitmaps

    found = _persistent(source)
    for bitmap in reversed(found):
        if bitmap.inconsistent and skip_broken:
            print(f"{program()}: warning: Skipping inconsistent bitmap '{bitmap.name}'", file=sys.stderr)
    there = {bitmap.name for bitmap in bitmaps.named(target)}
    for bitmap in reversed(found):
        if bitmap.name in there and not bitmap.inconsistent:
            raise Failure(f"Failed to create bitmap {bitmap.name}: Bitmap already exists: {bitmap.name}")
    made = [(bitmap, _make(target, bitmap)) for bitmap in found if not bitmap.inconsistent]
    for bitmap, copy in reversed(made):
        try:
            copy.merge(bitmap)
            copy.enabled = bitmap.enabled
        except (DiskwrightError, OSError) as error:
            for _, each in made:
                bitmaps.remove(target, str(each.name))
            raise Failure(f"Failed to populate bitmap {bitmap.name}: {message_of(error)}") from error


def _make(target: Node, bitmap: DirtyBitmap) -> DirtyBitmap:
    """An empty bitmap for the copy of ``bitmap``."""
    from diskwright.core import bitmaps

    assert bitmap.name is not None
    try:
        return bitmaps.add(target, bitmap.name, bitmap.granularity, persistent=True, enabled=False)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"Failed to create bitmap {bitmap.name}: {message_of(error)}") from error


def _persistent(node: Node) -> list[DirtyBitmap]:
    from diskwright.core.bitmaps import named

    try:
        return [bitmap for bitmap in named(node) if bitmap.persistent]
    except DiskwrightError as error:
        raise Failure(f"Could not read the bitmaps of '{node.filename}': {message_of(error)}") from error

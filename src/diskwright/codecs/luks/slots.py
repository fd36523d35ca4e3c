"""Changing who may open a LUKS image: adding passphrases and erasing them.

The texts are those of qemu-img, which scripts read. Nothing is changed before everything has been checked, and at
every moment at least one slot opens, unless ``force`` asks for the opposite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from diskwright.codecs.luks.area import Area
from diskwright.codecs.luks.kdf import Budget
from diskwright.codecs.luks.luks1 import SLOTS, Luks1
from diskwright.errors import ImageError, OptionError

ITER_TIME: Final = 2000
"""Milliseconds of processor time that trying a passphrase shall cost whoever tries, when nothing else is said."""


@dataclass(frozen=True)
class SlotChange:
    """What is to become of key slots. Secrets are bytes, or None."""

    state: str | None
    """active or inactive; None, when nobody has said, is refused"""
    new_secret: bytes | None = None
    old_secret: bytes | None = None
    keyslot: int | None = None
    iter_time: int | None = None

    def __repr__(self) -> str:
        return f"<SlotChange to {self.state}>"


def change(header: Luks1, area: Area, wanted: SlotChange, unlock: Callable[[], bytes], *, force: bool = False) -> None:
    """Makes the change. ``unlock`` answers the volume key. Raises OptionError or ImageError, with nothing changed."""
    if wanted.state is None:
        raise OptionError("Parameter 'state' is missing")
    if wanted.keyslot is not None and not 0 <= wanted.keyslot < SLOTS:
        raise OptionError(f"Invalid keyslot {wanted.keyslot} specified, must be between 0 and {SLOTS - 1}")
    if wanted.state == "active":
        _activate(header, area, wanted, unlock, force)
    else:
        _erase(header, area, wanted, force)


def _activate(header: Luks1, area: Area, wanted: SlotChange, unlock: Callable[[], bytes], force: bool) -> None:
    if wanted.new_secret is None:
        raise OptionError("'new-secret' is required to activate a keyslot")
    if wanted.old_secret is not None:
        raise OptionError("'old-secret' must not be given when activating keyslots")
    iter_time = ITER_TIME if wanted.iter_time is None else wanted.iter_time
    free = [index for index, slot in enumerate(header.slots) if not slot.in_use]
    target = wanted.keyslot
    if target is None:
        if not free:
            raise ImageError("Can't add a keyslot - all keyslots are in use")
        target = free[0]
    if target in free:
        header.store_key(area, target, unlock(), wanted.new_secret, iter_time)
        return
    if not force:
        raise ImageError(f"Refusing to overwrite active keyslot {target} - please erase it first")
    key = unlock()
    # While the slot is being overwritten nothing opens with what is in it, so the key waits in another.
    spare = free[0] if free else None
    if spare is not None:
        header.store_key(area, spare, key, wanted.new_secret, iter_time)
    header.store_key(area, target, key, wanted.new_secret, iter_time)
    if spare is not None:
        header.erase_slot(area, spare)


def _erase(header: Luks1, area: Area, wanted: SlotChange, force: bool) -> None:
    if wanted.new_secret is not None:
        raise OptionError("'new-secret' must not be given when erasing keyslots")
    if wanted.iter_time is not None:
        raise OptionError("'iter-time' must not be given when erasing keyslots")
    if wanted.keyslot is not None:
        _erase_one(header, area, wanted.keyslot, wanted.old_secret, force)
    elif wanted.old_secret is not None:
        _erase_matching(header, area, wanted.old_secret, force)
    else:
        raise OptionError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them "
            "must be given"
        )


def _erase_one(header: Luks1, area: Area, index: int, old_secret: bytes | None, force: bool) -> None:
    if old_secret is not None and not _opens(header, area, index, old_secret, Budget(area.path)):
        raise ImageError(f"Given keyslot {index} doesn't contain the given old password for erase operation")
    if not header.slots[index].in_use and not force:
        raise ImageError(f"Given keyslot {index} is already erased (inactive) ")
    if _in_use(header) == [index] and not force:
        raise ImageError(
            f"Attempt to erase the only active keyslot {index} which will erase all the data in the image irreversibly "
            "- refusing operation"
        )
    header.erase_slot(area, index)


def _erase_matching(header: Luks1, area: Area, old_secret: bytes, force: bool) -> None:
    budget = Budget(area.path)
    matching = [index for index in _in_use(header) if _opens(header, area, index, old_secret, budget)]
    if not matching:
        raise ImageError("No keyslots match given (old) password for erase operation")
    if matching == _in_use(header) and not force:
        raise ImageError(
            "All the active keyslots match the (old) password that was given and erasing them will erase all the data "
            "in the image irreversibly - refusing operation"
        )
    for index in matching:
        header.erase_slot(area, index)


def _in_use(header: Luks1) -> list[int]:
    return [index for index, slot in enumerate(header.slots) if slot.in_use]


def _opens(header: Luks1, area: Area, index: int, secret: bytes, budget: Budget) -> bool:
    return header.slots[index].in_use and header.try_slot(area, index, secret, budget) is not None

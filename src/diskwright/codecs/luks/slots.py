"""Changing who may open a LUKS image: adding passphrases and erasing them.

The texts are those of qemu-img, which scripts read. Nothing is changed before everything has been checked, and at
every moment at least one slot opens, unless ``force`` asks for the opposite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from diskwright.codecs.luks.area import Area
from diskwright.codecs.luks.kdf import Budget
from diskwright.errors import ImageError, OptionError

ITER_TIME: Final = 2000
"""Milliseconds of processor time that trying a passphrase shall cost whoever tries, when nothing else is said."""


class KeySlots(Protocol):
    """What this needs of a header of either version. ``Luks1`` says what the methods do."""

    @property
    def slot_count(self) -> int: ...
    def slots_taken(self) -> list[int]: ...
    def slots_that_open(self) -> list[int]: ...
    def try_slot(self, area: Area, index: int, passphrase: bytes, budget: Budget) -> bytes | None: ...
    def store_key(self, area: Area, index: int, key: bytes, passphrase: bytes, iter_time: int) -> None: ...
    def erase_slot(self, area: Area, index: int) -> None: ...


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


def change(
    header: KeySlots, area: Area, wanted: SlotChange, unlock: Callable[[], bytes], *, force: bool = False
) -> None:
    """Makes the change. ``unlock`` answers the volume key. Raises OptionError or ImageError, with nothing changed."""
    if wanted.state is None:
        raise OptionError("Parameter 'state' is missing")
    if wanted.keyslot is not None and not 0 <= wanted.keyslot < header.slot_count:
        raise OptionError(f"Invalid keyslot {wanted.keyslot} specified, must be between 0 and {header.slot_count - 1}")
    if wanted.state == "active":
        _activate(header, area, wanted, unlock, force)
    else:
        _erase(header, area, wanted, force)


def _activate(header: KeySlots, area: Area, wanted: SlotChange, unlock: Callable[[], bytes], force: bool) -> None:
    if wanted.new_secret is None:
        raise OptionError("'new-secret' is required to activate a keyslot")
    if wanted.old_secret is not None:
        raise OptionError("'old-secret' must not be given when activating keyslots")
    iter_time = ITER_TIME if wanted.iter_time is None else wanted.iter_time
    taken = header.slots_taken()
    free = [index for index in range(header.slot_count) if index not in taken]
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


def _erase(header: KeySlots, area: Area, wanted: SlotChange, force: bool) -> None:
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


def _erase_one(header: KeySlots, area: Area, index: int, old_secret: bytes | None, force: bool) -> None:
    if old_secret is not None and not _opens(header, area, index, old_secret, Budget(area.path)):
        raise ImageError(f"Given keyslot {index} doesn't contain the given old password for erase operation")
    if index not in header.slots_taken() and not force:
        raise ImageError(f"Given keyslot {index} is already erased (inactive) ")
    if header.slots_that_open() == [index] and not force:
        raise ImageError(
            f"Attempt to erase the only active keyslot {index} which will erase all the data in the image irreversibly "
            "- refusing operation"
        )
    header.erase_slot(area, index)


def _erase_matching(header: KeySlots, area: Area, old_secret: bytes, force: bool) -> None:
    budget = Budget(area.path)
    matching = [index for index in header.slots_taken() if _opens(header, area, index, old_secret, budget)]
    if not matching:
        raise ImageError("No keyslots match given (old) password for erase operation")
    if not set(header.slots_that_open()) - set(matching) and not force:
        raise ImageError(
            "All the active keyslots match the (old) password that was given and erasing them will erase all the data "
            "in the image irreversibly - refusing operation"
        )
    for index in matching:
        header.erase_slot(area, index)


def _opens(header: KeySlots, area: Area, index: int, secret: bytes, budget: Budget) -> bool:
    return index in header.slots_taken() and header.try_slot(area, index, secret, budget) is not None

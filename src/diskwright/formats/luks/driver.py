"""luks: the driver. A straight line behind a header; the node does the encryption with the cipher found there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.cipher_options import PBKDFS
from diskwright.core.ciphered import Locked
from diskwright.core.driver import (
    CheckReport,
    Format,
    Info,
    MeasuredSource,
    Measurement,
    OpenContext,
    Progress,
    not_supported,
)
from diskwright.core.node import Node
from diskwright.core.secrets import Secret, Secrets, bind
from diskwright.errors import CorruptImage, LimitExceeded, OptionError
from diskwright.extents import DATA, Extent, Extents
from diskwright.formats.luks.options import LuksAmendOptions, LuksCreateOptions, LuksOptions
from diskwright.units import MAX_DISK_SIZE, SECTOR, align_down, align_up

if TYPE_CHECKING:
    from diskwright.codecs.luks import Area, Luks1, Luks2
    from diskwright.core.inspection import Inspection

MAGIC: Final = b"LUKS\xba\xbe"
# What works on LUKS headers is imported where it is needed: every probe of an image loads this module.


class Luks(Format):
    """A LUKS volume, version 1 or 2.

    The header may lie in a file of its own, the child ``header``; then ``file`` holds the payload.
    """

    name = "luks"
    options = LuksOptions
    create_options = LuksCreateOptions
    amend_options = LuksAmendOptions
    roles = ("header",)
    suffixes = (".luks",)
    cluster_size = 1

    def __init__(
        self, file: Node, header_file: Node | None, header: Luks1 | Luks2, key: Secret | None, secrets: Secrets
    ) -> None:
        self.children = (file,) if header_file is None else (file, header_file)
        self.header, self._key, self._secrets = header, key, secrets
        self.area = _area(header_file or file)
        self._start = header.payload_start
        self._sector = header.sector_size if header.version == 2 else SECTOR
        self._fixed_size = header.payload_size if header.version == 2 else None

    # -- opening ---------------------------------------------------------------------------------

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        # Version 2 too: to read one as raw would be worse than to ask for its key.
        return 100 if head[:6] == MAGIC and head[6:8] in (b"\0\1", b"\0\2") else 0

    @classmethod
    def inspect(cls, file: Node) -> Inspection:
        from diskwright.formats.luks.inspect import inspect

        return inspect(file)

    @classmethod
    def open(cls, context: OpenContext, options: LuksOptions) -> Luks:
        from diskwright.codecs.luks import read_header

        file = context.file
        header_file = context.open_reference("header", "", "file") if "header" in context.given else None
        header = read_header(_area(header_file or file))
        image = cls(file, header_file, header, options.key_secret, context.secrets)
        image._check_payload()
        image.cipher = header.cipher(image._unlock()) if context.guest_data else Locked(file.filename)
        return image

    def _check_payload(self) -> None:
        """That the payload begins, and ends, in the file."""
        path, available = self.children[0].filename, self.children[0].size
        if self._start > available:
            raise CorruptImage(path, "payload offset", self._start, 104, f"is beyond the file's end at {available}")
        if len(self.children) == 1 and self._start < SECTOR:
            raise CorruptImage(
                path, "payload offset", self._start, 104, "the payload would begin within the header; is it detached?"
            )
        if self._fixed_size is not None and self._start + self._fixed_size > available:
            raise CorruptImage(path, "LUKS2 segments size", self._fixed_size, None, f"the file ends at {available}")

    def _unlock(self) -> bytes:
        if self._key is None:
            raise OptionError("Parameter 'key-secret' is required for cipher")
        return self.header.unlock(self.area, self._key.reveal())

    # -- the map ---------------------------------------------------------------------------------

    @property
    def size(self) -> int:  # type: ignore[override]
        if self._fixed_size is not None:
            return self._fixed_size
        return align_down(self.children[0].size - self._start, self._sector)

    def extent_at(self, offset: int, length: int) -> Extent:
        return Extent(offset, length, DATA, offset + self._start)

    def extents(self, offset: int, length: int) -> Extents:
        return Extents.of([self.extent_at(offset, length)])

    def in_place(self, offset: int, length: int) -> int:
        return offset + self._start

    # -- the whole -------------------------------------------------------------------------------

    @classmethod
    def create(cls, file: Node, options: LuksCreateOptions) -> None:
        """See ``Format.create``. What nobody has written yet reads as noise: it is zeros, decrypted."""
        if options.key_secret is None:
            raise OptionError("Parameter 'key-secret' is required for cipher")
        if options.iter_time < 1:
            raise OptionError("iter-time must be larger than zero")
        passphrase = options.key_secret.reveal()
        header, start, unit = _planned(options)
        size = align_up(options.size, unit)
        if size > MAX_DISK_SIZE - start:
            raise LimitExceeded(f"The image size is too large: with its header it would exceed {MAX_DISK_SIZE} bytes")
        length = start if options.detached_header else start + size
        file.resize(length, preallocation="off" if options.detached_header else options.preallocation)
        area, detached = _area(file), options.detached_header
        if options.luks_version == "1":
            header.make(area, passphrase, options.iter_time, detached=detached)
            return
        from diskwright.codecs.luks.luks2_write import encryption_of, make

        make(
            encryption_of(header, unit), header.key_bytes, options.hash_alg, area, passphrase,
            pbkdf=options.pbkdf or PBKDFS[0], iter_time=options.iter_time, sector_size=unit, detached=detached,
        )  # fmt: skip

    @classmethod
    def measure(cls, options: LuksCreateOptions, source: MeasuredSource | None) -> Measurement:
        """See ``Format.measure``: the header, and every byte of the disk."""
        if options.key_secret is None:
            raise OptionError("Parameter 'key-secret' is required for cipher")
        options.key_secret.reveal()
        _, start, unit = _planned(options)
        # qemu-img, whose figures these are for version 1, does not round up to whole sectors.
        size = options.size if options.luks_version == "1" else align_up(options.size, unit)
        length = start + (0 if options.detached_header else size)
        return Measurement(length, length)

    def resize(self, size: int, *, preallocation: str = "off", conceal: Callable[[], None] | None = None) -> None:
        """See ``Format.resize``, but new bytes read as noise: nothing on disk says that they are new."""
        if self._fixed_size is not None:
            raise not_supported("A LUKS2 image whose segment has a fixed size cannot be resized")
        if size % self._sector:
            raise OptionError(f"The new size must be a multiple of {self._sector} bytes")
        self.children[0].resize(self._start + size, preallocation=preallocation)

    def amend(
        self,
        options: LuksAmendOptions,
        *,
        resize: Callable[[int], None],
        force: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Adds or erases passphrases; see ``codecs.luks.slots``."""
        from diskwright.codecs.luks.slots import KeySlots, SlotChange, change

        wanted = bind(options, self._secrets)
        slots: KeySlots
        if self.header.version == 1:
            slots = self.header
        else:
            from diskwright.codecs.luks.luks2_write import Luks2Slots

            slots = Luks2Slots(self.header)
        new, old = _reveal(wanted.new_secret), _reveal(wanted.old_secret)
        asked = SlotChange(wanted.state, new, old, wanted.keyslot, wanted.iter_time)
        change(slots, self.area, asked, self._unlock, force=force)

    def check(self, repair: str) -> CheckReport:
        """See ``Format.check``: whether both copies of a LUKS2 header are whole and the same."""
        header = self.header
        if header.version == 1:
            raise not_supported("This image format does not support checks")
        report = CheckReport(corruptions=len(header.lost))
        for message in header.lost:
            report.say(message)
        if header.lost and repair == "all":
            from diskwright.codecs.luks.luks2_write import publish

            publish(header, self.area, header.data)
            report.corruptions_fixed, report.corruptions = report.corruptions, 0
        return report

    def info(self) -> Info:
        from diskwright.codecs.luks.facts import facts

        return Info(encrypted=True, specific=facts(self.header))

    def zero_init(self) -> bool:
        return False


def _planned(options: LuksCreateOptions) -> tuple[Luks1, int, int]:
    """The header of a new image (of version 2: one with the same cipher), where the payload begins, and the length of
    its sectors. Raises UnsupportedFeature, OptionError."""
    from diskwright.codecs.luks import Luks1

    header = Luks1.plan(
        options.cipher_alg, options.cipher_mode, options.ivgen_alg, options.ivgen_hash_alg, options.hash_alg
    )
    unit = SECTOR if options.sector_size is None else options.sector_size
    if options.luks_version == "1":
        if options.pbkdf not in (None, "pbkdf2") or unit != SECTOR:
            raise OptionError("LUKS version 1 has sectors of 512 bytes, and pbkdf2; luks-version=2 has others")
        return header, header.payload_start, unit
    from diskwright.codecs.luks.luks2_write import PAYLOAD, encryption_of

    if unit not in (512, 1024, 2048, 4096):
        raise OptionError(f"sector-size is {unit}; it must be 512, 1024, 2048 or 4096")
    encryption_of(header, unit)
    return header, PAYLOAD, unit


def _area(file: Node) -> Area:
    from diskwright.codecs.luks import Area

    return Area(file, file.filename, file.size)


def _reveal(secret: Secret | None) -> bytes | None:
    return None if secret is None else secret.reveal()


DRIVERS: tuple[Any, ...] = (Luks,)

"""Encrypted images: LUKS (crypt_method 2), and the old AES method (1), which is kept for reading old images.

LUKS: a header extension says in which clusters a LUKS header with its key slots lies (specification: section Full
disk encryption header pointer); a sector's vector comes from its place in the file. AES: the key is the password
itself, and vectors come from guest offsets. Either way 512 bytes are a sector, and compressed clusters are not
encrypted.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from diskwright.core import options as opts
from diskwright.core.cipher_options import SlotOptions
from diskwright.core.secrets import Secret, Secrets, bind
from diskwright.errors import CorruptImage, ImageError, LimitExceeded, OptionError
from diskwright.formats.qcow2.header import EXT_ENCRYPTION, Header
from diskwright.units import MiB

if TYPE_CHECKING:
    from diskwright.codecs.luks import Luks1
    from diskwright.core.ciphered import Cipher
    from diskwright.core.node import Node
    from diskwright.extents import Extent
    from diskwright.formats.qcow2.driver import Qcow2
    from diskwright.formats.qcow2.options import Qcow2CreateOptions, Qcow2Options
    from diskwright.formats.qcow2.writing import Writer

SECTOR: Final = 512
AES: Final = 1
LUKS: Final = 2
NAMES: Final = {AES: "aes", LUKS: "luks"}

MAX_LUKS_HEADER: Final = 64 * MiB
"""Longest LUKS header accepted, key slots included; those of known programs have 2 MiB."""

_POINTER: Final = struct.Struct(">QQ")


# -- opening -------------------------------------------------------------------------------------------


class Encryption:
    """How one open image is encrypted."""

    def __init__(self, file: Node, header: Header, options: Qcow2Options, secrets: Secrets) -> None:
        """Raises CorruptImage, LimitExceeded, UnsupportedFeature; OptionError when the user expects another method."""
        self.method, self._path, self._secrets = header.crypt_method, file.filename, secrets
        self._key: Secret | None = options.encrypt_key_secret
        name, expected = NAMES[header.crypt_method], options.encrypt_format
        if expected not in (None, name):
            raise OptionError(f"Header reported '{name}' encryption format but options specify '{expected}'")
        self.luks: Luks1 | None = None
        if self.method == LUKS:
            from diskwright.codecs.luks import Area, Luks1

            offset, length = pointer(file.filename, header)
            if offset + length > file.size:
                raise CorruptImage(self._path, "LUKS header offset", offset, None, "it ends beyond the file's end")
            self._area = Area(file, file.filename, length, offset)
            self.luks = Luks1.read(self._area)

    @property
    def by_place(self) -> bool:
        return self.method == LUKS

    def _passphrase(self) -> bytes:
        if self._key is None:
            raise OptionError("Parameter 'encrypt.key-secret' is required for cipher")
        return self._key.reveal()

    def _volume_key(self) -> bytes:
        assert self.luks is not None
        return self.luks.unlock(self._area, self._passphrase())

    def cipher(self) -> Cipher:
        """Raises OptionError without a secret, ImageError with a wrong one. With AES no one can tell."""
        if self.luks is not None:
            return self.luks.cipher(self._volume_key())
        from diskwright.codecs.sector_ciphers import sector_cipher

        return sector_cipher("aes", "cbc", "plain64", "", _aes_key(self._passphrase()))

    def info(self) -> dict[str, object]:
        if self.luks is None:
            return {"format": "aes"}
        from diskwright.codecs.luks.facts import facts

        return facts(self.luks, within="luks")

    def amend(self, options: Mapping[str, object], *, force: bool) -> None:
        """Adds or erases passphrases by the ``encrypt.`` options; see ``codecs.luks.slots``."""
        from diskwright.codecs.luks.slots import SlotChange, change

        if self.luks is None:
            raise OptionError("Only LUKS encryption options can be amended")
        named = {name.removeprefix("encrypt."): value for name, value in options.items()}
        wanted = bind(opts.parse(SlotOptions, named, owner="qcow2"), self._secrets)
        new, old = wanted.new_secret, wanted.old_secret
        slots = SlotChange(
            wanted.state,
            None if new is None else new.reveal(),
            None if old is None else old.reveal(),
            wanted.keyslot,
            wanted.iter_time,
        )
        change(self.luks, self._area, slots, self._volume_key, force=force)


def amend_encryption(image: Qcow2, options: Mapping[str, object], *, force: bool) -> None:
    """The part of ``Format.amend`` that options beginning with ``encrypt.`` ask for."""
    if image.writer is None:
        raise ImageError(f"{image.children[0].filename}: is open read-only")
    if image.encryption is None:
        raise OptionError("Can't amend encryption options - encryption not present")
    image.encryption.amend(options, force=force)


def open_encryption(image: Qcow2, options: Qcow2Options, secrets: Secrets, *, io: bool) -> None:
    """Finds out how the image is encrypted, if it is, and with ``io`` unlocks it."""
    header, path = image.header, image.children[0].filename
    if header.crypt_method:
        image.encryption = Encryption(image.children[0], header, options, secrets)
        image.cipher_by_place = image.encryption.by_place
        if header.size % SECTOR and image.writable:
            raise CorruptImage(path, "size", header.size, 24, "an encrypted disk has whole sectors")
        if io:
            image.cipher = image.encryption.cipher()
        else:
            from diskwright.core.ciphered import Locked

            image.cipher = Locked(path)
    elif options.encrypt_format is not None:
        raise OptionError(f"No encryption in image header, but options specified format '{options.encrypt_format}'")


def pointer(path: str, header: Header) -> tuple[int, int]:
    """``(offset, length)`` of the LUKS header, in bytes. Raises CorruptImage or LimitExceeded."""
    data = header.extension(EXT_ENCRYPTION)
    if data is None or len(data) != _POINTER.size:
        what = "missing" if data is None else f"{len(data)} bytes long"
        raise CorruptImage(path, "encryption header extension", what, None, f"must have {_POINTER.size} bytes")
    offset, length = _POINTER.unpack(data)
    if not offset or offset % (1 << header.cluster_bits) or offset >= 1 << 56:
        raise CorruptImage(path, "LUKS header offset", offset, None, "is not the beginning of a cluster")
    if length > MAX_LUKS_HEADER:
        raise LimitExceeded(f"{path}: its LUKS header has {length} bytes; at most {MAX_LUKS_HEADER} are accepted")
    return offset, length


def region(header: Header) -> tuple[int, int] | None:
    """``(offset, length)`` of what a LUKS header takes, for those who count clusters; None when there is none."""
    data = header.extension(EXT_ENCRYPTION)
    if header.crypt_method != LUKS or data is None or len(data) != _POINTER.size:
        return None
    offset, length = _POINTER.unpack(data)
    return (offset, length) if offset < 1 << 56 and 0 < length <= MAX_LUKS_HEADER else None


def _aes_key(password: bytes) -> bytes:
    return password[:16].ljust(16, b"\0")


# -- creating ------------------------------------------------------------------------------------------


def plan(options: Qcow2CreateOptions, header: Header) -> Luks1 | None:
    """Enters the encryption that ``options`` ask for into the header of a new image; the LUKS header there is to be.
    Raises OptionError or UnsupportedFeature."""
    method = options.encrypt_format
    if options.encryption:
        if method not in (None, "aes"):
            raise OptionError("Options 'encryption' and 'encrypt.format' are mutually exclusive")
        method = "aes"
    if method is None:
        given = [name for name in ("key_secret", "cipher_alg", "cipher_mode", "ivgen_alg", "ivgen_hash_alg", "hash_alg",
                                   "iter_time") if getattr(options, f"encrypt_{name}") is not None]  # fmt: skip
        if given:
            raise OptionError("Parameter 'encrypt.format' is missing")
        return None
    if method == "aes":
        _check_key(options)
        header.crypt_method = AES
        return None
    if options.encrypt_iter_time is not None and options.encrypt_iter_time < 1:
        raise OptionError("iter-time must be larger than zero")
    luks = planned(options)
    header.crypt_method = LUKS
    # First of all, so that its place is the same whatever else follows; where the LUKS header is comes later.
    header.extensions.insert(0, (EXT_ENCRYPTION, bytes(_POINTER.size)))
    return luks


def _check_key(options: Qcow2CreateOptions) -> None:
    if options.encrypt_key_secret is None:
        raise OptionError("Parameter 'encrypt.key-secret' is required for cipher")
    options.encrypt_key_secret.reveal()


def planned(options: Qcow2CreateOptions) -> Luks1:
    """The LUKS header that a new image will have. Raises OptionError or UnsupportedFeature."""
    from diskwright.codecs.luks import Luks1

    _check_key(options)
    return Luks1.plan(
        options.encrypt_cipher_alg or "aes-256",
        options.encrypt_cipher_mode or "xts",
        options.encrypt_ivgen_alg or "plain64",
        options.encrypt_ivgen_hash_alg,
        options.encrypt_hash_alg or "sha256",
    )


def store(writer: Writer, luks: Luks1, options: Qcow2CreateOptions) -> None:
    """Gives the LUKS header of a new image its clusters, writes it and points the image's header at it."""
    from diskwright.codecs.luks import Area

    assert options.encrypt_key_secret is not None
    cluster_size, length = 1 << writer.header.cluster_bits, luks.payload_start
    clusters = -(-length // cluster_size)
    offset = writer.take_adjoining(clusters) << writer.header.cluster_bits
    writer.file.write_zeros(offset, clusters * cluster_size)
    area = Area(writer.file, writer.file.filename, length, offset)
    luks.make(area, options.encrypt_key_secret.reveal(), options.encrypt_iter_time or 2000)
    writer.checkpoint()
    data = _POINTER.pack(offset, length)
    writer.header.extensions[0] = (EXT_ENCRYPTION, data)
    writer.write_header(writer.header.header_length + 8, data)


# -- for those who move clusters themselves ------------------------------------------------------------


def seal(image: Qcow2, plain: memoryview, guest_offset: int, place: int) -> memoryview:
    """What ``plain`` is stored as at ``place`` of the file: itself, when the image is not encrypted."""
    if image.cipher is None:
        return plain
    sealed = memoryview(bytearray(len(plain)))
    image.cipher.encrypt(plain, sealed, place if image.cipher_by_place else guest_offset)
    return sealed


def unseal(image: Qcow2, stored: memoryview, run: Extent) -> None:
    """Makes guest bytes, where they are, of those stored for the DATA run."""
    if image.cipher is not None:
        image.cipher.decrypt(stored, run.file_offset if image.cipher_by_place else run.offset)

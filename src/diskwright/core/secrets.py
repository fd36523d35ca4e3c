"""Secrets: passphrases and keys that options refer to by an id, as QEMU's ``--object secret`` defines them.

What a driver gets is a ``Secret``: it knows its id and where to ask, and its bytes appear only in what ``reveal``
returns. Nothing else here, no ``repr``, no error and no JSON, ever holds them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from diskwright.core.options import OptionType, describe
from diskwright.errors import OptionError

T = TypeVar("T")

MAX_SECRET: Final = 8 << 20
"""Longest secret in bytes: what cryptsetup takes from a key file at most."""


class Secret:
    """A reference to a secret. ``str()`` and ``repr`` tell its id only."""

    __slots__ = ("_secrets", "id")

    def __init__(self, id: str, secrets: Secrets) -> None:
        self.id, self._secrets = id, secrets

    def reveal(self) -> bytes:
        """The secret itself. Raises OptionError when there is none of that id."""
        return self._secrets.reveal(self.id)

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<Secret {self.id!r}>"

    def __reduce__(self) -> Any:
        raise TypeError("A secret is not written out")


class Secrets:
    """The secrets of one graph, by id."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, bytes | str] | None = None) -> None:
        self._values: dict[str, bytes] = {}
        for id, value in (values or {}).items():
            self.add(id, value.encode() if isinstance(value, str) else bytes(value))

    def __repr__(self) -> str:
        return f"<Secrets {', '.join(self._values) or 'none'}>"

    def __reduce__(self) -> Any:
        raise TypeError("Secrets are not written out")

    def add(self, id: str, value: bytes) -> None:
        """Raises OptionError when the id is taken, or the value longer than ``MAX_SECRET``."""
        if id in self._values:
            raise OptionError(f"attempt to add duplicate property '{id}' to object (type 'container')")
        if len(value) > MAX_SECRET:
            raise OptionError(f"Secret '{id}' is longer than the {MAX_SECRET} bytes accepted")
        self._values[id] = value

    def reveal(self, id: str) -> bytes:
        try:
            return self._values[id]
        except KeyError:
            raise OptionError(f"No secret with id '{id}'") from None

    def add_object(self, options: Mapping[str, str]) -> None:
        """Defines one by the properties of QEMU's object: ``id``, ``data`` or ``file``, ``format`` (raw or base64),
        ``keyid`` and ``iv`` when it is encrypted itself (AES-256-CBC). Raises OptionError or OSError."""
        for name in options:
            if name not in ("id", "data", "file", "format", "keyid", "iv"):
                raise OptionError(f"Parameter '{name}' is unexpected")
        if "id" not in options:
            raise OptionError("Parameter 'id' is missing")
        form = options.get("format", "raw")
        if form not in ("raw", "base64"):
            raise OptionError(f"Parameter 'format' does not accept value '{form}'")
        value = _given(options)
        if form == "base64":
            value = _from_base64(value)
        if "keyid" in options:
            value = self._decrypt(value, options["keyid"], options.get("iv"))
        self.add(options["id"], value)

    def _decrypt(self, value: bytes, keyid: str, iv: str | None) -> bytes:
        key = self.reveal(keyid)
        if len(key) != 32:
            raise OptionError(f"Key should be 32 bytes in length, not {len(key)}")
        if iv is None:
            raise OptionError("IV is required to decrypt secret")
        vector = _from_base64(iv.encode())
        if len(vector) != 16:
            raise OptionError(f"IV should be 16 bytes in length not {len(vector)}")
        if not value or len(value) % 16:
            raise OptionError("The encrypted secret does not consist of whole blocks of 16 bytes")
        from cryptography.hazmat.primitives.ciphers import modes

        from diskwright.codecs.block_ciphers import Blocks

        plain: bytes = Blocks("aes", key).native(modes.CBC(vector)).decryptor().update(value)
        padding = plain[-1]
        if not 1 <= padding <= 16 or plain[-padding:] != bytes([padding]) * padding:
            raise OptionError(f"Incorrect number of padding bytes found on decrypted data; is '{keyid}' its key?")
        return plain[:-padding]


def _given(options: Mapping[str, str]) -> bytes:
    if "data" in options and "file" in options:
        raise OptionError("'file' and 'data' are mutually exclusive")
    if "data" in options:
        return options["data"].encode("utf-8", "surrogateescape")
    if "file" not in options:
        raise OptionError("Either 'file' or 'data' must be provided")
    path = options["file"]
    try:
        with open(path, "rb") as file:
            return file.read(MAX_SECRET + 1)
    except OSError as error:
        raise OptionError(f"Unable to read {path}: {error.strerror}") from None


def _from_base64(text: bytes) -> bytes:
    import base64
    import binascii

    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except (ValueError, binascii.Error):
        # Without the text, and without a cause that might quote it.
        raise OptionError("Base64 data contains invalid characters, or is cut off") from None


class SecretType(OptionType):
    """An option that names a secret. Drivers find a ``Secret`` in it."""

    label = "str"

    def parse(self, name: str, value: object) -> Any:
        if isinstance(value, (str, Secret)):
            return value
        raise OptionError(f"Option '{name}' needs the id of a secret")


SECRET: Final = SecretType()


def bind(options: T, secrets: Secrets) -> T:
    """``options`` (a driver's dataclass) with the ids in it made into references to ``secrets``."""
    found = {
        info.field: Secret(value, secrets)
        for info in describe(type(options))
        if info.type is SECRET and isinstance(value := getattr(options, info.field), str)
    }
    return dataclasses.replace(options, **found) if found else options  # type: ignore[type-var]


def needed_to_open(options: Mapping[str, object]) -> dict[str, object]:
    """Of the options an image was created with, those that opening it takes too: which secret is its key."""
    names = {key: key.replace("_", "-") for key in options}
    return {
        name: options[key]
        for key, name in names.items()
        if (name == "key-secret" or name.endswith(".key-secret")) and options[key] is not None
    }

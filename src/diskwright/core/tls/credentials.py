"""TLS credentials: certificates in a directory, or a file of pre-shared keys, as QEMU's objects ``tls-creds-x509`` and
``tls-creds-psk`` name them.

A credential belongs to one end, ``server`` or ``client``. It checks its files when it is made, so that what is wrong
with them is told before anybody connects.
"""

from __future__ import annotations

import os
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from diskwright.core.options import BOOL
from diskwright.core.tls.psk import CIPHERS, MAX_KEY, serve_keys, use_key
from diskwright.errors import OptionError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from diskwright.core.secrets import Secrets

SERVER: Final = "server"
CLIENT: Final = "client"

MAX_FILE: Final = 4 << 20
"""Longest file of keys or certificates that is read, in bytes."""

_CA, _CRL = "ca-cert.pem", "ca-crl.pem"
_KEYS: Final = "keys.psk"
_DEFAULT_USER: Final = "qemu"

Identity = Callable[[ssl.SSLObject], str | None]


class Terms(NamedTuple):
    """What one connection is made with. ``identity`` tells, after the handshake, who the peer has proved to be; None
    when it has proved nothing."""

    context: ssl.SSLContext
    identity: Identity


class Credentials(ABC):
    """One set of credentials. ``endpoint`` is ``SERVER`` or ``CLIENT``."""

    proves_peer = True
    """Whether a peer has to prove who it is."""
    needs_hostname = False
    """Whether a client has to know its server's name to tell it from others."""

    def __init__(self, id: str, endpoint: str) -> None:
        self.id, self.endpoint = id, endpoint

    @abstractmethod
    def terms(self) -> Terms:
        """For one more connection. Raises OptionError or OSError when files have become unusable."""


def from_object(kind: str, options: Mapping[str, str], secrets: Secrets) -> Credentials:
    """The credentials an object of ``kind`` describes. Raises OptionError."""
    known = ("id", "dir", "endpoint", "priority", "verify-peer", *_OWN[kind])
    for name in options:
        if name not in known:
            raise OptionError(f"Parameter '{name}' is unexpected")
    endpoint = options.get("endpoint", CLIENT)
    if endpoint not in (CLIENT, SERVER):
        raise OptionError(f"Parameter 'endpoint' does not accept value '{endpoint}'")
    verify: bool = BOOL.parse("verify-peer", options.get("verify-peer", "on"))
    folder, priority = options.get("dir"), options.get("priority", "")
    if folder is None:
        raise OptionError("Missing 'dir' property value")
    if kind == "tls-creds-psk":
        return Psk(options["id"], endpoint, folder, options.get("username", _DEFAULT_USER), priority=priority)
    sane: bool = BOOL.parse("sanity-check", options.get("sanity-check", "on"))
    password = secrets.reveal(options["passwordid"]) if "passwordid" in options else None
    return X509(options["id"], endpoint, folder, verify_peer=verify, sane=sane, password=password, priority=priority)


_OWN: Final = {"tls-creds-x509": ("sanity-check", "passwordid"), "tls-creds-psk": ("username",)}
KINDS: Final = tuple(_OWN)


class X509(Credentials):
    """Certificates: ``ca-cert.pem`` says whom to trust (``ca-crl.pem`` whom no longer), ``server-cert.pem`` and
    ``server-key.pem``, or ``client-cert.pem`` and ``client-key.pem``, who we are. A client may go without.

    Without ``verify_peer`` a server asks for no client certificate, and a client takes any server for the right one.
    """

    def __init__(
        self,
        id: str,
        endpoint: str,
        folder: str,
        *,
        verify_peer: bool = True,
        sane: bool = True,
        password: bytes | None = None,
        priority: str = "",
    ) -> None:
        super().__init__(id, endpoint)
        self.proves_peer, self.needs_hostname = verify_peer, verify_peer and endpoint == CLIENT
        ca = _readable(folder, _CA)
        must = endpoint == SERVER
        cert, key = (_optional(folder, f"{endpoint}-{what}.pem", must=must) for what in ("cert", "key"))
        if sane:
            _check(ca, is_ca=True)
            if cert is not None:
                _check(cert, is_ca=False)
        self._context = context = _new_context(endpoint, priority)
        context.check_hostname = self.needs_hostname
        context.verify_mode = ssl.CERT_REQUIRED if verify_peer else ssl.CERT_NONE
        _load(ca, context)
        crl = _optional(folder, _CRL, must=False)
        if crl is not None:
            _load(crl, context)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        if cert is not None and key is not None:
            _load_own(context, cert, key, password)

    def terms(self) -> Terms:
        return Terms(self._context, distinguished_name)


class Psk(Credentials):
    """Keys in ``keys.psk``: a line ``username:key`` for each, the key in hexadecimal. A server takes all of them,
    looking into the file for each client; a client uses the one of ``username``."""

    def __init__(self, id: str, endpoint: str, folder: str, username: str, *, priority: str = "") -> None:
        super().__init__(id, endpoint)
        self._path, self._username, self._priority = _readable(folder, _KEYS), username, priority
        _new_context(endpoint, priority)
        if endpoint == CLIENT and self._key(username) is None:
            raise OptionError(f"Username {username} not found in PSK file {self._path}")

    def terms(self) -> Terms:
        # A context for each connection: it remembers who has come.
        context = _new_context(self.endpoint, self._priority)
        context.set_ciphers(CIPHERS)
        if self.endpoint == CLIENT:
            # OpenSSL takes a key set this way for a session of TLS 1.3 to be resumed, and as such it would not fit the
            # session context that Python gives every context.
            if context.minimum_version > ssl.TLSVersion.TLSv1_2:
                raise OptionError("A client with a pre-shared key speaks TLS 1.2, which the priority forbids")
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED  # no authority is loaded: a certificate instead of the key fails
            key = self._key(self._username)
            if key is None:
                raise OptionError(f"Username {self._username} not found in PSK file {self._path}")
            use_key(context, self._username, key)
            return Terms(context, lambda connection: None)
        names: list[str] = []

        def key_of(name: str) -> bytes | None:
            key = self._key(name)
            if key is not None:
                names.append(name)  # the last one that is found is the one that is used
            return key

        serve_keys(context, key_of)
        return Terms(context, lambda connection: names[-1] if names else None)

    def _key(self, username: str) -> bytes | None:
        wanted = username.encode("utf-8", "surrogateescape")
        with open(self._path, "rb") as file:
            lines = file.read(MAX_FILE).splitlines()
        for line in lines:
            name, colon, text = line.partition(b":")
            if colon and name == wanted:
                try:
                    key = bytes.fromhex(text.strip().decode("ascii"))
                except ValueError:
                    raise OptionError(f"The key of {username} in {self._path} is not hexadecimal") from None
                if not 0 < len(key) <= MAX_KEY:
                    raise OptionError(f"The key of {username} in {self._path} has {len(key)} bytes, not 1 to {MAX_KEY}")
                return key
        return None


# -- files -------------------------------------------------------------------------------------------


def _readable(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        raise OptionError(f"Unable to access credentials {path}: {error.strerror}") from None


def _optional(folder: str, name: str, *, must: bool) -> str | None:
    return _readable(folder, name) if must or os.path.exists(os.path.join(folder, name)) else None


def _load(path: str, context: ssl.SSLContext) -> None:
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise OptionError(f"Cannot load certificates of {path}: {_cause(error)}") from None


def _load_own(context: ssl.SSLContext, cert: str, key: str, password: bytes | None) -> None:
    try:
        # Never None: OpenSSL would ask at the terminal.
        context.load_cert_chain(cert, key, password if password is not None else b"")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise OptionError(f"Cannot load certificate '{cert}' & key '{key}': {_cause(error)}") from None


def _cause(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return " ".join(str(error).split())


def _check(path: str, *, is_ca: bool) -> None:
    """Finds out what would make every handshake fail. Raises OptionError."""
    import datetime

    from cryptography import x509

    with open(path, "rb") as file:
        data = file.read(MAX_FILE)
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise OptionError(f"Unable to import certificates of {path}: {' '.join(str(error).split())}") from None
    now = datetime.datetime.now(datetime.timezone.utc)  # noqa: UP017
    for certificate in found if is_ca else found[:1]:
        if certificate.not_valid_after_utc < now:
            raise OptionError(f"The certificate {path} has expired")
        if certificate.not_valid_before_utc > now:
            raise OptionError(f"The certificate {path} is not yet active")
        if is_ca and not _signs_others(certificate):
            raise OptionError(f"The certificate {path} is not one of an authority: its basic constraints say so")


def _signs_others(certificate: Certificate) -> bool:
    """Certificates of version 1 do not say; they are taken for what they are used as."""
    from cryptography import x509

    try:
        return bool(certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except x509.ExtensionNotFound:
        return certificate.version is x509.Version.v1


def distinguished_name(connection: ssl.SSLObject) -> str | None:
    """Of the peer's certificate, its parts in the certificate's order, written as RFC 4514 writes each: as lists of
    those who are let in name them."""
    from cryptography import x509

    encoded = connection.getpeercert(binary_form=True)
    if encoded is None:
        return None
    names = {x509.NameOID.EMAIL_ADDRESS: "EMAIL"}
    subject = x509.load_der_x509_certificate(encoded).subject
    return ",".join(part.rfc4514_string(names) for part in subject.rdns)


# -- priorities --------------------------------------------------------------------------------------

_VERSIONS: Final = {
    "VERS-TLS1.0": ssl.TLSVersion.TLSv1,
    "VERS-TLS1.1": ssl.TLSVersion.TLSv1_1,
    "VERS-TLS1.2": ssl.TLSVersion.TLSv1_2,
    "VERS-TLS1.3": ssl.TLSVersion.TLSv1_3,
}
_ALL: Final = ("VERS-ALL", "VERS-TLS-ALL")
_LEVELS: Final = {
    "NORMAL": "",
    "SYSTEM": "",
    "@SYSTEM": "",
    "PFS": "ECDHE:DHE:!aNULL:!eNULL",
    "SECURE128": "DEFAULT:@SECLEVEL=3",
    "SECURE192": "DEFAULT:@SECLEVEL=4",
    "SECURE256": "DEFAULT:@SECLEVEL=5",
}
_EXCHANGES: Final = ("ECDHE-PSK", "DHE-PSK")  # QEMU's words for keys; these are always there with them


def _new_context(endpoint: str, priority: str) -> ssl.SSLContext:
    """A context for TLS 1.2 and newer, or for what a GnuTLS priority string says, as far as it can be said here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if endpoint == SERVER else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    if endpoint == SERVER:
        context.num_tickets = 0  # nobody resumes an NBD session
    if not priority:
        return context
    level, *words = priority.split(":")
    if level not in _LEVELS:
        raise OptionError(f"TLS priority '{level}' is not known here; it begins with one of {', '.join(_LEVELS)}")
    if _LEVELS[level]:
        context.set_ciphers(_LEVELS[level])
    versions = {ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3}
    for word in filter(None, words):
        _apply_word(word, versions)
    if not versions:
        raise OptionError(f"TLS priority '{priority}' leaves no version of TLS")
    context.minimum_version, context.maximum_version = min(versions), max(versions)
    return context


def _apply_word(word: str, versions: set[ssl.TLSVersion]) -> None:
    add, name = word[0] == "+", word[1:]
    if word[0] in "+-!":
        if name in _ALL:
            versions.update((ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)) if add else versions.clear()
            return
        if name in _VERSIONS and (not add or _VERSIONS[name] >= ssl.TLSVersion.TLSv1_2):
            versions.add(_VERSIONS[name]) if add else versions.discard(_VERSIONS[name])
            return
        if add and name in _EXCHANGES:
            return
    raise OptionError(f"TLS priority '{word}' has no counterpart here; versions of TLS can be chosen (-VERS-TLS1.2)")

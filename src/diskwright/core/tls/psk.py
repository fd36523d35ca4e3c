"""TLS by keys that both sides know beforehand (RFC 4279, and RFC 8446 section 2.2).

Python's ``ssl`` can do that from version 3.13 on. For 3.11 and 3.12, a closed set of interpreters, the same two
callbacks are set on OpenSSL itself, in the very library ``ssl`` uses; what they are given and return is in
SSL_CTX_set_psk_server_callback(3) and SSL_CTX_set_psk_client_callback(3).
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import Callable
from typing import Any, Final

from diskwright.errors import UnsupportedFeature

CIPHERS: Final = "kECDHEPSK:kDHEPSK:!eNULL"
"""For TLS 1.2: key exchanges with forward secrecy only. Those of TLS 1.3 are not chosen here; all have it."""

MAX_KEY: Final = 64
"""Longest key in bytes: OpenSSL 1.1 takes no longer ones than 256, GnuTLS makes them of 32."""

_POINTER_AT: Final = 16
"""Where an SSLContext of CPython 3.11 and 3.12 keeps OpenSSL's: right behind what every object begins with."""


def serve_keys(context: ssl.SSLContext, key_of: Callable[[str], bytes | None]) -> None:
    """Makes a server's context ask ``key_of`` for the key of each client's name; None turns the client away."""
    if sys.version_info >= (3, 13):
        _need(ssl.HAS_PSK)
        context.set_psk_server_callback(lambda name: key_of(name or "") or b"")
    else:
        _serve_keys(context, key_of)


def use_key(context: ssl.SSLContext, username: str, key: bytes) -> None:
    """Makes a client's context call itself ``username`` and prove it by ``key``."""
    if sys.version_info >= (3, 13):
        _need(ssl.HAS_PSK)
        context.set_psk_client_callback(lambda hint: (username, key))
    else:
        _use_key(context, username, key)


def _need(there: bool) -> None:
    if not there:
        raise UnsupportedFeature("This Python's TLS library has no pre-shared keys")


def _serve_keys(context: ssl.SSLContext, key_of: Callable[[str], bytes | None]) -> None:
    import ctypes as ct

    prototype = ct.CFUNCTYPE(ct.c_uint, ct.c_void_p, ct.c_char_p, ct.POINTER(ct.c_ubyte), ct.c_uint)

    def callback(connection: int, identity: bytes | None, into: Any, room: int) -> int:
        try:
            key = key_of((identity or b"").decode("utf-8", "surrogateescape"))
            if not key or len(key) > room:
                return 0
            ct.memmove(into, key, len(key))
            return len(key)
        except Exception:
            return 0  # nothing may be raised into OpenSSL; 0 refuses

    _set(context, "SSL_CTX_set_psk_server_callback", prototype(callback))


def _use_key(context: ssl.SSLContext, username: str, key: bytes) -> None:
    import ctypes as ct

    prototype = ct.CFUNCTYPE(
        ct.c_uint, ct.c_void_p, ct.c_char_p, ct.POINTER(ct.c_char), ct.c_uint, ct.POINTER(ct.c_ubyte), ct.c_uint
    )
    name = username.encode("utf-8", "surrogateescape") + b"\0"

    def callback(connection: int, hint: bytes | None, name_into: Any, name_room: int, into: Any, room: int) -> int:
        if len(name) > name_room or len(key) > room:
            return 0
        ct.memmove(name_into, name, len(name))
        ct.memmove(into, key, len(key))
        return len(key)

    _set(context, "SSL_CTX_set_psk_client_callback", prototype(callback))


def _set(context: ssl.SSLContext, function: str, callback: Any) -> None:
    """Sets a callback on the OpenSSL context within ``context``, and keeps it alive as long as that."""
    import _ssl
    import ctypes as ct

    if sys.implementation.name != "cpython" or object.__basicsize__ != _POINTER_AT:
        raise UnsupportedFeature("Pre-shared keys for TLS need Python 3.13 or newer on this interpreter")
    try:
        # Looked up through Python's own module, so it is the library that module is linked with and no other.
        library = ct.CDLL(getattr(_ssl, "__file__", None))
        setter, options = library[function], library["SSL_CTX_get_options"]
    except (OSError, AttributeError) as error:
        raise UnsupportedFeature(f"Pre-shared keys for TLS need Python 3.13 or newer here: {error}") from None
    pointer = ct.c_void_p.from_address(id(context) + _POINTER_AT)
    options.argtypes, options.restype = [ct.c_void_p], ct.c_uint64
    if options(pointer) & 0xFFFFFFFF != int(context.options) & 0xFFFFFFFF:
        raise UnsupportedFeature("Pre-shared keys for TLS need Python 3.13 or newer: this one's contexts are unknown")
    setter.argtypes, setter.restype = [ct.c_void_p, ct.c_void_p], None
    setter(pointer, ct.cast(callback, ct.c_void_p))
    setattr(context, "_diskwright_psk", callback)  # noqa: B010 - an attribute ssl knows nothing of

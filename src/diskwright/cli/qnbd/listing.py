"""``--list``: what a server exports, in the classic program's words."""

from __future__ import annotations

import socket
from typing import Final

from diskwright.cli.common import Failure
from diskwright.cli.qnbd.arguments import DEFAULT_BIND, DEFAULT_PORT, Settings
from diskwright.cli.qnbd.dialog import Dialog, connect
from diskwright.errors import OptionError
from diskwright.wire.nbd import client
from diskwright.wire.nbd import constants as c

_FLAGS: Final = (
    (c.FLAG_READ_ONLY, "readonly"),
    (c.FLAG_SEND_FLUSH, "flush"),
    (c.FLAG_SEND_FUA, "fua"),
    (1 << 4, "rotational"),
    (c.FLAG_SEND_TRIM, "trim"),
    (c.FLAG_SEND_WRITE_ZEROES, "zeroes"),
    (c.FLAG_SEND_DF, "df"),
    (c.FLAG_CAN_MULTI_CONN, "multi"),
    (1 << 9, "resize"),
    (c.FLAG_SEND_CACHE, "cache"),
    (c.FLAG_SEND_FAST_ZERO, "fast-zero"),
)

Listed = tuple[str, str, client.ExportDetails | None, list[str]]
"""Name, description, what else is known, and metadata contexts."""


def run(settings: Settings) -> int:
    """Prints the exports of the server the settings name. Raises Failure."""
    if settings.tls_creds is not None:
        try:
            settings.objects.credentials(settings.tls_creds, "client")
        except Failure as failure:
            raise Failure(f"Failed to get TLS creds: {failure.message}") from None
    host, port = settings.bind or DEFAULT_BIND, settings.port or DEFAULT_PORT
    sock = connect(settings.socket, host, port)
    with Dialog(sock) as dialog:
        try:
            exports = _ask(dialog, settings, None if sock.family == socket.AF_UNIX else host)
        except client.Refused as refusal:
            raise Failure(_worded(refusal, settings)) from None
    print(_text(exports), end="")
    return 0


def _ask(dialog: Dialog, settings: Settings, host: str | None) -> list[Listed]:
    greeting = dialog.greet()
    if settings.tls_creds is not None:
        if not greeting.fixed:
            raise Failure("Server does not support STARTTLS")
        dialog.start_tls(settings.objects.credentials(settings.tls_creds, "client"), _hostname(settings, host))
    if greeting.old is not None:
        dialog.disconnect()
        return [("", "", greeting.old, [])]
    if not greeting.fixed:
        raise Failure("Server does not support export lists")
    structured = client.structured_replies(dialog.ask)
    exports: list[Listed] = []
    for name, description in client.list_exports(dialog.ask):
        details_of = _details(dialog, name)
        contexts: list[str] = []
        if structured and details_of is not None:
            contexts = _contexts(dialog, name)
        exports.append((name, description, details_of, contexts))
    return exports


def _hostname(settings: Settings, host: str | None) -> str | None:
    """The name the server's certificate has to bear."""
    credentials = settings.objects.credentials(settings.tls_creds or "", "client")
    name = settings.tls_hostname or host
    if credentials.needs_hostname and name is None:
        raise OptionError("No hostname for certificate validation")
    return name


def _details(dialog: Dialog, name: str) -> client.ExportDetails | None:
    try:
        return client.info(dialog.ask, name, (c.INFO_BLOCK_SIZE,))
    except client.Refused as refusal:
        if refusal.kind == c.REP_ERR_UNSUP:
            return None
        raise


def _contexts(dialog: Dialog, name: str) -> list[str]:
    try:
        return list(client.meta_contexts(dialog.ask, name))
    except client.Refused as refusal:
        if refusal.kind == c.REP_ERR_UNSUP:
            return []
        raise


def _worded(refusal: client.Refused, settings: Settings) -> str:
    option = f"option {refusal.number} ({client.OPTION_NAMES[refusal.number]})"
    text = {
        c.REP_ERR_POLICY: f"Denied by server for {option}",
        c.REP_ERR_INVALID: f"Invalid parameters for {option}",
        c.REP_ERR_PLATFORM: f"Server lacks support for {option}",
        c.REP_ERR_TLS_REQD: f"TLS negotiation required before {option}",
        c.REP_ERR_UNKNOWN: "Requested export not available",
        c.REP_ERR_SHUTDOWN: f"Server shutting down before {option}",
        c.REP_ERR_BLOCK_SIZE_REQD: f"Server requires INFO_BLOCK_SIZE for {option}",
        c.REP_ERR_UNSUP: f"Server does not support {option}",
    }.get(refusal.kind, f"Unknown error code when asking for {option}")
    if refusal.kind == c.REP_ERR_TLS_REQD and settings.tls_creds is None:
        text += "\nDid you forget a valid tls-creds?"
    return f"{text}\nserver reported: {_printable(refusal.said)}" if refusal.said else text


def _text(exports: list[Listed]) -> str:
    lines = [f"exports available: {len(exports)}"]
    for name, description, details, contexts in exports:
        lines.append(f" export: '{_printable(name)}'")
        if description:
            lines.append(f"  description: {_printable(description)}")
        if details is not None:
            lines += _size_and_flags(details)
        if contexts:
            lines.append(f"  available meta contexts: {len(contexts)}")
            lines += [f"   {_printable(each)}" for each in contexts]
    return "\n".join(lines) + "\n"


def _size_and_flags(details: client.ExportDetails) -> list[str]:
    lines = [f"  size:  {details.size}"]
    if details.flags & c.FLAG_HAS_FLAGS:
        words = "".join(f"{word} " for bit, word in _FLAGS if details.flags & bit)
        lines.append(f"  flags: {details.flags:#x} ( {words})")
    if details.minimum_block:
        lines.append(f"  min block: {details.minimum_block}")
        lines.append(f"  opt block: {details.preferred_block}")
        lines.append(f"  max block: {details.maximum_block}")
    return lines


def _printable(text: str) -> str:
    """A server's words without what a terminal would act on."""
    return "".join(each if each.isprintable() or "\udc80" <= each <= "\udcff" else "?" for each in text)

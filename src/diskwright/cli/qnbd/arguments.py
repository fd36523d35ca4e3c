"""qemu-nbd's command line as settings. What is wrong with one option is told when its turn comes, what is wrong with
several together after all have been read: in the order of the classic program, whose texts scripts may look for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from diskwright.cli.common import CACHE_MODES, Failure
from diskwright.cli.faces import OWN_NAME, program
from diskwright.cli.getopt_long import OPERAND, Option, scan
from diskwright.cli.objects import KINDS, Objects
from diskwright.wire.nbd.constants import MAX_STRING

DEFAULT_PORT: Final = "10809"
DEFAULT_BIND: Final = "0.0.0.0"
MAX_CLIENTS: Final = 4096
"""How many at once without ``--shared``'s limit (``--shared=0``)."""

OPTIONS: Final = (
    Option("help", "h"),
    Option("version", "V"),
    Option("bind", "b", True),
    Option("port", "p", True),
    Option("socket", "k", True),
    Option("offset", "o", True),
    Option("read-only", "r"),
    Option("connect", "c", True),
    Option("disconnect", "d"),
    Option("list", "L"),
    Option("allocation-depth", "A"),
    Option("bitmap", "B", True),
    Option("snapshot", "s"),
    Option("load-snapshot", "l", True),
    Option("nocache", "n"),
    Option("cache", "", True),
    Option("aio", "", True),
    Option("discard", "", True),
    Option("detect-zeroes", "", True),
    Option("shared", "e", True),
    Option("format", "f", True),
    Option("persistent", "t"),
    Option("verbose", "v"),
    Option("object", "", True),
    Option("export-name", "x", True),
    Option("description", "D", True),
    Option("tls-creds", "", True),
    Option("tls-hostname", "", True),
    Option("tls-authz", "", True),
    Option("image-opts"),
    Option("trace", "T", True),
    Option("fork"),
    Option("pid-file", "", True),
    Option("selinux-label", "", True),
    Option("gate", "", True, exact=True),
    Option("tls-optional", exact=True),
)
"""In this order abbreviations are listed when they fit several. The last two are ours."""

AIO_MODES: Final = ("threads", "native", "io_uring")
_DISCARD: Final = {"ignore": "ignore", "off": "ignore", "unmap": "unmap", "on": "unmap"}
_GATES: Final = ("open", "directory", "closed")


@dataclass
class Settings:
    """What the command line asks for."""

    image: str = ""
    help: bool = False
    version: bool = False
    help_on_objects: bool = False
    # connections
    bind: str | None = None
    port: str | None = None
    socket: str | None = None
    shared: int = 1
    persistent: bool = False
    export_name: str | None = None
    description: str | None = None
    tls_creds: str | None = None
    tls_authz: str | None = None
    tls_hostname: str | None = None
    tls_optional: bool = False
    # the image
    offset: int = 0
    read_only: bool = False
    snapshot: bool = False
    load_snapshot: str | None = None
    format: str | None = None
    image_opts: bool = False
    cache: str | None = None
    aio: str | None = None
    discard: str | None = None
    detect_zeroes: str = "off"
    gate: str = "open"
    bitmaps: list[str] = field(default_factory=list)
    allocation_depth: bool = False
    # the process
    list: bool = False
    connect: str | None = None
    disconnect: bool = False
    fork: bool = False
    pid_file: str | None = None
    verbose: bool = False
    trace: str | None = None
    objects: Objects = field(default_factory=Objects)


def parse(words: Sequence[str]) -> Settings:
    """Reads the command line. Raises Failure."""
    settings = Settings()
    operands: list[str] = []
    for name, value in scan(words, OPTIONS, f"{program()}: {try_help()}"):
        if name == OPERAND:
            operands.append(value)
        elif name in _ACTIONS:
            _ACTIONS[name](settings, value)
        elif name in _TEXTS:
            setattr(settings, name.replace("-", "_"), value)
        else:
            setattr(settings, name.replace("-", "_"), True)
        if settings.help or settings.version or settings.help_on_objects:
            return settings
    _check_together(settings, operands)
    return settings


def try_help() -> str:
    command = f"{program()} nbd" if program() == OWN_NAME else program()
    return f"Try `{command} --help' for more information."


_TEXTS: Final = (
    "bind", "port", "format", "pid-file", "tls-creds", "tls-hostname", "tls-authz", "connect", "trace",
)  # fmt: skip


# -- one option --------------------------------------------------------------------------------------


def _socket(settings: Settings, value: str) -> None:
    if not value.startswith("/"):
        raise Failure("socket path must be absolute")
    settings.socket = value


def _number(text: str, most: int, message: str) -> int:
    """As strtoull(3) reads it: decimal, octal or hexadecimal, and -1 for the largest there is."""
    found = re.fullmatch(r"[ \t\n\v\f\r]*([+-]?)(0[xX][0-9a-fA-F]+|[0-9]+)", text)
    if found is None:
        raise Failure(message)
    digits = found[2]
    if digits[:2] in ("0x", "0X"):
        number = int(digits, 16)
    elif digits[0] == "0" and len(digits) > 1:
        try:
            number = int(digits, 8)
        except ValueError:
            raise Failure(message) from None
    else:
        number = int(digits)
    number = -number if found[1] == "-" else number
    if not -most <= number <= most:
        raise Failure(message)
    return number


def _offset(settings: Settings, value: str) -> None:
    number = _number(value, (1 << 64) - 1, f"Invalid offset '{value}'")
    settings.offset = number % (1 << 64)


def _shared(settings: Settings, value: str) -> None:
    message = f"Invalid shared device number '{value}'"
    settings.shared = _number(value, (1 << 31) - 1, message)
    if settings.shared < 0:
        raise Failure(message)


def _nocache(settings: Settings, value: str) -> None:
    _cache(settings, "none")


def _cache(settings: Settings, value: str) -> None:
    if settings.cache is not None:
        raise Failure("-n and --cache can only be specified once")
    if value not in CACHE_MODES:
        raise Failure(f"Invalid cache mode `{value}'")
    settings.cache = value


def _aio(settings: Settings, value: str) -> None:
    if settings.aio is not None:
        raise Failure("--aio can only be specified once")
    if value not in AIO_MODES:
        raise Failure(f"Invalid aio mode '{value}'")
    settings.aio = value


def _discard(settings: Settings, value: str) -> None:
    if settings.discard is not None:
        raise Failure("--discard can only be specified once")
    if value not in _DISCARD:
        raise Failure(f"Invalid discard mode `{value}'")
    settings.discard = _DISCARD[value]


def _detect_zeroes(settings: Settings, value: str) -> None:
    if value not in ("off", "on", "unmap"):
        raise Failure(f"Failed to parse detect_zeroes mode: invalid parameter value: {value}")
    if value == "unmap" and settings.discard != "unmap":
        raise Failure("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
    settings.detect_zeroes = value


def _load_snapshot(settings: Settings, value: str) -> None:
    from diskwright.cli.common import snapshot_parameters

    try:
        snapshot_parameters(value)
    except Failure:
        raise Failure(f"Failed in parsing snapshot param `{value}'") from None
    settings.load_snapshot, settings.read_only = value, True


def _string(value: str, what: str) -> str:
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        raise Failure(f"{what} is not text in UTF-8, which the protocol wants") from None
    if len(encoded) > MAX_STRING:
        raise Failure(f"{what} '{value}' too long")
    return value


def _export_name(settings: Settings, value: str) -> None:
    settings.export_name = _string(value, "export name")


def _description(settings: Settings, value: str) -> None:
    settings.description = _string(value, "export description")


def _bitmap(settings: Settings, value: str) -> None:
    if value not in settings.bitmaps:
        settings.bitmaps.append(value)


def _object(settings: Settings, value: str) -> None:
    if value in ("help", "?"):
        settings.help_on_objects = True
    else:
        settings.objects.add(value)


def _selinux_label(settings: Settings, value: str) -> None:
    raise Failure("SELinux labels of sockets are not supported")


def _gate(settings: Settings, value: str) -> None:
    if value not in _GATES:
        raise Failure(f"Invalid gate '{value}': use one of {', '.join(_GATES)}")
    settings.gate = value


_ACTIONS: Final[dict[str, Callable[[Settings, str], None]]] = {
    "socket": _socket,
    "offset": _offset,
    "shared": _shared,
    "nocache": _nocache,
    "cache": _cache,
    "aio": _aio,
    "discard": _discard,
    "detect-zeroes": _detect_zeroes,
    "load-snapshot": _load_snapshot,
    "export-name": _export_name,
    "description": _description,
    "bitmap": _bitmap,
    "object": _object,
    "selinux-label": _selinux_label,
    "gate": _gate,
}


# -- options together --------------------------------------------------------------------------------


def _check_together(settings: Settings, operands: list[str]) -> None:
    if settings.list:
        _check_list(settings, operands)
    elif len(operands) != 1:
        raise Failure(f"Invalid number of arguments\n{try_help()}")
    else:
        settings.image = operands[0]
        if settings.export_name is None:
            settings.export_name = ""
    if settings.tls_creds is not None:
        if settings.connect is not None:
            raise Failure("TLS is not supported with a host device")
        if settings.tls_authz is not None and settings.list:
            raise Failure("TLS authorization is incompatible with export list")
        if settings.tls_hostname is not None and not settings.list:
            raise Failure("TLS hostname is only supported with export list")
    else:
        for given, name in ((settings.tls_authz, "authz"), (settings.tls_hostname, "hostname")):
            if given is not None:
                raise Failure(f"--tls-{name} is not permitted without --tls-creds")
        if settings.tls_optional:
            raise Failure("--tls-optional is not permitted without --tls-creds")
    if settings.image_opts and settings.format is not None:
        raise Failure("--image-opts and -f are mutually exclusive")


def _check_list(settings: Settings, operands: list[str]) -> None:
    if operands:
        raise Failure("List mode is incompatible with a file name")
    about_device = (
        settings.export_name is not None, settings.description is not None, settings.offset,
        settings.connect is not None, settings.disconnect, settings.format is not None,
        settings.load_snapshot is not None, settings.bitmaps, settings.allocation_depth,
        settings.aio is not None, settings.discard is not None, settings.cache is not None,
    )  # fmt: skip
    if any(about_device):
        raise Failure("List mode is incompatible with per-device settings")
    if settings.fork:
        raise Failure("List mode is incompatible with forking")


OBJECT_HELP: Final = "List of user creatable objects:\n" + "".join(f"  {kind}\n" for kind in KINDS)

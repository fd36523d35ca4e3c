"""What users define with ``--object``: secrets, TLS credentials, and lists of who may come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from diskwright.cli.common import Failure
from diskwright.core.options import split_pairs
from diskwright.core.secrets import Secrets
from diskwright.errors import DiskwrightError, OptionError

if TYPE_CHECKING:
    from diskwright.core.throttle import ThrottleGroup
    from diskwright.core.tls.authz import Allows
    from diskwright.core.tls.credentials import Credentials

KINDS: Final = (
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "secret",
    "throttle-group",
    "tls-creds-psk",
    "tls-creds-x509",
)


class Objects:
    """The objects of one command line."""

    def __init__(self) -> None:
        self.secrets = Secrets()
        self.groups: dict[str, object] = {}
        """What options of nodes refer to: throttle groups."""
        self._credentials: dict[str, Credentials] = {}
        self._authz: dict[str, Allows] = {}
        self._ids: set[str] = set()

    def add(self, text: str) -> None:
        """Defines one: ``kind,id=...,...``, or JSON with ``qom-type``. Raises Failure, without a secret in it."""
        try:
            self._add(*_parsed(text))
        except (DiskwrightError, OSError) as error:
            raise Failure(str(error)) from None

    def _add(self, kind: str, options: Mapping[str, str]) -> None:
        if kind not in KINDS:
            raise OptionError(f"Parameter 'qom-type' does not accept value '{kind}'")
        if "id" not in options:
            raise OptionError("Parameter 'id' is missing")
        id = options["id"]
        if id in self._ids:
            raise OptionError(f"attempt to add duplicate property '{id}' to object (type 'container')")
        if kind == "secret":
            self.secrets.add_object(options)
        elif kind == "throttle-group":
            self.groups[id] = _throttle_group(id, options)
        elif kind.startswith("tls-creds-"):
            from diskwright.core.tls import credentials

            self._credentials[id] = credentials.from_object(kind, options, self.secrets)
        else:
            from diskwright.core.tls import authz

            self._authz[id] = authz.from_object(kind, options)
        self._ids.add(id)

    def credentials(self, id: str, endpoint: str) -> Credentials:
        """The TLS credentials called ``id``, for that end of a connection. Raises Failure."""
        found = self._credentials.get(id)
        if found is None:
            known = f"Object with id '{id}' is not TLS credentials"
            raise Failure(known if id in self._ids else f"No TLS credentials with id '{id}'")
        if found.endpoint != endpoint:
            raise Failure(f"Expected TLS credentials for a {endpoint} endpoint")
        return found

    def authz(self, id: str) -> Allows:
        """The check called ``id``. Raises Failure."""
        if id not in self._authz:
            raise Failure(f"No authorization object with id '{id}'")
        return self._authz[id]


def _throttle_group(id: str, options: Mapping[str, str]) -> ThrottleGroup:
    """Limits are given as ``limits.NAME``, or each as a property of its own, ``x-NAME``."""
    from diskwright.core.throttle import Limits, ThrottleGroup, limits_of

    limits = Limits()
    for prefix in ("limits.", "x-"):
        given = {key: value for key, value in options.items() if key.startswith(prefix)}
        limits = limits_of(given, prefix=prefix, before=limits)
    for key in options:
        if key != "id" and not key.startswith(("limits.", "x-")):
            raise OptionError(f"Parameter '{key}' is unexpected")
    return ThrottleGroup(id, limits)


def objects_of(texts: Sequence[str]) -> Objects:
    """All of them, in order: later ones may refer to earlier ones. Raises Failure."""
    objects = Objects()
    for text in texts:
        objects.add(text)
    return objects


def _parsed(text: str) -> tuple[str, dict[str, str]]:
    if text.startswith("{"):
        from diskwright.core.graph import parse_json

        given = _flat(parse_json(text))
        if "qom-type" not in given:
            raise OptionError("Parameter 'qom-type' is missing")
        return given.pop("qom-type"), given
    kind, _, rest = text.partition(",")
    try:
        pairs = dict(split_pairs(rest))
    except OptionError:
        raise OptionError("An --object has a value without a name") from None  # not with the text: it holds a secret
    kind = kind.removeprefix("qom-type=")
    if not kind or "=" in kind:
        raise OptionError("Parameter 'qom-type' is missing")
    return kind, pairs


def _flat(value: object, name: str = "") -> dict[str, str]:
    """Nested JSON under dotted names, as command lines spell it."""
    if isinstance(value, Mapping):
        items = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list):
        items = [(str(number), each) for number, each in enumerate(value)]
    elif isinstance(value, bool):
        return {name: "on" if value else "off"}
    else:
        return {name: str(value)}
    flat: dict[str, str] = {}
    for key, each in items:
        flat.update(_flat(each, f"{name}.{key}" if name else key))
    return flat

"""The registry: drivers by name, found where they are, loaded when they are wanted.

A built-in driver is a module (or package) of ``storage``, ``formats`` or ``filters`` with a tuple
``DRIVERS``. Other distributions add theirs through the entry-point group ``diskwright.drivers``, each
entry naming a driver class; they are looked at only when no built-in answers, because reading
every installed distribution's metadata costs more than opening an image does.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Iterator
from typing import Final

from diskwright.core.driver import Driver, Filter, Format, Storage
from diskwright.errors import GraphError, OptionError

ENTRY_POINTS: Final = "diskwright.drivers"
_PACKAGES: Final = ("diskwright.formats", "diskwright.storage", "diskwright.filters")

_lock = threading.RLock()
_known: dict[str, Driver] = {}
_loaded: set[str] = set()
_entry_points_read = False


def register(driver: Driver) -> None:
    """Makes ``driver`` known under its name. Raises GraphError when another has that name."""
    with _lock:
        present = _known.setdefault(driver.name, driver)
        if present is not driver:
            raise GraphError(f"Two drivers are called '{driver.name}': {present.__module__} and {driver.__module__}")


def find(name: str) -> Driver:
    """The driver called ``name``. Raises OptionError when there is none."""
    with _lock:
        if name in _known:
            return _known[name]
        # Most drivers live in a module of their name, so most look-ups load one module and no more.
        module = name.replace("-", "_")
        for package in _PACKAGES:
            if module in _modules(package):
                _load(package, module)
        if name not in _known:
            for _ in _every():
                if name in _known:
                    break
        if name not in _known:
            raise OptionError(f"Unknown driver '{name}'")
        return _known[name]


def formats() -> list[type[Format]]:
    """Every format driver, built-in ones first."""
    return [driver for driver in _every() if issubclass(driver, Format)]


def builtin_formats() -> list[type[Format]]:
    """The format drivers of this package, without a look at other distributions."""
    with _lock:
        for module in _modules("diskwright.formats"):
            _load("diskwright.formats", module)
        return [driver for driver in _known.values() if issubclass(driver, Format)]


def storages() -> list[type[Storage]]:
    """Every storage driver."""
    return [driver for driver in _every() if issubclass(driver, Storage)]


def filters() -> list[type[Filter]]:
    """Every filter that can be opened by name."""
    return [driver for driver in _every() if issubclass(driver, Filter)]


def for_prefix(prefix: str) -> type[Storage] | type[Filter] | None:
    """The storage or filter whose file names begin with ``prefix`` and a colon; None when there is none."""
    with _lock:
        # A module of the prefix's name answers for most; the others need a look at all.
        module = prefix.replace("-", "_")
        for package in ("diskwright.storage", "diskwright.filters"):
            if module in _modules(package):
                _load(package, module)
        for driver in list(_known.values()):
            if not issubclass(driver, Format) and prefix in driver.prefixes:
                return driver
        for driver in _every():
            if not issubclass(driver, Format) and prefix in driver.prefixes:
                return driver
        return None


def _modules(package: str) -> list[str]:
    return [info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def _load(package: str, module: str) -> None:
    full = f"{package}.{module}"
    if full in _loaded:
        return
    _loaded.add(full)
    for driver in getattr(importlib.import_module(full), "DRIVERS", ()):
        register(driver)


def _every() -> Iterator[Driver]:
    """All drivers; entry points last and read once."""
    global _entry_points_read
    with _lock:
        for package in _PACKAGES:
            for module in _modules(package):
                _load(package, module)
        yield from list(_known.values())
        if not _entry_points_read:
            _entry_points_read = True
            from importlib.metadata import entry_points

            for entry in entry_points(group=ENTRY_POINTS):
                driver = entry.load()
                if driver.name not in _known:
                    register(driver)
                    yield driver

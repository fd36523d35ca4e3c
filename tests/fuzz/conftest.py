"""What the campaigns share."""

from __future__ import annotations

import pytest

from diskwright.formats.qcow2 import header as header_module


@pytest.fixture(autouse=True)
def all_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check needs no more of these than it knows itself."""
    readable = header_module._READABLE | header_module.DATA_FILE | header_module.EXTENDED_L2
    monkeypatch.setattr(header_module, "_READABLE", readable)

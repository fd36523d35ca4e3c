"""Features mixed at random, operations at random, both programs in turn; see ``mixing``.

``DISKWRIGHT_MIXED`` is the number of images (default 48; ``make test-long`` takes 1500), ``DISKWRIGHT_MIXED_FIRST`` the
seed of the first.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.formats.luks.peers import needs_qemu
from tests.formats.qcow2.mixing import Mix
from tests.formats.qcow2.support import LONG

IMAGES = int(os.environ.get("DISKWRIGHT_MIXED") or (1500 if LONG else 48))
FIRST = int(os.environ.get("DISKWRIGHT_MIXED_FIRST") or 0)
PARTS = 8


@needs_qemu
@pytest.mark.parametrize("part", range(PARTS))
def test_mixed_features(part: int, tmp_path: Path) -> None:
    for seed in range(FIRST + part, FIRST + IMAGES, PARTS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        mix = Mix(seed, folder)
        if not mix.create(ours=mix.rng.random() < 0.7):
            continue
        for _ in range(3):
            if mix.rng.random() < 0.7:
                mix.ours(12)
            else:
                mix.qemu(8)
            mix.judge()
        for path in folder.iterdir():
            path.unlink()

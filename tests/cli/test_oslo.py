"""What OpenStack's parser of ``qemu-img info`` (oslo.utils) makes of ours and of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.matrix import images
from tests.cli.run import Result, diskwright, needs_qemu, qemu_img

imageutils: Any = pytest.importorskip("oslo_utils.imageutils")

pytestmark = needs_qemu

FACTS = ("image", "backing_file", "backing_file_format", "file_format", "virtual_size", "cluster_size", "disk_size",
         "snapshots", "encrypted", "format_specific")  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("oslo")
    images.prepare(directory)
    return directory


def parsed(result: Result, form: str) -> dict[str, object]:
    assert result.code == 0, result
    try:
        found = imageutils.QemuImgInfo(result.out, format=form)
    except ValueError as error:
        if "Only 'json' is supported" in str(error):
            pytest.skip("this oslo.utils does not parse text any more")
        raise
    return {fact: getattr(found, fact, None) for fact in FACTS}


@pytest.mark.parametrize("name", [name for name in images.SOUND if name != "names-itself"])
@pytest.mark.parametrize("form", ["json", "human"])
def test_it_finds_the_same_facts(name: str, form: str, prepared: Path) -> None:
    words = ("info", f"--output={form}", name)
    ours, theirs = (parsed(program(*words, cwd=prepared), form) for program in (diskwright, qemu_img))
    assert ours == theirs
    assert ours["image"] == name
    size = json.loads(qemu_img("info", "--output=json", name, cwd=prepared).out)["virtual-size"]
    assert ours["virtual_size"] == size

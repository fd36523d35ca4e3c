"""An error injected at an event fails the same step of a script in both programs, and never damages an image."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diskwright.filters.blkdebug.rules import EVENTS
from tests.filters.scripts import SCRIPTS, ours, prepare, theirs
from tests.peers.qemu_img import qemu_img

DIFFERENT = {
    ("*", "flush_to_disk"): "qemu-io says nothing when a flush fails",
    ("*", "cluster_free"): "clusters are freed at another time: here when the map without them is durable",
    ("data", "refblock_load"): "here refcounts are looked at before a cluster is overwritten in place",
}

NEVER_HERE = {
    "l1_shrink_write_table", "l1_shrink_free_l2_clusters", "empty_image_prepare", "vmstate_load", "vmstate_save",
    "cor_write", "cluster_alloc_space", "pwritev_zero", "reftable_update", "reftable_grow", "refblock_update",
    "refblock_alloc_hookup", "refblock_alloc_write", "refblock_alloc_write_blocks", "refblock_alloc_write_table",
    "refblock_alloc_switch_table", "pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
}  # fmt: skip
"""Events that no script comes to."""


def _inject(path: Path, event: str) -> Path:
    path.write_text(f'[inject-error]\nevent = "{event}"\nonce = "on"\n')
    return path


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_error_at_each_event_fails_the_same_step(tmp_path: Path, name: str) -> None:
    script, differences, reached = SCRIPTS[name], [], set()
    for event in EVENTS:
        config = _inject(tmp_path / "config", event)
        found = []
        for run in (ours, theirs):
            prepare(script, tmp_path / "model", tmp_path / "work")
            found.append(run(script, tmp_path / "work", config))
            if run is ours and found[0] is not None:
                # In qcow2 the worst an error may leave is leaked clusters; exit code 3 says that and no more.
                done = qemu_img("check", "-q", str(tmp_path / "work" / "image"), check=False)
                assert done.returncode in (0, 3), event
            shutil.rmtree(tmp_path / "work")
        if found[0] is not None:
            reached.add(event)
        if found[0] != found[1] and not {("*", event), (name, event)} & set(DIFFERENT):
            differences.append((event, *found))
    assert not differences, "(event, step that fails here, step that fails in QEMU)"
    assert len(reached) >= 16 and not reached & NEVER_HERE

"""An error injected at an event fails the same step of a script in both programs, and never damages an image."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from diskwright.filters.blkdebug.rules import EVENTS
from tests.cli.run import diskwright
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


BREAKS = (
    "break write_aio A", "aio_write -P 5 0 64k", "wait_break A", "resume A", "aio_flush", "read -P 5 0 64k",
    "break read_aio B", "remove_break B", "read 0 4k", "resume B", "break rubbish C", "remove_break C",
    "break cluster_alloc D", "aio_write 1M 64k", "wait_break D", "resume D", "aio_flush",
)  # fmt: skip


def test_breakpoints_are_spoken_of_alike(tmp_path: Path) -> None:
    words = [word for command in BREAKS for word in ("-c", command)]
    told = []
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        qemu_img("create", "-q", "-f", "qcow2", str(tmp_path / name / "image"), "4M")
        line = [*words, "blkdebug::image"]
        if name == "ours":
            run = diskwright("io", *line, cwd=tmp_path / name)
            code, out = run.code, run.out
        else:
            done = subprocess.run(["qemu-io", *line], cwd=tmp_path / name, capture_output=True, text=True, check=False)
            code, out = done.returncode, done.stdout
        told.append((code, re.sub(r"; .* sec \(.*\)", "", out)))
    assert told[0] == told[1] and "Suspended request 'D'" in told[0][1]

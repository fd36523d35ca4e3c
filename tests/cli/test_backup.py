"""diskwright backup: full, incremental by a bitmap of the image, and what is refused."""

from __future__ import annotations

from pathlib import Path

from tests.cli.run import diskwright, qemu_img
from tests.jobs.chains import read_file


def test_a_full_backup_and_two_incremental_ones(tmp_path: Path) -> None:
    def ok(*words: str) -> str:
        found = diskwright(*words, cwd=tmp_path)
        assert (found.code, found.err) == (0, "")
        return found.out

    ok("create", "-q", "-f", "qcow2", "disk.qcow2", "4M")
    ok("bitmap", "--add", "disk.qcow2", "daily")
    ok("io", "-c", "write -P 1 0 1M", "disk.qcow2")
    ok("backup", "--sync", "full", "--bitmap", "daily", "disk.qcow2", "0.qcow2")
    moments = [read_file(str(tmp_path / "disk.qcow2"))]
    for day in (1, 2):
        ok("io", "-c", f"write -P {day + 1} {day}M 64k", "disk.qcow2")
        ok(
            "backup", "--bitmap", "daily", "-o", f"backing_file={day - 1}.qcow2,backing_fmt=qcow2",
            "disk.qcow2", f"{day}.qcow2",
        )  # fmt: skip
        moments.append(read_file(str(tmp_path / "disk.qcow2")))
    assert len(set(moments)) == 3
    for day, moment in enumerate(moments):
        assert read_file(str(tmp_path / f"{day}.qcow2")) == moment
        assert qemu_img("check", "-q", f"{day}.qcow2", cwd=tmp_path).code == 0
    # Only what was written that day is in that day's image.
    rows = diskwright("map", "--output=json", "2.qcow2", cwd=tmp_path).out
    assert rows.count('"depth": 0') == 1
    assert '"start": 2097152, "length": 65536, "depth": 0' in rows


def test_compressed_and_of_an_image_that_is_only_read(tmp_path: Path) -> None:
    assert diskwright("create", "-q", "-f", "raw", "disk.raw", "1M", cwd=tmp_path).code == 0
    (tmp_path / "disk.raw").write_bytes(b"abcd" * 262_144)
    (tmp_path / "disk.raw").chmod(0o444)
    found = diskwright("backup", "-f", "raw", "-O", "qcow2", "-c", "disk.raw", "copy", cwd=tmp_path)
    assert (found.code, found.out, found.err) == (0, "", "")
    assert (tmp_path / "copy").stat().st_size < 600_000
    assert read_file(str(tmp_path / "copy")) == b"abcd" * 262_144


def test_what_is_refused(tmp_path: Path) -> None:
    assert diskwright("create", "-q", "-f", "qcow2", "disk.qcow2", "1M", cwd=tmp_path).code == 0
    for words, text in (
        (("--bitmap", "nix"), "Could not back up 'disk.qcow2': Bitmap 'nix' could not be found"),
        (("--sync", "bitmap"), "must provide a valid bitmap name for 'bitmap' sync mode"),
        (("--bitmap-mode", "always"), "Cannot specify bitmap sync mode without a bitmap"),
        (("-c", "-O", "raw"), "Compression not supported"),
        (("-n",), "Could not open 'new'"),
    ):
        found = diskwright("backup", *words, "disk.qcow2", "new", cwd=tmp_path)
        assert found.code == 1
        assert text in found.err
        assert found.err.count("\n") == 1
        (tmp_path / "new").unlink(missing_ok=True)
    found = diskwright("backup", "disk.qcow2", "disk.qcow2", cwd=tmp_path)
    assert found.code == 1
    assert "destroy" in found.err

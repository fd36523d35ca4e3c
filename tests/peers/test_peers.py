"""The instruments themselves: each program starts, answers, fails when it should, and is gone afterwards."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.peers import MissingPeer, find, fio, libnbd, nbdkit, qemu_img, qemu_nbd
from tests.peers.process import PeerError, Server, short_folder
from tests.peers.qemu_storage_daemon import QemuStorageDaemon
from tests.peers.qmp import Qmp, QmpError

MIB = 1 << 20


def alive(pid: int) -> bool:
    """True while there is a process ``pid``."""
    return os.path.exists(f"/proc/{pid}")


def test_a_missing_program_is_named() -> None:
    with pytest.raises(MissingPeer, match="no-such-program"):
        find("no-such-program")


def test_a_server_that_does_not_start_tells_why() -> None:
    with pytest.raises(PeerError, match="nonexistent"):
        qemu_nbd.serve("/nonexistent/image.raw")
    with pytest.raises(PeerError, match="no-such-plugin"):
        nbdkit.serve("no-such-plugin")


def test_a_stopped_server_leaves_nothing(tmp_path: Path) -> None:
    with nbdkit.serve("memory", "1M") as server:
        pid, scratch = server.pid, server.scratch
        assert alive(pid) and os.path.exists(server.socket)
    assert not alive(pid) and not os.path.exists(scratch)


def test_socket_paths_are_short(sock_dir: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 90)))
    assert short_folder() == "/tmp"
    assert len(sock_dir) < 60
    server = Server("true")
    assert len(server.path("s")) < 60
    server.stop()


def test_qemu_img(tmp_path: Path) -> None:
    base = qemu_img.create(str(tmp_path / "base.qcow2"), "4M")
    top = qemu_img.create(str(tmp_path / "top.qcow2"), None, backing=base, cluster_size=4096, lazy_refcounts=True)
    assert qemu_img.info_json(top)["cluster-size"] == 4096
    qemu_img.qemu_io(top, "write -P 7 64k 8k")
    qemu_img.assert_clean(top)
    assert not qemu_img.compare(base, top)
    assert next(part for part in qemu_img.map_json(top) if part["data"])["start"] == 65536
    assert qemu_img.read_all(top, "qcow2", str(tmp_path))[65536:73728] == bytes([7]) * 8192
    with pytest.raises(PeerError, match="verification failed"):
        qemu_img.qemu_io(top, "read -P 8 64k 8k")
    with pytest.raises(PeerError, match="no-such"):
        qemu_img.info_json(str(tmp_path / "no-such"))


def test_a_damaged_image_is_reported(tmp_path: Path) -> None:
    image = qemu_img.create(str(tmp_path / "a.qcow2"), "4M")
    qemu_img.qemu_io(image, "write 0 1M")
    with open(image, "r+b") as file:
        file.seek(2 * 65536)  # the first refcount block: all clusters become free
        file.write(bytes(65536))
    assert qemu_img.check_json(image)["status"] == 2
    with pytest.raises(AssertionError, match="corruptions"):
        qemu_img.assert_clean(image)


def test_qemu_nbd_serves_several_clients(tmp_path: Path) -> None:
    image = qemu_img.create(str(tmp_path / "a.qcow2"), "4M")
    with qemu_nbd.serve(image, "qcow2", export="disk one") as server:
        code = "h.pwrite(b'x' * 512, 1024); h.flush(); print(h.get_size())"
        assert libnbd.run_snippet(server.uri, code).strip() == str(4 * MIB)
        assert libnbd.run_snippet(server.uri, "print(h.pread(512, 1024) == b'x' * 512)").strip() == "True"
        assert libnbd.info_json(server.uri)["exports"][0]["export-size"] == 4 * MIB
    qemu_img.qemu_io(image, "read -P 120 1024 512")


def test_libnbd_passes_on_what_goes_wrong() -> None:
    with nbdkit.serve("--filter=error", "memory", "1M", "error-pread-rate=1", "error=ENOSPC") as server:
        with pytest.raises(PeerError, match="No space left"):
            libnbd.run_snippet(server.uri, "h.pread(512, 0)")
        libnbd.run_snippet(server.uri, "h.pwrite(bytes(512), 0)")


def test_libnbd_copies_and_maps(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(b"\1" * MIB + bytes(MIB))
    with nbdkit.serve("memory", "2M") as server:
        libnbd.copy(str(source), server.uri)
        libnbd.copy(server.uri, str(tmp_path / "back.raw"))
        extents = libnbd.map_json(server.uri)
    assert (tmp_path / "back.raw").read_bytes() == source.read_bytes()
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [(0, MIB, 0), (MIB, MIB, 3)]


def test_nbdkit_outlives_a_short_lived_thread_elsewhere() -> None:
    with nbdkit.serve("memory", "1M") as server:
        thread = threading.Thread(target=libnbd.info_json, args=(server.uri,))
        thread.start()
        thread.join()
        assert alive(server.pid) and server.returncode is None


def test_fio_verifies_through_several_connections() -> None:
    with nbdkit.serve("memory", "4M") as server:
        job = fio.verify(server.uri, size=MIB, connections=4, depth=4)["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["io_bytes"] == 4 * MIB
    assert job["read"]["io_bytes"] == 4 * MIB


def test_fio_fails_when_the_server_loses_data() -> None:
    # The plugin is a shell script that accepts every write and forgets it.
    words = ("get_size=echo 1M", "pread=dd if=/dev/zero count=$3 iflag=count_bytes", "pwrite=cat >/dev/null")
    with nbdkit.serve("eval", *words, "can_write=") as server, pytest.raises(PeerError, match=r"verify|fio: status"):
        fio.verify(server.uri, size=65536, connections=1, depth=1)


def test_qemu_storage_daemon_over_qmp(tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(MIB))
    node = {"driver": "file", "node-name": "disk", "filename": str(raw)}
    with QemuStorageDaemon(node) as daemon:
        uri = daemon.serve_nbd("disk")
        libnbd.run_snippet(uri, "h.pwrite(b'y' * 512, 0); h.flush()")
        job = {"job-id": "job0", "driver": "null-co"}
        with pytest.raises(QmpError, match="GenericError"):
            daemon.qmp.execute("blockdev-add", job)
        daemon.qmp.execute("blockdev-add", driver="null-co", node_name="nil", size=MIB, read_zeroes=True)
        daemon.qmp.execute("blockdev-mirror", job_id="job0", device="disk", target="nil", sync="full")
        daemon.qmp.wait_event("BLOCK_JOB_READY", 30, lambda data: data["device"] == "job0")
        daemon.qmp.execute("job-cancel", id="job0")
        daemon.qmp.wait_job("job0", "concluded", 30)
        with pytest.raises(TimeoutError, match="NO_SUCH_EVENT"):
            daemon.qmp.wait_event("NO_SUCH_EVENT", 0.05)
        daemon.qmp.close()  # its socket serves one client at a time
        with Qmp(daemon.qmp_socket) as other:
            assert other.execute("query-version")["qemu"]["major"] >= 5
    assert raw.read_bytes()[:512] == b"y" * 512

"""Metadata contexts: what block status tells of depth and of dirty bitmaps, to our client and to others'."""

from __future__ import annotations

import itertools
import random
from contextlib import closing
from pathlib import Path

import pytest

from diskwright.core import bitmaps
from diskwright.core.bitmap import DirtyBitmap
from diskwright.core.graph import Graph
from diskwright.errors import GraphError
from diskwright.exports.nbd import NbdExport
from diskwright.exports.nbd.contexts import AllocationDepth, BaseAllocation, DirtyRuns, Look, dirty_runs
from tests.exports.nbd.client import MIB, REQ_ONE, STATUS, Client, serving
from tests.peers import libnbd
from tests.peers.process import run

SIZE = 4 * MIB
DEPTH, BITMAP = "qemu:allocation-depth", "qemu:dirty-bitmap:b"


@pytest.fixture
def chain(tmp_path: Path) -> str:
    """base <- top, both with data of their own; top has a bitmap b with 1 MiB to 1.25 MiB dirty, disabled."""
    base, top = str(tmp_path / "base.qcow2"), str(tmp_path / "top.qcow2")
    run("qemu-img", "create", "-f", "qcow2", base, str(SIZE))
    run("qemu-io", "-f", "qcow2", "-c", "write 0 128k", "-c", "write -z 3M 64k", base)
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    run("qemu-img", "bitmap", "--add", "-g", "64k", top, "b")
    run("qemu-io", "-f", "qcow2", "-c", "write 1M 256k", top)
    run("qemu-img", "bitmap", "--disable", top, "b")
    return top


def test_several_contexts_in_one_reply(chain: str, sock_dir: str) -> None:
    with closing(Graph()) as graph:
        disk = graph.disk(graph.open(chain, driver="qcow2", writable=True))
        dirty = dirty_runs(disk.node, "b", read_only=False)
        export = NbdExport("", disk, contexts=(BaseAllocation(), AllocationDepth(), dirty))
        names = ("base:allocation", DEPTH, BITMAP)
        with serving(export, folder=sock_dir) as served:
            with Client(served.path, structured=True, contexts=names) as client:
                assert client.ids == {name: number for number, name in enumerate(names, 1)}
                reply = client.ask(STATUS, 0, SIZE)
                assert reply.chunks == (5, 5, 5)
                k64, k128, k256 = MIB // 16, MIB // 8, MIB // 4
                assert client.status[2] == (
                    (k128, 2), (MIB - k128, 0), (k256, 1), (2 * MIB - k256, 0), (k64, 2), (MIB - k64, 0)
                )  # fmt: skip
                assert client.status[3] == ((MIB, 0), (k256, 1), (3 * MIB - k256, 0))
                assert sum(length for length, _ in client.status[1]) == SIZE
                # Requests that begin and end amid runs; and one run only.
                reply = client.ask(STATUS, MIB + 512, 1024)
                assert client.status == {1: ((1024, 0),), 2: ((1024, 1),), 3: ((1024, 1),)}
                reply = client.ask(STATUS, MIB // 2, SIZE // 2, flags=REQ_ONE)
                assert client.status[3] == ((MIB // 2, 0),) and len(client.status[2]) == 1
            with Client(served.path, structured=True, contexts=(BITMAP, "qemu:nothing")) as client:
                assert client.ids == {BITMAP: 3}
                assert client.ask(STATUS, 0, SIZE).chunks == (5,)
            with Client(served.path, structured=True, contexts=("qemu:",)) as client:
                assert client.ids == {} and client.ask(STATUS, 0, SIZE).error == 22
            assert [(run["offset"], run["length"], run["type"]) for run in libnbd.map_json(served.uri, BITMAP)] == [
                (0, MIB, 0), (MIB, MIB // 4, 1), (MIB + MIB // 4, 3 * MIB - MIB // 4, 0)
            ]  # fmt: skip
            assert [run["type"] for run in libnbd.map_json(served.uri, DEPTH)] == [2, 0, 1, 0, 2, 0]
            options = f"driver=nbd,server.type=unix,server.path={served.path},x-dirty-bitmap={BITMAP}"
            listed = run("qemu-img", "map", "--output=json", "--image-opts", options).stdout
            assert '"start": 1048576, "length": 262144' in listed
        dirty.release()
        disk.close()


def test_a_bitmap_is_held_while_it_is_exported(chain: str) -> None:
    with closing(Graph()) as graph:
        node = graph.open(chain, driver="qcow2", writable=True)
        held = dirty_runs(node, "b", read_only=False)
        for forbidden in (bitmaps.clear, bitmaps.remove, bitmaps.enable):
            with pytest.raises(GraphError, match="in use"):
                forbidden(node, "b")
        with pytest.raises(GraphError, match="in use"):
            dirty_runs(node, "b", read_only=False)
        held.release()
        bitmaps.enable(node, "b")
        with pytest.raises(GraphError, match="Enabled bitmap 'b' incompatible with readonly export"):
            dirty_runs(node, "b", read_only=True)
        dirty_runs(node, "b", read_only=False).release()
        with pytest.raises(GraphError, match="Bitmap 'c' is not found"):
            dirty_runs(node, "c", read_only=False)


def test_a_bitmap_of_a_backing_image_is_found(chain: str, tmp_path: Path) -> None:
    over = str(tmp_path / "over.qcow2")
    run("qemu-img", "create", "-f", "qcow2", "-b", chain, "-F", "qcow2", over)
    with closing(Graph()) as graph:
        found = dirty_runs(graph.open(over, driver="qcow2"), "b", read_only=True)
        assert found.name == BITMAP
        found.release()


def test_an_enabled_bitmap_goes_on_recording(sock_dir: str, tmp_path: Path) -> None:
    image = str(tmp_path / "a.qcow2")
    run("qemu-img", "create", "-f", "qcow2", image, str(SIZE))
    with closing(Graph()) as graph:
        disk = graph.disk(graph.open(image, driver="qcow2", writable=True))
        bitmaps.add(disk.node, "b", 65536)
        dirty = dirty_runs(disk.node, "b", read_only=False)
        with (
            serving(NbdExport("", disk, contexts=(BaseAllocation(), dirty)), folder=sock_dir) as served,
            Client(served.path, structured=True, contexts=(BITMAP,)) as client,
        ):
            assert client.ask(STATUS, 0, SIZE).extents == ((SIZE, 0),)
            assert client.write(100000, bytes(range(256))) == 0
            assert client.ask(STATUS, 0, SIZE).extents == ((65536, 0), (65536, 1), (SIZE - 131072, 0))
        dirty.release()
        disk.close()


@pytest.mark.parametrize("seed", range(4))
def test_runs_agree_with_the_bits(seed: int) -> None:
    """For random bitmaps and requests, with few descriptors and with many."""
    rng = random.Random(seed)
    size, granularity = 1_000_000, 512
    bitmap = DirtyBitmap(size, granularity)
    for _ in range(200):
        at = rng.randrange(size)
        bitmap.mark(at, min(rng.choice((1, 600, 20000)), size - at))
    context = DirtyRuns(bitmap, "b")
    for _ in range(300):
        offset = rng.randrange(size)
        length = rng.randrange(1, size - offset + 1)
        most = rng.choice((1, 2, 5, 4096))
        runs = context.runs(Look(None, offset, length, most))  # type: ignore[arg-type]
        assert 1 <= len(runs) <= most
        assert all(one[1] != two[1] for one, two in itertools.pairwise(runs))
        told = sum(run for run, _ in runs)
        assert told == length or (told < length and len(runs) == most)
        at = offset
        for run_length, state in runs:
            assert run_length > 0
            granules = range(at // granularity, (at + run_length - 1) // granularity + 1)
            assert all(bitmap.get(granule * granularity) == bool(state) for granule in granules)
            at += run_length

"""The same load from fio's own NBD engine: another program's word on what the load generator found."""

from __future__ import annotations

from tests.peers.fio import fio

from bench.rounds import Sample
from bench.servers import NbdServer
from bench.settings import Settings


def fio_turn(
    server: NbdServer, write: bool, block: int, depth: int, connections: int, size: int, settings: Settings
) -> Sample:
    """One turn with fio in place of the load generator. fio keeps ``depth`` requests in flight on each connection."""
    order = ("" if block > 65536 else "rand") + ("write" if write else "read")
    seconds = max(1, round(settings.seconds))
    words = [f"rw={order}", f"bs={block}", f"iodepth={depth}", f"size={size}", "time_based", f"runtime={seconds}"]
    words += ["ramp_time=200ms", "randrepeat=1", "norandommap", "refill_buffers=0", "scramble_buffers=0"]
    report = fio(server.uri, *words, connections=connections)
    part = report["jobs"][0]["write" if write else "read"]
    rate = float(part["iops"])
    return Sample(rate * block / (1 << 20) if block > 65536 else rate)

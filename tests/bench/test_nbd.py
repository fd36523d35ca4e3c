"""The NBD benchmark as a whole, small: it has figures of who serves right, and none of who does not."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from bench.report import Report
from bench.servers import KINDS, Kind
from bench.settings import QUICK, Settings
from bench.workspace import NoRoom, machine, require_room, subfolder, workspace

from bench import nbd

SMALL = replace(QUICK, rounds=1, warm_up=0.01, seconds=0.05, disk=8 << 20, match="raw, 4 KiB random write, depth 16")
PEER = KINDS[0]
STOPPED = Kind("stopped", ("raw",), lambda image, fmt, socket: ["qemu-nbd", "-t", "-f", fmt, "-k", socket, image + "x"])
# It answers every write with success and forgets it.
FORGETS = Kind("forgets", ("raw",), lambda image, fmt, socket: ["nbdkit", "-f", "-U", socket, *_cow(image)])


def _cow(image: str) -> list[str]:
    return ["--filter=cow", "file", image]


def figures(monkeypatch: pytest.MonkeyPatch, folder: str, settings: Settings, *kinds: Kind) -> Report:
    monkeypatch.setattr(nbd, "KINDS", kinds)
    report = Report({}, {})
    nbd.run(settings, folder, report)
    return report


def test_figures_and_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sock_dir: str
) -> None:
    report = figures(monkeypatch, sock_dir, SMALL, PEER, STOPPED, FORGETS)
    part = report.results["nbd raw"]
    assert list(report.results) == ["nbd raw"]  # nothing else matches
    assert [case["case"] for case in part["cases"]] == [
        "4 KiB random write, depth 16, 1 conn.",
        "4 KiB random write, depth 16, 4 conn.",
    ]
    for case in part["cases"]:
        assert len(case["rounds"][PEER.name]) == 1 and case["rounds"][PEER.name][0] > 0
        assert case["server_cpu_us_per_request"]["forgets"] is None  # its image held none of the writes
        assert case["rounds"]["stopped"] == []
    assert sorted(part["failures"]) == ["forgets", "stopped"]
    assert any("forgets" in text and "wrong data" in text for text in report.failures)
    assert any("stopped" in text and "No such file" in text for text in report.failures)
    assert part["peak_bytes"][PEER.name] > 1 << 20
    assert "| 4 KiB random write, depth 16, 4 conn., 1/s |" in capsys.readouterr().out
    path = os.path.join(sock_dir, "json")
    report.write_json(path)
    with open(path, encoding="utf-8") as file:
        assert json.load(file)["results"]["nbd raw"] == json.loads(json.dumps(part))
    assert os.listdir(sock_dir) == ["json"]


def test_the_working_folder_goes_whatever_happens(sock_dir: str) -> None:
    with pytest.raises(NoRoom, match="--dir"), workspace(sock_dir) as folder, subfolder(folder, "part"):
        assert machine(folder)["file system"] != "unknown"
        require_room(folder, 1 << 60)
    assert os.listdir(sock_dir) == []

"""What all tests share: programs of others, short socket paths, and the proof that nothing is left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from tests import leaks
from tests.peers import MissingPeer, find
from tests.peers.process import short_folder
from tools import setup

IN_CI = os.environ.get("CI", "") not in ("", "0", "false")
LONG = os.environ.get("DISKWRIGHT_LONG", "") not in ("", "0")

# A shared machine is slow at times, so no time limit; the same examples each time, so that a failure can be repeated.
_COMMON = hypothesis.settings(deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("default", parent=_COMMON, derandomize=True, database=None)
hypothesis.settings.register_profile("long", parent=_COMMON, max_examples=3000)
hypothesis.settings.load_profile("long" if LONG else "default")


def pytest_configure(config: pytest.Config) -> None:
    """Refuses to start in CI without all peers, since a test may skip by itself for want of one."""
    missing = setup.missing_packages(setup.NEEDS["test"]) if IN_CI else []
    if missing:
        raise pytest.UsageError(f"CI without {', '.join(missing)}: run tools/setup.py test")
    # Marks this process's environment, which every process that a test starts inherits.
    config.stash[leaks.SESSION] = leaks.Session()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the guests in one worker, one after the other, and campaigns out of the ordinary run."""
    for item in items:
        if item.get_closest_marker("guest"):
            item.add_marker(pytest.mark.xdist_group("guest"))
        if item.get_closest_marker("long") and not LONG:
            item.add_marker(pytest.mark.skip(reason="a longer campaign: make test-long"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """A peer missing in a fixture."""
    with _missing_peer_skips():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A peer missing in a test."""
    with _missing_peer_skips():
        return (yield)


class _missing_peer_skips:
    """Turns MissingPeer into a skip. In CI it stays an error: there every peer has to be."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MissingPeer) and not IN_CI:
            pytest.skip(str(error))


@pytest.fixture
def peer() -> Callable[[str], str]:
    """A function that returns a program's path; without the program the test is skipped, or in CI fails."""
    return find


@pytest.fixture
def sock_dir() -> Iterator[str]:
    """A folder whose path is short enough for unix sockets in it (the limit is 107 bytes)."""
    path = tempfile.mkdtemp(prefix="dw", dir=short_folder())
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a process, a thread or an open file. Fixtures of wider scope may keep theirs."""
    before = leaks.Snapshot()
    yield
    report = getattr(request.node, "_dw_failed", False)
    left = before.left(files=not report)  # the traceback of a failed test keeps its files open
    if left:
        pytest.fail("left behind: " + "; ".join(left), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Notes on a test that it failed."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.failed:
        item._dw_failed = True  # type: ignore[attr-defined]
    return report  # type: ignore[return-value]


@pytest.hookimpl(tryfirst=True)  # before the run's temporary folder is removed
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Looks for what the whole run left on the machine: each worker for its own, the controller for what it hears."""
    base = str(session.config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
    workers = bool(getattr(session.config.option, "numprocesses", None))  # they look for processes themselves
    left = session.config.stash[leaks.SESSION].left(base, processes=not workers)
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["leaks"] = left
        return
    left = sorted({*left, *session.config.stash.get(leaks.FROM_WORKERS, [])})
    if left:
        session.config.stash[leaks.FROM_WORKERS] = left
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Hears from a worker that has ended."""
    config: pytest.Config = node.config  # type: ignore[attr-defined]
    found = getattr(node, "workeroutput", {}).get("leaks", [])
    config.stash[leaks.FROM_WORKERS] = config.stash.get(leaks.FROM_WORKERS, []) + found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Names what was left."""
    left = config.stash.get(leaks.FROM_WORKERS, [])
    if left:
        terminalreporter.section("left behind by the tests", red=True)
        for line in left:
            terminalreporter.line(line)

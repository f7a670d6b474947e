"""A pytest plugin for ``make gpu``: some of the tests, what is urgent first, until a deadline; every outcome is written
as soon as it is known.

Loaded with ``-p outcomes`` and steered by the environment:

    FAIRKERNELS_SHARE      "3/12": the fourth of twelve processes that share the tests
    FAIRKERNELS_OUTCOMES   a file of lines of JSON; tests that began according to it are not run again
    FAIRKERNELS_DEADLINE   when no further test begins, in seconds on the clock of time.time()

A process whose GPU refuses to work after a failed test ends at once, with the exit code ``LOST``: nothing that follows
would mean anything. Started again it goes on behind that test.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

LOST = 70


def pytest_configure(config: pytest.Config) -> None:
    number, _, count = os.environ["FAIRKERNELS_SHARE"].partition("/")
    path, deadline = Path(os.environ["FAIRKERNELS_OUTCOMES"]), float(os.environ["FAIRKERNELS_DEADLINE"])
    config.pluginmanager.register(Outcomes(int(number), int(count), path, deadline))


class Outcomes:
    def __init__(self, number: int, count: int, path: Path, deadline: float) -> None:
        self.number, self.count, self.deadline = number, count, deadline
        self.began = set(began(path))
        self.file = path.open("a", buffering=1)
        self.file.write("\n")  # the last line may have been cut short
        self.failed = False

    def write(self, **line: Any) -> None:
        self.file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        mine = [item for item in items if zlib.crc32(topic(item).encode()) % self.count == self.number]
        if not self.began:
            self.write(collected=len(mine))
        items[:] = sorted((item for item in mine if item.nodeid not in self.began), key=urgency)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.number == 0:
            self.write(test=report.nodeid, outcome="failed", why=last_line(report.longreprtext))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(began=nodeid)
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.write(test=report.nodeid, outcome=report.outcome, why=why(report), seconds=round(report.duration, 3))
        if report.failed:
            self.write(traceback=report.longreprtext[-5000:], of=report.nodeid)
            self.failed = True

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.time() > self.deadline:
            item.session.shouldstop = "the deadline has come"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.failed and gpu_is_lost():
            self.write(lost=nodeid)
            self.file.close()
            os._exit(LOST)


def began(path: Path) -> Iterator[str]:
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            if line and "began" in (found := json.loads(line)):
                yield found["began"]


def topic(item: pytest.Item) -> str:
    """What tests of the same call have in common: kernels are compiled for it once, by one process."""
    return item.nodeid.partition("[")[2] or item.nodeid


def urgency(item: pytest.Item) -> tuple[bool, bool, bool]:
    """Slow tests last; what has to be compiled first behind what has not; float32 before the other dtypes."""
    other = any(dtype in item.nodeid for dtype in ("float64", "float16"))
    return item.get_closest_marker("slow") is not None, "triton" in item.nodeid, other


def gpu_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def why(report: pytest.TestReport) -> str:
    """In one line."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.partition("\n")[0] if crash else last_line(report.longreprtext)


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")

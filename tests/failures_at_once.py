"""A plugin of pytest that prints what fails as it fails, for a run that may be stopped: `-p tests.failures_at_once`."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\nFAILED {report.nodeid} in {report.when}\n{report.longreprtext[-2000:]}", flush=True)

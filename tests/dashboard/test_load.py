"""The dashboard's benchmark runs, on so few runs and events that it measures nothing."""

import sys

import pytest

import dashboard_load
from browser import launched

pytestmark = pytest.mark.browser


def test_benchmark_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with launched():
        pass  # else it is skipped
    monkeypatch.setattr(dashboard_load, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(dashboard_load, "TIMED_EVENTS", 2)
    arguments = ["--runs", "4", "--events", "300", "--small", "40"]
    monkeypatch.setattr(sys, "argv", ["dashboard_load.py", *arguments])
    dashboard_load.main()
    printed = capsys.readouterr().out
    assert "list of 4 runs painted, again" in printed
    assert "event to page, slowest" in printed

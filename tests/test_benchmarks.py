"""The benchmarks run, on hosts and for times too small to measure anything."""

import importlib
import sys
from typing import Any

import pytest

SMALL = {"WIDTH": 8, "BATCH": 2, "SIDE": 8}


@pytest.mark.parametrize(
    ("name", "arguments", "changes", "row"),
    [
        ("slot_overhead", ("--steps", "4"), {**SMALL, "BLOCK_STEPS": 2}, "blended"),
        (
            "isolation_monitor",
            ("--intervals", "1"),
            {"CHECKS": 2, "CALLS": 2, "WARM_UP_STEPS": 1, "DEFAULT_INTERVAL_STEPS": 3, **SMALL},
            "blended",
        ),
        ("snapshot_cost", ("--tasks", "teacher", "--steps", "8"), {"TURN_STEPS": 2}, "teacher"),
    ],
)
def test_a_benchmark_prints_its_table(
    name: str,
    arguments: tuple[str, ...],
    changes: dict[str, Any],
    row: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    modules = [importlib.import_module(name), importlib.import_module("slot_overhead")]
    for constant, value in changes.items():
        for module in modules:
            if hasattr(module, constant):
                monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    modules[0].main()
    printed = capsys.readouterr().out
    assert row in printed
    assert "nan" not in printed

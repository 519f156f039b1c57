"""The benchmarks run, on hosts and for times too small to measure anything."""

import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch

from redis_server import NO_SERVER, PROGRAM

SMALL = dict(CHANNELS=8, IMAGES=2, SIDE=8, WIDTH=16, TOKENS=8, SEQUENCES=2, DEPTH=3)  # noqa: C408
SMALL_SLOT_OVERHEAD = {**SMALL, "BLOCK_STEPS": 2, "CALLS": 2, "ROUNDS": 3, "BACKEND": "eager"}
needs_transformers = pytest.mark.skipif(
    not find_spec("transformers"), reason="needs esper-lite[hf]"
)
on_redis = [
    pytest.mark.redis,
    pytest.mark.skipif(which(PROGRAM) is None, reason=NO_SERVER),
]

pytestmark = [
    # torch's own tracer instantiates, and looks at, what it warns of
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def on(host: str, *arguments: str, row: str = "blended") -> tuple[Any, ...]:
    """Return slot_overhead's case on one host."""
    return "slot_overhead", ("--steps", "4", "--host", host, *arguments), SMALL_SLOT_OVERHEAD, row


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "arguments", "changes", "row"),
    [
        on("cnn", row="a dormant slot's call"),
        on("cnn", "--compile", "whole"),
        on("decoder", "--compile", "regional"),
        pytest.param(*on("llama", "--compile", "regional"), marks=needs_transformers),
        ("telemetry_cost", ("--steps", "20"), {**SMALL, "BLOCK_STEPS": 10}, "after_step"),
        (
            "compile_lifecycle",
            (
                "--host",
                "cnn",
                "--backend",
                "eager",
                "--slots",
                "1",
                "--epochs",
                "4",
                "--germinations",
                "2",
            ),
            {"STEADY_STEPS": 2, **SMALL},
            "2 germinations over 4 slots",
        ),
        (
            "isolation_monitor",
            ("--intervals", "1"),
            {"CHECKS": 2, "CALLS": 2, "WARM_UP_STEPS": 1, "DEFAULT_INTERVAL_STEPS": 3, **SMALL},
            "blended",
        ),
        ("snapshot_cost", ("--tasks", "teacher", "--steps", "8"), {"TURN_STEPS": 2}, "teacher"),
        ("host_parallelism", ("--quick",), {}, "under the random policy: "),
        ("policies", ("--quick", "--tasks", "digits", "--seeds", "2"), {}, "policy-digits/policy"),
        pytest.param(
            *("bus_priority", ("--emergencies", "3"), {}, "one stream for both"), marks=on_redis
        ),
        pytest.param(
            "bus_throughput",
            ("--events", "500", "--rounds", "1", "--steps", "5"),
            {"REMEMBERED": (100, 500)},
            "at once, with storing",
            marks=on_redis,
        ),
    ],
)
def test_a_benchmark_prints_its_table(
    name: str,
    arguments: tuple[str, ...],
    changes: dict[str, Any],
    row: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    modules = [importlib.import_module(part) for part in (name, "slot_overhead", "speed_hosts")]
    for constant, value in changes.items():
        for module in modules:
            if hasattr(module, constant):
                monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    modules[0].main()
    printed = capsys.readouterr().out
    assert row in printed
    assert "nan" not in printed

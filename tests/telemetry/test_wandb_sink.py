"""What W&B has written of a run in offline mode, read from its own file."""

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from esper.telemetry import WandbSink
from tracked_run import CONFIG, PRUNED, SLOT, tell_run

BLOCK_BYTES, FILE_HEADER_BYTES, HEADER_BYTES = 32_768, 7, 7
WHOLE, LAST = 1, 4


def records(folder: Path) -> list[Record]:
    """Return what the file of a finished run holds; W&B's process may still be at its end."""
    (file,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 30.0
    while True:
        found = list(parsed(file.read_bytes()))
        if any(record.HasField("exit") for record in found):
            return found
        assert time.monotonic() < deadline, "W&B has not written the end of the run"
        time.sleep(0.01)


def parsed(content: bytes) -> Iterator[Record]:
    """Yield W&B's records, which are kept as LevelDB keeps its log."""
    place, parts = FILE_HEADER_BYTES, b""
    while place + HEADER_BYTES <= len(content):
        if BLOCK_BYTES - place % BLOCK_BYTES < HEADER_BYTES:
            place += BLOCK_BYTES - place % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += HEADER_BYTES
        parts += content[place : place + length]
        place += length
        if kind in (WHOLE, LAST):
            yield Record.FromString(parts)
            parts = b""


def runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return what was logged, call by call."""
    return [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records(folder)
        if record.HasField("history")
    ]


def values(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows(folder) if name in row]


def identity(folder: Path) -> tuple[str, str, str]:
    (run,) = [record.run for record in records(folder) if record.HasField("run")][:1]
    return run.run_id, run.project, run.display_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which everything was told, and that was resumed once."""
    folder = tmp_path_factory.mktemp("run")
    with WandbSink(folder, project="growth", name="first", config=CONFIG) as sink:
        tell_run(sink, PRUNED)
    with WandbSink(folder, project="growth", name="first", config=CONFIG, after_step=30) as resumed:
        resumed.measure(4, 40, {"loss": 0.25})
    assert resumed.run.id == sink.run.id
    return folder


def test_values_are_logged_by_step(folder: Path) -> None:
    first, _ = runs(folder)
    (_, start), (step, nan), (_, last) = values(first, "loss")
    assert (start, step, last) == (1.0, 20, 0.5)
    assert math.isnan(float(nan))
    assert values(first, "top-5 %") == [(20, 0.5)]
    assert values(first, f"slots/{SLOT}/alpha") == [(10, 0.0), (14, 1.0), (20, 0.0)]
    assert values(first, f"slots/{SLOT}/stage") == [(10, 3.0)]
    assert values(first, "param_count") == [(0, 97.0), (30, 120.0)]
    assert values(first, "test/loss") == [(30, 0.25)]


def test_charts_are_drawn_over_the_step(folder: Path) -> None:
    (metric,) = [
        record.metric for record in records(runs(folder)[0]) if record.metric.glob_name == "*"
    ]
    assert metric.step_metric == "step"


def test_notable_events_are_a_table_and_critical_ones_alerts(folder: Path) -> None:
    first, _ = runs(folder)
    tables = sorted((first / "files" / "media" / "table").glob("events_*.json"))
    newest = json.loads(max(tables, key=lambda path: int(path.name.split("_")[1])).read_text())
    assert newest["columns"] == ["epoch", "step", "priority", "type", "text"]
    kinds = {row[3]: row for row in newest["data"]}
    assert set(kinds) == {"step_skipped", "seed_pruned"}
    assert kinds["seed_pruned"][:3] == [1, 20, "normal"]
    assert kinds["seed_pruned"][4] == "norm pruned from layer.0: no use"
    alerts = [record.alert for record in records(first) if record.HasField("alert")]
    assert [alert.title for alert in alerts] == ["esper: step_skipped"]


def test_settings_are_the_config(folder: Path) -> None:
    settings: dict[str, Any] = {}
    for record in records(runs(folder)[0]):
        for change in (record.run.config, record.config):
            for item in change.update:
                settings[item.key or item.nested_key[0]] = json.loads(item.value_json)
    assert settings["task"] == "quadratic"
    assert settings["threads"] is None
    assert settings["trainer"] == {"epochs": 3}


def test_a_resumed_run_is_the_same_run(folder: Path) -> None:
    first, second = runs(folder)
    assert identity(first) == identity(second)
    assert identity(first)[1:] == ("growth", "first")
    assert values(second, "loss") == [(40, 0.25)]


@pytest.mark.parametrize(("error", "code"), [(None, 0), (ZeroDivisionError, 1)])
def test_exit_code_says_how_the_run_ended(
    tmp_path: Path, error: type[Exception] | None, code: int
) -> None:
    if error is None:
        WandbSink(tmp_path).close()
    else:
        with pytest.raises(error), WandbSink(tmp_path):
            raise error
    (run,) = runs(tmp_path)
    (end,) = [record.exit for record in records(run) if record.HasField("exit")]
    assert end.exit_code == code

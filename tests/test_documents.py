"""What README and docs say runs, and is complete."""

import dataclasses
import importlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic_core import PydanticUndefined

from esper.experiments import RunConfig, load_run_config, prepare
from esper.experiments.config import BusConfig, CheckpointConfig, CompileConfig, task_defaults
from esper.experiments.settings import known_keys
from esper.lifecycle.events import Event
from esper.lifecycle.gates import GATE_INTO, GateThresholds
from esper.lifecycle.record import Record
from esper.policies.growth_schedule import GrowthScheduleConfig
from esper.policies.heuristic import HeuristicConfig
from esper.slots.config import SlotConfig
from esper.supervision.config import keys_and_defaults
from esper.tasks import OWN_SCHEME, SCHEMES, TASKS, Task, TaskSetup
from esper.tasks.collection.address import Address
from esper.tasks.digits import DIGITS
from esper.telemetry import RunReader
from esper.telemetry.tracking import TrackingConfig
from esper.training import GovernorConfig, TrainerConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RESULTS.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_run_in_order(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(BLOCK.findall(document.read_text(encoding="utf-8"))):
        exec(compile(block, f"{document.name}, block {number}", "exec"), namespace)


def test_readme_example_is_short_enough_to_read() -> None:
    first = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    code = [line for line in first.splitlines() if line.strip()]
    assert len(code) <= 30


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, section in LINK.findall(page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if section:
            assert section in sections(linked), f"{target}#{section}"


def sections(page: Path) -> list[str]:
    """What a page's headings are called in links, as GitHub has it."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_loop_page_shows_every_event_and_gate() -> None:
    page = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")
    union = get_args(Event)[0]
    missing = [kind.__name__ for kind in get_args(union) if kind.__name__ not in page]
    assert not missing
    for stage, gate in GATE_INTO.items():
        assert f"| {stage.name} | {gate} |" in page


TABLE = re.compile(r"^\| (?:key|setting) \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)
SECTIONS: dict[str, tuple[str, type[Record]]] = {
    "": ("settings.md", RunConfig),
    "trainer.": ("settings.md", TrainerConfig),
    "trainer.governor.": ("settings.md", GovernorConfig),
    "compile.": ("settings.md", CompileConfig),
    "bus.": ("settings.md", BusConfig),
    "checkpoint.": ("checkpoints.md", CheckpointConfig),
    "tracking.": ("tracking.md", TrackingConfig),
    "slot.": ("loop.md", SlotConfig),
    "slot.thresholds.": ("gates.md", GateThresholds),
    "heuristic.": ("policies.md", HeuristicConfig),
    "growth_schedule.": ("growth_schedule.md", GrowthScheduleConfig),
}
"""The settings of a run, by their prefix: which page has the table, and of what."""


def keys_in_tables(page: str) -> dict[str, str]:
    """What a page's tables say is the default of each key."""
    found: dict[str, str] = {}
    for table in TABLE.findall((ROOT / "docs" / page).read_text(encoding="utf-8")):
        for row in table.splitlines():
            first, second = row.strip("|").split(" | ")[:2]
            keys = re.findall(r"`([\w.]+=?)`", first)
            told = second.strip().split(", ") if len(keys) > 1 else [second.strip()]
            assert not found.keys() & keys, row
            found |= zip(keys, told, strict=True)
    return found


def in_words(value: Any, *, needed: str = "") -> str:
    """How a table tells a default."""
    if value in (..., PydanticUndefined):
        return needed
    if value is None:
        return "none"
    if isinstance(value, bool | tuple | dict):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_every_setting_of_a_run_is_in_a_table_with_its_default() -> None:
    fields: list[str] = []
    pages: dict[str, set[str]] = {}
    for prefix, (page, record) in SECTIONS.items():
        told = keys_in_tables(page)
        for name, field in record.model_fields.items():
            key = f"{prefix}{name}"
            if f"{key}." in SECTIONS:
                continue
            fields.append(key)
            default = field.get_default(call_default_factory=True)
            shown = key if key in told else name
            pages.setdefault(page, set()).add(shown)
            assert told[shown].replace("–", "none") == in_words(default, needed="the task's"), key
    assert sorted(fields) == sorted(known_keys(RunConfig))
    for page, shown in pages.items():
        assert set(keys_in_tables(page)) - {"thresholds"} == shown, page


def test_settings_page_says_what_a_task_brings() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    told = re.findall(
        r"`([\w.]+)`", page.partition("A task brings its own")[2].partition(" All\n")[0]
    )
    brought = task_defaults(DIGITS)
    trainer = [f"trainer.{name}" for name in brought.pop("trainer")]
    assert sorted(told) == sorted([*brought.keys() - {"task"}, *trainer])


def test_every_key_of_the_file_of_serve_is_in_a_table_with_its_default() -> None:
    expected = {key: in_words(value, needed="needed") for key, value in keys_and_defaults()}
    assert keys_in_tables("operate.md") == expected


def test_tasks_page_names_all_that_a_task_and_an_address_take() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    for kind in (Task, TaskSetup):
        table = page.partition(f"| of `{kind.__name__}` |")[2].partition("\n\n")[0]
        shown = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
        names = [name for first in shown for name in re.findall(r"`(\w+)`", first)]
        assert sorted(names) == sorted(field.name for field in dataclasses.fields(kind))
    settings = {f"{field.name}=" for field in dataclasses.fields(Address)} - {"scheme=", "name="}
    assert set(keys_in_tables("tasks.md")) == settings
    for name in (*TASKS, *SCHEMES, OWN_SCHEME):
        assert f"`{name}`" in page


def test_the_task_of_the_tasks_page_is_found_and_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = BLOCK.findall((ROOT / "docs" / "tasks.md").read_text(encoding="utf-8"))
    (tmp_path / "ring.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "ring", raising=False)
    config = load_run_config("python:ring:TASK", None, ["trainer.epochs=9"], {})
    run = prepare(config)
    *_, last = run.reports
    assert last.epoch == 9
    assert run.finish().keys() == {"loss", "accuracy"}
    assert run.growth.state().param_count > 42, "the page says how many the host has alone"


KILLED = """
import os, runpy, signal
from esper.training import Checkpoints
after_epoch = Checkpoints.after_epoch
def kill_after_last(checkpoints, trainer):
    if trainer.epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    after_epoch(checkpoints, trainer)
Checkpoints.after_epoch = kill_after_last
runpy.run_path("mine.py")
"""


def test_the_script_of_the_checkpoints_page_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """Its folder tells of one run then, the same as if it had never been killed."""
    source, *_ = BLOCK.findall((ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8"))
    starts = {"whole": [["mine.py"]], "killed": [["-c", KILLED], ["mine.py"]]}
    codes, told = {}, {}
    for name, all_arguments in starts.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.py").write_text(source, encoding="utf-8")
        codes[name] = [
            subprocess.run([sys.executable, *arguments], cwd=folder, check=False).returncode
            for arguments in all_arguments
        ]
        reader = RunReader(folder / "runs" / "mine")
        events = [(record.step, record.event.type) for record in reader.events()]
        losses = [(row.step, row.name, row.value) for row in reader.metrics(name="loss")]
        told[name] = reader.standing, events, losses
    assert codes == {"whole": [0], "killed": [-signal.SIGKILL, 0]}
    assert told["killed"] == told["whole"]
    assert reader.attempt == 2


SHOWN_IMPORT = re.compile(r"^from (esper[\w.]*) import ([\w, ]+)$", re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_shown_as_imported_is_there(document: Path) -> None:
    """Blocks that are run show it by themselves; others are sketches."""
    for module, names in SHOWN_IMPORT.findall(document.read_text(encoding="utf-8")):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"

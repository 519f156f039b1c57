"""What a terminal shows of a run while it goes on."""

import io
import re

import pytest
from rich.console import Console

from esper.cli.grow import choose_view
from esper.cli.live_view import LiveView
from esper.cli.views import Glance, slot_words
from esper.experiments import load_run_config
from esper.experiments.run import prepare
from esper.lifecycle.events import EventRecord, RunResumed
from esper.lifecycle.stages import SeedStage


class Watcher:
    """Takes a picture of the view after each step, at a second per step."""

    def __init__(self, width: int) -> None:
        self.now = 0.0
        self.pictures: list[str] = []
        self.console = Console(file=io.StringIO(), force_terminal=True, width=width)
        self.view = LiveView(self.console, "digits", unit="epoch", clock=lambda: self.now)

    def after_step(self, trainer: object) -> None:
        self.now += 1.0
        with self.console.capture() as captured:
            self.console.print(self.view._render())
        self.pictures.append(re.sub(r"\x1b\[[0-9;]*m", "", captured.get()))

    def after_epoch(self, trainer: object) -> None:
        pass


def test_what_a_slot_holds_is_told_in_words() -> None:
    glance = Glance(
        path="stage1",
        stage=SeedStage.FOSSILIZED,
        blueprint="norm",
        alpha=1.0,
        contribution_fraction=0.1,
        committed=1,
    )
    assert slot_words(glance) == "[stage1 FOSSILIZED, 1 committed]"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("given", "unit"), [([], "epoch"), (["trainer.decision_interval_steps=5"], "decision")]
)
def test_an_event_is_told_by_what_its_epoch_counts(
    given: list[str], unit: str, terminal: bool
) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    settings = load_run_config("digits", None, given, {})
    view = choose_view(console, settings, quiet=False, as_json=False)
    event = RunResumed(name="step-20")
    view.publish(EventRecord(time_seconds=0.0, epoch=4, step=20, event=event))
    told = str(view._events[0]) if isinstance(view, LiveView) else console.file.getvalue()
    assert told.strip() == f"{unit} 4: goes on from checkpoint step-20"


@pytest.mark.parametrize("width", [100, 60])
def test_it_moves_with_each_step_also_within_an_epoch(width: int) -> None:
    watcher = Watcher(width)
    config = load_run_config("digits", None, ["policy=schedule", "trainer.epochs=3"], {})
    run = prepare(config, sinks=[watcher.view])
    assert "not begun" in str(watcher.view._render().renderables[0])
    run.trainer.keeper = watcher
    watcher.view.follow(run)
    for report in run.reports:
        watcher.view.epoch(report, run.growth.slots)
    assert len(watcher.pictures) == run.total_steps == 60
    for step, picture in enumerate(watcher.pictures, start=1):
        assert f"epoch {1 + (step - 1) // 20}/3  step {step}/60" in picture
    assert "1 steps/s, 30 s left" in watcher.pictures[29]
    assert "first epoch under way" in watcher.pictures[10]
    assert all(("saves ≥" in picture) == (width == 100) for picture in watcher.pictures)
    assert "accuracy" in watcher.pictures[30]
    grown = next(i for i, text in enumerate(watcher.pictures) if "germinated" in text)
    assert 0 < grown < len(watcher.pictures)
    assert re.search(r"(?:[█░] |alpha )1\.00", watcher.pictures[grown])
    assert not re.search(r"(?:[█░] |alpha )1\.00", watcher.pictures[grown - 1])

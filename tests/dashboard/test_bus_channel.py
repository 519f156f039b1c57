"""What a person asks in the page reaches a run over the bus, and its answer comes back."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from commanded import KEYRING, CountedRun
from esper.bus import Bus, InProcessBus
from esper.bus.mirror import Mirror
from esper.dashboard.bus_channel import BusCommandChannel
from esper.dashboard.commands import Command, CommandRefusedError
from esper.telemetry import RunStore
from esper.telemetry.command_log import CommandLog, LoggedCommand
from esper.telemetry.run_folder import CONFIG_FILE, DATABASE_FILE, write_json
from esper.telemetry.run_reader import RunReader

LISTENING = {"bus": {"commands": "redis://here"}}


@contextmanager
def stepping(folder: Path, bus: Bus) -> Iterator[CountedRun]:
    """Let a run step in a thread of its own, by the id that its folder holds."""
    made, over = threading.Event(), threading.Event()
    runs: list[CountedRun] = []

    def step() -> None:
        CountedRun(folder, bus).close()
        write_json(folder / CONFIG_FILE, LISTENING)
        run = CountedRun(folder, bus, run=RunReader(folder).run_id)
        runs.append(run)
        made.set()
        run.step_until(over.is_set)
        run.store.set_status("finished")
        run.close()

    thread = threading.Thread(target=step)
    thread.start()
    try:
        assert made.wait(30)
        yield runs[0]
    finally:
        over.set()
        thread.join()


def channel(root: Path, bus: Bus, *, wait_seconds: float = 30.0) -> BusCommandChannel:
    return BusCommandChannel(root, bus, KEYRING, sender="ann", wait_seconds=wait_seconds)


def test_what_is_asked_in_the_page_is_done_by_that_run_and_answered(tmp_path: Path) -> None:
    bus = InProcessBus()
    passing = channel(tmp_path, bus)
    with stepping(tmp_path / "one", bus) as one, stepping(tmp_path / "two", bus) as two:
        assert {offer.name for offer in passing.offers("one") if offer.target == "run"} == {
            *("pause", "resume", "checkpoint", "stop"),
        }
        with pytest.raises(CommandRefusedError, match="the run was not paused"):
            passing.send(Command(run="one", action="resume", slot=None))
        with pytest.raises(CommandRefusedError, match="no checkpoint could be written"):
            passing.send(Command(run="two", action="stop", slot=None))
        settled = [logged.sender for run in (one, two) for logged in logged_of(run)]
        assert settled == ["ann", "ann"]
    assert passing.offers("one") == ()


def test_a_run_that_nobody_trains_is_told_as_such(tmp_path: Path) -> None:
    bus = InProcessBus()
    passing = channel(tmp_path, bus, wait_seconds=0.05)
    with stepping(tmp_path / "one", bus):
        pass
    with pytest.raises(CommandRefusedError, match=r"has not answered within 0\.05 s"):
        passing.send(Command(run="one", action="pause", slot=None))
    with pytest.raises(CommandRefusedError, match="there is no run elsewhere"):
        passing.send(Command(run="elsewhere", action="pause", slot=None))
    assert passing.offers("elsewhere") == ()


@pytest.mark.parametrize("config", [{}, {"bus": {"commands": None}}], ids=str)
def test_nothing_is_asked_of_a_run_that_listens_to_no_bus(
    config: dict[str, Any], tmp_path: Path
) -> None:
    store = RunStore(tmp_path / "run", config=config, environment={})
    assert channel(tmp_path, InProcessBus()).offers("run") == ()
    store.close()


def test_nothing_is_asked_of_a_run_that_was_killed(tmp_path: Path) -> None:
    passing = channel(tmp_path, InProcessBus())
    store = RunStore(tmp_path / "run", config=LISTENING, environment={})
    assert passing.offers("run") != ()
    store.close()
    assert passing.offers("run") == ()


def test_a_run_elsewhere_can_be_asked_before_its_settings_are_known_and_while_no_router_runs(
    tmp_path: Path,
) -> None:
    passing = channel(tmp_path, InProcessBus())
    mirror = Mirror(tmp_path / "run")
    assert passing.offers("run") != ()
    mirror.close()
    assert RunReader(tmp_path / "run").standing == "running"
    assert passing.offers("run") != ()
    mirror = Mirror(tmp_path / "run")
    mirror.set_status("interrupted")
    assert passing.offers("run") == ()
    mirror.close()


def logged_of(run: CountedRun) -> list[LoggedCommand]:
    with CommandLog.open(run.store.folder / DATABASE_FILE) as log:
        return list(log.settled())

"""A run without a network, commanded for real: its effects are rows, counted in its database."""

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from esper.bus import Bus, LinkState
from esper.bus.command_receiver import CommandReceiver
from esper.lifecycle.actions import Action, Germinate
from esper.lifecycle.alpha import BlendOperator
from esper.lifecycle.commands import Act
from esper.lifecycle.events import ActionApplied, Event, EventRecord, SeedGerminated
from esper.lifecycle.learning import Isolation, SeedObjective
from esper.signing import Keyring
from esper.telemetry.run_folder import DATABASE_FILE
from esper.telemetry.run_store import ReopenedRunStore, RunStore
from esper.training.control import RunControl

KEYRING = Keyring([b"a key for tests, 24 bytes or more"])
EFFECTS = "CREATE TABLE IF NOT EXISTS effects (name TEXT, process INTEGER)"


class CountedGrowth:
    """What `RunControl` asks of growth; an action's effect is a row in the run's own database."""

    def __init__(self, store: RunStore, process: int) -> None:
        self.step = self.epoch = 0
        self.meter = self
        self.store = store
        self.process = process
        store._database.execute(EFFECTS)

    def decision(self) -> Any:
        return nullcontext()

    held_up = decision

    def publish(self, events: Sequence[Event]) -> None:
        for event in events:
            self.store.publish(
                EventRecord(time_seconds=0.0, epoch=self.epoch, step=self.step, event=event)
            )

    def apply(self, action: Action) -> Sequence[Event]:
        assert isinstance(action, Germinate)
        row = (action.blueprint, self.process)
        self.store._database.execute("INSERT INTO effects VALUES (?, ?)", row)
        events = [
            ActionApplied(action=action),
            SeedGerminated(
                slot=action.slot,
                blueprint=action.blueprint,
                options={},
                param_count=1,
                blend_operator=BlendOperator.ADD,
                isolation=Isolation.NONE,
                objective=SeedObjective.PROXIMAL,
                prewarm_ms=0.0,
            ),
        ]
        self.publish(events)
        return events


class CountedRun:
    """Steps without doing anything else than what it is told.

    Args:
        folder: Of the run; opened again if it is there.
        bus: That it listens to.
        process: A number that its effects carry.
        run: Its id on the bus.
    """

    def __init__(
        self,
        folder: Path,
        bus: Bus,
        *,
        run: str = "run",
        process: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        there = (folder / DATABASE_FILE).exists()
        self.store = (
            ReopenedRunStore(folder, after_step=10**9)
            if there
            else RunStore(folder, config={}, environment={})
        )
        self.growth: Any = CountedGrowth(self.store, process)
        self.control = RunControl(self.store.commands)
        # A row outlives the process, so that there is nothing to be done again
        self.control.load_state_dict({"num_settled": 10**9, "again": [], "unwritten": []})
        self.link = LinkState()
        self.receiver = CommandReceiver(
            bus,
            KEYRING,
            run,
            database_file=folder / DATABASE_FILE,
            ask=self.control.ask,
            link=self.link,
            clock=clock,
        )

    def settle(self) -> None: ...

    def save(self) -> Path | None:
        return None

    def step_until(self, done: Callable[[], bool]) -> None:
        """Step, and receive, until it is so."""
        ends = time.monotonic() + 60.0
        with self.receiver.running():
            while not done():
                assert time.monotonic() < ends, "nothing happens any more"
                self.control._woken.wait(0.001)  # a step
                self.control._woken.clear()
                self.control.between_steps(self)
                self.growth.step += 1

    def close(self) -> None:
        self.store.close()


def effects_in(folder: Path) -> list[str]:
    """Return what has taken effect, in its order.

    Closed at once: a fork that inherits an open database loses its locks when it collects it.
    """
    with closing(sqlite3.connect(folder / DATABASE_FILE)) as database:
        database.execute(EFFECTS)
        return [name for (name,) in database.execute("SELECT name FROM effects ORDER BY rowid")]


def effect(name: str) -> Act:
    """Return a command that has an effect of this name."""
    return Act(action=Germinate(slot="slot", blueprint=name))

"""Commands are carried out between two steps, each once, and again where a state has lost them."""

import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

import esper
from esper.lifecycle.actions import Advance, Commit, Germinate, Prune, SetAlphaTarget
from esper.lifecycle.commands import Act, Command, Pause, Resume, SaveCheckpoint, Stop
from esper.lifecycle.events import (
    ActionRefused,
    CommandCarriedOut,
    CommandRefused,
    RunWentBack,
    SeedGerminated,
)
from esper.telemetry.command_log import CommandLog, LoggedCommand
from esper.telemetry.run_folder import DATABASE_FILE
from esper.telemetry.run_reader import RunReader
from esper.telemetry.run_store import ReopenedRunStore, RunStore
from esper.training.control import RunControl, RunStoppedError
from growth_problem import Problem, make_problem

GERMINATE = Act(action=Germinate(slot="embed", blueprint="mlp"))
STEPS_PER_EPOCH = 16


@dataclass
class Sender:
    """A keeper that asks for things after given steps, and keeps a state of each step."""

    log: CommandLog
    script: Mapping[int, Sequence[Command]] = field(default_factory=dict)
    answers: dict[str, LoggedCommand] = field(default_factory=dict)
    states: dict[int, Any] = field(default_factory=dict)
    between_epochs: dict[int, Any] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    saves: list[int] = field(default_factory=list)
    can_save: bool = True

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = mse_loss(output, target)
        self.last = float(value.detach())
        return value

    def after_step(self, trainer: esper.Trainer) -> None:
        step = trainer.growth.step
        self.losses[step] = self.last
        self.states[step] = trainer.state_dict()
        for number, command in enumerate(self.script.get(step, ())):
            self.ask(trainer, command, f"{step}-{number}")

    def ask(self, trainer: esper.Trainer, command: Command, id_: str) -> None:
        logged = self.log.receive(id_, "ann@lab", command, received_seconds=0.0)
        assert trainer.control is not None
        if logged.outcome is None:
            assert trainer.control.ask(logged, lambda done: self.answers.update({id_: done}))

    def after_epoch(self, trainer: esper.Trainer) -> None:
        self.between_epochs[trainer.growth.step] = trainer.state_dict()

    def save(self, trainer: esper.Trainer) -> Path | None:
        if self.can_save:
            self.saves.append(trainer.growth.step)
        return Path("kept") if self.can_save else None

    def told(self, id_: str) -> str:
        outcome = self.answers[id_].outcome
        assert outcome is not None
        return f"{'done' if outcome.done else 'refused'}: {outcome.text}"


def controlled(
    sender: Sender, *, epochs: int = 3, policy: esper.Policy | None = None, **settings: Any
) -> tuple[Problem, esper.Trainer]:
    problem = make_problem()
    policy = policy or esper.PlannedPolicy({}, tend_seeds=False)
    trainer = problem.trainer(policy, epochs, loss=sender.loss, **settings)
    trainer.keeper = sender
    trainer.control = RunControl(sender.log)
    return problem, trainer


def test_a_command_is_carried_out_after_the_step_and_told_with_who_asked() -> None:
    sender = Sender(CommandLog.in_memory(), {5: [GERMINATE]})
    problem, trainer = controlled(sender, epochs=1)
    trainer.fit()
    assert problem.slots["embed"].stage is esper.SeedStage.TRAINING
    (germinated,) = [r for r in problem.recorder.records if isinstance(r.event, SeedGerminated)]
    assert germinated.step == 6, "asked after step 5 was kept: before step 7"
    (told,) = problem.recorder.of(CommandCarriedOut)
    assert (told.sender, told.command, told.id) == ("ann@lab", GERMINATE, "5-0")
    assert "mlp germinated in embed" in sender.told("5-0")
    assert "embed is TRAINING" in sender.told("5-0")
    settled = sender.answers["5-0"]
    assert settled.place is not None
    assert (settled.place.step, settled.ordinal) == (6, 1)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (Act(action=Prune(slot="embed")), "prune is not legal for slot 'embed' in DORMANT"),
        (Act(action=Commit(slot="nowhere")), "there is no slot 'nowhere'"),
        (Act(action=Germinate(slot="embed", blueprint="conv_light")), "does not fit slot 'embed'"),
        (
            Act(action=Germinate(slot="embed", blueprint="mlp", options={"bogus": 1})),
            "could not germinate in embed",
        ),
        (
            Act(action=Germinate(slot="embed", blueprint="mlp", options={"blueprint": "x"})),
            "blueprint 'mlp' has no option 'blueprint'",
        ),
        (Resume(), "the run was not paused"),
    ],
    ids=["stage", "slot", "blueprint", "options", "an argument's name", "not paused"],
)
def test_what_is_not_possible_is_refused_with_the_reason_and_changes_nothing(
    command: Command, reason: str
) -> None:
    plain, asked = Sender(CommandLog.in_memory()), Sender(CommandLog.in_memory(), {3: [command]})
    controlled(plain, epochs=1)[1].fit()
    problem, trainer = controlled(asked, epochs=1)
    trainer.fit()
    assert asked.told("3-0").startswith("refused: ")
    assert reason in asked.told("3-0")
    assert reason in problem.recorder.of(CommandRefused)[0].reason
    assert asked.losses == plain.losses


def test_a_gate_that_refuses_is_the_reason() -> None:
    commit = [GERMINATE, Act(action=Advance(slot="embed"))]
    sender = Sender(CommandLog.in_memory(), {2: commit})
    controlled(sender, epochs=1)[1].fit()
    assert sender.told("2-1").startswith("refused: G2 refused mlp in embed: ")


SCRIPT = {
    4: [GERMINATE],
    9: [Act(action=Prune(slot="embed", reason="of no use"))],
    16: [Pause(), Resume()],
    32: [GERMINATE],
    40: [Act(action=Commit(slot="embed")), SaveCheckpoint()],
}
"""Before, at and after the ends of epochs of 16 steps; the slot is embargoed for an epoch."""


@pytest.mark.parametrize("interval", [None, 6], ids=["by epochs", "by steps"])
def test_a_run_that_goes_on_from_any_state_is_commanded_as_it_was(
    tmp_path: Path, interval: int | None
) -> None:
    """Every step's state, with the log as it was at the end: losses and network to the bit."""
    sender = Sender(_log(tmp_path), SCRIPT)
    settings = {"decision_interval_steps": interval}
    problem, trainer = controlled(sender, epochs=4, **settings)
    trainer.fit()
    outcomes = {id_: sender.told(id_) for id_ in sender.answers}
    assert [told.partition(":")[0] for told in outcomes.values()] == [
        *("done", "done", "done", "done"),
        *("done", "refused", "done"),
    ]
    assert {logged.place for logged in sender.answers.values()} >= {
        (32, 2 if interval is None else 5)
    }
    for step, state in [*sender.states.items(), *sender.between_epochs.items()]:
        again = Sender(sender.log)
        other, resumed = controlled(again, epochs=4, **settings)
        resumed.load_state_dict(state)
        list(resumed.run())  # of the last one nothing
        assert again.losses == {s: loss for s, loss in sender.losses.items() if s > step}, step
        assert _weights(other) == _weights(problem), step
    other, anew = controlled(Sender(sender.log), epochs=4, **settings)
    anew.fit()
    assert _weights(other) == _weights(problem), "without any state"


def test_what_was_not_done_again_before_a_second_crash_is_done_after_it() -> None:
    """A state that is taken on the way to a lost action knows that it has not been there yet."""
    sender = Sender(CommandLog.in_memory(), {10: [GERMINATE]})
    problem, trainer = controlled(sender, epochs=1)
    trainer.fit()
    again = Sender(sender.log, {6: [Act(action=Prune(slot="embed"))]})
    _, resumed = controlled(again, epochs=1)
    resumed.load_state_dict(sender.states[5])
    resumed.fit()
    assert again.told("6-0").startswith("refused: "), "which is settled on the way"
    for step in (6, 8, 10, 11):
        last = Sender(sender.log)
        other, once_more = controlled(last, epochs=1)
        once_more.load_state_dict(again.states[step])
        once_more.fit()
        assert last.losses == {s: loss for s, loss in sender.losses.items() if s > step}, step
        assert _weights(other) == _weights(problem), step


def test_a_run_that_goes_back_is_commanded_again() -> None:
    sender = Sender(CommandLog.in_memory(), {10: [GERMINATE]})
    settings = {"governor": {"snapshot_steps": 4, "max_bad_steps": 2, "history_steps": 8}}
    problem, trainer = controlled(sender, epochs=3, **settings)
    good, spoilt = sender.loss, {"left": 2}

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = good(output, target)
        if trainer.growth.step >= 11 and torch.is_grad_enabled() and spoilt["left"]:
            spoilt["left"] -= 1
            return value * float("nan")
        return value

    trainer.training_step.loss = loss
    trainer.fit()
    (back,) = problem.recorder.of(RunWentBack)
    assert back.to_step <= 11 < back.from_step
    germinated = [r.step for r in problem.recorder.records if isinstance(r.event, SeedGerminated)]
    assert germinated == [11, 11]
    assert problem.slots["embed"].stage is esper.SeedStage.TRAINING
    assert len(problem.recorder.of(CommandCarriedOut)) == 2


def test_a_paused_run_waits_and_still_does_what_it_is_told() -> None:
    sender = Sender(CommandLog.in_memory(), {5: [Pause()]})
    _, trainer = controlled(sender, epochs=1)
    log, lock = sender.log, threading.Lock()
    beats: list[tuple[str, int]] = []
    asked = {"germinate": GERMINATE, "resume": Resume()}

    def beat(state: str, *, step: int) -> None:
        """Stands in for another thread: whoever sends commands while the run waits."""
        with lock:
            beats.append((state, step))
            if state == "paused":
                hours["waited"] += 1.0
            if state == "paused" and asked and beats.count(("paused", step)) % 2 == 0:
                id_ = next(iter(asked))
                sender.ask(trainer, asked.pop(id_), id_)

    trainer.control = RunControl(log, beat=beat)
    hours = {"waited": 0.0}
    meter = trainer.growth.meter
    meter._clock = lambda: time.perf_counter() + 3600.0 * hours["waited"]
    trainer.fit()
    assert [step for state, step in beats if state == "paused"] == [6] * beats.count(("paused", 6))
    assert beats.count(("paused", 6)) >= 3
    assert sender.told("5-0") == "done: paused after step 6"
    assert sender.told("germinate").startswith("done: mlp germinated in embed")
    assert sender.told("resume") == "done: goes on"
    assert trainer.growth.step == STEPS_PER_EPOCH
    assert hours["waited"] >= 3.0
    assert meter.cost.total.seconds < 3600.0, "what it waited for is no cost of its own"


def test_a_pause_outlives_the_process_and_a_stop_ends_it(tmp_path: Path) -> None:
    sender = Sender(_log(tmp_path), {5: [Pause(), Stop()]})
    _, trainer = controlled(sender)
    with pytest.raises(RunStoppedError):
        trainer.fit()
    assert not RunControl(sender.log).paused
    logged = sender.log.receive("more", "bob", Pause(), received_seconds=0.0)
    control = RunControl(sender.log)
    assert control.ask(logged, lambda _: None)
    problem = make_problem()
    paused = problem.trainer(esper.PlannedPolicy({}), 1)
    paused.control = control
    control.end("the test")
    with pytest.raises(RunStoppedError):
        paused.fit()
    assert RunControl(sender.log).paused


def test_stop_writes_a_checkpoint_then_ends_the_run() -> None:
    sender = Sender(CommandLog.in_memory(), {5: [Stop()]})
    _, trainer = controlled(sender)
    with pytest.raises(RunStoppedError) as stopped:
        trainer.fit()
    assert (stopped.value.by, stopped.value.step, stopped.value.commanded) == ("ann@lab", 6, True)
    assert sender.saves == [6]
    assert sender.told("5-0") == "done: a checkpoint of step 6 is written, and the run has ended"


def test_a_run_that_cannot_be_kept_is_not_stopped_by_a_command_but_by_a_signal() -> None:
    sender = Sender(CommandLog.in_memory(), {5: [Stop(), SaveCheckpoint()]}, can_save=False)
    _, trainer = controlled(sender, epochs=1)
    trainer.fit()
    assert "no checkpoint could be written" in sender.told("5-0")
    assert "no checkpoint could be written" in sender.told("5-1")
    _, signalled = controlled(sender, epochs=1)
    assert signalled.control is not None
    signalled.control.end("SIGTERM")
    with pytest.raises(RunStoppedError) as stopped:
        signalled.fit()
    assert (stopped.value.commanded, stopped.value.saved) == (False, False)


def test_outcome_and_events_are_in_the_run_folder_or_neither(tmp_path: Path) -> None:
    """An error in the middle of an action takes its events and its outcome with it."""
    store = RunStore(tmp_path / "run", config={}, environment={})
    sender = Sender(store.commands, {5: [GERMINATE]})
    problem, trainer = controlled(sender, epochs=1)
    trainer.growth.sinks.append(store)
    settle = trainer.settle

    def failing() -> None:
        settle()
        if problem.slots["embed"].stage is not esper.SeedStage.DORMANT:
            raise ZeroDivisionError

    trainer.settle = failing  # type: ignore[method-assign]
    with suppress(ZeroDivisionError):
        trainer.fit()
    store.close()
    assert problem.slots["embed"].stage is esper.SeedStage.TRAINING
    assert not [
        r for r in RunReader(tmp_path / "run").events() if r.event.type == "seed_germinated"
    ]
    with CommandLog.open(tmp_path / "run" / DATABASE_FILE) as log:
        logged = log.find("5-0")
    assert logged is not None
    assert logged.outcome is None
    assert "5-0" not in sender.answers


@pytest.mark.parametrize("place", ["before it is begun", "after it took effect"])
def test_a_log_that_cannot_be_written_delays_and_doubles_nothing(
    place: str, tmp_path: Path
) -> None:
    store = RunStore(tmp_path / "run", config={}, environment={})
    log = store.commands
    log._database.execute("PRAGMA busy_timeout=0")
    other = sqlite3.connect(tmp_path / "run" / DATABASE_FILE, isolation_level=None)
    ramp = Act(action=SetAlphaTarget(slot="embed", target=1.0, steps=9))
    sender = Sender(log, {2: [GERMINATE, ramp]})
    problem, trainer = controlled(sender, epochs=1)
    trainer.growth.sinks.append(store)
    if place == "after it took effect":
        other.executescript(
            "CREATE TABLE full (x); INSERT INTO full VALUES (1);"
            "CREATE TRIGGER no_room BEFORE UPDATE ON commands WHEN (SELECT count(*) FROM full) "
            "BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
    answered: dict[int, int] = {}

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        step = trainer.growth.step
        answered[step] = len(sender.answers)
        if step == 2 and place == "before it is begun":
            other.execute("BEGIN IMMEDIATE")
        if step == 8:
            other.execute("COMMIT" if other.in_transaction else "DELETE FROM full")
        return sender.loss(output, target)

    receive = log.receive
    log.receive = lambda id_, *args, **kwargs: (  # type: ignore[method-assign]
        (other.execute("COMMIT"), receive(id_, *args, **kwargs), other.execute("BEGIN IMMEDIATE"))
        if other.in_transaction
        else (None, receive(id_, *args, **kwargs))
    )[1]
    trainer.training_step.loss = loss
    trainer.fit()
    assert [answered[step] for step in (3, 8, 9)] == [0, 0, 2]
    assert sender.told("2-0").startswith("done: mlp germinated")
    assert sender.told("2-1").startswith("refused: ")
    assert len(problem.recorder.of(SeedGerminated)) == 1
    assert len(problem.recorder.of(CommandCarriedOut)) == 1
    assert len(problem.recorder.of(CommandRefused)) == 1
    told = [(r.step, repr(r.event)) for r in problem.recorder.records]
    stored = [(r.step, repr(r.event)) for r in RunReader(tmp_path / "run").events()]
    assert sorted(stored) == sorted(told), "each once, and at the step at which it was"
    assert [logged.id for logged in log.settled()] == ["2-0", "2-1"]
    again = Sender(log)
    restarted, resumed = controlled(again, epochs=1)
    resumed.load_state_dict(sender.states[6])
    resumed.fit()
    assert again.losses == {step: loss for step, loss in sender.losses.items() if step > 6}
    assert restarted.recorder.of(ActionRefused) == [], "it is not germinated again"
    store.close()


def test_what_a_run_has_not_written_down_is_written_by_the_process_that_goes_on(
    tmp_path: Path,
) -> None:
    store = RunStore(tmp_path / "run", config={}, environment={})
    sender = Sender(store.commands, {2: [GERMINATE]})
    problem, trainer = controlled(sender, epochs=1)
    trainer.growth.sinks.append(store)
    store._database.execute(
        "CREATE TEMP TRIGGER no_room BEFORE UPDATE ON commands BEGIN SELECT RAISE(ABORT, ''); END"
    )
    trainer.fit()
    store.close()
    reopened = ReopenedRunStore(tmp_path / "run", after_step=6)
    _, resumed = controlled(Sender(reopened.commands), epochs=1)
    for _ in range(2):
        resumed.load_state_dict(sender.states[6])
    reopened.close()
    stored = [(r.step, repr(r.event)) for r in RunReader(tmp_path / "run").events()]
    told = [(r.step, repr(r.event)) for r in problem.recorder.records if r.step <= 6]
    assert stored == told
    assert "seed_germinated" in str(told)


def test_what_was_not_carried_out_by_the_end_is_refused() -> None:
    sender = Sender(CommandLog.in_memory())
    problem, trainer = controlled(sender, epochs=1)
    trainer.fit()
    assert trainer.control is not None
    sender.ask(trainer, GERMINATE, "late")
    trainer.control.close(trainer.growth, refuse="the run has finished")
    assert sender.told("late") == "refused: the run has finished"
    logged = sender.log.receive("later", "ann@lab", GERMINATE, received_seconds=0.0)
    assert not trainer.control.ask(logged, lambda _: None)
    assert problem.slots["embed"].stage is esper.SeedStage.DORMANT


def _log(tmp_path: Path) -> CommandLog:
    return CommandLog(sqlite3.connect(tmp_path / "log.sqlite", isolation_level=None))


def _weights(problem: Problem) -> dict[str, bytes]:
    return {
        name: value.detach().numpy().tobytes()
        for name, value in problem.model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }

"""What somebody asks of a run while it goes on, carried out between two steps."""

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from esper.bus.link_state import LinkState
from esper.lifecycle.actions import Action
from esper.lifecycle.commands import (
    Act,
    Command,
    Outcome,
    Pause,
    Resume,
    SaveCheckpoint,
    Stop,
)
from esper.lifecycle.events import (
    CommandCarriedOut,
    CommandRefused,
    Event,
    EventRecord,
    parse_event_record,
)
from esper.lifecycle.outcomes import came_of
from esper.telemetry.command_log import AlreadySettledError, CommandLog, LoggedCommand, Place
from esper.training.growth import Growth

_LOOK_SECONDS = 0.2
"""Between two looks at what was asked while a run is paused, if nothing wakes it before."""

Answer = Callable[[LoggedCommand], None]
"""Is told how a command was settled, by the thread that trains; must not wait."""


class Beat(Protocol):
    """Gives a sign of life."""

    def __call__(self, state: str, *, step: int) -> None:
        """Say "running" or "paused", and after which step."""


class RunStoppedError(Exception):
    """A run ends before its last step, because it was asked to.

    Attributes:
        by: Who asked, or what signal.
        step: After which it ends.
        commanded: Whether it was a command: then it is for whoever sent it to say when it goes on.
        saved: Whether it can go on from where it ends.
    """

    def __init__(self, by: str, *, step: int, commanded: bool, saved: bool) -> None:
        super().__init__(f"stopped by {by} after step {step}")
        self.by, self.step, self.commanded, self.saved = by, step, commanded, saved


class Controlled(Protocol):
    """A trainer, as far as it is controlled."""

    growth: Growth

    def settle(self) -> None:
        """Take note of what has changed between two steps."""

    def save(self) -> Path | None:
        """Write a checkpoint; None if the run keeps none, or the disk refuses it."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    logged: LoggedCommand
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class _Unwritten:
    """A command that was carried out, and that the log did not take yet."""

    asked: _Asked
    outcome: Outcome
    place: Place
    records: Sequence[EventRecord]
    """What its action has caused and what was told of it: heard by all sinks, and to be stored."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "id": self.asked.logged.id,
            "outcome": self.outcome.model_dump(mode="json"),
            "place": [*self.place],
            "events": [record.model_dump_json() for record in self.records],
        }


class RunControl:
    """Carries out commands between two steps, in their order, each once.

    A command's outcome is written to the log together with its events, and only then answered. What
    a run that goes on from an earlier state has lost is done again from the log, at the same place.

    Args:
        log: Of this run, open in the thread that trains.
        beat: A sign of life between any two steps.
        link: Knows whether commands can come; what it has to tell is published between two steps.
    """

    def __init__(
        self, log: CommandLog, *, beat: Beat | None = None, link: LinkState | None = None
    ) -> None:
        self._log = log
        self._beat = beat
        self._link = link
        self._lock = threading.Lock()
        self._asked: deque[_Asked] = deque()
        self._unwritten: deque[_Unwritten] = deque()
        self._woken = threading.Event()
        self._ending: str | None = None
        self._ended = False
        settled = log.settled()
        self._num_settled = max((logged.ordinal or 0 for logged in settled), default=0)
        self._again = deque(_done_actions(settled))
        self.paused = _left_paused(settled)
        """Whether the run makes no step until it is told to."""

    def ask(self, logged: LoggedCommand, answer: Answer) -> bool:
        """Let a command be carried out between two steps; may be called by any thread.

        Args:
            logged: That was received, and has no outcome.
            answer: Is called once it has one.

        Returns:
            Whether it will be: not once the run has ended.
        """
        with self._lock:
            if self._ended:
                return False
            self._asked.append(_Asked(logged=logged, answer=answer))
        self._woken.set()
        return True

    def end(self, by: str) -> None:
        """Let the run write a checkpoint and end between two steps; a signal may call it."""
        self._ending = by  # no more: a signal may come while any lock is held

    def between_steps(self, trainer: Controlled) -> None:
        """Carry out what was asked, and wait here as long as the run is paused.

        Raises:
            RunStoppedError: The run is to end.
        """
        self._show_life(trainer.growth)
        if self._again:
            self._do_again(trainer)
        if not (self._asked or self._unwritten or self.paused or self._ending):
            return
        self._serve(trainer)
        if self.paused:
            with trainer.growth.held_up():
                self._wait(trainer)

    def close(self, growth: Growth, *, refuse: str | None) -> None:
        """Take no more commands: the run has ended.

        Args:
            growth: Of the run.
            refuse: Why those are refused that were asked and not carried out; None leaves them to
                the run that goes on from here.
        """
        with self._lock:
            self._ended = True
        if self._link is not None:
            growth.publish(self._link.take_events())
        self._write()
        if refuse is None:
            return
        refusal = Outcome(done=False, text=refuse)
        while self._asked:
            asked = self._asked.popleft()
            self._settle(growth, asked, lambda: (refusal, ()))
            if self._asked and self._asked[0] is asked:
                return

    def state_dict(self) -> dict[str, Any]:
        """Return which commands the run's state knows of."""
        unwritten = [done.state_dict() for done in self._unwritten]
        again = [logged.id for logged in self._again]
        return {"num_settled": self._num_settled, "again": again, "unwritten": unwritten}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let all be done again that was done after the state was taken.

        Raises:
            sqlite3.Error: The state knows of a command that the log cannot take.
        """
        for carried_out in state["unwritten"]:
            place = Place(*carried_out["place"])
            with (
                suppress(AlreadySettledError),
                self._log.settling(carried_out["id"], place) as outcomes,
            ):
                outcomes.append(Outcome.from_dump(carried_out["outcome"]))
                self._log.store_events(map(parse_event_record, carried_out["events"]))
        self._num_settled = state["num_settled"]
        unknown = set(state["again"])
        known = {carried_out["id"] for carried_out in state["unwritten"]}
        self._again = deque(
            logged
            for logged in _done_actions(self._log.settled())
            if logged.id in unknown
            or ((logged.ordinal or 0) > self._num_settled and logged.id not in known)
        )

    def _show_life(self, growth: Growth) -> None:
        if self._beat is not None:
            self._beat("paused" if self.paused else "running", step=growth.step)
        if self._link is not None and self._link.has_events:
            growth.publish(self._link.take_events())

    def _wait(self, trainer: Controlled) -> None:
        while self.paused:
            self._woken.wait(_LOOK_SECONDS)
            self._woken.clear()
            self._show_life(trainer.growth)
            self._serve(trainer)

    def _serve(self, trainer: Controlled) -> None:
        self._write()
        while self._asked and not self._unwritten:
            asked = self._asked.popleft()
            self._carry_out(trainer, asked)
            if self._asked and self._asked[0] is asked:
                break  # the log cannot be written now
        if self._ending is not None:
            saved = trainer.save() is not None
            step = trainer.growth.step
            raise RunStoppedError(self._ending, step=step, commanded=False, saved=saved)

    def _carry_out(self, trainer: Controlled, asked: _Asked) -> None:
        command, growth = asked.logged.command, trainer.growth
        outcome = self._settle(growth, asked, lambda: self._do(trainer, command))
        if isinstance(command, Stop) and outcome is not None and outcome.done:
            by = asked.logged.sender
            raise RunStoppedError(by, step=growth.step, commanded=True, saved=True)

    def _do(self, trainer: Controlled, command: Command) -> tuple[Outcome, Sequence[Event]]:
        """Carry one command out; return what came of it, and the events that it has caused."""
        if isinstance(command, Act):
            events = _act(trainer, command.action)
            return came_of(events), events
        return self._do_to_run(trainer, command), ()

    def _do_to_run(
        self, trainer: Controlled, command: Pause | Resume | Stop | SaveCheckpoint
    ) -> Outcome:
        step = trainer.growth.step
        if isinstance(command, Pause):
            self.paused, was = True, self.paused
            return Outcome(done=True, text=f"paused {'already' if was else f'after step {step}'}")
        if isinstance(command, Resume):
            self.paused, was = False, self.paused
            return Outcome(done=was, text="goes on" if was else "the run was not paused")
        if trainer.save() is None:
            what = "it would be lost, and goes on" if isinstance(command, Stop) else "nothing is"
            text = f"no checkpoint could be written ({what}); is checkpoint.enabled false?"
            return Outcome(done=False, text=text)
        ended = ", and the run has ended" if isinstance(command, Stop) else ""
        return Outcome(done=True, text=f"a checkpoint of step {step} is written{ended}")

    def _settle(
        self, growth: Growth, asked: _Asked, do: Callable[[], tuple[Outcome, Sequence[Event]]]
    ) -> Outcome | None:
        """Carry one command out, tell it, and write down what came of it.

        If the log cannot be written now, a command that was not begun is the next one again, and
        of one that took effect the outcome is written later, with the events that went from the
        run folder with it.

        Returns:
            The outcome, if it was carried out now.
        """
        place, outcome = Place(growth.step, growth.epoch), None
        events: Sequence[Event] = ()
        try:
            with suppress(AlreadySettledError), self._log.settling(asked.logged.id, place) as kept:
                outcome, events = do()
                kept.append(outcome)
                growth.publish([_told(asked.logged, outcome)])
            self._answer(asked)
        except sqlite3.Error:
            if outcome is None:
                self._asked.appendleft(asked)
            else:
                events = [*events, _told(asked.logged, outcome)]
                records = _records(events, place)
                self._unwritten.append(
                    _Unwritten(asked=asked, outcome=outcome, place=place, records=records)
                )
        return outcome

    def _write(self) -> None:
        """Write down what was carried out when the log could not be written."""
        while self._unwritten:
            done = self._unwritten[0]
            id_ = done.asked.logged.id
            try:
                with suppress(AlreadySettledError), self._log.settling(id_, done.place) as kept:
                    kept.append(done.outcome)
                    self._log.store_events(done.records)
                self._answer(done.asked)
            except sqlite3.Error:
                return
            self._unwritten.popleft()

    def _answer(self, asked: _Asked) -> None:
        settled = self._log.find(asked.logged.id)
        assert settled is not None
        self._num_settled = max(self._num_settled, settled.ordinal or 0)
        asked.answer(settled)

    def _do_again(self, trainer: Controlled) -> None:
        here = Place(trainer.growth.step, trainer.growth.epoch)
        while self._again and self._again[0].place is not None and self._again[0].place <= here:
            logged = self._again.popleft()
            assert isinstance(logged.command, Act)
            outcome = came_of(_act(trainer, logged.command.action))
            trainer.growth.publish([_told(logged, outcome)])
            self._num_settled = max(self._num_settled, logged.ordinal or 0)


def _act(trainer: Controlled, action: Action) -> Sequence[Event]:
    with trainer.growth.meter.decision():
        events = trainer.growth.apply(action)
    trainer.settle()
    return events


def _records(events: Sequence[Event], place: Place) -> list[EventRecord]:
    now = time.time()
    return [
        EventRecord(time_seconds=now, epoch=place.epoch, step=place.step, event=event)
        for event in events
    ]


def _told(logged: LoggedCommand, outcome: Outcome) -> CommandCarriedOut | CommandRefused:
    if outcome.done:
        return CommandCarriedOut(
            id=logged.id, sender=logged.sender, command=logged.command, text=outcome.text
        )
    return CommandRefused(
        id=logged.id, sender=logged.sender, command=logged.command, reason=outcome.text
    )


def _done_actions(settled: Sequence[LoggedCommand]) -> list[LoggedCommand]:
    """Return what has changed the network, in its order."""
    return [
        logged
        for logged in settled
        if isinstance(logged.command, Act) and logged.outcome is not None and logged.outcome.done
    ]


def _left_paused(settled: Sequence[LoggedCommand]) -> bool:
    """Return whether the last that was said of it is that the run shall wait."""
    said = [
        isinstance(logged.command, Pause)
        for logged in settled
        if logged.outcome is not None
        and logged.outcome.done
        and isinstance(logged.command, (Pause, Resume, Stop))
    ]
    return bool(said) and said[-1]

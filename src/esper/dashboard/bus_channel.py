"""Passes what a person asks of a run in the page on to the run, over the bus."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from esper.bus.bus import Bus, BusRefusedError, BusUnavailableError
from esper.bus.command_sender import CommandSender, NoAnswerError
from esper.dashboard.commands import Command, CommandRefusedError, OfferedAction
from esper.dashboard.run_folders import RunFolders
from esper.lifecycle import commands
from esper.lifecycle.actions import Action, Advance, Commit, Prune
from esper.signing import Keyring
from esper.telemetry.run_reader import RunReader

_WAIT_SECONDS = 10.0
_OF_RUNS: dict[str, commands.Command] = {
    "pause": commands.Pause(),
    "resume": commands.Resume(),
    "checkpoint": commands.SaveCheckpoint(),
    "stop": commands.Stop(),
}
_OF_SLOTS: dict[str, Callable[[str], Action]] = {
    "advance": lambda slot: Advance(slot=slot),
    "commit": lambda slot: Commit(slot=slot),
    "prune": lambda slot: Prune(slot=slot),
}
_OFFERED = (
    OfferedAction(name="pause", label="Pause", target="run"),
    OfferedAction(name="resume", label="Resume", target="run"),
    OfferedAction(name="checkpoint", label="Checkpoint", target="run"),
    OfferedAction(
        name="stop",
        label="Stop",
        target="run",
        question="Stop this run? It writes a checkpoint, and esper resume goes on from there.",
    ),
    OfferedAction(name="advance", label="Advance", target="slot"),
    OfferedAction(
        name="commit",
        label="Commit",
        target="slot",
        question="Let this seed pass to the host for good, if its gate does?",
    ),
    OfferedAction(
        name="prune", label="Prune", target="slot", question="Remove this seed for good?"
    ),
)


class BusCommandChannel:
    """A `CommandChannel` to the runs in a folder, also to those that run elsewhere.

    Everything is offered for a run that is running and listens to a bus, and a run refuses what is
    not legal; one elsewhere counts as running until it has told of its end. Nothing is offered for
    the training of a policy, which listens to no bus.

    Args:
        root: The folder that runs are in.
        bus: That they listen to.
        keyring: Signs commands and verifies answers.
        sender: Who asks, for the runs' events: whoever may open the page.
        wait_seconds: For an answer.
    """

    def __init__(
        self,
        root: Path,
        bus: Bus,
        keyring: Keyring,
        *,
        sender: str,
        wait_seconds: float = _WAIT_SECONDS,
    ) -> None:
        self._folders = RunFolders(root)
        self._bus = bus
        self._keyring = keyring
        self._sender = sender
        self._wait_seconds = wait_seconds
        self._known: dict[str, Path] = {}

    def offers(self, run: str) -> Sequence[OfferedAction]:
        """Return everything if the run is running and listens, else nothing."""
        reader = self._reader(run)
        if reader is None or reader.standing != "running":
            return ()
        return _OFFERED if _listens(reader) else ()

    def send(self, command: Command) -> str:
        """Pass a command on, and return what came of it.

        Raises:
            CommandRefusedError: It had no effect, or none that is known yet.
        """
        reader = self._reader(command.run)
        if reader is None:
            raise CommandRefusedError(f"there is no run {command.run} any more")
        sender = CommandSender(self._bus, self._keyring, reader.run_id, sender=self._sender)
        asked = (
            _OF_RUNS[command.action]
            if command.slot is None
            else commands.Act(action=_OF_SLOTS[command.action](command.slot))
        )
        try:
            answer = sender.send(asked, wait_seconds=self._wait_seconds)
        except (BusRefusedError, BusUnavailableError, NoAnswerError) as error:
            raise CommandRefusedError(str(error)) from error
        if not answer.outcome.done:
            raise CommandRefusedError(answer.outcome.text)
        return answer.outcome.text

    def _reader(self, run: str) -> RunReader | None:
        folder = self._known.get(run)
        if folder is None or not self._folders.still_hold(folder):
            self._known = self._folders.find().folders
            folder = self._known.get(run)
        return None if folder is None else RunReader(folder)


def _listens(reader: RunReader) -> bool:
    """Return whether a run takes commands from a bus."""
    bus = reader.config().get("bus")
    if isinstance(bus, Mapping) and bus.get("commands") is not None:
        return True
    return reader.is_mirror  # whose settings may not have come

"""A run's connection with the bus: it is told what to do, and tells of itself."""

import os

from esper.bus.addresses import open_bus
from esper.bus.bus import Bus
from esper.bus.command_receiver import CommandReceiver
from esper.bus.link_state import LinkState
from esper.bus.telemetry_link import TelemetryLink
from esper.experiments.config import BusConfig
from esper.experiments.settings import SettingsError
from esper.signing import KeyFileError, Keyring
from esper.telemetry.run_folder import DATABASE_FILE, RunStatus
from esper.telemetry.run_reader import RunReader
from esper.training.control import RunControl
from esper.training.growth import Growth

PASSWORD_VARIABLE = "ESPER_BUS_PASSWORD"  # noqa: S105 – its name

_CLOSE_SECONDS = 3.0
"""With what ends receiving, less than a supervisor waits for a run to end."""


class BusConnection:
    """Connects one run; a server that is away is waited for beside the training.

    Args:
        config: Names the servers and the keys.

    Raises:
        SettingsError: The keys cannot be read, an address is none, or redis is not installed.
    """

    def __init__(self, config: BusConfig) -> None:
        assert config.commands is not None
        self._config = config
        self.link = LinkState()
        try:
            file = config.key_file
            self._keyring = Keyring.of_user() if file is None else Keyring.from_file(file)
            self._commands = open_run_bus(config.commands)
            telemetry = config.telemetry or config.commands
            same = telemetry == config.commands
            self._telemetry = self._commands if same else open_run_bus(telemetry)
        except (KeyFileError, ModuleNotFoundError, ValueError) as error:
            raise SettingsError(f"bus: {error}") from error
        self._telemetry_link: TelemetryLink | None = None
        self._receiver: CommandReceiver | None = None

    def open(
        self,
        run: RunReader,
        growth: Growth,
        control: RunControl,
        *,
        after_step: int,
    ) -> None:
        """Begin to receive and to send.

        Args:
            run: Its folder, where telemetry is kept as long as it cannot be sent.
            growth: Tells of itself.
            control: Carries out what is received.
            after_step: The last step that the run still knows of; -1 of a new one.
        """
        self._telemetry_link = TelemetryLink(
            self._telemetry, self._keyring, run.run_id, folder=run.folder, link=self.link
        )
        self._telemetry_link.begin(run.config(), run.environment(), after_step)
        growth.sinks.append(self._telemetry_link)
        self._receiver = CommandReceiver(
            self._commands,
            self._keyring,
            run.run_id,
            database_file=run.folder / DATABASE_FILE,
            ask=control.ask,
            link=self.link,
            window_seconds=self._config.window_seconds,
        )
        self._receiver.start()

    def stop_receiving(self, *, refuse_rest: bool) -> None:
        """Answer what is settled, and take no more commands; as `CommandReceiver.stop`."""
        if self._receiver is not None:
            self._receiver.stop(refuse_rest=refuse_rest)

    def close(self, status: RunStatus) -> None:
        """Send what can be sent, and let go of the servers."""
        if self._telemetry_link is not None:
            self._telemetry_link.end(status)
            self._telemetry_link.close(limit_seconds=_CLOSE_SECONDS)
        for bus in {id(bus): bus for bus in (self._commands, self._telemetry)}.values():
            bus.close()


def open_run_bus(address: str) -> Bus:
    """Return the bus at an address, with the password of the environment if there is one.

    Raises:
        ValueError: It is no address.
        ModuleNotFoundError: Redis' client is not installed.
    """
    return open_bus(address, password=os.environ.get(PASSWORD_VARIABLE))

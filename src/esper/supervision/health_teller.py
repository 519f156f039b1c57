"""Tells over the bus how everything that is served stands."""

import os
import socket
import threading
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Self

from esper.bus.backoff import Backoff
from esper.bus.bus import HEALTH, Bus
from esper.bus.envelope import MAX_RUN_CHARACTERS, Sealer
from esper.bus.messages import HealthMessage, body_of
from esper.experiments.bus_connection import open_run_bus
from esper.signing import Keyring
from esper.supervision.config import BusConfig
from esper.supervision.status import ServiceStatus

HEALTH_SECONDS = 5.0
_CLOSE_SECONDS = 2.0
_HASH_CHARACTERS = 8
_SHOWN_CHARACTERS = MAX_RUN_CHARACTERS - 1 - _HASH_CHARACTERS


class HealthTeller:
    """Publishes the state of each program every 5 s, and whenever one is in another state.

    A thread of its own does it: a server that is away holds up nobody, and only the newest state is
    told when it is back.

    Args:
        bus: Takes the messages; it is closed with this.
        sealer: Signs them.
    """

    def __init__(self, bus: Bus, sealer: Sealer) -> None:
        self._bus = bus
        self._sealer = sealer
        self._host = socket.gethostname()
        self._condition = threading.Condition()
        self._newest: Sequence[ServiceStatus] | None = None
        self._told_states: list[tuple[str, str]] = []
        self._told_seconds = 0.0
        self._closed = False
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="esper-health", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, config: BusConfig | None, folder: Path) -> Self | None:
        """Return one for the bus of a config; None if it has none.

        Raises:
            ValueError: The keys cannot be read, or the address is none.
            ModuleNotFoundError: Redis' client is not installed.
        """
        if config is None:
            return None
        keyring = keyring_of(config)
        return cls(open_run_bus(config.telemetry_url), Sealer(keyring, source_of(folder)))

    @property
    def condition(self) -> str:
        """How it goes: "told", or why not."""
        return self._problem or "told"

    def tell(self, services: Sequence[ServiceStatus]) -> None:
        """Take the newest state, which is told soon if it is another, else in its time."""
        states = [(service.name, service.state.value) for service in services]
        with self._condition:
            due = time.monotonic() - self._told_seconds >= HEALTH_SECONDS
            if due or states != self._told_states:
                self._newest = services
                self._told_states = states
                self._told_seconds = time.monotonic()
                self._condition.notify_all()

    def close(self) -> None:
        """Tell what is left to tell, if the server takes it soon."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        backoff = Backoff()
        while True:
            with self._condition:
                while self._newest is None and not self._closed:
                    self._condition.wait()
                services, self._newest = self._newest, None
            if services is None:
                self._bus.close()
                return
            try:
                self._bus.publish(HEALTH, [self._message(service) for service in services])
            except Exception as error:  # noqa: BLE001 – whatever it is, the next state is told
                self._problem = str(error) or type(error).__name__
                with self._condition:
                    if self._newest is None:
                        self._newest = services
                    if self._closed:
                        return
                    self._condition.wait(backoff.failed())
            else:
                self._problem = None
                backoff.works()

    def _message(self, service: ServiceStatus) -> bytes:
        details = service.model_dump(
            mode="json", exclude={"name", "state", "pid", "log", "last_lines"}
        )
        message = HealthMessage(
            service=service.name,
            state=service.state.value,
            pid=service.pid or 0,
            host=self._host,
            details=details,
        )
        return self._sealer.seal(body_of(message))[1]


def source_of(folder: Path) -> str:
    """Return what a supervisor is called on the bus: no other one of this machine is called so."""
    place = str(folder.absolute())
    shown = f"serve:{socket.gethostname()}:{folder.absolute().name}"[:_SHOWN_CHARACTERS]
    return f"{shown}-{sha256(os.fsencode(place)).hexdigest()[:_HASH_CHARACTERS]}"


def keyring_of(config: BusConfig) -> Keyring:
    """Return the keys that sign what goes over the bus.

    Raises:
        KeyFileError: They cannot be read.
    """
    if config.key_file is None:
        return Keyring.of_user()
    return Keyring.from_file(config.key_file)

"""Tells the bus of a run, without the run ever waiting for it."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from esper.bus.backoff import Backoff
from esper.bus.bus import EMERGENCY, TELEMETRY, Bus
from esper.bus.envelope import MAX_BODY_BYTES, Sealer
from esper.bus.link_state import LinkState
from esper.bus.messages import RunMessage, StatusMessage, body_of
from esper.bus.producers import note_producers
from esper.bus.spool import MAX_SPOOL_BYTES, SPOOL_FOLDER, Spool
from esper.bus.telemetry_lane import BATCH_MESSAGES, TelemetryLane, is_emergency
from esper.lifecycle.events import EventRecord
from esper.signing import Keyring
from esper.telemetry.run_folder import RunStatus

_MAX_QUEUED = 10_000
_PAUSE_SECONDS = 0.2
"""Between two looks: normal events wait for each other so long, so that a step is seldom woken."""


class TelemetryLink:
    """A sink that sends everything to the bus, signed, in a thread of its own.

    What `is_emergency` tells goes to `EMERGENCY`, all else to `TELEMETRY`; each way has a queue and
    a spool of its own, and the first one goes first. What takes an event only appends it to a
    queue. By whom it tells is noted in the run's folder, for a router whose mirrors are beside
    that. While the bus is away, messages are kept in the run's folder, bounded, or in the queue if
    the disk does not take them; they are sent when it is there again, or those in the folder by the
    next attempt of the run if this one ends before. A message may arrive twice, with one id; what
    was lost for good shows in the sequence of the ids.

    Args:
        bus: May be away.
        keyring: Signs.
        run: Its id.
        folder: Of the run, which no other process writes.
        link: Is told whether the bus can be reached, and how many messages were lost.
        max_queued: Items of each way in memory, besides a batch; beyond it the oldest go.
        max_spool_bytes: Of each way.
        clock: Seconds since the Unix epoch.

    Raises:
        ValueError: The run's id is empty or too long.
    """

    def __init__(
        self,
        bus: Bus,
        keyring: Keyring,
        run: str,
        *,
        folder: Path,
        link: LinkState,
        max_queued: int = _MAX_QUEUED,
        max_spool_bytes: int = MAX_SPOOL_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bus = bus
        self._link = link
        sealers = {stream: Sealer(keyring, run, clock=clock) for stream in (EMERGENCY, TELEMETRY)}
        with suppress(OSError):  # that its folder is being written tells a router, too
            note_producers(folder, [sealer.producer for sealer in sealers.values()])
        self._emergency, self._telemetry = (
            TelemetryLane(
                stream,
                sealer,
                Spool(folder / SPOOL_FOLDER / stream.name, max_bytes=max_spool_bytes),
                max_queued=max_queued,
            )
            for stream, sealer in sealers.items()
        )
        self._backoff = Backoff()
        self._try_again = 0.0
        """Monotonic seconds; before it the bus is left alone."""
        self._wake = threading.Event()
        self._closing = False
        self._deadline = 0.0
        """For all that is left, once it is closing."""
        self._lock = threading.Lock()
        """Whoever holds it may touch lanes; the thread does not, while it waits for the bus."""
        self._over = False
        """Lanes are closed."""
        self._thread = threading.Thread(target=self._serve, name="esper-telemetry", daemon=True)
        self._thread.start()

    def begin(
        self, config: Mapping[str, Any], environment: Mapping[str, Any], after_step: int
    ) -> None:
        """Say that the run begins, or goes on; before anything else is told of it.

        Args:
            config: What was chosen for it, as JSON values.
            environment: What it runs on, as JSON values.
            after_step: The last step that it still knows of; below 0 it begins.

        Raises:
            ValueError: These are no JSON values, or more than a message may hold.
        """
        try:
            message = RunMessage(
                config=dict(config), environment=dict(environment), after_step=after_step
            )
        except ValidationError as error:
            places = [".".join(map(str, issue["loc"][:4])) for issue in error.errors()]
            raise ValueError(  # without their values, which may be secret
                f"a run is told of in JSON values, which these are not: {', '.join(places[:5])}"
            ) from None
        num_bytes = len(body_of(message))
        if num_bytes > MAX_BODY_BYTES:
            raise ValueError(
                f"config and environment have {num_bytes} bytes as JSON, and a message holds "
                f"{MAX_BODY_BYTES}"
            )
        for lane in (self._emergency, self._telemetry):
            lane.put(message)
        self._wake.set()

    def publish(self, record: EventRecord) -> None:
        """Take one event."""
        if is_emergency(record.event):
            self._emergency.put(record)
            self._wake.set()
        elif self._telemetry.put(record) >= BATCH_MESSAGES and not self._wake.is_set():
            self._wake.set()

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Take named values."""
        self._telemetry.put((epoch, step, dict(metrics)))

    def flush(self) -> None:
        """Let what was taken be sent now; does not wait for it."""
        self._wake.set()

    def end(self, status: RunStatus) -> None:
        """Say how the run has ended; after everything else is told of it."""
        self._telemetry.put(StatusMessage(status=status))
        self._wake.set()

    def close(self, *, limit_seconds: float = 5.0) -> int:
        """Send what is left as long as the limit and the bus permit, and keep the rest.

        Nothing may be told afterwards.

        Returns:
            How many messages are kept; the next attempt of the run sends them.
        """
        self._deadline = time.monotonic() + limit_seconds
        self._closing = True
        self._wake.set()
        self._thread.join(limit_seconds)
        with self._lock:
            self._finish()  # if the bus holds the thread, which then finds that it is over
        return sum(lane.kept_messages for lane in (self._emergency, self._telemetry))

    def _serve(self) -> None:
        while not self._over:
            closing = self._closing
            if not closing:
                self._wake.wait(_PAUSE_SECONDS)
                self._wake.clear()
            if closing or time.monotonic() >= self._try_again:
                self._attempt()
            else:
                self._keep()
            if closing:
                with self._lock:
                    self._finish()

    def _attempt(self) -> None:
        """Send all there is, emergencies first; if that fails, keep it and wait a while."""
        concern = ""
        try:
            arrived = True
            while arrived and not (self._closing and time.monotonic() > self._deadline):
                arrived = False
                concern = EMERGENCY.name
                while self._send(self._emergency):
                    arrived = True
                concern = TELEMETRY.name
                arrived = self._send(self._telemetry) or arrived
                if arrived:
                    self._works()
        except Exception as error:  # noqa: BLE001 – whatever a bus raises, training goes on
            self._keep()
            self._link.failed(concern, error)
            self._try_again = time.monotonic() + self._backoff.failed()

    def _send(self, lane: TelemetryLane) -> bool:
        """Send one batch, and return whether there was one."""
        with self._lock:
            batch = [] if self._over else lane.next_batch()
        if not batch:
            return False
        self._bus.publish(lane.stream, batch)
        with self._lock:
            if self._over:
                return False
            lane.sent()
            self._link.lost(lane.take_lost())
        return True

    def _works(self) -> None:
        """Take note that the bus takes everything, also of a way that has nothing left to send."""
        if self._backoff.failures:
            self._keep()  # so that what was lost meanwhile is known before the outage is over
            self._backoff.works()
        for lane in (self._emergency, self._telemetry):
            self._link.works(lane.stream.name)

    def _keep(self) -> None:
        """Put what is in flight or waits into the spools."""
        with self._lock:
            if self._over:
                return
            for lane in (self._emergency, self._telemetry):
                lane.keep()
                self._link.lost(lane.take_lost())

    def _finish(self) -> None:
        """Keep what is left, and let go of the spools, once."""
        if self._over:
            return
        for lane in (self._emergency, self._telemetry):
            lane.close()
            self._link.lost(lane.take_lost())
        self._over = True

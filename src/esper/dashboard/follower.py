"""Looks at the runs as long as somebody listens, and wakes the listeners."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from esper.dashboard.watcher import Watcher

INTERVAL_SECONDS = 0.2
"""Between two looks. With what reading and drawing take, an event is seen within a second."""

_LOG = logging.getLogger(__name__)


class Listener:
    """Waits for news."""

    def __init__(self, follower: "Follower") -> None:
        self._follower = follower
        self._news = asyncio.Event()

    @property
    def stopped(self) -> bool:
        """Whether there will be no more news."""
        return self._follower.stopped

    def wake(self) -> None:
        """End the wait."""
        self._news.set()

    async def wait(self, seconds: float) -> bool:
        """Wait for news, at most so long; return whether there are any."""
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True


class Follower:
    """Tells listeners that the list of runs has changed.

    Args:
        watcher: Looks.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._listeners: set[Listener] = set()
        self._wanted = asyncio.Event()
        self._failed = ""
        self.stopped = False

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        """Listen as long as the context lasts."""
        listener = Listener(self)
        self._listeners.add(listener)
        self._wanted.set()
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                self._wanted.clear()

    async def run(self) -> None:
        """Look, until cancelled; with nobody listening, wait for somebody."""
        while True:
            await self._wanted.wait()
            await self.look()
            await asyncio.sleep(INTERVAL_SECONDS)

    async def look(self) -> None:
        """Look once, and tell of what has changed.

        Failing is logged, each cause once in a row: the next look may go well.
        """
        try:
            changed = await asyncio.to_thread(self._watcher.look)
        except Exception as error:  # noqa: BLE001 – whatever one look raises, others follow
            if repr(error) != self._failed:
                _LOG.error("looking at the runs failed", exc_info=error)
            self._failed = repr(error)
            return
        self._failed = ""
        if changed:
            self._wake()

    def dismiss_listeners(self) -> None:
        """Send all listeners home."""
        self.stopped = True
        self._wake()

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.wake()

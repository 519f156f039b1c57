"""Looks at the runs as long as somebody listens, and wakes the listeners."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from esper.dashboard.watcher import Watcher

INTERVAL_SECONDS = 0.2
"""Between two looks. With what reading and drawing take, an event is seen within a second."""


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
            if await asyncio.to_thread(self._watcher.look):
                self._wake()
            await asyncio.sleep(INTERVAL_SECONDS)

    def stop(self) -> None:
        """Send all listeners home."""
        self.stopped = True
        self._wake()

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.wake()

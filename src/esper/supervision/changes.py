"""News that something has changed, for whoever waits for it."""

from collections.abc import Callable

import anyio


class Changes:
    """Tells that the state of some program has changed. For one event loop.

    Args:
        listener: Is called with the name of each program that has changed.
    """

    def __init__(self, listener: Callable[[str], None]) -> None:
        self._listener = listener
        self._next = anyio.Event()

    def tell(self, name: str) -> None:
        """Say that one has changed."""
        self.wake()
        self._listener(name)

    def wake(self) -> None:
        """Let those who wait look again."""
        passed, self._next = self._next, anyio.Event()
        passed.set()

    async def next(self) -> None:
        """Wait until one changes, or there are others."""
        await self._next.wait()

"""Prints what a supervisor tells, which waits for nobody who reads it."""

import threading
from collections import deque
from collections.abc import Callable

from esper.supervision.notice import SERVE, Notice

_MAX_WAITING = 1_000
_CLOSE_SECONDS = 2.0


class NoticePrinter:
    """Prints notices in a thread of its own, in their order.

    Where they cannot be printed now, as in a terminal that was stopped, they wait; of too many the
    oldest go, and how many is printed in their place.

    Args:
        show: Prints one; may take as long as it likes.
        max_waiting: Notices.
    """

    def __init__(self, show: Callable[[Notice], None], *, max_waiting: int = _MAX_WAITING) -> None:
        self._show = show
        self._max_waiting = max_waiting
        self._condition = threading.Condition()
        self._waiting: deque[Notice] = deque()
        self._dropped = 0
        self._closed = False
        # A daemon, as it may never come back from printing.
        self._thread = threading.Thread(target=self._run, name="esper-notices", daemon=True)
        self._thread.start()

    def tell(self, notice: Notice) -> None:
        """Take one, which is printed soon."""
        with self._condition:
            self._waiting.append(notice)
            if len(self._waiting) > self._max_waiting:
                self._waiting.popleft()
                self._dropped += 1
            self._condition.notify_all()

    def close(self, limit_seconds: float = _CLOSE_SECONDS) -> None:
        """Print what waits, if that can be done in time."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join(limit_seconds)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._waiting and not self._closed:
                    self._condition.wait()
                if not self._waiting:
                    return
                notice = self._waiting.popleft()
                dropped, self._dropped = self._dropped, 0
            if dropped:
                text = f"{dropped} notices are left out, as nobody read what is printed here"
                self._show(Notice(time_seconds=notice.time_seconds, about=SERVE, text=text))
            self._show(notice)

"""What one open page is sent: rows of the list as they change, and the run that it shows."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from pydantic_core import to_json

from esper.dashboard.commands import CommandChannel, OfferedAction
from esper.dashboard.follower import Follower, Listener
from esper.dashboard.run_folders import Refusal, as_text
from esper.dashboard.run_tail import RunTail, TailState
from esper.dashboard.watched_run import CANNOT_READ, RunRow
from esper.dashboard.watcher import UnknownRunError, Watcher

HEARTBEAT_SECONDS = 10.0
_RETRY_MILLISECONDS = 1000
_PROGRESS_SECONDS = 0.3
_VERSION = re.compile(r"[0-9]{1,18}")

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RowsMessage:
    """Rows of the list: all of them, or those that changed."""

    whole: bool
    root: str
    rows: list[RunRow]
    gone: list[str]
    refused: list[Refusal]


@dataclass(frozen=True, kw_only=True)
class StoryMessage:
    """The run that the page shows; `whole` begins its lines anew.

    Attributes:
        problem: Why there is no state, or what is wrong besides.
    """

    run: str
    whole: bool = False
    problem: str | None = None
    state: TailState | None = None
    offers: Sequence[OfferedAction] = ()


class Streams:
    """Makes a stream of server-sent events for each page.

    Args:
        watcher: Knows the runs.
        follower: Says when to ask.
        channel: Offers actions; None offers none.
    """

    def __init__(
        self, watcher: Watcher, follower: Follower, channel: CommandChannel | None
    ) -> None:
        self._watcher = watcher
        self._follower = follower
        self._channel = channel
        self._name = secrets.token_hex(4)

    async def messages(self, *, run: str | None, last_id: str) -> AsyncIterator[bytes]:
        """Yield messages until the server stops.

        Args:
            run: Whose story is sent besides the list; None sends the list only.
            last_id: Of the last message that this page got; what it has is not sent again. An id of
                another server than this one, one that none gives, or none, begins anew.
        """
        name, _, version = last_id.partition("-")
        known = int(version) if name == self._name and _VERSION.fullmatch(version) else 0
        story = None if run is None else _Story(run, self._watcher, self._channel)
        with self._follower.listen() as listener:
            yield f"retry: {_RETRY_MILLISECONDS}\n\n".encode()
            whole = known == 0
            await self._follower.look()
            while not listener.stopped:
                changes = await asyncio.to_thread(self._watcher.changes, since=known)
                if whole or changes.version != known:
                    message = RowsMessage(
                        whole=whole,
                        root=as_text(str(self._watcher.root)),
                        rows=changes.rows,
                        gone=changes.gone,
                        refused=changes.refused,
                    )
                    known, whole = changes.version, False
                    yield _event("runs", message, f"{self._name}-{known}")
                if story is not None:
                    async for told in story.news(listener):
                        yield _story_event(told)
                if not await listener.wait(HEARTBEAT_SECONDS):
                    yield _event("beat", None)


class _Story:
    """Tells one page of one run, only what it does not know."""

    def __init__(self, run: str, watcher: Watcher, channel: CommandChannel | None) -> None:
        self._run = run
        self._watcher = watcher
        self._channel = channel
        self._tail: RunTail | None = None
        """Held while the page is open: else two long stories would push each other out of mind."""
        self._last_line = 0
        self._last: tuple[object, ...] | None = None
        self._telling: str | None = None
        self._looked_at = -1

    async def news(self, listener: Listener) -> AsyncIterator[StoryMessage]:
        """Yield the story if it has changed, and how far reading is if it takes long."""
        version = await asyncio.to_thread(self._watcher.version_of, self._run)
        if version == self._looked_at:
            return
        self._looked_at = version
        try:
            tail = self._tail = await asyncio.to_thread(self._watcher.tail, self._run)
            told = time.monotonic()
            while await asyncio.to_thread(tail.advance) and not listener.stopped:
                if time.monotonic() - told > _PROGRESS_SECONDS:
                    told = time.monotonic()
                    yield await asyncio.to_thread(self._tell, tail)
            message = await asyncio.to_thread(self._tell, tail)
        except UnknownRunError:
            reason = self._watcher.reason_against(self._run)
            message = self._trouble(
                "There is no such run, or no longer."
                if reason is None
                else f"This is not shown here: {reason}."
            )
        except CANNOT_READ as error:
            message = self._trouble(f"The run cannot be read: {error}")
        except Exception as error:  # noqa: BLE001 – the list must go on
            message = self._trouble(f"The run cannot be told: {error!r}")
            if self._last is None or self._last[0] != message.problem:
                _LOG.error("%s cannot be told", self._run, exc_info=error)
        shown = (message.problem, message.state and message.state.version, tuple(message.offers))
        if shown != self._last:
            self._last = shown
            yield message

    def _trouble(self, problem: str) -> StoryMessage:
        """Return why there is no story now; it is tried again with the next news of any run."""
        self._telling = None
        self._looked_at = -1
        return StoryMessage(run=self._run, problem=problem)

    def _tell(self, tail: RunTail) -> StoryMessage:
        offers, problem = self._offers()
        state = tail.state(after=self._last_line)
        whole = state.telling != self._telling
        if whole:
            state = tail.state()
            self._telling = state.telling
        if state.lines:
            self._last_line = state.lines[-1].id
        return StoryMessage(run=self._run, whole=whole, problem=problem, state=state, offers=offers)

    def _offers(self) -> tuple[tuple[OfferedAction, ...], str | None]:
        """Return what can be asked of the run, or why that is not known."""
        if self._channel is None:
            return (), None
        try:
            return tuple(self._channel.offers(self._run)), None
        except Exception as error:  # noqa: BLE001 – whatever a channel raises, the story goes on
            _LOG.error("what can be asked of %s is not known", self._run, exc_info=error)
            return (), f"What can be asked of the run is not known: {error}"


def _story_event(message: StoryMessage) -> bytes:
    """Return a story as a message, or why it cannot be sent: the list must go on."""
    try:
        return _event("story", message)
    except ValueError as error:
        problem = as_text(f"The run cannot be sent: {error}")
        return _event("story", StoryMessage(run=as_text(message.run), problem=problem))


def _event(kind: str, message: object, message_id: str | None = None) -> bytes:
    """Return a message as the standard has it: its id, its kind, and its data in one line."""
    name = b"" if message_id is None else f"id: {message_id}\n".encode()
    data = to_json(message, inf_nan_mode="null")
    return name + f"event: {kind}\n".encode() + b"data: " + data + b"\n\n"

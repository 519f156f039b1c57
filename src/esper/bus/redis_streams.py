"""The bus between processes and machines: Redis Streams."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from esper.bus.bus import (
    DEAD_LETTERS,
    GIVEN_UP,
    MAX_DELIVERIES,
    BusUnavailableError,
    Delivery,
    Stream,
    check_limit,
    entry_order,
)
from esper.bus.dead_letter import DeadLetter
from esper.bus.redis_link import AnswerError, RedisLink, ServerFacts

_PREFIX = "esper:"
_FIELD = b"m"
_OLDEST = "0-0"
_MESSAGES_AT_ONCE = 1_000
"""In one write to the server, which holds them and its answers in memory meanwhile."""
_REFUSE = """
redis.call('XADD', KEYS[1], 'MAXLEN', '=', ARGV[1], '*', ARGV[2], ARGV[3])
return redis.call('XACK', KEYS[2], ARGV[4], ARGV[5])
"""
"""A script ends with its first error; MULTI would acknowledge although the letter was refused."""
_LOST_GROUP = ("NOGROUP ", "UNBLOCKED ")
_FOREIGN = f"it was not written by esper: it has fields other than {_FIELD.decode()!r}"

_Found = TypeVar("_Found")
_Fields = Mapping[bytes, bytes]


class RedisBus:
    """A `Bus` by a Redis server of version 7.0 or newer.

    Args:
        url: `redis://HOST:PORT/NUMBER`, `rediss://…` with TLS, or `unix:///PATH`. A password in it
            is in no error, log or `repr`.
        password: Of the server, if it is not in the address.
        timeout_seconds: After which a server that does not answer is taken to be away.

    Raises:
        ModuleNotFoundError: redis is not installed.
        ValueError: The address or the password cannot be read, or there are two passwords.

    Effects: connects with the first call, not before; as many connections as threads call at once.
    """

    def __init__(
        self, url: str, *, password: str | None = None, timeout_seconds: float = 5.0
    ) -> None:
        self._link = RedisLink(url, password=password, timeout_seconds=timeout_seconds)

    def __repr__(self) -> str:
        return f"RedisBus({self.address!r})"

    @property
    def address(self) -> str:
        """Where the server is; without a password."""
        return self._link.address

    def ping(self) -> None:
        """Ask whether the server is there.

        Raises:
            BusUnavailableError: It is not.
            BusRefusedError: It does not let this user in.
        """
        with self._link.asking("a ping"):
            self._link.client.ping()

    def server_facts(self) -> ServerFacts:
        """Ask the server how it is set up.

        Raises:
            BusUnavailableError: It is away.
            BusRefusedError: It is older than Redis 7.0, or does not let this user in.
        """
        return self._link.facts()

    def publish(self, stream: Stream, messages: Sequence[bytes]) -> Sequence[str]:
        """Append messages to a stream in this order, and return their entries."""
        entries: list[str] = []
        doing = f"publishing to {stream.name}"
        for begin in range(0, len(messages), _MESSAGES_AT_ONCE):
            with self._link.asking(doing), self._link.client.pipeline(transaction=False) as pipe:
                for message in messages[begin : begin + _MESSAGES_AT_ONCE]:
                    pipe.xadd(
                        _key(stream), {_FIELD: message}, maxlen=stream.max_length, approximate=False
                    )
                entries += [entry.decode() for entry in pipe.execute()]
        return entries

    def subscribe(
        self, stream: Stream, *, group: str, consumer: str, idle_seconds: float = 30.0
    ) -> "_Subscription":
        """Read a stream as one consumer of a group, which begins with the oldest message."""
        return _Subscription(self._link, stream, group, consumer, idle_seconds)

    def latest(self, stream: Stream, *, limit: int) -> Sequence[Delivery]:
        """Return the newest messages of a stream, oldest first."""
        check_limit(limit)
        with self._link.asking(f"reading {stream.name}"):
            found = self._link.client.xrevrange(_key(stream), count=limit)
        return [_delivery(entry, fields, 0) for entry, fields in reversed(found)]

    def after(
        self, stream: Stream, entry: str | None, *, limit: int, wait_seconds: float
    ) -> Sequence[Delivery]:
        """Return the messages after an entry, oldest first."""
        check_limit(limit)
        begin = _OLDEST if entry is None else entry
        entry_order(begin)

        def look(block: int | None) -> list[Delivery]:
            with self._link.asking(f"reading {stream.name}"):
                found = self._link.client.xread({_key(stream): begin}, count=limit, block=block)
            return [_delivery(entry, fields, 0) for _, new in found for entry, fields in new]

        return _wait_for(look, wait_seconds, self._link.timeout_seconds / 2.0)

    def close(self) -> None:
        """End all connections."""
        self._link.close()


class _Subscription:
    """A place in a group. The group is made where there is none, again if the server lost it."""

    def __init__(
        self, link: RedisLink, stream: Stream, group: str, consumer: str, idle_seconds: float
    ) -> None:
        self._link = link
        self._client = link.client
        self._stream = stream
        self._place = (_key(stream), group)
        self._consumer = consumer
        self._idle_seconds = idle_seconds
        self._reclaimed: str | None = None
        """Before it everything was taken that others held; None where nothing is to be."""
        with link.asking(f"joining {group} at {stream.name}"):
            self._make_group()

    def receive(self, *, limit: int, wait_seconds: float) -> Sequence[Delivery]:
        check_limit(limit)
        # In parts: a server must answer within the timeout, and what others hold may become overdue
        longest = min(self._link.timeout_seconds, max(self._idle_seconds, 0.01)) / 2.0
        return _wait_for(
            lambda block: self._overdue(limit) or self._new(limit, block), wait_seconds, longest
        )

    def reclaim(self) -> None:
        self._reclaimed = "-"

    def acknowledge(self, entries: Collection[str]) -> None:
        if entries:
            with self._link.asking(f"acknowledging of {self._stream.name}"):
                self._client.xack(*self._place, *entries)

    def renew(self, entries: Collection[str]) -> None:
        if entries:
            with self._link.asking(f"renewing of {self._stream.name}"):
                self._in_group(lambda: self._claim(list(entries), 0, justid=True))

    def refuse(self, delivery: Delivery, reason: str) -> None:
        letter = DeadLetter.of(
            delivery.message,
            stream=self._stream.name,
            entry=delivery.entry,
            deliveries=delivery.deliveries,
            reason=reason,
        ).model_dump_json()
        key, group = self._place
        with self._link.asking(f"putting a message of {self._stream.name} among the dead letters"):
            self._client.eval(
                *(_REFUSE, 2, _key(DEAD_LETTERS), key),
                *(DEAD_LETTERS.max_length, _FIELD, letter, group, delivery.entry),
            )

    def close(self) -> None:
        # A name that is left in the group takes nothing from anybody
        with suppress(BusUnavailableError), self._link.asking(f"leaving {self._stream.name}"):
            if not self._pending("-", 1, 0, consumer=self._consumer):
                self._client.xgroup_delconsumer(*self._place, self._consumer)

    def _overdue(self, limit: int) -> list[Delivery]:
        """Take what some consumer has held for too long, or what is to be reclaimed."""
        taken: list[Delivery] = []
        begin, more = self._reclaimed or "-", True
        while more and len(taken) < limit:
            try:
                found, begin, more = self._take(begin, limit - len(taken))
            except BusUnavailableError:
                if not taken:
                    raise
                break  # the next call tells; these are taken
            taken += found
            if self._reclaimed is not None:
                self._reclaimed = begin if more else None
        return taken

    def _take(self, begin: str, limit: int) -> tuple[list[Delivery], str, bool]:
        """Take pending messages from an entry on.

        Returns:
            Those that can be delivered, where to go on, and whether there are more.
        """
        idle = 0 if self._reclaimed is not None else round(1e3 * self._idle_seconds)
        with self._link.asking(f"receiving of {self._stream.name}"):
            # One more tells whether there are more: those that come later are nobody's to reclaim.
            pending = self._in_group(lambda: self._pending(begin, limit + 1, idle))
            more, pending = len(pending) > limit, pending[:limit]
            if not pending:
                return [], begin, False
            had = {item["message_id"]: item["times_delivered"] for item in pending}
            claimed = self._claim(list(had), idle)
        found = self._sort_out([(entry, fields, had[entry] + 1) for entry, fields in claimed])
        return found, f"({pending[-1]['message_id'].decode()}", more

    def _new(self, limit: int, block_milliseconds: int | None) -> list[Delivery]:
        """Take what nobody in the group has received yet."""
        key, group = self._place
        with self._link.asking(f"receiving of {self._stream.name}"):
            found = self._in_group(
                lambda: self._client.xreadgroup(
                    group, self._consumer, {key: ">"}, count=limit, block=block_milliseconds
                )
            )
        return self._sort_out([(entry, fields, 1) for _, new in found for entry, fields in new])

    def _sort_out(self, found: Sequence[tuple[bytes, _Fields, int]]) -> list[Delivery]:
        """Put among the dead letters what cannot be delivered, and return the others."""
        good: list[Delivery] = []
        dead: list[tuple[Delivery, str]] = []
        for entry, fields, deliveries in found:
            delivery = _delivery(entry, fields, min(deliveries, MAX_DELIVERIES))
            if _FIELD not in fields:
                dead.append((delivery, _FOREIGN))
            elif deliveries > MAX_DELIVERIES:
                dead.append((delivery, GIVEN_UP))
            else:
                good.append(delivery)
        try:
            for delivery, reason in dead:
                self.refuse(delivery, reason)
        except BusUnavailableError:
            if not good:
                raise  # else the others come first; these are pending, and will be overdue again
        return good

    def _pending(self, begin: str, limit: int, idle: int, consumer: str | None = None) -> Any:
        return self._client.xpending_range(
            *self._place, min=begin, max="+", count=limit, idle=idle, consumername=consumer
        )

    def _claim(self, entries: Sequence[bytes | str], idle: int, *, justid: bool = False) -> Any:
        """Take pending messages; those that were trimmed are no longer pending then."""
        return self._client.xclaim(*self._place, self._consumer, idle, entries, justid=justid)

    def _in_group(self, ask: Callable[[], _Found]) -> _Found:
        try:
            return ask()
        except AnswerError as error:
            if not str(error).startswith(_LOST_GROUP):
                raise
        self._make_group()
        return ask()

    def _make_group(self) -> None:
        try:
            self._client.xgroup_create(*self._place, id=_OLDEST, mkstream=True)
        except AnswerError as error:
            if not str(error).startswith("BUSYGROUP "):
                raise


def _wait_for(
    look: Callable[[int | None], list[Delivery]], wait_seconds: float, longest_seconds: float
) -> list[Delivery]:
    """Look until something is found or the time is over.

    Args:
        look: Called with the milliseconds that the server may wait, None for not at all.
        wait_seconds: In all.
        longest_seconds: For one call.
    """
    end = time.monotonic() + wait_seconds
    while True:
        left = end - time.monotonic()
        block = max(1, round(1e3 * min(left, longest_seconds))) if left > 0.0 else None
        found = look(block)
        if found or block is None:
            return found


def _delivery(entry: bytes, fields: _Fields, deliveries: int) -> Delivery:
    """Return a message; what somebody else wrote is all its fields, which no receiver takes."""
    message = fields.get(_FIELD, repr(fields).encode())
    return Delivery(entry=entry.decode(), message=message, deliveries=deliveries)


def _key(stream: Stream) -> str:
    return f"{_PREFIX}{stream.name}"

"""Signed messages: who holds a key wrote this, for this run, at this time."""

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import quote, unquote

from esper.signing import Keyring

MAX_MESSAGE_BYTES = 1 << 20
"""Of a whole message."""
MAX_BODY_BYTES = MAX_MESSAGE_BYTES - 4096
"""With any run's id a message is not too large then."""
MAX_RUN_CHARACTERS = 255

_VERSION = b"esper1"
_HEAD = re.compile(
    rb"(?P<version>[\x21-\x7e]{1,16}) "
    rb"(?P<id>[0-9a-f]{16}-[1-9][0-9]{0,17}(?:-[1-9][0-9]{0,17})?) "
    rb"(?P<run>[!-~]{1,3060}) (?P<time>0|[1-9][0-9]{0,11}) (?P<signature>[0-9a-f]{64})"
)


_RANGE = re.compile(rb"[!-~]{1,16} [0-9a-f]{16}-([1-9][0-9]{0,17})-([1-9][0-9]{0,17}) ")


class Refusal(StrEnum):
    """Why a message is not taken."""

    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    UNKNOWN_VERSION = "unknown_version"
    BAD_SIGNATURE = "bad_signature"
    WRONG_RUN = "wrong_run"
    STALE = "stale"
    UNKNOWN_BODY = "unknown_body"


class MessageRefusedError(ValueError):
    """A message that cannot be trusted or read; the text says why.

    Attributes:
        refusal: The kind of reason.
    """

    def __init__(self, refusal: Refusal, text: str) -> None:
        super().__init__(text)
        self.refusal = refusal


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A message whose signature was verified.

    Attributes:
        id: `PRODUCER-NUMBER`, or `PRODUCER-FIRST-LAST` of several messages in one envelope; no
            other one has it.
        run: What it is about, or for.
        time_seconds: When it was sealed, by the sender's clock; seconds since the Unix epoch.
        body: JSON.
    """

    id: str
    run: str
    time_seconds: int
    body: bytes

    @property
    def producer(self) -> str:
        """The one `Sealer` that has made it."""
        return self.id.partition("-")[0]

    @property
    def numbers(self) -> range:
        """Which of that sealer's messages are in it, counted from 1; what never comes was lost."""
        numbers = self.id.split("-")[1:]
        return range(int(numbers[0]), int(numbers[-1]) + 1)


class Sealer:
    """Signs messages about one run, or for it, each with an id of its own.

    The layout is that of Standard Webhooks, with the run besides: HMAC-SHA256 over
    `id.run.time.body`, where the run is percent-encoded, dots included, so that no part can pass
    for another. Ids count up, so that a receiver knows how many it has missed; use one sealer for
    each stream.

    Args:
        keyring: Its first key signs.
        run: Its id.
        clock: Seconds since the Unix epoch.

    Raises:
        ValueError: The run's id is empty, too long, or has half a surrogate pair.

    Source: https://github.com/standard-webhooks/standard-webhooks (signed content and rotation);
    the signature is hexadecimal here, and the headers are one line.
    """

    def __init__(
        self, keyring: Keyring, run: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._keyring = keyring
        self._run = _escaped(run)
        self._clock = clock
        self.producer = secrets.token_hex(8)
        """Its own name; no other one has it."""
        self._sealed = 0

    def seal(self, body: bytes, *, messages: int = 1) -> tuple[str, bytes]:
        """Return a new envelope's id, and the envelope.

        Args:
            body: JSON.
            messages: How many there are in it; see `BundleMessage`.

        Raises:
            ValueError: It would be larger than any receiver takes.
        """
        first, self._sealed = self._sealed + 1, self._sealed + messages
        last = f"-{self._sealed}" if messages > 1 else ""
        id_ = f"{self.producer}-{first}{last}"
        head = id_.encode(), self._run, b"%d" % int(self._clock())
        signature = self._keyring.signature(_signed(*head, body)).encode()
        message = b"%s %s %s %s %s\n%s" % (_VERSION, *head, signature, body)
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"a message of {len(message)} bytes is larger than the {MAX_MESSAGE_BYTES} that "
                "receivers take"
            )
        return id_, message

    def skip(self, messages: int) -> None:
        """Count messages that are never sealed, so that receivers know that they miss them."""
        self._sealed += messages


def open_envelope(message: bytes, keyring: Keyring) -> Envelope:
    """Verify a message, and return what it holds.

    Raises:
        MessageRefusedError: It is malformed, too large, of another version, or no key of the
            keyring has signed it.
    """
    if len(message) > MAX_MESSAGE_BYTES:
        raise MessageRefusedError(
            Refusal.TOO_LARGE, f"it has {len(message)} bytes, and {MAX_MESSAGE_BYTES} are allowed"
        )
    head, newline, body = message.partition(b"\n")
    found = _HEAD.fullmatch(head)
    if found is None or not newline:
        raise MessageRefusedError(Refusal.MALFORMED, f"it has no head: {head[:80]!r}")
    version, id_, run, seconds, signature = found.groups()
    if version != _VERSION:
        raise MessageRefusedError(
            Refusal.UNKNOWN_VERSION,
            f"its version is {version.decode()}, and this esper reads {_VERSION.decode()}",
        )
    if not keyring.verifies(_signed(id_, run, seconds, body), signature.decode()):
        raise MessageRefusedError(
            Refusal.BAD_SIGNATURE,
            f"no key here has signed message {id_.decode()}; are the keys the same?",
        )
    return Envelope(
        id=id_.decode(), run=unquote(run.decode()), time_seconds=int(seconds), body=body
    )


def messages_in(envelope: bytes) -> int:
    """Return how many messages an envelope says that it holds, unverified; 1 of other bytes."""
    found = _RANGE.match(envelope)
    return 1 if found is None else max(1, int(found[2]) - int(found[1]) + 1)


def check_run(envelope: Envelope, run: str) -> None:
    """Raise unless a message is for this run.

    Raises:
        MessageRefusedError: It is for another one.
    """
    if envelope.run != run:
        raise MessageRefusedError(
            Refusal.WRONG_RUN, f"message {envelope.id} is for run {envelope.run!r}, not {run!r}"
        )


def check_fresh(envelope: Envelope, *, received_seconds: float, window_seconds: float) -> None:
    """Raise unless a message was sealed shortly before it was first received, by both clocks.

    Args:
        envelope: The message.
        received_seconds: When it was seen first, seconds since the Unix epoch.
        window_seconds: How far apart both may be, before or after.

    Raises:
        MessageRefusedError: They are further apart.
    """
    age = received_seconds - envelope.time_seconds
    if abs(age) > window_seconds:
        when = f"{age:.0f} s before" if age > 0 else f"{-age:.0f} s after"
        raise MessageRefusedError(
            Refusal.STALE,
            f"message {envelope.id} was sent {when} it was received, and {window_seconds:.0f} s "
            "are allowed; is a clock wrong?",
        )


def _signed(id_: bytes, run: bytes, seconds: bytes, body: bytes) -> bytes:
    return b"%s.%s.%s.%s" % (id_, run, seconds, body)


def _escaped(run: str) -> bytes:
    """Return a run's id without dots, spaces and anything that is not ASCII."""
    if not 0 < len(run) <= MAX_RUN_CHARACTERS:
        raise ValueError(
            f"a run's id has 1 to {MAX_RUN_CHARACTERS} characters, got {len(run)}: {run[:40]!r}"
        )
    try:
        return quote(run, safe="").replace(".", "%2E").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a run's id is text, which {run[:40]!r} is not: {error}") from error

"""How a Redis server is reached, what its errors mean, and how it is set up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from esper.bus.bus import BusRefusedError, BusUnavailableError

try:
    import redis
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "a bus by Redis needs redis: pip install 'esper-lite[redis]'", name=missing.name
    ) from missing
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry

OLDEST_VERSION = "7.0"
AnswerError = ResponseError
"""What redis raises where the server has answered with an error."""

_NOT_NOW = (
    redis.ConnectionError,
    redis.TimeoutError,
    OutOfMemoryError,
    ReadOnlyError,
    ClusterDownError,
    TryAgainError,
)
_NOT_NOW_CODES = ("MISCONF ", "BUSY ", "NOREPLICAS ", "UNKILLABLE ")
_NEVER = (AuthenticationError, AuthorizationError)
"""redis calls these connection errors."""
_PARTS = {"host", "port", "db", "username", "password", "path", "connection_class"}
_UNREADABLE = (
    "the address of the bus cannot be read; it is redis://HOST:PORT/NUMBER, rediss:// for TLS, or "
    "unix:///PATH, all in UTF-8; each part of HOST between dots has 1 to 63 characters, and in a "
    "password : / ? # @ are percent-encoded"
)


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """How a server is set up; None is what it does not tell.

    Attributes:
        version: Of Redis, or of the one that the server is compatible with.
        append_only: Whether it keeps what is written in a file.
        append_fsync: When that is on the disk: "always", "everysec" or "no".
        max_memory_bytes: That it may use; 0 is no limit.
        max_memory_policy: What it does then; all but "noeviction" may lose streams.
    """

    version: str | None
    append_only: bool | None
    append_fsync: str | None
    max_memory_bytes: int | None
    max_memory_policy: str | None


class RedisLink:
    """A pool of connections to one server, whose errors are the bus's. For any number of threads.

    Nothing is tried twice here: a message must not be appended twice because an answer was lost.

    Args:
        url: As `RedisBus`.
        password: As there.
        timeout_seconds: As there.

    Raises:
        ValueError: The address or the password cannot be read, or there are two passwords.
    """

    def __init__(self, url: str, *, password: str | None, timeout_seconds: float) -> None:
        parts = _parts(url)
        _check_password(password or "")
        if password is not None and "password" in parts:
            raise ValueError("the password of the bus is given twice, in its address and besides")
        self.timeout_seconds = timeout_seconds
        self.address = _shown(parts)
        self._pool = redis.ConnectionPool(
            **{
                **parts,
                **({} if password is None else {"password": password}),
                "socket_timeout": timeout_seconds,
                "socket_connect_timeout": timeout_seconds,
                "retry": Retry(NoBackoff(), 0),
                "protocol": 2,
            }
        )
        self.client: Any = redis.Redis(connection_pool=self._pool)

    def __repr__(self) -> str:
        return f"RedisLink({self.address!r})"

    @contextmanager
    def asking(self, doing: str) -> Iterator[None]:
        """Turn errors of redis within the block into the bus's.

        Args:
            doing: What is tried, for their text.

        Raises:
            BusUnavailableError: The server is away or cannot take anything now.
            BusRefusedError: It refuses this.
        """
        try:
            yield
        except RedisError as error:
            raise self.error(doing, error) from error

    def error(self, doing: str, error: RedisError) -> BusUnavailableError | BusRefusedError:
        """Return what an error of redis means."""
        # redis puts the command before it in a pipeline, with what it was to write
        text = str(error).rpartition("of pipeline caused error: ")[2]
        for_now = isinstance(error, _NOT_NOW) or text.startswith(_NOT_NOW_CODES)
        if for_now and not isinstance(error, _NEVER):
            return BusUnavailableError(f"{doing} failed, {self.address} is not available: {text}")
        if isinstance(error, _NEVER):
            text = f"{text} (is the password right?)"
        elif isinstance(error, NoPermissionError):
            text = f"{text} (what may this user do?)"
        elif text.startswith("WRONGTYPE"):
            text = f"{text} (somebody keeps something else there that is no stream)"
        return BusRefusedError(f"{doing} failed, {self.address} refuses it: {text}")

    def facts(self) -> ServerFacts:
        """Ask the server how it is set up.

        Raises:
            BusUnavailableError: It is away.
            BusRefusedError: It is older than Redis 7.0, or does not let this user in.
        """
        with self.asking("asking how it is set up"):
            info = self._if_allowed(self.client.info)
            config = self._if_allowed(self.client.config_get, "append*")
        version = info.get("redis_version")
        if version is not None and _number(version) < _number(OLDEST_VERSION):
            raise BusRefusedError(
                f"{self.address} is Redis {version}; a bus needs {OLDEST_VERSION} or newer"
            )
        append_only = info.get("aof_enabled")
        return ServerFacts(
            version=version,
            append_only=None if append_only is None else bool(append_only),
            append_fsync=config.get("appendfsync"),
            max_memory_bytes=info.get("maxmemory"),
            max_memory_policy=info.get("maxmemory_policy"),
        )

    def close(self) -> None:
        """End all connections."""
        self._pool.disconnect()

    @staticmethod
    def _if_allowed(ask: Any, *arguments: str) -> dict[str, Any]:
        """Return what the server tells, or nothing where it does not tell this user, or anybody."""
        try:
            told: dict[str, Any] = ask(*arguments)
        except ResponseError as error:
            if isinstance(error, _NOT_NOW):
                raise
            return {}
        return {_text(name): _text(value) for name, value in told.items()}


def _parts(url: str) -> dict[str, Any]:
    """Return what connects to an address; no error has it in its text, it may hold a password."""
    try:
        url.encode()
        parts: dict[str, Any] = parse_url(url)
        parts.get("host", "").encode("idna")  # as it is looked up, where redis lets the error pass
        split = urlsplit(url)
    except ValueError:
        raise ValueError(_UNREADABLE) from None
    number = split.path.strip("/")
    if split.scheme == "unix":
        readable = bool(split.path)
    else:
        readable = bool(split.hostname) and (not number or number.isdecimal())
    unknown = {name for name in parts if not name.startswith("ssl_")} - _PARTS
    if not readable or split.fragment or unknown:
        raise ValueError(_UNREADABLE)
    return parts


def _check_password(password: str) -> None:
    try:
        password.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "the password of the bus is no text in UTF-8; give it in that encoding, or the server "
            "another one"
        ) from None  # which holds it


def _shown(parts: dict[str, Any]) -> str:
    """Return an address without a password."""
    number = parts.get("db", 0)
    if "path" in parts:
        return f"unix://{parts['path']}" + (f"?db={number}" if number else "")
    scheme = "rediss" if "connection_class" in parts else "redis"
    host = f"[{parts['host']}]" if ":" in parts["host"] else parts["host"]
    return f"{scheme}://{host}:{parts.get('port', 6379)}/{number}"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value

"""Serving the dashboard until somebody ends it."""

import errno
import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from esper.dashboard.access import Access, new_token
from esper.dashboard.commands import CommandChannel
from esper.dashboard.server import Dashboard


class AddressError(OSError):
    """The address cannot be served; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a dashboard is served.

    Attributes:
        url: For a browser, without the token.
        token: Needed to see anything; None if none is.
        generated: Whether the token was made here, and nobody knows it yet.
    """

    url: str
    token: str | None
    generated: bool

    @property
    def url_with_token(self) -> str:
        """The URL that lets in; the part behind # is never sent, nor kept in any log."""
        return self.url if self.token is None else f"{self.url}#token={self.token}"


class DashboardServer:
    """Serves one folder of runs.

    The socket is bound at once, so that the port is known and a second server is refused.

    Args:
        root: The folder that runs are in; need not exist yet.
        host: Name or address to bind; beyond loopback a token is needed, and made if none is given.
        port: 0 takes any that is free.
        token: None needs none on loopback.
        channel: Takes commands to runs.

    Raises:
        AddressError: The address is taken, or not one of this machine's.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        channel: CommandChannel | None = None,
    ) -> None:
        self._socket = _bound(host, port)
        address, port = self._socket.getsockname()[:2]
        generated = token is None and not ipaddress.ip_address(address).is_loopback
        if generated:
            token = new_token()
        self.address = Address(
            url=f"http://{_shown(host, address)}:{port}/", token=token, generated=generated
        )
        self._dashboard = Dashboard(Path(root), Access(token, port=port), channel)
        config = uvicorn.Config(
            self._dashboard.app(),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config, self._dashboard.end_streams)

    def serve(self) -> None:
        """Serve until SIGINT, SIGTERM or `stop`, and end at once then, open streams and all.

        Raises:
            KeyboardInterrupt: It was SIGINT.
        """
        self._server.run(sockets=[self._socket])

    def close(self) -> None:
        """Let go of the address, if it is not served after all."""
        self._socket.close()

    def stop(self) -> None:
        """End; may be called by another thread."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """Ends the streams first when it is to end, which else would keep it."""

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_streams = end_streams

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_streams()
        await super().shutdown(sockets)


def allow_many_files() -> None:
    """Let this process open as many files as it may; each open page and each look needs some."""
    try:
        import resource  # noqa: PLC0415 – not on Windows
    except ModuleNotFoundError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise AddressError(f"{host} is no address: {error}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # until then a second server may bind it too
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"port {port} of {host} is taken; choose another, or any with --port 0"
            ) from error
        raise AddressError(f"{host} cannot be served here: {error}") from error
    return bound


def _shown(host: str, address: str) -> str:
    """Return a host for a URL: of all addresses this machine's name."""
    if ipaddress.ip_address(address).is_unspecified:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host

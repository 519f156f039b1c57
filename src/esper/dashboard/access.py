"""Who may look: host names against DNS rebinding, the token, and same-origin requests."""

import hashlib
import hmac
import ipaddress
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

TOKEN_VARIABLE = "ESPER_DASHBOARD_TOKEN"  # noqa: S105 – the name, not the token
MIN_TOKEN_CHARACTERS = 16
COMMAND_HEADER = "x-esper-command"

_MAKE_ONE = "make one: python -c 'import secrets; print(secrets.token_urlsafe())'"
_OTHERS_MAY_READ = stat.S_IRGRP | stat.S_IROTH
_SESSION = b"esper dashboard session"
_COMMAND = b"esper dashboard command"


class TokenError(ValueError):
    """A token that is too easily guessed or read by others."""


class Access:
    """Decides whom the dashboard answers.

    Without a token only loopback names are answered: a page of another site whose name was made to
    resolve to this machine is not. With one, any name is, and everything but the empty page needs
    the token or the cookie that it was exchanged for.

    Args:
        token: None lets everybody in who can reach the server, which only loopback may do.
        port: Tells the cookie from that of another dashboard on this host.
    """

    def __init__(self, token: str | None, *, port: int) -> None:
        self._token = token
        self._key = (token or secrets.token_urlsafe()).encode()
        self.cookie_name = f"esper-dashboard-{port}"

    @property
    def needs_token(self) -> bool:
        """Whether somebody without the token sees nothing."""
        return self._token is not None

    def knows_host(self, headers: Headers) -> bool:
        """Return whether the name that the server was called by is one that it answers to."""
        return self.needs_token or is_loopback(_hostname(headers.get("host", "")))

    def admits(self, headers: Headers) -> bool:
        """Return whether a request has the token, as a cookie or as a bearer's."""
        if self._token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(given):
            return True
        return hmac.compare_digest(self._cookie_in(headers), self.cookie_value)

    def is_token(self, given: str) -> bool:
        """Return whether this is the token; it takes as long for any that is not."""
        if self._token is None:
            return False
        # What was sent as JSON may be no text.
        return hmac.compare_digest(given.encode(errors="surrogatepass"), self._token.encode())

    @property
    def cookie_value(self) -> str:
        """What the token is exchanged for; it stays good as long as the token is the same."""
        return self._derived(_SESSION)

    @property
    def command_token(self) -> str:
        """What a request that changes something must carry in `COMMAND_HEADER`.

        A page of another site can neither read it nor send such a header.
        """
        return self._derived(_COMMAND)

    def may_command(self, headers: Headers) -> bool:
        """Return whether a request comes from the dashboard's own page."""
        origin = headers.get("origin")
        if origin is not None and _place(origin) != headers.get("host"):
            return False
        given = headers.get(COMMAND_HEADER, "")
        return hmac.compare_digest(given.encode(), self.command_token.encode())

    def _derived(self, purpose: bytes) -> str:
        return hmac.new(self._key, purpose, hashlib.sha256).hexdigest()

    def _cookie_in(self, headers: Headers) -> str:
        # of one bad cookie of another program on this host http.cookies would make none at all
        given = cookie_parser(headers.get("cookie", "")).get(self.cookie_name, "")
        return given.encode("ascii", "replace").decode()


def is_loopback(host: str) -> bool:
    """Return whether a name or address can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def find_token(file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the token from a file or the environment, the file first; None if there is neither.

    It is no argument of the command: every user of the machine sees those.

    Raises:
        TokenError: It is short or no text, not of printable ASCII, or others may read the file.
        OSError: The file cannot be read.
    """
    if file is not None:
        if os.name == "posix" and file.stat().st_mode & _OTHERS_MAY_READ:
            raise TokenError(f"others may read {file}; make it yours alone: chmod 600 {file}")
        try:
            token, source = file.read_text(encoding="utf-8").strip(), str(file)
        except UnicodeDecodeError as error:
            raise TokenError(f"{file} holds no text; {_MAKE_ONE}") from error
    elif TOKEN_VARIABLE in environment:
        token, source = environment[TOKEN_VARIABLE].strip(), TOKEN_VARIABLE
    else:
        return None
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise TokenError(
            f"the token in {source} has {len(token)} characters, at least {MIN_TOKEN_CHARACTERS} "
            f"are needed; {_MAKE_ONE}"
        )
    if not (token.isascii() and token.isprintable()):
        raise TokenError(
            f"the token in {source} holds others than printable ASCII characters, which not every "
            f"program sends alike; {_MAKE_ONE}"
        )
    return token


def new_token() -> str:
    """Return a token that cannot be guessed: 256 bits."""
    return secrets.token_urlsafe(32)

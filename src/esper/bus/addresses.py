"""Which bus an address means."""

from urllib.parse import parse_qs, urlsplit

from esper.bus.bus import Bus


def check_no_password(name: str, url: str) -> None:
    """Raise if an address that others will see holds a password.

    Args:
        name: Of the setting.
        url: Its value.

    Raises:
        ValueError: It does; or its parts cannot be told.
    """
    parts = urlsplit(url)
    _ = parts.port  # raises where it is none
    if parts.password is not None or "password" in parse_qs(parts.query, keep_blank_values=True):
        raise ValueError(
            f"{name} holds a password, which others would see in the run folder and among the "
            "running programs; take it out, and set the environment variable ESPER_BUS_PASSWORD"
        )


def open_bus(url: str, *, password: str | None = None) -> Bus:
    """Return the bus at an address; the first call connects.

    Args:
        url: `redis://HOST:PORT/NUMBER`, `rediss://…` with TLS, or `unix:///PATH`.
        password: If it is not in the address.

    Raises:
        ModuleNotFoundError: redis is not installed.
        ValueError: There is no such bus, or the address cannot be read.
    """
    scheme, found, _ = url.partition("://")
    if not found or scheme not in ("redis", "rediss", "unix"):
        # Not the address itself: there may be a password in it
        got = f"got {scheme}://…" if found else "got one without ://"
        raise ValueError(f"the address of a bus begins with redis://, rediss:// or unix://, {got}")
    from esper.bus.redis_streams import RedisBus  # noqa: PLC0415 – an optional extra

    return RedisBus(url, password=password)

"""Which bus an address means."""

from esper.bus.bus import Bus


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

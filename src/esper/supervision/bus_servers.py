"""How the servers of the bus are set up, as far as it matters that nothing is lost."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from esper.bus.bus import BusRefusedError, BusUnavailableError
from esper.experiments.bus_connection import open_run_bus
from esper.supervision.config import BusConfig, ServeConfig
from esper.supervision.finding import Finding, failure, ok, warning

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_DEFAULT_PORT = 6379


def servers_found(config: ServeConfig) -> Iterator[Finding]:
    """Yield what there is to say of the servers, but for those that are to be started first."""
    if config.bus is None:
        return
    own = own_services(config)
    for role, address in _addresses(config.bus).items():
        if role in own:
            yield ok(f"bus {role}", f"service {own[role]} will serve it")
        else:
            yield from _server(role, address)
    if _instance(config.bus.commands) == _instance(config.bus.telemetry_url):
        yield warning(
            "bus",
            "one server takes commands and telemetry: much telemetry can hold up commands, "
            "and fill the memory that they need; give telemetry one of its own",
        )


def own_servers_found(config: ServeConfig) -> list[Finding]:
    """Return what there is to say of the servers that are among the services, which run now."""
    if config.bus is None:
        return []
    addresses = _addresses(config.bus)
    return [found for role in own_services(config) for found in _server(role, addresses[role])]


def own_services(config: ServeConfig) -> dict[str, str]:
    """Return the services that are servers of the bus, by what they are for."""
    if config.bus is None:
        return {}
    names = {service.ready.port: service.name for service in config.service if service.ready}
    own = {}
    for role, address in _addresses(config.bus).items():
        host, place = _instance(address)
        if host in LOOPBACK and place in names:
            own[role] = names[place]
    return own


def _addresses(bus: BusConfig) -> dict[str, str]:
    """Return the different ones, by what they are for."""
    both = {"commands": bus.commands, "telemetry": bus.telemetry_url}
    return both if bus.telemetry_url != bus.commands else {"commands": bus.commands}


def _server(role: str, address: str) -> Iterator[Finding]:
    about = f"bus {role}"
    try:
        from esper.bus.redis_streams import RedisBus  # noqa: PLC0415 – an optional extra

        bus = open_run_bus(address)
        assert isinstance(bus, RedisBus)
        facts = bus.server_facts()
    except (BusRefusedError, BusUnavailableError, ModuleNotFoundError, ValueError) as error:
        yield failure(about, str(error))
        return
    bus.close()
    yield ok(about, f"{bus.address}, Redis {facts.version}")
    if role == "commands" and not (facts.append_only and facts.append_fsync == "always"):
        yield warning(
            about,
            "a command can be lost when its machine loses power: it does not run with "
            "appendonly yes and appendfsync always",
        )
    if facts.max_memory_bytes and facts.max_memory_policy != "noeviction":
        yield warning(
            about,
            f"it may throw messages away when its memory is full: its maxmemory-policy is "
            f"{facts.max_memory_policy}, and should be noeviction",
        )


def _instance(address: str) -> tuple[str, int | str]:
    """Return what tells a server from others, whatever database of it an address names."""
    parts = urlsplit(address)
    if parts.scheme == "unix":
        return "", parts.path
    host = parts.hostname or LOOPBACK[0]
    return LOOPBACK[0] if host in LOOPBACK else host, parts.port or _DEFAULT_PORT

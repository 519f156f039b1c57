"""What is served is told over a real bus, signed; what is forged is counted and not shown."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.bus.bus import HEALTH
from esper.bus.envelope import MAX_MESSAGE_BYTES, Sealer
from esper.bus.messages import HealthMessage, body_of
from esper.bus.redis_streams import RedisBus
from esper.signing import Keyring
from esper.supervision.health_reader import HealthOnBus, read_health
from esper.supervision.health_teller import HealthTeller, source_of
from esper.supervision.status import ServiceState, ServiceStatus
from redis_server import NO_SERVER, PROGRAM, RedisServer
from supervised import STATUS, Served, wait_for

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=NO_SERVER),
]

RING = Keyring([b"a key that the supervisor has"])
OTHER = Keyring([b"a key that nobody else here has"])


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def service(name: str, state: ServiceState = ServiceState.READY) -> ServiceStatus:
    return ServiceStatus(name=name, kind="service", state=state, since_seconds=1.0, log="log")


def health(server: RedisServer, *, ahead_seconds: float = 0.0) -> HealthOnBus:
    bus = RedisBus(server.url)
    try:
        return read_health(bus, RING, now_seconds=time.time() + ahead_seconds)
    finally:
        bus.close()


def states(server: RedisServer) -> dict[str, str]:
    return {one.service: one.state for one in health(server).services}


def teller(server: RedisServer) -> HealthTeller:
    return HealthTeller(RedisBus(server.url), Sealer(RING, "serve:here"))


def say(server: RedisServer, ring: Keyring, name: str, *, clock: float | None = None) -> None:
    message = HealthMessage(service=name, state="ready", pid=1, host="elsewhere")
    sealer = Sealer(ring, "serve:there", clock=lambda: clock or time.time())
    bus = RedisBus(server.url)
    bus.publish(HEALTH, [sealer.seal(body_of(message))[1]])
    bus.close()


def test_a_change_is_told_at_once_and_the_newest_state_is_what_is_read(
    server: RedisServer,
) -> None:
    telling = teller(server)
    telling.tell([service("a"), service("b")])
    wait_for(lambda: states(server) == {"a": "ready", "b": "ready"})
    telling.tell([service("a"), service("b", ServiceState.GIVEN_UP)])
    wait_for(lambda: states(server) == {"a": "ready", "b": "given up"})
    telling.close()
    assert [one.needs_a_person for one in health(server).services] == [False, True]


def test_two_supervisors_of_one_machine_do_not_hide_each_other(server: RedisServer) -> None:
    folders = (Path("/one/serve"), Path("/two/serve"), Path(f"/{300 * 'x'}/{250 * 'y'}"))
    for folder in folders:
        telling = HealthTeller(RedisBus(server.url), Sealer(RING, source_of(folder)))
        telling.tell([service("router")])
        telling.close()
    found = health(server).services
    assert [one.service for one in found] == 3 * ["router"]
    assert sum(":serve-" in one.source for one in found) == 2


def test_forged_ones_are_not_shown_but_counted(server: RedisServer) -> None:
    say(server, RING, "true")
    say(server, OTHER, "forged")
    bus = RedisBus(server.url)
    bus.publish(HEALTH, [b"noise"])
    bus.close()
    found = health(server)
    assert [one.service for one in found.services] == ["true"]
    assert found.refused == 2


def test_one_that_has_said_nothing_for_long_is_silent_and_one_that_ended_is_not(
    server: RedisServer,
) -> None:
    telling = teller(server)
    telling.tell([service("runs"), service("done", ServiceState.FINISHED)])
    telling.close()
    found = {one.service: one for one in health(server, ahead_seconds=25.0).services}
    assert found["runs"].is_silent
    assert not found["done"].is_silent
    assert not any(one.is_silent for one in health(server).services)


def test_a_message_that_comes_late_does_not_replace_a_newer_one(server: RedisServer) -> None:
    say(server, RING, "a")
    say(server, RING, "a", clock=time.time() - 100.0)
    (one,) = health(server).services
    assert one.age_seconds < 50.0


@pytest.mark.parametrize("later", [0.0, 7200.0])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_was_ahead_and_was_set_right_hides_no_later_state(
    restarted: bool, later: float, server: RedisServer
) -> None:
    ahead = Sealer(RING, "serve:there", clock=lambda: time.time() + seconds)
    bus = RedisBus(server.url)
    for seconds, state in ((3600.0, "ready"), (0.0, "given up")):
        message = HealthMessage(service="a", state=state, pid=1, host="there")
        sealer = Sealer(RING, "serve:there") if restarted and not seconds else ahead
        bus.publish(HEALTH, [sealer.seal(body_of(message))[1]])
    bus.close()
    (one,) = health(server, ahead_seconds=later).services
    assert one.state == "given up"
    assert one.age_seconds >= 0.0


def test_a_server_that_is_away_or_hangs_holds_up_nobody_and_hears_the_newest_state_later(
    server: RedisServer,
) -> None:
    telling = teller(server)
    telling.tell([service("a", ServiceState.STARTING)])
    wait_for(lambda: states(server) == {"a": "starting"})
    server.kill()
    began = time.monotonic()
    for index in range(100):
        state = ServiceState.STARTING if index % 2 else ServiceState.BACKING_OFF
        telling.tell([service("a", state)])
    telling.tell([service("a", ServiceState.READY)])
    assert time.monotonic() - began < 0.5
    wait_for(lambda: telling.condition != "told")
    server.start()
    wait_for(lambda: states(server) == {"a": "ready"})
    wait_for(lambda: telling.condition == "told")
    telling.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "esper-health"]


def test_what_no_message_can_tell_is_said_and_what_comes_later_is_told(server: RedisServer) -> None:
    telling = teller(server)
    large = service("a").model_copy(update={"reason": 2 * MAX_MESSAGE_BYTES * "x"})
    telling.tell([large])
    wait_for(lambda: telling.condition != "told")
    assert "is larger than" in telling.condition
    telling.tell([service("a", ServiceState.BACKING_OFF)])
    wait_for(lambda: states(server) == {"a": "backing off"})
    wait_for(lambda: telling.condition == "told")
    telling.close()


def test_what_was_being_told_when_the_server_went_is_not_told_after_what_is_newer(
    server: RedisServer,
) -> None:
    server.pause()
    telling = teller(server)
    telling.tell([service("a", ServiceState.STARTING)])
    wait_for(lambda: telling._newest is None)  # it is being sent
    telling.tell([service("a", ServiceState.READY)])
    server.kill()
    server.start()
    wait_for(lambda: states(server))
    telling.close()
    assert states(server) == {"a": "ready"}


@pytest.mark.slow
def test_serve_goes_on_without_its_bus_and_status_reads_what_it_told(
    tmp_path: Path, server: RedisServer
) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(RING.keys[0])
    keys.chmod(0o600)
    config = f"""
[bus]
commands = "{server.url}"
key_file = "keys"
[restart]
first_seconds = 0.05
[[service]]
name = "sleeper"
command = ["sleep", "1000"]
"""
    asking = ("--bus", server.url, "--key-file", "keys")
    with Served(tmp_path, config) as served:
        served.wait_for("sleeper", "ready")
        wait_for(lambda: states(server) == {"sleeper": "ready"})
        say(server, OTHER, "forged")
        told = served.run(STATUS, *asking)
        assert told.returncode == 0, told.stderr
        assert "not taken: 1 messages" in told.stdout
        assert "forged" not in told.stdout
        server.kill()
        wait_for(lambda: (s := served.status) and s.bus not in (None, "told"))
        before = served.status
        wait_for(lambda: (s := served.status) and before and s.time_seconds > before.time_seconds)
        served.wait_for("sleeper", "ready")
        assert served.run(STATUS, *asking).returncode == 3
        server.start()
        wait_for(lambda: (s := served.status) and s.bus == "told")
        found = json.loads(served.run(STATUS, *asking, "--json").stdout)
        assert [one["service"] for one in found["services"]] == ["sleeper"]
        assert found["services"][0]["details"]["kind"] == "service"

"""The bus by a real Redis that is away, stops answering, is full, loses its data or is killed."""

import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Self

import pytest
import redis

from esper.bus import (
    DEAD_LETTERS,
    BusRefusedError,
    BusUnavailableError,
    DeadLetter,
    Delivery,
    Stream,
    open_bus,
)
from esper.bus import redis_link as link_module
from esper.bus.redis_streams import RedisBus
from processes import run_python
from redis_server import RedisServer

pytestmark = pytest.mark.redis

KEPT = Stream(name="kept", max_length=None)
SECRET = "s3cret/?#@:w0rd"  # noqa: S105 – of a server that lives as long as a test
LONG_SECONDS = 20.0


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer(fsync="always") as server:
        yield server


@pytest.fixture
def bus(server: RedisServer) -> Iterator[RedisBus]:
    with closing(RedisBus(server.url, timeout_seconds=LONG_SECONDS)) as bus:
        yield bus


def letters(bus: RedisBus) -> list[DeadLetter]:
    found = bus.latest(DEAD_LETTERS, limit=100)
    return [DeadLetter.model_validate_json(delivery.message) for delivery in found]


def messages(deliveries: Sequence[Delivery]) -> list[bytes]:
    return [delivery.message for delivery in deliveries]


def all_calls(bus: RedisBus, held: Delivery) -> dict[str, Callable[[], object]]:
    """Return what waits for a server, none of it for long; a subscription is there already."""
    reader = bus.subscribe(KEPT, group="other", consumer="one")
    return {
        "publish": lambda: bus.publish(KEPT, [b"message"]),
        "subscribe": lambda: bus.subscribe(KEPT, group="third", consumer="one"),
        "receive": lambda: reader.receive(limit=1, wait_seconds=0.0),
        "acknowledge": lambda: reader.acknowledge([held.entry]),
        "renew": lambda: reader.renew([held.entry]),
        "refuse": lambda: reader.refuse(held, "reason"),
        "latest": lambda: bus.latest(KEPT, limit=1),
        "after": lambda: bus.after(KEPT, None, limit=1, wait_seconds=0.0),
        "ping": bus.ping,
        "server_facts": bus.server_facts,
    }


def held_by(bus: RedisBus) -> Delivery:
    bus.publish(KEPT, [b"held"])
    [held] = bus.subscribe(KEPT, group="group", consumer="one").receive(limit=1, wait_seconds=0.0)
    return held


def test_a_server_that_is_not_there_yet_is_no_error_before_it_is_asked(server: RedisServer) -> None:
    server.kill()
    with closing(RedisBus(server.url)) as bus:
        with pytest.raises(BusUnavailableError) as caught:
            bus.publish(KEPT, [b"early"])
        assert str(caught.value).startswith(
            f"publishing to kept failed, {server.url}/0 is not available: "
        )
        with pytest.raises(BusUnavailableError, match="joining group at kept"):
            bus.subscribe(KEPT, group="group", consumer="one")
        server.start()
        bus.publish(KEPT, [b"now"])
        assert messages(bus.latest(KEPT, limit=9)) == [b"now"]


def test_every_call_says_that_the_server_went_away_and_works_when_it_is_back(
    server: RedisServer, bus: RedisBus
) -> None:
    calls = all_calls(bus, held_by(bus))
    server.kill()
    for name, call in calls.items():
        with pytest.raises(BusUnavailableError, match=f"{server.url}/0 is not available") as caught:
            call()
        assert "held" not in str(caught.value), name
    server.start()
    for call in calls.values():
        call()


def test_who_waits_for_a_message_is_told_that_the_server_died(
    server: RedisServer, bus: RedisBus
) -> None:
    reader = bus.subscribe(KEPT, group="group", consumer="one")
    errors: list[BusUnavailableError] = []

    def wait() -> None:
        try:
            reader.receive(limit=1, wait_seconds=60.0)
        except BusUnavailableError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    with server.client() as client:
        until(lambda: client.info("clients")["blocked_clients"] == 1)
    server.kill()
    thread.join(LONG_SECONDS)
    assert len(errors) == 1
    server.start()
    bus.publish(KEPT, [b"again"])
    assert messages(reader.receive(limit=1, wait_seconds=0.0)) == [b"again"]


def test_a_server_that_does_not_answer_is_taken_to_be_away(server: RedisServer) -> None:
    with closing(RedisBus(server.url, timeout_seconds=0.3)) as bus:
        calls = all_calls(bus, held_by(bus))
        server.pause()
        for name, call in calls.items():
            began = time.monotonic()
            with pytest.raises(BusUnavailableError, match=r"[Tt]imeout|timed out"):
                call()
            assert time.monotonic() - began < 4.0, name
        server.go_on()
        bus.publish(KEPT, [b"again"])


class AnswersLost:
    """Stands before a server, and closes a connection instead of answering an XADD."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone does not wake who accepts
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                self._pass_on(self._listening.accept()[0])

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server.port)) as server:
            while asked := client.recv(65536):
                server.sendall(asked)
                answer = server.recv(65536)
                if b"XADD" in asked:
                    return
                client.sendall(answer)


def test_what_was_taken_though_the_answer_was_lost_is_not_sent_twice(
    server: RedisServer, bus: RedisBus
) -> None:
    lost = pytest.raises(BusUnavailableError)
    with AnswersLost(server) as lossy, closing(RedisBus(lossy.url)) as cut, lost:
        cut.publish(KEPT, [b"once"])
    assert messages(bus.latest(KEPT, limit=9)) == [b"once"]


def test_waiting_for_longer_than_the_timeout_is_no_timeout(server: RedisServer) -> None:
    with closing(RedisBus(server.url, timeout_seconds=0.4)) as bus:
        reader = bus.subscribe(KEPT, group="group", consumer="one")
        assert reader.receive(limit=1, wait_seconds=1.0) == []
        assert bus.after(KEPT, None, limit=1, wait_seconds=1.0) == []


def test_who_waits_long_gets_what_becomes_overdue_meanwhile(bus: RedisBus) -> None:
    bus.publish(KEPT, [b"abandoned"])
    abandoning = bus.subscribe(KEPT, group="group", consumer="one")
    abandoning.receive(limit=1, wait_seconds=0.0)
    other = bus.subscribe(KEPT, group="group", consumer="two", idle_seconds=0.2)
    began = time.monotonic()
    assert messages(other.receive(limit=1, wait_seconds=4.0 * LONG_SECONDS)) == [b"abandoned"]
    assert time.monotonic() - began < 0.4 * LONG_SECONDS


def make_full(server: RedisServer) -> None:
    server.config_set(maxmemory="1", maxmemory_policy="noeviction")


def empty_again(server: RedisServer) -> None:
    server.config_set(maxmemory="0")


def make_replica(server: RedisServer) -> None:
    with server.client() as client:
        client.replicaof("127.0.0.1", "1")


def make_master(server: RedisServer) -> None:
    with server.client() as client:
        client.replicaof("NO", "ONE")


def fail_to_save(server: RedisServer) -> None:
    """Have it fail to write a snapshot, after which it refuses to be changed."""
    shutil.rmtree(server.folder)
    with server.client() as client:
        client.config_set("appendonly", "no")
        client.config_set("save", "3600 1")
        client.bgsave()
        until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


def save_again(server: RedisServer) -> None:
    with server.client() as client:
        client.config_set("save", "")


@pytest.mark.parametrize(
    ("spoil", "mend", "says"),
    [
        (make_full, empty_again, "command not allowed when used memory > 'maxmemory'"),
        (make_replica, make_master, "You can't write against a read only replica"),
        (fail_to_save, save_again, "MISCONF"),
    ],
    ids=["full", "replica", "cannot save"],
)
def test_a_server_that_takes_nothing_now_changes_nothing_and_may_take_it_later(
    server: RedisServer,
    bus: RedisBus,
    spoil: Callable[[RedisServer], None],
    mend: Callable[[RedisServer], None],
    says: str,
) -> None:
    bus.publish(KEPT, [b"before"])
    reader = bus.subscribe(KEPT, group="group", consumer="one")
    [held] = reader.receive(limit=1, wait_seconds=0.0)
    spoil(server)
    for call in (
        lambda: bus.publish(KEPT, [b"secret one", b"secret two"]),
        lambda: reader.refuse(held, "a reason"),
    ):
        with pytest.raises(BusUnavailableError, match="is not available: ") as caught:
            call()
        assert says in str(caught.value)
        assert "secret" not in str(caught.value)
    mend(server)
    assert letters(bus) == []
    bus.publish(KEPT, [b"later"])
    assert messages(bus.latest(KEPT, limit=9)) == [b"before", b"later"]
    reader.reclaim()
    assert messages(reader.receive(limit=1, wait_seconds=0.0)) == [b"before"]


def test_a_server_that_is_busy_with_a_script_is_not_available(
    server: RedisServer, bus: RedisBus
) -> None:
    server.config_set(busy_reply_threshold="1")

    def occupy() -> None:
        with server.client() as client, pytest.raises(redis.ResponseError, match="killed"):
            client.eval("while true do end", 0)

    thread = threading.Thread(target=occupy)
    with server.client() as client:
        thread.start()
        until(lambda: raises(redis.ResponseError, client.ping))
        with pytest.raises(BusUnavailableError, match="BUSY"):
            bus.publish(KEPT, [b"message"])
        client.script_kill()
    thread.join()
    bus.publish(KEPT, [b"message"])


@pytest.mark.parametrize("waits", [False, True])
def test_a_group_is_made_again_where_the_server_has_lost_it(
    server: RedisServer, bus: RedisBus, waits: bool
) -> None:
    bus.publish(KEPT, [b"lost"])
    reader = bus.subscribe(KEPT, group="group", consumer="one")
    [held] = reader.receive(limit=1, wait_seconds=0.0)
    with server.client() as client:
        if not waits:
            client.flushall()
            bus.publish(KEPT, [b"new"])
        else:
            thread = threading.Thread(
                target=lambda: (
                    until(lambda: client.info("clients")["blocked_clients"] == 1),
                    client.flushall(),
                    bus.publish(KEPT, [b"new"]),
                )
            )
            thread.start()
        [found] = reader.receive(limit=9, wait_seconds=LONG_SECONDS)
        if waits:
            thread.join()
        client.flushall()
    assert (found.message, found.deliveries) == (b"new", 1)
    reader.renew([held.entry])
    reader.acknowledge([held.entry])
    assert reader.receive(limit=9, wait_seconds=0.0) == []


def test_a_password_lets_in_and_is_never_shown() -> None:
    with RedisServer(password=SECRET) as server:
        address = f"redis://127.0.0.1:{server.port}/0"
        quoted = "s3cret%2F%3F%23%40%3Aw0rd"
        urls = server.url, server.url.replace("//", f"//:{quoted}@")
        for url, password in ((urls[0], SECRET), (urls[1], None)):
            with closing(RedisBus(url, password=password)) as bus:
                bus.publish(KEPT, [b"message"])
                assert repr(bus) == f"RedisBus('{address}')"
                server.kill()
                with pytest.raises(BusUnavailableError) as away:
                    bus.ping()
                assert not_in(SECRET, quoted, text=str(away.value))
                server.start()
        wrong = "wr0ng"
        for password in (None, wrong):
            with closing(RedisBus(server.url, password=password)) as bus:
                for call in (
                    bus.ping,
                    bus.server_facts,
                    lambda bus=bus: bus.publish(KEPT, [b"message"]),
                    lambda bus=bus: bus.subscribe(KEPT, group="group", consumer="one"),
                ):
                    with pytest.raises(BusRefusedError, match="is the password right") as refused:
                        call()
                    assert address in str(refused.value)
                    assert not_in(wrong, text=str(refused.value))


def not_in(*secrets: str, text: str) -> bool:
    return not any(secret in text for secret in secrets)


def test_a_password_given_twice_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="given twice"):
        RedisBus("redis://:one@localhost", password=SECRET)


def test_a_password_that_is_no_text_is_a_mistake_and_never_shown() -> None:
    with pytest.raises(ValueError, match="password of the bus is no text in UTF-8") as caught:
        open_bus("redis://localhost", password="hunter\udce92")  # noqa: S106 – of nobody
    assert "hunter" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "url",
    [
        "http://:hunter2@localhost",
        "localhost:6379:hunter2",
        ":hunter2@localhost",
        "redis://:hunter2/2@localhost:6379",
        "redis://:hunter2@localhost:port",
        "redis://:hunter2@localhost/first",
        "redis://:hunter2@localhost?retries=3",
        "redis://:hunter2@localhost#fragment",
        "redis://:hunter2@",
        "redis://:hunter2@a..b:1/0",
        f"rediss://:hunter2@{64 * 'x'}",
        "redis://:hunter2@a%2E%2Eb",
        "redis://:hunter2@localhost?username=\udcff",
        "unix://",
    ],
)
def test_an_address_that_cannot_be_read_is_told_without_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"the address of (a|the) bus") as caught:
        open_bus(url)
    assert "hunter2" not in str(caught.value)
    assert "unix://" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_database_and_a_socket_are_addresses_too(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with RedisServer(settings={"unixsocket": str(path)}) as server:
        for address in (f"{server.url}/3", f"unix://{path}"):
            with closing(open_bus(address)) as bus:
                assert repr(bus) == f"RedisBus('{address}')"
                assert bus.latest(KEPT, limit=1) == []
                bus.publish(KEPT, [address.encode()])
        server.kill()
        away = pytest.raises(BusUnavailableError, match=f"unix://{path} is not available")
        with closing(open_bus(f"unix://{path}")) as bus, away:
            bus.publish(KEPT, [b"message"])


def test_what_somebody_else_wrote_is_a_dead_letter_and_no_crash(
    server: RedisServer, bus: RedisBus
) -> None:
    with server.client() as client:
        client.xadd("esper:kept", {"who": b"somebody\xff"})
    bus.publish(KEPT, [b"ours"])
    assert messages(bus.latest(KEPT, limit=9)) == [b"{b'who': b'somebody\\xff'}", b"ours"]
    reader = bus.subscribe(KEPT, group="group", consumer="one")
    assert messages(reader.receive(limit=9, wait_seconds=0.0)) == [b"ours"]
    [letter] = letters(bus)
    assert "it was not written by esper" in letter.reason
    assert letter.content == b"{b'who': b'somebody\\xff'}"


def test_a_message_is_kept_where_there_is_no_place_for_dead_letters(
    server: RedisServer, bus: RedisBus
) -> None:
    """Redis carries out the rest of a transaction though a part of it fails."""
    held = held_by(bus)
    reader = bus.subscribe(KEPT, group="group", consumer="one")
    with server.client() as client:
        client.set("esper:dead", "no stream")
        with pytest.raises(BusRefusedError, match=r"WRONGTYPE .* that is no stream"):
            reader.refuse(held, "a reason")
        client.delete("esper:dead")
    reader.reclaim()
    assert messages(reader.receive(limit=1, wait_seconds=0.0)) == [b"held"]


def test_what_is_no_stream_and_what_a_user_may_not_are_refused(server: RedisServer) -> None:
    with server.client() as client:
        client.set("esper:kept", "no stream")
        client.acl_setuser(
            "reader", enabled=True, nopass=True, keys=["*"], commands=["+@read", "+ping"]
        )
    with closing(RedisBus(server.url)) as bus:
        for call in (
            lambda: bus.publish(KEPT, [b"message"]),
            lambda: bus.subscribe(KEPT, group="group", consumer="one"),
            lambda: bus.latest(KEPT, limit=1),
        ):
            with pytest.raises(BusRefusedError, match="keeps something else there"):
                call()
    with closing(RedisBus(server.url.replace("//", "//reader:any@"))) as bus:
        with pytest.raises(BusRefusedError, match="what may this user do"):
            bus.publish(Stream(name="other", max_length=None), [b"message"])
        facts = bus.server_facts()
        assert (facts.version, facts.append_only, facts.append_fsync) == (None, None, None)


def test_a_consumer_that_leaves_is_forgotten_unless_it_holds_something(
    server: RedisServer, bus: RedisBus
) -> None:
    bus.publish(KEPT, [b"one", b"two", b"three"])
    holding, done, staying = (
        bus.subscribe(KEPT, group="group", consumer=name) for name in ("holding", "done", "staying")
    )
    holding.receive(limit=1, wait_seconds=0.0)
    for reader in (done, staying):
        [found] = reader.receive(limit=1, wait_seconds=0.0)
        reader.acknowledge([found.entry])
    holding.close()
    done.close()
    with server.client() as client:
        names = {consumer["name"] for consumer in client.xinfo_consumers("esper:kept", "group")}
    assert names == {b"holding", b"staying"}
    server.kill()
    staying.close()


def test_a_server_tells_how_it_is_set_up(
    server: RedisServer, bus: RedisBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.config_set(maxmemory="100mb", maxmemory_policy="noeviction")
    facts = bus.server_facts()
    assert facts.version is not None
    assert int(facts.version.split(".")[0]) >= 7
    assert (facts.append_only, facts.append_fsync) == (True, "always")
    assert (facts.max_memory_bytes, facts.max_memory_policy) == (100 << 20, "noeviction")
    monkeypatch.setattr(link_module, "OLDEST_VERSION", "99.0")
    with pytest.raises(BusRefusedError, match=rf"is Redis {facts.version}; a bus needs 99.0"):
        bus.server_facts()


def test_without_redis_the_package_works_and_says_what_a_redis_bus_needs() -> None:
    script = (
        "import sys; sys.modules['redis'] = None\n"
        "import esper.bus\n"
        "esper.bus.InProcessBus().publish(esper.bus.EMERGENCY, [b'message'])\n"
        "try:\n"
        "    esper.bus.open_bus('redis://localhost')\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    done = run_python("-c", script)
    assert done.stdout == "a bus by Redis needs redis: pip install 'esper-lite[redis]'\n", done


class Traffic:
    """A writer and a reader of one stream, in threads, that go on through outages."""

    def __init__(self, server: RedisServer, count: int) -> None:
        self.server = server
        self.count = count
        self.up = threading.Event()
        self.up.set()
        self.published: dict[str, int] = {}
        """What the writer was told is in the stream: by entry, which number it wrote."""
        self.seen: set[int] = set()
        self.acknowledged: set[str] = set()
        """What the reader was told it will not get again."""
        self.again: list[str] = []
        """Which of that came nevertheless."""
        self.outages = 0

    def write(self) -> None:
        with closing(RedisBus(self.server.url)) as bus:
            for begin in range(0, self.count, 20):
                numbers = range(begin, begin + 20)
                entries = self._until_up(
                    lambda numbers=numbers: bus.publish(KEPT, [b"%d" % at for at in numbers])
                )
                self.published.update(zip(entries, numbers, strict=True))

    def read(self) -> None:
        with closing(RedisBus(self.server.url)) as bus:
            reader = self._until_up(
                lambda: bus.subscribe(KEPT, group="group", consumer="one", idle_seconds=0.5)
            )
            while len(self.seen) < self.count:
                found = self._until_up(lambda: reader.receive(limit=50, wait_seconds=0.2))
                self.again += [new.entry for new in found if new.entry in self.acknowledged]
                self.seen.update(int(delivery.message) for delivery in found)
                entries = [delivery.entry for delivery in found]
                try:
                    reader.acknowledge(entries)
                except BusUnavailableError:
                    self.outages += 1
                else:
                    self.acknowledged.update(entries)
            reader.reclaim()
            found = self._until_up(lambda: reader.receive(limit=self.count, wait_seconds=0.0))
            self.again += [new.entry for new in found if new.entry in self.acknowledged]

    def _until_up(self, call: Callable[[], Sequence[str]]) -> Sequence[str]:
        while True:
            assert self.up.wait(LONG_SECONDS)
            try:
                return call()
            except BusUnavailableError:
                self.outages += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=work, daemon=True) for work in (self.write, self.read)]
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join(120.0)
            assert not thread.is_alive()


@pytest.mark.parametrize("attempt", range(3))
def test_nothing_that_was_taken_is_lost_or_comes_again_when_the_server_is_killed(
    server: RedisServer, attempt: int
) -> None:
    draw = random.Random()
    traffic = Traffic(server, count=10_000)
    with traffic.running():
        for kill in sorted(draw.sample(range(500, 9_000), 4)):
            until(lambda kill=kill: len(traffic.published) >= kill)
            traffic.up.clear()
            server.kill()
            server.start()
            traffic.up.set()
    assert traffic.outages >= 4
    with closing(RedisBus(server.url)) as bus:
        kept = {
            delivery.entry: int(delivery.message)
            for delivery in bus.after(KEPT, None, limit=50_000, wait_seconds=0.0)
        }
        assert traffic.published.items() <= kept.items()
        assert traffic.seen == set(range(10_000))
        assert traffic.again == []
        assert letters(bus) == []


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 3.0 * LONG_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def raises(error: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except error:
        return True
    return False

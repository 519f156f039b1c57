"""A command is verified, carried out once, answered, and never again."""

import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bus_machinery import Clock, wait_for
from commanded import KEYRING, CountedRun, effect, effects_in
from esper.bus import (
    DEAD_LETTERS,
    Bus,
    BusUnavailableError,
    CommandMessage,
    DeadLetter,
    Delivery,
    InProcessBus,
    Sealer,
    Subscription,
    answers_from,
    body_of,
    command_receiver,
    commands_for,
    message_in,
    open_envelope,
)
from esper.bus.command_sender import CommandSender, NoAnswerError
from esper.bus.redis_streams import RedisBus
from esper.lifecycle.actions import Germinate
from esper.lifecycle.commands import Act, Pause
from esper.signing import Keyring
from esper.telemetry.command_log import CommandLog, LoggedCommand
from redis_server import RedisServer

RUN = "run"


@pytest.fixture(params=["in process", pytest.param("redis", marks=pytest.mark.redis)])
def bus(request: pytest.FixtureRequest) -> Iterator[Bus]:
    if request.param == "in process":
        yield InProcessBus()
        return
    with RedisServer() as server:
        opened = RedisBus(server.url)
        yield opened
        opened.close()


def sealed(name: str, *, run: str = RUN, keyring: Keyring = KEYRING, **when: Any) -> bytes:
    message = CommandMessage(sender="ann@lab", command=effect(name))
    return Sealer(keyring, run, **when).seal(body_of(message))[1]


def answers(bus: Bus) -> list[Any]:
    found = bus.after(answers_from(RUN), None, limit=100_000, wait_seconds=0.0)
    return [message_in(open_envelope(delivery.message, KEYRING)) for delivery in found]


def dead(bus: Bus) -> list[DeadLetter]:
    found = bus.after(DEAD_LETTERS, None, limit=100_000, wait_seconds=0.0)
    return [DeadLetter.model_validate_json(delivery.message) for delivery in found]


def settle(folder: Path, bus: Bus, done: Callable[[], bool], **how: Any) -> None:
    run = CountedRun(folder, bus, run=RUN, **how)
    run.step_until(done)
    run.close()


def test_commands_are_carried_out_and_each_sender_hears_what_came_of_its_own(
    bus: Bus, tmp_path: Path
) -> None:
    names = ("first", "second", "third")
    heard: dict[str, Any] = {}

    def ask(name: str) -> None:
        sender = CommandSender(bus, KEYRING, RUN, sender="ann@lab")
        heard[name] = sender.send(effect(name), wait_seconds=30.0)

    with ThreadPoolExecutor(len(names)) as asking:
        asked = [asking.submit(ask, name) for name in names]
        waiting = lambda: bus.latest(commands_for(RUN), limit=len(names))  # noqa: E731
        while len(waiting()) < len(names):
            time.sleep(0.001)
        settle(tmp_path, bus, lambda: len(heard) == len(names))
        for one in asked:
            one.result()
    for name, answer in heard.items():
        assert answer.outcome.done
        assert f"{name} germinated in slot" in answer.outcome.text
    assert sorted(effects_in(tmp_path)) == sorted(names)


def test_commands_keep_their_order(bus: Bus, tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(60)]
    bus.publish(commands_for(RUN), [sealed(name) for name in names])
    settle(tmp_path, bus, lambda: len(answers(bus)) == 60)
    assert effects_in(tmp_path) == names


def test_a_thousand_replays_are_answered_and_never_carried_out(bus: Bus, tmp_path: Path) -> None:
    message = sealed("once")
    bus.publish(commands_for(RUN), [message] * 500)
    settle(tmp_path, bus, lambda: len(answers(bus)) == 500)
    bus.publish(commands_for(RUN), [message] * 500)
    settle(tmp_path, bus, lambda: len(answers(bus)) == 1000)
    assert effects_in(tmp_path) == ["once"]
    assert {answer.outcome.done for answer in answers(bus)} == {True}
    assert dead(bus) == []


def test_what_cannot_be_trusted_is_a_dead_letter_with_the_reason(bus: Bus, tmp_path: Path) -> None:
    good = sealed("good")
    flipped = []
    for index in range(len(good)):
        changed = bytearray(good)
        changed[index] ^= 1 << random.Random(index).randrange(8)
        flipped.append(bytes(changed))
    other_key = Keyring([secrets.token_bytes(32)])
    others = {
        sealed("b", run="another run"): "wrong_run",
        sealed("c", keyring=other_key): "bad_signature",
        Sealer(KEYRING, RUN).seal(b'{"kind":"command"}')[1]: "unknown_body",
        Sealer(KEYRING, RUN).seal(b'{"kind":"status","status":"failed"}')[1]: "unknown_body",
        b"": "malformed",
        b"\xff" * 2_000_000: "too_large",
    }
    published = [*flipped, *others]
    bus.publish(commands_for(RUN), published)
    bus.publish(commands_for(RUN), [good])
    settle(tmp_path, bus, lambda: bool(answers(bus)))
    letters = dead(bus)
    assert [letter.content for letter in letters] == published
    reasons = [letter.reason.partition(":")[0] for letter in letters]
    assert reasons[len(flipped) :] == list(others.values())
    assert set(reasons[: len(flipped)]) <= {"malformed", "bad_signature", "unknown_version"}
    assert effects_in(tmp_path) == ["good"]


def test_freshness_is_judged_when_a_command_first_comes(bus: Bus, tmp_path: Path) -> None:
    """The clock goes on while the process is away: what it had received is still good."""
    now = 1_000_000.0
    sent = {"old": -301, "early": 301, "good": -299}
    for name, ago in sent.items():
        bus.publish(commands_for(RUN), [sealed(name, clock=lambda ago=ago: now + ago)])
    settle(tmp_path, bus, lambda: len(answers(bus)) == 3, clock=lambda: now)
    assert effects_in(tmp_path) == ["good"]
    assert [letter.reason.partition(":")[0] for letter in dead(bus)] == ["stale", "stale"]
    assert "301 s before" in dead(bus)[0].reason
    bus.publish(commands_for(RUN), [sealed("late", clock=lambda: now)])
    run = CountedRun(tmp_path, bus, run=RUN, clock=lambda: now + 10)
    with run.receiver.running():  # received, and the process ends before the next step
        ends = time.monotonic() + 30
        while not run.control._asked and time.monotonic() < ends:
            run.control._woken.wait(0.05)
    run.close()
    assert run.control._asked
    settle(tmp_path, bus, lambda: len(answers(bus)) == 4, clock=lambda: now + 5000)
    assert effects_in(tmp_path) == ["good", "late"]


def test_a_command_that_kills_the_process_five_times_is_given_up_and_no_other(
    bus: Bus, tmp_path: Path
) -> None:
    bus.publish(commands_for(RUN), [sealed("deadly"), sealed("next")])
    for _ in range(5):
        run = CountedRun(tmp_path, bus, run=RUN)
        with run.receiver.running():
            ends = time.monotonic() + 30
            while not run.control._asked and time.monotonic() < ends:
                run.control._woken.wait(0.05)
        assert [asked.logged.command for asked in run.control._asked] == [effect("deadly")]
        run.close()
    settle(tmp_path, bus, lambda: bool(answers(bus)))
    assert effects_in(tmp_path) == ["next"]
    (letter,) = dead(bus)
    assert letter.deliveries == 5


def test_a_run_that_is_away_is_not_waited_for_forever(bus: Bus) -> None:
    sender = CommandSender(bus, KEYRING, RUN, sender="ann@lab")
    with pytest.raises(NoAnswerError, match=r"run run has not answered within 1\.2 s"):
        sender.send(Pause(), wait_seconds=1.2)
    assert len(bus.latest(commands_for(RUN), limit=10)) == 1


@pytest.mark.redis
def test_a_server_that_goes_away_in_the_middle_of_a_command(tmp_path: Path) -> None:
    """Killed while the command is worked on: it is done once, told once lost and once regained."""
    with RedisServer(fsync="always") as server:
        bus, asked = RedisBus(server.url), RedisBus(server.url)
        run = CountedRun(tmp_path, bus, run=RUN)
        heard: list[Any] = []
        sender = CommandSender(asked, KEYRING, RUN, sender="ann@lab")
        asking = threading.Thread(
            target=lambda: heard.append(sender.send(effect("once"), wait_seconds=60.0))
        )
        apply = run.growth.apply

        def kill_then_apply(action: Germinate) -> Any:
            server.kill()
            return apply(action)

        run.growth.apply = kill_then_apply
        asking.start()
        back = threading.Event()

        def over() -> bool:
            if not back.is_set() and effects_in(tmp_path):
                ends = time.monotonic() + 30
                while not run.link.has_events and time.monotonic() < ends:
                    back.wait(0.01)
                server.start()
                back.set()
            return bool(heard)

        run.step_until(over)
        asking.join()
        assert effects_in(tmp_path) == ["once"]
        assert heard[0].outcome.done
        assert [event.type for event in run.link.take_events()] == ["bus_lost", "bus_regained"]
        run.close()
        bus.close()
        asked.close()


class Losing(InProcessBus):
    """A server that loses all it has once an answer is waited for, and is away at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.losses_left = 1

    def after(self, *where: Any, **how: Any) -> Sequence[Delivery]:
        if self.losses_left:
            self.losses_left -= 1
            super().__init__()
            raise BusUnavailableError("the server is away")
        return super().after(*where, **how)


def test_a_command_that_a_server_has_lost_is_sent_again(tmp_path: Path) -> None:
    bus, heard = Losing(), threading.Event()
    sender = CommandSender(bus, KEYRING, RUN, sender="ann@lab")
    with ThreadPoolExecutor(1) as asking:
        asked = asking.submit(sender.send, effect("once"), wait_seconds=30.0)
        asked.add_done_callback(lambda _: heard.set())
        wait_for(lambda: not bus.losses_left)
        settle(tmp_path, bus, heard.is_set)
    assert asked.result().outcome.done
    assert effects_in(tmp_path) == ["once"]


def test_a_server_that_goes_for_good_leaves_open_what_became_of_a_command() -> None:
    bus = Losing()
    bus.losses_left = 1_000_000
    sender = CommandSender(bus, KEYRING, RUN, sender="ann@lab")
    with pytest.raises(NoAnswerError, match="away before run run had answered"):
        sender.send(Pause(), wait_seconds=0.3)


@pytest.mark.redis
def test_a_server_that_is_away_is_an_error_of_the_sender(tmp_path: Path) -> None:
    with RedisServer() as server:
        bus = RedisBus(server.url)
        server.kill()
        sender = CommandSender(bus, KEYRING, RUN, sender="ann@lab")
        with pytest.raises(BusUnavailableError):
            sender.send(Act(action=Germinate(slot="a", blueprint="b")), wait_seconds=0.3)
        bus.close()


def test_a_run_that_has_finished_refuses_everything_that_is_left(bus: Bus, tmp_path: Path) -> None:
    bus.publish(commands_for(RUN), [sealed(name) for name in ("a", "b", "c")])
    run = CountedRun(tmp_path, bus, run=RUN)
    run.receiver.start()
    wait_for(lambda: bool(run.control._asked))
    run.control.close(run.growth, refuse="the run has finished")
    run.receiver.stop(refuse_rest=True, limit_seconds=30.0)
    run.close()
    told = [answer.outcome for answer in answers(bus)]
    assert [outcome.done for outcome in told] == [False, False, False]
    assert {outcome.text for outcome in told} == {"the run has finished", "the run has ended"}
    assert effects_in(tmp_path) == []


def test_a_run_that_is_to_go_on_leaves_to_its_next_process_what_is_left(
    bus: Bus, tmp_path: Path
) -> None:
    bus.publish(commands_for(RUN), [sealed(name) for name in ("a", "b", "c")])
    run = CountedRun(tmp_path, bus, run=RUN)
    with run.receiver.running():
        wait_for(lambda: bool(run.control._asked))
        run.control.close(run.growth, refuse=None)
    run.close()
    assert answers(bus) == []
    settle(tmp_path, bus, lambda: len(answers(bus)) == 3)
    assert effects_in(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("refuse_rest", [False, True])
def test_a_command_that_comes_while_a_run_ends_is_refused_only_if_nobody_goes_on(
    refuse_rest: bool, tmp_path: Path
) -> None:
    bus, came = InProcessBus(), threading.Event()
    run = CountedRun(tmp_path, bus, run=RUN)
    run.control.close(run.growth, refuse=None)
    run.receiver._ask = lambda *asked: run.control.ask(*asked) or came.set() or False
    run.receiver.start()
    bus.publish(commands_for(RUN), [sealed("late")])
    assert came.wait(30.0)
    assert answers(bus) == []
    run.receiver.stop(refuse_rest=refuse_rest, limit_seconds=30.0)
    run.close()
    assert [answer.outcome.text for answer in answers(bus)] == refuse_rest * ["the run has ended"]
    assert len(dead(bus)) == refuse_rest
    if not refuse_rest:
        settle(tmp_path, bus, lambda: bool(answers(bus)))
        assert effects_in(tmp_path) == ["late"]


def test_a_log_that_is_full_for_a_moment_changes_no_order(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive, failures = CommandLog.receive, iter([True, True])

    def failing(self: CommandLog, *args: Any, **kwargs: Any) -> Any:
        if next(failures, False):
            raise sqlite3.OperationalError("database or disk is full")
        return receive(self, *args, **kwargs)

    monkeypatch.setattr(CommandLog, "receive", failing)
    bus.publish(commands_for(RUN), [sealed(name) for name in ("a", "b", "c")])
    began = time.monotonic()
    settle(tmp_path, bus, lambda: len(answers(bus)) == 3)
    assert effects_in(tmp_path) == ["a", "b", "c"]
    assert time.monotonic() - began < 10.0


def test_a_command_that_cannot_be_dealt_with_is_a_dead_letter_and_others_go_on(
    bus: Bus, tmp_path: Path
) -> None:
    bus.publish(commands_for(RUN), [sealed("bad"), sealed("good")])
    run = CountedRun(tmp_path, bus, run=RUN)
    answer, failures = run.receiver._answer, iter([True])

    def failing(logged: LoggedCommand) -> None:
        if next(failures, False):
            raise RuntimeError("a defect")
        answer(logged)

    run.receiver._answer = failing  # type: ignore[method-assign]
    run.step_until(lambda: bool(answers(bus)))
    run.close()
    assert effects_in(tmp_path) == ["bad", "good"]
    assert [letter.reason for letter in dead(bus)] == ["it failed here: RuntimeError"]


def test_what_comes_of_a_command_that_was_given_up_is_no_answer_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked for already, and is carried out all the same."""
    monkeypatch.setattr(command_receiver, "_RENEW_SECONDS", 0.0)
    bus, failures = InProcessBus(), iter([True])
    subscribe = bus.subscribe

    def failing_once(*where: Any, **how: Any) -> Subscription:
        subscription = subscribe(*where, **how)
        renew = subscription.renew

        def failing(entries: Collection[str]) -> None:
            if next(failures, False):
                raise RuntimeError("a defect")
            renew(entries)

        monkeypatch.setattr(subscription, "renew", failing)
        return subscription

    monkeypatch.setattr(bus, "subscribe", failing_once)
    bus.publish(commands_for(RUN), [sealed("given up"), sealed("next")])
    run = CountedRun(tmp_path, bus, run=RUN)
    with run.receiver.running():
        wait_for(lambda: len(run.control._asked) == 2)
        wait_for(lambda: run.control.between_steps(run) or answers(bus))  # a step, and another
    run.close()
    assert [letter.reason for letter in dead(bus)] == ["it failed here: RuntimeError"]
    assert effects_in(tmp_path) == ["given up", "next"]
    (answer,) = answers(bus)
    assert "next germinated in slot" in answer.outcome.text


def test_a_command_that_takes_long_is_taken_by_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_receiver, "_RENEW_SECONDS", 0.0)
    clock = Clock()
    bus = InProcessBus(clock)
    bus.publish(commands_for(RUN), [sealed("slow")])
    run = CountedRun(tmp_path, bus, run=RUN)
    other = bus.subscribe(commands_for(RUN), group="run", consumer="other", idle_seconds=30.0)
    with run.receiver.running():
        wait_for(lambda: bool(run.control._asked))
        for _ in range(10):
            before = run.receiver._in_hand.renewed if run.receiver._in_hand else 0.0
            clock.seconds += 20.0
            wait_for(lambda before=before: run.receiver._in_hand.renewed > before)  # type: ignore[union-attr]
            assert other.receive(limit=1, wait_seconds=0.0) == []
    run.close()


@pytest.mark.redis
def test_a_server_that_hangs_holds_up_no_end(tmp_path: Path) -> None:
    with RedisServer() as server:
        bus = RedisBus(server.url)
        run = CountedRun(tmp_path, bus, run=RUN)
        run.receiver.start()
        server.pause()
        began = time.monotonic()
        run.receiver.stop(refuse_rest=True, limit_seconds=1.0)
        assert time.monotonic() - began < 2.0
        server.go_on()
        run.receiver._thread.join(30.0)
        run.close()
        bus.close()


@pytest.mark.parametrize("name", ["", 201 * "x"], ids=["none", "too long"])
def test_a_sender_has_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="has 1 to 200 characters"):
        CommandSender(InProcessBus(), KEYRING, RUN, sender=name)

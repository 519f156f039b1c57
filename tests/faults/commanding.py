"""Forks processes that carry out commands and are killed in the middle of one.

    python commanding.py FOLDER URL TRIALS SEED

Publishes commands, lets one process after the other carry them out until each was killed, and the
last one finish; prints as JSON what took effect. A fork costs less than a new Python with torch.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commanded import KEYRING, CountedRun, effect, effects_in
from esper.bus import (
    DEAD_LETTERS,
    CommandMessage,
    DeadLetter,
    Sealer,
    answers_from,
    body_of,
    commands_for,
)
from esper.bus.redis_streams import RedisBus

RUN = "run"
POINTS = ("received", "effect", "settled", "answered", "any time")
COMMANDS_A_TRIAL = 4


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing(call: Callable[..., Any], number: int, *, before: bool) -> Callable[..., Any]:
    """Return the call, with a kill before or after it the how manyth time."""
    state = {"left": number}

    def called(*args: Any, **kwargs: Any) -> Any:
        state["left"] -= 1
        if state["left"] == 0 and before:
            die()
        result = call(*args, **kwargs)
        if state["left"] == 0:
            die()
        return result

    return called


def child(folder: Path, url: str, process: int, point: str | None, number: int) -> None:
    bus = RedisBus(url)
    run = CountedRun(folder, bus, run=RUN, process=process)
    receiver: Any = run.receiver
    if point == "received":
        receiver._ask = killing(receiver._ask, number, before=True)
    elif point == "effect":
        run.growth.apply = killing(run.growth.apply, number, before=False)
    elif point == "settled":
        receiver._answer = killing(receiver._answer, number, before=True)
    elif point == "answered":
        receiver._answer = killing(receiver._answer, number, before=False)
    asked = sum(1 for line in (folder / "published").read_text().splitlines() if line)
    run.step_until(lambda: point is None and len(effects_in(folder)) >= asked)
    run.close()


def trial(folder: Path, url: str, process: int, point: str | None, draw: random.Random) -> bool:
    """Return whether the process was killed."""
    # From its second command on: a command that is always in hand when a process dies is given up
    number = draw.randrange(2, COMMANDS_A_TRIAL)
    forked = os.fork()
    if forked == 0:
        try:
            child(folder, url, process, point, number)
        finally:
            os._exit(0)
    if point == "any time":
        effects = len(effects_in(folder))
        while len(effects_in(folder)) <= effects:
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.01))
        os.kill(forked, signal.SIGKILL)
    _, status = os.waitpid(forked, 0)
    return os.WIFSIGNALED(status)


def main() -> None:
    folder, url, trials = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    draw = random.Random(int(sys.argv[4]))
    bus = RedisBus(url)
    names = [f"n{number}" for number in range(trials * COMMANDS_A_TRIAL)]
    sealer = Sealer(KEYRING, RUN, clock=lambda: time.time() + 200)  # still fresh at the end
    messages = [
        sealer.seal(body_of(CommandMessage(sender="test", command=effect(name))))[1]
        for name in names
    ]
    bus.publish(commands_for(RUN), messages)
    (folder / "published").write_text("\n".join(names))
    run = CountedRun(folder, bus, run=RUN)  # makes the tables
    run.close()
    killed = 0
    for number in range(trials):
        killed += trial(folder, url, number, POINTS[number % len(POINTS)], draw)
    trial(folder, url, trials, None, draw)
    answers = bus.after(answers_from(RUN), None, limit=100_000, wait_seconds=0.0)
    effects = effects_in(folder)
    letters = [
        DeadLetter.model_validate_json(delivery.message)
        for delivery in bus.after(DEAD_LETTERS, None, limit=1_000, wait_seconds=0.0)
    ]
    print(  # noqa: T201
        json.dumps(
            {
                "killed": killed,
                "asked": len(names),
                "lost": len(set(names) - set(effects)),
                "doubled": len(effects) - len(set(effects)),
                "in order": effects == names,
                "answers": len(answers),
                "given up": [f"{letter.deliveries}: {letter.reason}" for letter in letters],
            }
        )
    )


if __name__ == "__main__":
    main()

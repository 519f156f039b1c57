"""Forks training processes that kill themselves at a given point, and looks at what they left.

    python killing.py FOLDER FIRST_POINT LAST_POINT

Prints one JSON object per point: what the newest checkpoint is, and whether going on from it gives
the losses of a run that was never killed. A fork costs less than a new Python with torch in it.
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

import torch
from torch.nn.functional import cross_entropy

import esper
from esper.lifecycle.actions import Germinate
from esper.slots.slot_set import SlotSet
from esper.training import Checkpoints

SAVED_STEPS = 2
"""Between two checkpoints."""
KILLED_STEP = 8
FURTHER_STEPS = 12
EPOCH_STEPS = 4
LAST_OPERATION = 40
"""Kill points up to here are file operations of one checkpoint, further ones are times in it."""
WATCHED = frozenset(
    {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.scandir"}
)

Losses = dict[int, float]


def make(losses: Losses) -> esper.Trainer:
    """Return a small run that germinates after its first and third epoch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 64), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 3)
    )
    inputs, labels = torch.randn(64, 6), torch.randint(0, 3, (64,))
    slots = esper.attach(model, ["0", "1"], example=inputs[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plan = {epoch: [Germinate(slot=slot, blueprint="mlp")] for epoch, slot in ((1, "0"), (3, "1"))}
    growth = esper.Growth(slots, optimizer, policy=esper.PlannedPolicy(plan), max_epochs=9)
    batches = list(zip(inputs.split(16), labels.split(16), strict=True))

    def loss(output: Any, target: Any) -> Any:
        value = cross_entropy(output, target)
        losses[growth.step + 1] = float(value.detach())
        return value

    return esper.Trainer(
        growth,
        batches,
        loss=loss,
        evaluate=lambda: float(cross_entropy(model(inputs), labels).detach()),
        config=esper.TrainerConfig(epochs=9),
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_operation(number: int) -> Callable[[], None]:
    """Return what arms a kill at a file operation, counted from then on."""
    state = {"armed": False, "left": number}

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if state["armed"] and event in WATCHED:
            if state["left"] == 0:
                die()
            state["left"] -= 1

    sys.addaudithook(hook)
    return lambda: state.update(armed=True)


def child(folder: Path, point: str, number: int) -> None:
    """Train until the kill."""
    trainer = make({})
    checkpoints = Checkpoints(folder, interval_steps=SAVED_STEPS)
    save, arm = checkpoints.save, kill_at_operation(number)

    def saving(trainer: esper.Trainer) -> Any:
        if trainer.growth.step == KILLED_STEP and point == "operation":
            arm()
        if trainer.growth.step == KILLED_STEP and point == "time":
            (folder / ".saving").touch()
        return save(trainer)

    checkpoints.save = saving  # type: ignore[method-assign]
    trainer.keeper = checkpoints
    if point == "structure":
        added = SlotSet.seed_added

        def add(self: SlotSet, *args: Any, **kwargs: Any) -> None:
            if trainer.growth.step > EPOCH_STEPS and number == 0:
                die()
            added(self, *args, **kwargs)
            if trainer.growth.step > EPOCH_STEPS:
                die()

        SlotSet.seed_added = add  # type: ignore[method-assign]
    trainer.fit()


def run(folder: Path, point: str, number: int) -> dict[str, Any]:
    """Fork, wait for the end, and go on from what is left."""
    process = os.fork()
    if process == 0:
        try:
            child(folder, point, number)
        finally:
            os._exit(0)
    if point == "time":
        while not (folder / ".saving").exists():
            time.sleep(0.0002)
        time.sleep(random.Random(number).uniform(0.0, 0.02))
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    further: Losses = {}
    trainer = make(further)
    checkpoints = Checkpoints(folder, interval_steps=SAVED_STEPS)
    latest = (folder / "latest").resolve().is_dir()
    info = checkpoints.resume(trainer)
    trainer.keeper = checkpoints
    for _ in trainer.run():
        if trainer.growth.step >= info.step + FURTHER_STEPS:
            break
    expected: Losses = {}
    for _ in make(expected).run():
        pass
    return {
        "point": point,
        "number": number,
        "killed": os.WIFSIGNALED(status),
        "step": info.step,
        "latest": latest,
        "left_over": [p.name for p in folder.iterdir() if p.name.startswith(".step-")],
        "same": all(expected[step] == loss for step, loss in further.items()),
        "further": len(further),
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, points = Path(sys.argv[1]), json.loads(sys.argv[2])
    for point, number in points:
        result = run(folder / f"{point}-{number}", point, number)
        print(json.dumps(result), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

"""Trains on a disk that fills up; prints what happened.

python filling.py FOLDER
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

from esper.lifecycle.events import CheckpointFailed, CheckpointSaved
from esper.training import Checkpoints
from growth_problem import make_problem


class Ever:
    """A policy that never grows."""

    name = "ever"

    def decide(self, state: object) -> list[object]:
        return []


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    problem = make_problem()
    trainer = problem.trainer(Ever(), epochs=6)
    trainer.keeper = Checkpoints(folder / "checkpoints", keep_best=False, keep_last=1)
    for report in trainer.run():
        if report.epoch == 2:  # nothing more fits
            ballast = (folder / "ballast").open("wb", buffering=0)
            with ballast, contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(256))
        if report.epoch == 4:
            (folder / "ballast").unlink()
    events = problem.recorder
    document = {
        "saved": [event.name for event in events.of(CheckpointSaved)],
        "failed": [event.name for event in events.of(CheckpointFailed)],
        "errors": [event.error for event in events.of(CheckpointFailed)],
        "there": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "newest": Checkpoints(folder / "checkpoints").newest().info.step,
    }
    print(json.dumps(document))  # noqa: T201


if __name__ == "__main__":
    main()

"""A training loop of one's own in one of several processes, once for each scenario.

    torchrun --nproc-per-node 2 own_loop.py FOLDER SCENARIO…

Writes, by scenario and rank, which seeds failed in which step, and what weights came of it all.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.lifecycle.actions import Action, Advance, GrowthState
from esper.lifecycle.stages import SeedStage
from esper.seeds import Seed, blueprints, zero_initialise_
from esper.slots import replication
from ranks import run

STEPS = 8
PLANTED_STEP = 3


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.leaves_second_out = False

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(features))
        if not self.leaves_second_out:  # as with LayerDrop and stochastic depth
            hidden = hidden + self.second(hidden)
        return self.head(hidden)


class Fussy(Seed):
    """Raises when it is told to."""

    raises = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = zero_initialise_(nn.Linear(dim, dim))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.layer,)

    def increment(self, features: Tensor) -> Tensor:
        if Fussy.raises:
            raise MemoryError("of the test")
        return self.layer(features)


def fussy(dim: int) -> Seed:
    return Fussy(dim)


class SlowAlarm(replication._Alarm):
    """Is on its way for a while, as from a GPU."""

    under_way = True


class Script:
    """Lets the seed that raises go on, at the first decision."""

    name = "script"

    def decide(self, state: GrowthState) -> list[Action]:
        return [Advance(slot="second")] if state.epoch == 1 else []


class Told:
    """Keeps which seeds failed, by step."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def publish(self, record: Any) -> None:
        event = record.event
        if event.type == "seed_failed":
            self.lines.append(f"{record.step} {event.slot} {event.error}")

    def measure(self, epoch: int, step: int, metrics: Any) -> None:
        pass

    def flush(self) -> None:
        pass


def grow(slots: esper.SlotSet, scenario: str) -> None:
    for path, blueprint in (("first", "mlp"), ("second", "fussy")):
        slot = slots[path]
        slot.germinate(blueprint)
        while slot.stage is not SeedStage.BLENDING:
            slot.advance(force=True)
        if scenario == "raises frozen":
            slot.advance(force=True)
        else:
            slot.set_alpha_target(0.5, 2 * STEPS)


def plant(scenario: str, step: int, rank: int, model: Host, inputs: Tensor) -> None:
    """Let a step be as the scenario has it."""
    planted = step == PLANTED_STEP
    if scenario == "skipped" and planted:
        inputs[0, 0] = torch.nan
    elif scenario == "left out at first":
        model.leaves_second_out = step == 0
    elif scenario == "left out in one":
        model.leaves_second_out = rank == 1 and step in (0, PLANTED_STEP)
    elif scenario not in ("raises while measured", "raises, then by hand"):
        Fussy.raises = scenario.startswith("raises") and planted and rank == 1


def train(scenario: str, rank: int) -> tuple[Told, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, told = Host(), Told()
    config = esper.SlotConfig(isolation="shadowing")
    slots = esper.attach(model, ["first", "second"], example=torch.zeros(2, 4), config=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    growth = esper.Growth(slots, optimizer, policy=Script(), sinks=[told])
    held_out = esper.HeldOut(
        model,
        [(torch.eye(4), torch.eye(4)[:, :2])],
        loss=lambda outputs, wanted: mse_loss(outputs, wanted, reduction="none").mean(-1),
    )
    wrapped = DistributedDataParallel(model, find_unused_parameters="left out" in scenario)
    slots.replicate()
    grow(slots, scenario)
    generator = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        inputs = torch.randn(8, 4, generator=generator)
        plant(scenario, step, rank, model, inputs)
        optimizer.zero_grad()
        mse_loss(wrapped(inputs), inputs[:, :2]).backward()
        if not slots.clip_grad_norm_(1.0).isfinite():
            continue
        optimizer.step()
        growth.after_step()
        if step == PLANTED_STEP and scenario in ("raises while measured", "raises, then decision"):
            Fussy.raises = rank == 1 and scenario == "raises while measured"
            growth.after_epoch(held_out)
            Fussy.raises = False
        if step == PLANTED_STEP and scenario == "raises, then by hand":
            Fussy.raises = rank == 1
            with torch.no_grad():
                model(inputs)
            Fussy.raises = False
            slots["second"].advance(force=True)
    growth.after_epoch(held_out)  # compares what has grown
    return told, {name: value.detach() for name, value in model.named_parameters()}


def main() -> None:
    torch.set_num_threads(1)
    blueprints.register("fussy", family="transformer")(fussy)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    folder, rank = Path(sys.argv[1]), dist.get_rank()
    for scenario in sys.argv[2:]:
        alarm = replication._Alarm
        if scenario in ("raises, told late", "raises, then decision"):
            replication._Alarm = SlowAlarm
        told, weights = train(scenario, rank)
        replication._Alarm = alarm
        (folder / f"{scenario} {rank}.txt").write_text("\n".join(told.lines))
        safetensors.torch.save_file(weights, folder / f"{scenario} {rank}.safetensors")


if __name__ == "__main__":
    run(main)

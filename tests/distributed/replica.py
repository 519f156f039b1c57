"""One of several processes that train one model, or the one that trains on all of their batches.

    torchrun --nproc-per-node 2 replica.py FOLDER SCENARIO
    python replica.py FOLDER SCENARIO 2

Writes gradients and parameters after every step, by rank, for a test to compare.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.compilation import CompiledHost
from esper.lifecycle.actions import Action, Germinate, GrowthState, Prune
from esper.slots.replication import LostReplicaError
from esper.slots.sharded import whole
from esper.training import Checkpoints
from ranks import run

EPOCH_STEPS = 4
EPOCHS = 8
SAMPLES = 4
"""Of one process, in one step."""


class Host(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 2))

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.second(torch.tanh(self.first(features))))))


class Script:
    """Germinates live and behind the host, prunes one, commits the other; by the first's word."""

    name = "script"
    reads_losses = False

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def weighs(self, state: GrowthState) -> list[str]:
        assert self.rank == 0, "the first process decides for all what is weighed"
        return [slot.path for slot in state.slots]

    def upcoming(self, state: GrowthState) -> list[Germinate]:
        assert self.rank == 0, "the first process foresees for all"
        return [Germinate(slot="second", blueprint="lora")] if state.epoch == 1 else []

    def decide(self, state: GrowthState) -> list[Action]:
        assert self.rank == 0, "the first process decides for all"
        plan: dict[int, list[Action]] = {
            1: [Germinate(slot="first", blueprint="mlp")],
            2: [Germinate(slot="second", blueprint="lora")],
            4: [Prune(slot="second", reason="test")],
        }
        tending = esper.PlannedPolicy({}, patience_epochs=9)
        return [*tending.decide(state), *plan.get(state.epoch, [])]


LENIENT = {
    "min_steps_at_target": 1,
    "min_contribution_fraction": -9.0,
    "min_over_linear_fraction": None,
    "max_linear_share": 1.0,
    "max_loss_increase_fraction": 9.0,
    "standard_errors": 0.0,
    "trial_epochs": 1,
}


class Watch:
    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.kept: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def before_step(self, trainer: esper.Trainer) -> None:
        self.gradients = {
            name: whole(p.grad).clone()
            for name, p in trainer.model.named_parameters()
            if p.grad is not None
        }

    def after_step(self, trainer: esper.Trainer) -> None:
        step = trainer.growth.step
        for name, gradient in self.gradients.items():
            self.kept[f"{step:03d} gradient {name}"] = gradient
        self.gradients = {}
        for name, value in trainer.model.named_parameters():
            self.kept[f"{step:03d} weight {name}"] = whole(value.detach()).clone()
        assert trainer.ema is not None
        for name, value in trainer.ema.averages().items():
            self.kept[f"{step:03d} average {name}"] = whole(value).clone()

    def after_epoch(self, trainer: esper.Trainer) -> None:
        safetensors.torch.save_file(self.kept, self.folder / f"rank{self.rank}.safetensors")


def batches(rank: int, size: int, samples: int) -> list[tuple[Tensor, Tensor]]:
    """Return this process's shares of the same data for all."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(EPOCH_STEPS, size * SAMPLES, 4, generator=generator)
    targets = torch.stack([inputs.prod(-1), inputs.sum(-1)], dim=-1)
    share = slice(rank * samples, (rank + 1) * samples)
    return [(x[share], y[share]) for x, y in zip(inputs, targets, strict=True)]


def make(rank: int, size: int, samples: int, watch: Watch, scenario: str) -> esper.Trainer:
    torch.manual_seed(0)
    model = Host(0.2 if "random" in scenario else 0.0)
    # The other objectives weigh by norms over the batch, each process by its own.
    behind = {"isolation": "shadowing", "objective": "plain"}
    config = esper.SlotConfig(
        **({} if "live" in scenario else behind),
        blend_operator="gate" if scenario.startswith("sharded") else "add",
        thresholds={
            **LENIENT,
            "min_training_steps": 2,
            "min_gradient_ratio": 0.0,
            "min_line_search_gain_fraction": -9.0,
        },
        ramp_steps=3,
        embargo_epochs=1,
    )
    data = batches(rank, size, samples)
    slots = esper.attach(model, ["first", "second"], example=data[0][0], config=config)
    several, sharded = dist.is_initialized(), scenario.startswith("sharded")
    if several and sharded:
        mesh = init_device_mesh("cpu", (size,))
        for layer in (model.first, model.second, model):
            fully_shard(layer, mesh=mesh)
        slots.replicate_sharded(lambda seed: fully_shard(seed, mesh=mesh))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    in_graphs = several and "compiled" in scenario
    growth = esper.Growth(
        slots,
        optimizer,
        policy=Script(rank),
        max_epochs=EPOCHS,
        compiled=CompiledHost(slots, backend="aot_eager") if in_graphs else None,
    )
    if in_graphs:
        growth.sinks.append(AllCompiled())
    held_out = esper.HeldOut(
        model,
        batches(0, size, size * SAMPLES),
        loss=lambda out, y: mse_loss(out, y, reduction="none").mean(-1),
    )
    trainer = esper.Trainer(
        growth,
        data,
        loss=mse_loss,
        evaluate=held_out,
        config=esper.TrainerConfig(
            epochs=EPOCHS, max_gradient_norm=1.0 if "live" in scenario else None
        ),
        keeper=watch,
        ema=esper.EMA(slots, decay=0.9),
        forward=wrapped(model, scenario) if several and not sharded else None,
    )
    if "random" in scenario:
        torch.manual_seed(100 + rank)  # masks of its own
    optimizer.register_step_pre_hook(lambda *_: watch.before_step(trainer))
    return trainer


def wrapped(model: nn.Module, scenario: str) -> nn.Module:
    if scenario in ("forgotten", "unwrapped"):
        return model if scenario == "forgotten" else nn.Sequential(model)
    forward = DistributedDataParallel(model)
    return torch.compile(forward, backend="eager") if "as one graph" in scenario else forward


class AllCompiled:
    """Raises unless both seeds were compiled."""

    num_compiled = 0

    def publish(self, record: Any) -> None:
        assert record.event.type != "compile_failed", record.event
        self.num_compiled += record.event.type == "seed_compiled"

    def measure(self, epoch: int, step: int, metrics: Any) -> None:
        assert self.num_compiled == 2 or epoch < EPOCHS

    def flush(self) -> None:
        pass


class Told:
    """Writes what the governor does."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def publish(self, record: Any) -> None:
        if record.event.type in ("step_skipped", "run_went_back", "seed_blamed"):
            with self.file.open("a") as file:
                file.write(f"{record.step} {record.event.type}\n")

    def measure(self, epoch: int, step: int, metrics: Any) -> None:
        pass

    def flush(self) -> None:
        pass


def plant(scenario: str, folder: Path, trainer: esper.Trainer, rank: int) -> None:
    """Let one process differ from the others, or die, when a decision falls due."""
    look_around = trainer.growth.look
    started_again = (folder / "checkpoints" / "latest").exists()

    def differ(*args: Any, **kwargs: Any) -> Any:
        if rank == 1 and scenario == "disagree" and trainer.growth.epoch == 1:
            trainer.growth.slots["second"].germinate("norm")
        if (
            rank == 1
            and scenario.endswith("die")
            and trainer.growth.epoch == 3
            and not started_again
        ):
            print(f"dies at {time.monotonic()}", flush=True)  # noqa: T201
            os._exit(7)
        return look_around(*args, **kwargs)

    trainer.growth.look = differ  # type: ignore[method-assign]
    if scenario == "spoilt":
        look, losses = trainer.governor.look, []

        def spoil(loss: Tensor) -> None:
            losses.append(loss)
            bad = rank == 1 and 14 <= len(losses) < 17
            look(loss * torch.nan if bad else loss)

        trainer.governor.look = spoil  # type: ignore[method-assign]
        trainer.growth.sinks.append(Told(folder / f"told{rank}"))


def check_limits(trainer: esper.Trainer, folder: Path) -> None:
    """Ask a sharded model for what it cannot give."""
    slots = trainer.growth.slots
    for ask in (
        lambda: slots["second"].germinate("block", source="head"),
        lambda: esper.save_pretrained(slots, folder / "pretrained"),
        lambda: CompiledHost(slots),
        lambda: slots.replicate_sharded(lambda seed: None) or slots.shard(nn.Linear(2, 2)),
    ):
        try:
            ask()
        except ValueError as error:
            assert "sharded" in str(error), error  # noqa: PT017 – no test, a script
        else:
            raise AssertionError("was not refused")
    assert not (folder / "pretrained").exists()
    assert trainer.ema is not None
    averages = {name: whole(value).clone() for name, value in trainer.ema.averages().items()}
    with trainer.ema.applied():
        for name, value in trainer.model.named_parameters():
            assert torch.equal(whole(value), averages[name]), name
    state = trainer.growth.isolation_monitor.state_dict()
    assert state["checks"] == 0


def main() -> None:
    torch.set_num_threads(1)
    folder, scenario = Path(sys.argv[1]), sys.argv[2]
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        rank, size, samples = dist.get_rank(), dist.get_world_size(), SAMPLES
    else:
        rank, size = 0, int(sys.argv[3])
        samples = size * SAMPLES
    trainer = make(rank, size, samples, Watch(folder, rank), scenario)
    plant(scenario, folder, trainer, rank)
    if scenario.endswith("die"):
        checkpoints = Checkpoints(folder / "checkpoints")
        trainer.keeper = checkpoints
        if checkpoints.names():
            checkpoints.resume(trainer)
    try:
        trainer.fit()
    except LostReplicaError:
        print(f"lost at {time.monotonic()}", flush=True)  # noqa: T201
        raise
    if scenario.startswith("sharded") and dist.is_initialized():
        check_limits(trainer, folder)
    if scenario.endswith("die"):
        end = Watch(folder, rank)
        end.after_step(trainer)
        end.after_epoch(trainer)


if __name__ == "__main__":
    run(main)

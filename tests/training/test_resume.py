"""A run that goes on from a checkpoint is, to the bit, the run that was never interrupted.

Each case trains once without a stop and keeps a checkpoint at every step; then fresh objects, as a
new process would make them, go on from the steps at which something is under way.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

import esper
from esper.lifecycle.actions import Germinate, Prune
from esper.lifecycle.stages import SeedStage
from esper.policies import HeuristicConfig
from esper.slots.config import SlotConfig
from esper.training import GovernorConfig
from esper.training.state_tree import read_tree, write_tree
from growth_problem import LENIENT

TIMES = {"seconds", "step_seconds_before", "prewarm_ms", "step_time_ratio"}
STEPS_PER_EPOCH = 6
FURTHER_STEPS = 50


class Block(nn.Module):
    """A convolution with statistics and a random mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.2)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.dropout(torch.relu(self.norm(self.convolution(features))))


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.first = Block()
        self.second = Block()
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.first(torch.relu(self.stem(images))))
        return self.head(features.mean(dim=(2, 3)))


@dataclass
class Watch:
    """A keeper that writes what the loss was, the stages, and a checkpoint at every step."""

    folder: Path | None = None
    losses: dict[int, float] = field(default_factory=dict)
    stages: dict[int, tuple[SeedStage, ...]] = field(default_factory=dict)
    last_loss: float = 0.0
    stop_at: int | None = None

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        value = cross_entropy(output, labels)
        self.last_loss = float(value.detach())
        return value

    def after_step(self, trainer: esper.Trainer) -> None:
        step = trainer.growth.step
        self.losses[step] = self.last_loss
        self.stages[step] = tuple(slot.stage for slot in trainer.growth.slots.values())
        self.keep(trainer, f"step-{step}")
        if step == self.stop_at:
            raise KeyboardInterrupt

    def after_epoch(self, trainer: esper.Trainer) -> None:
        self.keep(trainer, f"epoch-{trainer.epoch}")

    def keep(self, trainer: esper.Trainer, name: str) -> None:
        if self.folder is not None:
            target = self.folder / name
            target.mkdir()
            write_tree(trainer.state_dict(), target, "state")


def behind_the_host() -> esper.Policy:
    """A copied block with dropout of its own, and beside it a seed that is pruned."""
    return esper.PlannedPolicy(
        {
            1: [Germinate(slot="first", blueprint="block", options={"source": "first"})],
            2: [Germinate(slot="second", blueprint="conv_light", blend_operator="gate")],
            4: [Prune(slot="second", reason="test")],
            9: [Germinate(slot="second", blueprint="conv_light")],
        },
        tend_seeds=True,
        patience_epochs=20,
    )


def eager_heuristic() -> esper.Policy:
    settings = {"warmup_epochs": 1, "plateau_epochs": 1, "plateau_fraction": 1.0}
    return esper.HeuristicPolicy(HeuristicConfig(max_living=2, patience_epochs=3, **settings))


THRESHOLDS = {**LENIENT, "min_training_steps": 5}


@dataclass(frozen=True)
class Case:
    """How a run is made; made the same way it is the same run."""

    policy: Callable[[], esper.Policy]
    slot: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=3e-3)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 16
    plateau: bool = False
    averaged: bool = False
    stages: frozenset[SeedStage] = frozenset()
    """Which cuts there must be at least."""

    def make(self, watch: Watch) -> esper.Trainer:
        torch.manual_seed(0)
        host = Host()
        images, labels = torch.randn(96, 1, 6, 6), torch.randint(0, 3, (96,))
        config = SlotConfig(
            thresholds=THRESHOLDS, ramp_steps=10, embargo_epochs=2, warmup_steps=4, **self.slot
        )
        slots = esper.attach(host, ["first", "second"], example=images[:2], config=config)
        optimizer = self.optimizer(host.parameters())
        growth = esper.Growth(slots, optimizer, policy=self.policy(), max_epochs=self.epochs)
        lower = torch.optim.lr_scheduler
        scheduler = (
            lower.ReduceLROnPlateau(optimizer, patience=1)
            if self.plateau
            else lower.OneCycleLR(optimizer, max_lr=5e-3, total_steps=400)
        )
        batch = 96 // (STEPS_PER_EPOCH * self.trainer.get("accumulation_steps", 1))
        held_out = esper.HeldOut(
            host,
            [(images[:32], labels[:32])],
            loss=lambda out, target: cross_entropy(out, target, reduction="none"),
        )
        return esper.Trainer(
            growth,
            DataLoader(TensorDataset(images, labels), batch_size=batch, shuffle=True),
            loss=watch.loss,
            evaluate=held_out,
            config=esper.TrainerConfig(
                **{
                    "epochs": self.epochs,
                    "scheduler_interval": "epoch" if self.plateau else "step",
                    **self.trainer,
                }
            ),
            scheduler=scheduler,
            keeper=watch,
            ema=esper.EMA(slots, decay=0.9) if self.averaged else None,
        )


_S = SeedStage
BEHIND = frozenset(
    {
        *(_S.DORMANT, _S.TRAINING, _S.BLENDING, _S.SHADOWING, _S.PROBATIONARY, _S.FOSSILIZED),
        _S.EMBARGOED,
    }
)

CASES = {
    "behind the host": Case(
        behind_the_host, {"isolation": "shadowing"}, averaged=True, stages=BEHIND
    ),
    "in shadow": Case(
        behind_the_host, {"isolation": "shadowing", "objective": "shadow"}, stages=BEHIND
    ),
    "live, accumulated, clipped": Case(
        eager_heuristic,
        trainer={"accumulation_steps": 2, "max_gradient_norm": 0.5},
        stages=frozenset({_S.PRUNED, _S.EMBARGOED}),
    ),
    "momentum, plateau, decisions between epochs": Case(
        eager_heuristic,
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        trainer={"decision_interval_steps": 4},
        plateau=True,
    ),
    "scaled gradients": Case(behind_the_host, trainer={"precision": "float16"}),
}


def cuts(stages: Mapping[int, tuple[SeedStage, ...]]) -> list[int]:
    """Return the first, a middle and the last step of every combination of stages."""
    steps = sorted(stages)
    chosen: set[int] = set()
    start = 0
    for index in range(1, len(steps) + 1):
        if index == len(steps) or stages[steps[index]] != stages[steps[start]]:
            run = steps[start:index]
            chosen |= {run[0], run[len(run) // 2], run[-1]}
            start = index
    return sorted(chosen)


@pytest.fixture(scope="module", params=list(CASES))
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Watch]:
    case = CASES[request.param]
    watch = Watch(tmp_path_factory.mktemp("run"))
    trainer = case.make(watch)
    trainer.fit()
    return case, watch


def go_on(case: Case, state: Mapping[str, Any], watch: Watch) -> esper.Trainer:
    trainer = case.make(watch)
    torch.manual_seed(99)
    trainer.load_state_dict(state)
    watch.stop_at = trainer.growth.step + FURTHER_STEPS
    with suppress(KeyboardInterrupt):
        list(trainer.run())  # at the end nothing
    return trainer


def test_every_cut_goes_on_as_if_nothing_had_happened(uninterrupted: tuple[Case, Watch]) -> None:
    case, watch = uninterrupted
    assert watch.folder is not None
    covered: set[SeedStage] = set()
    names = [f"step-{step}" for step in cuts(watch.stages)]
    names += [path.name for path in watch.folder.glob("epoch-*")]
    for name in names:
        state = read_tree(watch.folder / name, "state")
        again = Watch()
        trainer = go_on(case, state, again)
        first = state["growth"]["step"]
        covered.update(watch.stages.get(first, ()))
        expected = {
            step: loss
            for step, loss in watch.losses.items()
            if first < step <= first + FURTHER_STEPS
        }
        assert again.losses == expected, f"{name}, {watch.stages.get(first)}"
        assert {step: watch.stages[step] for step in again.stages} == again.stages, name
        at_end = read_tree(watch.folder / f"step-{trainer.growth.step}", "state")
        if trainer.epoch == case.epochs:
            at_end = read_tree(watch.folder / f"epoch-{case.epochs}", "state")
        assert not list(differences(trainer.state_dict(), at_end, name))
    assert covered >= case.stages


def differences(one: Any, other: Any, place: str) -> Iterator[str]:
    """Yield where two states differ, times apart."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in one.keys() | other.keys():
            if key not in TIMES:
                yield from differences(one.get(key), other.get(key), f"{place}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        yield from () if len(one) == len(other) else [place]
        for index, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from differences(a, b, f"{place}.{index}")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        yield from () if torch.equal(one, other) and one.dtype == other.dtype else [place]
    elif one != other and not (one != one and other != other):  # NaN is as good as NaN
        yield f"{place}: {one} and {other}"


class OrderedAhead:
    """Batches that draw the order of the next epoch when one has ended, and remember it.

    They give out what they change afterwards.
    """

    def __init__(self, data: TensorDataset) -> None:
        self.data = data
        self.order = torch.randperm(len(data))

    def __iter__(self) -> Iterator[Any]:
        for chosen in self.order.split(4):
            yield self.data[chosen]
        self.order.copy_(torch.randperm(len(self.data)))

    def state_dict(self) -> Mapping[str, Any]:
        return {"order": self.order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order = state["order"]


class Stream(IterableDataset[Any]):
    """Orders itself by the epoch's number, or by a generator."""

    def __init__(self, data: TensorDataset, generator: torch.Generator | None = None) -> None:
        self.data, self.generator, self.epoch = data, generator, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        by = self.generator or torch.Generator().manual_seed(self.epoch)
        yield from (self.data[index] for index in torch.randperm(len(self.data), generator=by))


class Drawn(Dataset[Any]):
    """Draws its samples of an epoch when it is told of one, as negatives are."""

    def __init__(self, data: TensorDataset, generator: torch.Generator | None = None) -> None:
        self.data, self.generator = data, generator

    def set_epoch(self, epoch: int) -> None:
        self.drawn = torch.randperm(len(self.data), generator=self.generator)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[self.drawn[index]]


LOADERS: Mapping[str, Callable[[TensorDataset], Any]] = {
    "shuffled": lambda data: DataLoader(data, 4, shuffle=True),
    "by a DistributedSampler": lambda data: DataLoader(
        data, 4, sampler=DistributedSampler(data, num_replicas=1, rank=0)
    ),
    "by the data set": lambda data: DataLoader(Stream(data), 4),
    "by the data set's generator": lambda data: DataLoader(Stream(data, torch.Generator()), 4),
    "drawn when it is told": lambda data: DataLoader(Drawn(data), 4),
    "drawn by its generator": lambda data: DataLoader(Drawn(data, torch.Generator()), 4),
    "ordered ahead": OrderedAhead,
}


class ShortGroups:
    """Five batches an epoch in groups of two; keeps every state and what was seen."""

    def __init__(
        self, loader: str, *, epochs: int = 3, bad: frozenset[int] = frozenset(), **settings: Any
    ) -> None:
        torch.manual_seed(0)
        self.states: dict[str, Mapping[str, Any]] = {}
        self.seen: list[int] = []
        self.bad, self.num_losses = bad, 0
        self.host = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        features = torch.randn(20, 4)
        slots = esper.attach(self.host, ["0"], example=features)
        optimizer = torch.optim.SGD(self.host.parameters(), lr=0.1)
        growth = esper.Growth(slots, optimizer, policy=esper.PlannedPolicy({}))
        self.trainer = esper.Trainer(
            growth,
            LOADERS[loader](TensorDataset(features, torch.arange(20.0)[:, None])),
            loss=self.loss,
            evaluate=lambda: 1.0,
            config=esper.TrainerConfig(epochs=epochs, accumulation_steps=2, **settings),
            keeper=self,
        )

    def loss(self, output: Tensor, numbers: Tensor) -> Tensor:
        self.seen += numbers.flatten().int().tolist()
        self.num_losses += 1
        value = (output - numbers / 20).square().mean()
        return value * torch.nan if self.num_losses in self.bad else value

    def after_step(self, trainer: esper.Trainer) -> None:
        self.states[f"step {trainer.growth.step}"] = trainer.state_dict()

    def after_epoch(self, trainer: esper.Trainer) -> None:
        self.states[f"epoch {trainer.epoch}"] = trainer.state_dict()

    def save(self, trainer: esper.Trainer) -> Path | None:
        return None

    def reports(self) -> list[tuple[int, int, float]]:
        return [(r.epoch, r.step, r.train_loss) for r in self.trainer.run()]


@pytest.mark.parametrize("loader", LOADERS)
def test_no_batch_is_seen_twice_or_left_out_around_a_short_last_group(loader: str) -> None:
    whole = ShortGroups(loader)
    wanted = whole.reports()
    assert [step for _, step, _ in wanted] == [3, 6, 9]
    epochs = [whole.seen[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3, "each epoch has an order of its own"
    for name, state in whole.states.items():
        again = ShortGroups(loader)
        torch.manual_seed(99)
        again.trainer.load_state_dict(state)
        assert again.reports() == wanted[state["epoch"] :], name
        assert again.seen == whole.seen[len(whole.seen) - len(again.seen) :], name
        assert not list(differences(again.trainer.state_dict(), whole.states["epoch 3"], name))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_way_back_to_the_end_of_an_epoch_does_not_begin_it_anew(loader: str) -> None:
    governor = GovernorConfig(snapshot_steps=3, max_bad_steps=2)
    whole = ShortGroups(loader, governor=governor)
    first, *later = whole.reports()
    spoilt = ShortGroups(loader, governor=governor, bad=frozenset({8, 10}))  # steps 5 and 6
    assert spoilt.reports() == [first, first, *later], "its end is told of again"
    assert spoilt.num_losses == whole.num_losses + 5
    assert torch.equal(spoilt.host[0].weight, whole.host[0].weight)

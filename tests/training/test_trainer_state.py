"""Which states a trainer takes, and which it refuses before anything is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import esper
from esper.training import Checkpoints
from growth_problem import Problem, make_problem


@pytest.mark.parametrize("had", [False, True])
@pytest.mark.parametrize(
    ("part", "told"),
    [("scheduler", "(a|no) learning-rate scheduler"), ("ema", "(an|no) average of its weights")],
)
def test_what_only_the_run_or_only_the_trainer_has_is_refused_and_nothing_is_loaded(
    part: str, told: str, had: bool
) -> None:
    def made(*, whole: bool) -> esper.Trainer:
        problem = make_problem()
        scheduler = None
        if whole and part == "scheduler":
            scheduler = torch.optim.lr_scheduler.StepLR(problem.optimizer, 2)
        trainer = problem.trainer(esper.PlannedPolicy({}), epochs=1, scheduler=scheduler)
        if whole and part == "ema":
            trainer.ema = esper.EMA(problem.slots, decay=0.9)
        return trainer

    trainer, other = made(whole=had), made(whole=not had)
    trainer.fit()
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(ValueError, match=f"the run had {told}; make the trainer") as refused:
        other.load_state_dict(trainer.state_dict())
    assert ("had no " in str(refused.value)) is not had
    assert (other.epoch, other.growth.step) == (0, 0)
    assert all(map(torch.equal, before, other.model.parameters()))


def another_head(problem: Problem) -> esper.Trainer:
    problem.model.head = torch.nn.Linear(16, 2)
    return problem.trainer(esper.PlannedPolicy({}), epochs=1)


def another_layer(problem: Problem) -> esper.Trainer:
    problem.model.added = torch.nn.Linear(2, 2)
    return problem.trainer(esper.PlannedPolicy({}), epochs=1)


def another_optimizer(problem: Problem) -> esper.Trainer:
    problem.optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e-2)
    return problem.trainer(esper.PlannedPolicy({}), epochs=1)


def more_groups(problem: Problem) -> esper.Trainer:
    parts = problem.model.children()
    problem.optimizer = torch.optim.Adam([{"params": list(part.parameters())} for part in parts])
    return problem.trainer(esper.PlannedPolicy({}), epochs=1)


def another_scheduler(problem: Problem) -> esper.Trainer:
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(problem.optimizer)
    return problem.trainer(esper.PlannedPolicy({}), epochs=1, scheduler=scheduler)


def another_place(problem: Problem) -> esper.Trainer:
    model = problem.model
    esper.detach(model)
    problem.slots = esper.attach(model, ["embed", "head"], example=problem.batches[0][0][:2])
    return problem.trainer(esper.PlannedPolicy({}), epochs=1)


def scaled(problem: Problem) -> esper.Trainer:
    return problem.trainer(esper.PlannedPolicy({}), epochs=1, precision="float16")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (another_head, r"'head.bias' has shape \(2,\), and had \(1,\)"),
        (another_layer, "it has 'added.bias'"),
        (another_optimizer, "the state is of a Adam, and this is a SGD"),
        (more_groups, "had 2 parameter groups, and has 3"),
        (another_scheduler, "was a StepLR, no ReduceLROnPlateau"),
        (scaled, "another precision than float16"),
        (another_place, "the slots were embed, and are embed, head; attach to the same targets"),
    ],
)
def test_a_trainer_that_is_made_otherwise_is_refused_and_nothing_is_loaded(
    make: Callable[[Problem], esper.Trainer], told: str
) -> None:
    whole, problem = make_problem(), make_problem(seed=1)
    scheduler = None
    if make is another_scheduler:
        scheduler = torch.optim.lr_scheduler.StepLR(whole.optimizer, 2)
    trainer = whole.trainer(esper.PlannedPolicy({}), epochs=1, scheduler=scheduler)
    trainer.fit()
    other = make(problem)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        other.load_state_dict(trainer.state_dict())
    assert (other.epoch, other.growth.step) == (0, 0)
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())


def test_a_state_holds_a_schedulers_as_it_was_then() -> None:
    problem = make_problem()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(problem.optimizer, [2])
    trainer = problem.trainer(esper.PlannedPolicy({}), epochs=1, scheduler=scheduler)
    state = trainer.state_dict()
    scheduler.milestones[5] += 1
    assert state["scheduler"]["state"]["milestones"] == {2: 1}
    trainer.load_state_dict(state)
    scheduler.milestones[5] += 1
    assert state["scheduler"]["state"]["milestones"] == {2: 1}


STATE = make_problem().trainer(esper.PlannedPolicy({}), epochs=1).state_dict()


@pytest.mark.parametrize(
    ("part", "field", "of"),
    [
        *((None, field, "the trainer") for field in sorted(STATE)),
        *(("governor", field, "the governor") for field in sorted(STATE["governor"])),
        *(("data", field, "the data") for field in sorted(STATE["data"])),
        *(("undecided", field, "the undecided") for field in sorted(STATE["undecided"])),
        ("growth", "slots", "growth"),
    ],
)
def test_a_state_that_lacks_a_field_is_refused_and_nothing_is_loaded(
    part: str | None, field: str, of: str
) -> None:
    trained = make_problem().trainer(esper.PlannedPolicy({}), epochs=1)
    fresh = make_problem(seed=1).trainer(esper.PlannedPolicy({}), epochs=1)
    trained.fit()
    state = trained.state_dict()
    before = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    del (state if part is None else state[part])[field]
    with pytest.raises(ValueError, match=f"the state of {of} lacks {field}"):
        fresh.load_state_dict(state)
    assert (fresh.epoch, fresh.growth.step) == (0, 0)
    assert all(torch.equal(v, before[k]) for k, v in fresh.model.state_dict().items())


class History(nn.Module):
    """Has an extra state that becomes longer."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[float] = []

    def forward(self, features: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.means.append(float(features.detach().mean()))
        return features

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.means)

    def set_extra_state(self, state: Tensor) -> None:
        self.means = state.tolist()


class Observer(nn.Module):
    """Has a buffer that gets its shape from the first batch, as torch.ao's observers have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(0))

    def forward(self, features: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.largest = features.detach().amax(0)
        return features

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.largest = torch.zeros_like(state[f"{prefix}largest"])
        super()._load_from_state_dict(state, prefix, *rest)


class LiveHistory(History):
    """Gives its extra state away as it is, and takes one over."""

    def get_extra_state(self) -> Any:
        return self.means

    def set_extra_state(self, state: Any) -> None:
        self.means = state


class Run:
    """A trainer over such a host, whose losses can be spoilt."""

    def __init__(self, kind: type[nn.Module], folder: Path) -> None:
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(4, 8), kind(), nn.ReLU(), nn.Linear(8, 1))
        features = torch.randn(16, 4)
        slots = esper.attach(host, ["0"], example=features)
        optimizer = torch.optim.Adam(host.parameters(), 1e-2)
        self.spoilt: set[int] = set()
        self.num_losses = 0
        self.trainer = esper.Trainer(
            esper.Growth(slots, optimizer, policy=esper.PlannedPolicy({})),
            [(features, features.prod(1, keepdim=True))] * 3,
            loss=self.loss,
            evaluate=lambda: 1.0,
            config=esper.TrainerConfig(epochs=4),
            keeper=Checkpoints(folder),
        )

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        self.num_losses += 1
        return mse_loss(output, targets) * (torch.nan if self.num_losses in self.spoilt else 1.0)

    def weights(self) -> dict[str, Any]:
        return dict(self.trainer.model.state_dict())


@pytest.mark.parametrize("kind", [History, Observer])
def test_a_run_goes_on_over_what_its_host_loads_by_itself(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    whole, cut, again = (Run(kind, tmp_path / name) for name in ("whole", "cut", "cut"))
    whole.trainer.fit()
    for report in cut.trainer.run():
        if report.epoch == 2:
            break
    assert isinstance(again.trainer.keeper, Checkpoints)
    again.trainer.keeper.resume(again.trainer)
    again.trainer.fit()
    wanted = whole.weights()
    assert all(torch.equal(value, wanted[name]) for name, value in again.weights().items())


def test_a_state_holds_an_extra_state_as_it_was_then(tmp_path: Path) -> None:
    trainer = Run(LiveHistory, tmp_path).trainer
    state = trainer.state_dict()
    trainer.fit()
    assert state["model"]["1._extra_state"] == []
    trainer.load_state_dict(state)
    trainer.fit()
    assert state["model"]["1._extra_state"] == []


@pytest.mark.parametrize("kind", [History, Observer])
def test_a_run_goes_back_over_what_its_host_loads_by_itself(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    whole, spoilt = Run(kind, tmp_path / "whole"), Run(kind, tmp_path / "spoilt")
    whole.trainer.fit()
    spoilt.spoilt = {4, 5, 6}
    spoilt.trainer.fit()
    assert spoilt.num_losses == whole.num_losses + 6
    wanted = whole.weights()
    assert all(torch.equal(value, wanted[name]) for name, value in spoilt.weights().items())

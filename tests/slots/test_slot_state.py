"""Slots become what they were, whatever has grown or gone since, with the optimizer's groups."""

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import esper
from esper import SeedStage, SlotConfig
from esper.seeds import BlueprintError
from esper.slots.gradient_health import GradientHealth
from esper.slots.nested import tensors_in
from esper.training.optimizer_state import load_optimizer_state, optimizer_state

INPUTS = torch.linspace(-1.0, 1.0, 40).reshape(5, 8)


class Run:
    """Two slots, an optimizer, and a step."""

    def __init__(self, **config: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2))
        self.slots = esper.attach(
            self.model, ["0", "2"], example=INPUTS, config=SlotConfig(embargo_epochs=1, **config)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.slots.bind(self.optimizer)

    def grow(self, path: str, blueprint: str, stage: SeedStage) -> None:
        self.slots[path].germinate(blueprint)
        while self.slots[path].stage is not stage:
            self.slots[path].advance(force=True)

    def step(self, times: int = 1) -> list[float]:
        losses = []
        for _ in range(times):
            loss = mse_loss(self.model(INPUTS), torch.ones(5, 2))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.slots.tick()
            losses.append(float(loss.detach()))
        return losses

    def state(self) -> dict[str, Any]:
        return {
            "slots": self.slots.state_dict(),
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": optimizer_state(self.optimizer, self.model),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.slots.load_state_dict(state["slots"])
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, self.model, state["optimizer"])

    def groups(self) -> list[list[str]]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [[names[p] for p in group["params"]] for group in self.optimizer.param_groups]


def started() -> Run:
    """One slot with a committed seed and a living one, one with a seed behind the host."""
    run = Run(isolation="shadowing", max_committed=3)
    run.grow("0", "mlp", SeedStage.FOSSILIZED)
    run.step(3)
    run.grow("0", "lora", SeedStage.PROBATIONARY)
    run.grow("2", "norm", SeedStage.TRAINING)
    run.step(3)
    run.slots["2"].nonfinite_steps.fill_(3)
    return run


def commit(run: Run) -> None:
    run.slots["0"].commit()


def prune(run: Run) -> None:
    run.slots["0"].prune()
    run.slots["2"].prune()
    for _ in range(4):
        run.slots.end_epoch()


def grow_on(run: Run) -> None:
    run.slots["0"].commit()
    run.grow("0", "mlp", SeedStage.BLENDING)
    run.slots["0"].set_alpha_target(0.7, 0)
    run.slots["2"].prune()


def nothing(run: Run) -> None:
    pass


@pytest.mark.parametrize("happens", [nothing, commit, prune, grow_on])
def test_slots_go_back_over_whatever_happened(happens: Callable[[Run], None]) -> None:
    run, untouched = started(), started()
    state = run.state()
    happens(run)
    run.step(2)
    run.load(state)
    assert [slot.stage for slot in run.slots.values()] == [
        SeedStage.PROBATIONARY,
        SeedStage.TRAINING,
    ]
    assert run.groups() == untouched.groups()
    assert [int(slot.nonfinite_steps) for slot in run.slots.values()] == [0, 3]
    assert run.slots["2"].guarded
    assert run.step(5) == untouched.step(5)
    commit(run), commit(untouched)
    assert run.step(5) == untouched.step(5)
    assert run.groups() == untouched.groups()
    assert run.optimizer.state.keys() <= set(run.model.parameters()), "nothing of the removed"


def test_a_fresh_model_becomes_the_grown_one() -> None:
    run, fresh = started(), Run(isolation="shadowing", max_committed=3)
    fresh.load(run.state())
    assert fresh.groups() == run.groups()
    assert fresh.step(5) == run.step(5)
    assert [s.committed for s in fresh.slots.values()] == [s.committed for s in run.slots.values()]


def test_weights_that_come_before_their_growth_are_told_to_wait_for_it() -> None:
    grown, fresh = Run(), Run()
    grown.grow("0", "mlp", SeedStage.FOSSILIZED)
    grown.grow("0", "noop", SeedStage.TRAINING)
    weights = grown.model.state_dict()
    for strict in (True, False):
        told = pytest.warns(match="slot '0', with the committed ones: 0 here, 1 in the weights")
        with told as warned, suppress(RuntimeError):
            fresh.model.load_state_dict(weights, strict=strict)
        assert len(warned) == 1
    fresh.load(grown.state())  # where a warning is an error
    assert torch.equal(fresh.model(INPUTS), grown.model(INPUTS))


def test_modules_that_are_there_already_stay_the_same_objects() -> None:
    """A compiled graph then stays as it is."""
    run = started()
    modules, state = list(run.model.modules()), run.state()
    run.step(2)
    run.load(state)
    assert all(a is b for a, b in zip(run.model.modules(), modules, strict=True))


def test_committed_seeds_stay_in_the_group_that_they_were_given() -> None:
    run = Run()
    run.grow("0", "mlp", SeedStage.FOSSILIZED)
    seed = list(run.slots["0"].branches.parameters())
    run.slots.unbind()
    host = [p for p in run.model.parameters() if not any(p is s for s in seed)]
    groups = [{"params": host}, {"params": seed, "weight_decay": 0.0}]
    run.optimizer = torch.optim.AdamW(groups, lr=0.01)
    run.slots.bind(run.optimizer)
    before, state = run.groups(), run.state()
    run.grow("2", "mlp", SeedStage.TRAINING)
    run.load(state)
    assert run.groups() == before


def test_a_state_is_a_copy() -> None:
    run = started()
    state = run.state()
    kept = [tensor.clone() for tensor in tensors_in(state)]
    run.step(3)
    prune(run)
    assert all(map(torch.equal, kept, tensors_in(state)))


def test_an_optimizer_goes_on_from_a_state_without_changing_it() -> None:
    """NAdam keeps a float32 factor for weights of half precision."""
    model = nn.Linear(3, 3).bfloat16()
    optimizer = torch.optim.NAdam(model.parameters())

    def step() -> None:
        model(torch.ones(2, 3).bfloat16()).float().square().sum().backward()
        optimizer.step()

    step()
    state = optimizer_state(optimizer, model)
    kept = [tensor.clone() for tensor in tensors_in(state)]
    load_optimizer_state(optimizer, model, state)
    step()
    assert all(map(torch.equal, kept, tensors_in(state)))


def lacking(state: dict[str, Any]) -> dict[str, Any]:
    del state["slots"]["2"]["slot"]["life"]["alpha"]["steepness"]
    return state


def lacking_top(state: dict[str, Any]) -> dict[str, Any]:
    del state["gradient_health"], state["breakers"]
    return state


def lacking_count(state: dict[str, Any]) -> dict[str, Any]:
    del state["slots"]["2"]["nonfinite_steps"]
    return state


def lacking_stream(state: dict[str, Any]) -> dict[str, Any]:
    state["slots"]["2"]["random_stream"] = {"cuda": None, "cuda_seed": 0}
    return state


def lacking_steps(state: dict[str, Any]) -> dict[str, Any]:
    del state["binding"]["steps"]["2"]
    return state


def lacking_norms(state: dict[str, Any]) -> dict[str, Any]:
    state["gradient_health"]["norms"]["seed of slot '2'"] = {"host": torch.ones(1)}
    return state


def lacking_failures(state: dict[str, Any]) -> dict[str, Any]:
    del state["breakers"]["mlp"]["failures"]
    return state


def unknown(state: dict[str, Any]) -> dict[str, Any]:
    state["slots"]["2"]["slot"]["living"]["blueprint"] = "missing"
    return state


def unbound(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "binding": None}


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "slots": {"0": state["slots"]["0"], "1": state["slots"]["2"]}}


def reshaped(state: dict[str, Any]) -> dict[str, Any]:
    state["slots"]["2"]["slot"]["living"]["param_count"] = 1
    return state


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lacking, ValueError, "SlotSnapshot lacks life.alpha.steepness"),
        (lacking_top, ValueError, "state of the slots lacks gradient_health, breakers; load all"),
        (lacking_count, ValueError, "state of slot '2' lacks nonfinite_steps"),
        (lacking_stream, ValueError, "state of the random stream of slot '2' lacks cpu"),
        (lacking_steps, ValueError, "state of the binding's steps lacks 2"),
        (lacking_norms, ValueError, "gradient norms of the seed of slot '2' lacks seed"),
        (lacking_failures, ValueError, "state of the breaker 'mlp' lacks failures"),
        (unknown, BlueprintError, "missing"),
        (unbound, ValueError, "bound to no optimizer"),
        (renamed, ValueError, "the slots were 0, 1, and are 0, 2"),
        (reshaped, ValueError, "builds 16 parameters now, 1 when it was saved"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    damage: Callable[[dict[str, Any]], dict[str, Any]], error: type[Exception], words: str
) -> None:
    run = started()
    state = damage(copy.deepcopy(run.slots.state_dict()))
    fresh = Run(isolation="shadowing", max_committed=3)
    before: dict[str, Tensor] = copy.deepcopy(fresh.model.state_dict())
    with pytest.raises(error, match=words):
        fresh.slots.load_state_dict(state)
    assert fresh.groups() == [[*before], [], []]
    assert [slot.stage for slot in fresh.slots.values()] == [SeedStage.DORMANT] * 2
    assert list(fresh.model.state_dict()) == list(before)


def test_a_slot_with_other_settings_is_refused() -> None:
    state = started().slots.state_dict()
    other = Run(isolation="shadowing", max_committed=4)
    with pytest.raises(
        ValueError, match=r"slot '0' had config.max_committed \d+, and has 4; build"
    ):
        other.slots.load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda run: torch.optim.SGD(run.model.parameters(), lr=0.1), "is of a AdamW"),
        (
            lambda run: torch.optim.AdamW(run.model.parameters()),
            "had 3 parameter groups, and has 1",
        ),
    ],
)
def test_a_state_of_another_optimizer_is_refused(make: Callable[[Run], Any], words: str) -> None:
    run = started()
    state = run.state()["optimizer"]
    optimizer = make(run)
    with pytest.raises(ValueError, match=words):
        load_optimizer_state(optimizer, run.model, state)


def test_a_parameter_that_is_not_the_models_has_no_name() -> None:
    run = Run()
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match=r"group 3 .* shape \(3,\) that is not the Sequential"):
        optimizer_state(run.optimizer, run.model)


def test_a_frozen_seed_whose_weights_were_loaded_by_assignment_stays_frozen() -> None:
    """`assign=True` puts other parameters in place of those that are guarded."""
    saved, loaded = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(2))
    inputs = torch.randn(3, 4)
    slots, others = (esper.attach(model, "0", example=inputs) for model in (saved, loaded))
    slots["0"].germinate("mlp_small")
    while slots["0"].stage is not SeedStage.SHADOWING:
        slots["0"].advance(force=True)
    weights = {name: value.clone() for name, value in saved.state_dict().items()}
    others.load_state_dict(slots.state_dict())
    loaded.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    others.bind(optimizer)
    loaded(inputs).square().mean().backward()
    optimizer.step()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[name]) == ("esper_slot" in name), name


def test_norms_that_were_kept_go_where_the_next_one_is() -> None:
    """A frozen host has no gradients: its norm is on the CPU, wherever its seeds are."""
    health = GradientHealth()
    kept = {"steps": 0, "norms": {"a": {"host": torch.ones(1), "seed": torch.ones(1)}}}
    health.load_state_dict(kept, device=torch.device("cpu"))
    elsewhere = nn.Parameter(torch.ones(2, device="meta"))
    elsewhere.grad = torch.ones(2, device="meta")
    health.measure([elsewhere], {"a": [elsewhere]}, "host")
    norms = health.state_dict()["norms"]["a"]["host"]
    assert (norms.device.type, norms.shape) == ("meta", (2,))

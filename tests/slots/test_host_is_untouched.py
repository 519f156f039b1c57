"""The bitwise promises: until a seed blends, the host cannot tell that it has slots."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper import SeedStage, SlotConfig, SlotSet
from esper.lifecycle.learning import Isolation
from esper.training.carried_state import CarriedState

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
STEPS = 50
MAX_NORM = 0.05
"""Below the hosts' gradient norms, so that clipping clips."""

Trace = dict[str, bytes]


def attach(host: Any, model: nn.Module, **config: Any) -> SlotSet:
    return esper.attach(
        model,
        host.targets,
        example=host.inputs(),
        config=SlotConfig(isolation=Isolation.SHADOWING, **config),
    )


def host_state(model: nn.Module) -> dict[str, Tensor]:
    return {n: tensor for n, tensor in model.state_dict().items() if "esper_slot" not in n}


@pytest.fixture(scope="module")
def train(bits_of: Callable[[Tensor], bytes]) -> Callable[..., Trace]:
    """Train a model and return every bit that belongs to its host."""

    def run(
        host: Any, model: nn.Module, precision: str, regime: str, slots: SlotSet | None
    ) -> Trace:
        own = {n: p for n, p in model.named_parameters() if "esper_slot" not in n}
        optimizer = torch.optim.AdamW(own.values(), lr=0.01, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled="scaler" in regime)
        clip = functools.partial(torch.nn.utils.clip_grad_norm_, own.values())
        if slots is not None:
            slots.bind(optimizer)
            clip = slots.clip_grad_norm_
        dtype = PRECISIONS[precision]
        trace: Trace = {}
        model.train()
        torch.manual_seed(1)

        def forward(step: int) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                output = model(host.inputs(step))
                return output, scaler.scale(F.cross_entropy(output, host.labels(step)))

        for step in range(STEPS):
            if slots is not None:
                slots.shadow_pass(lambda step=step: forward(step)[1])
            output, loss = forward(step)
            loss.backward()
            if "clip" in regime:
                scaler.unscale_(optimizer)
                trace[f"norm of step {step}"] = bits_of(clip(MAX_NORM))
            scaler.step(optimizer)
            scaler.update()
            trace[f"output of step {step}"] = bits_of(output)
            trace[f"gradients of step {step}"] = b"".join(bits_of(p.grad) for p in own.values())
            optimizer.zero_grad()
            if slots is not None:
                slots.tick()
        trace["scale"] = repr(scaler.get_scale()).encode()
        trace["random state"] = bits_of(torch.get_rng_state())
        trace |= {f"state {name}": bits_of(tensor) for name, tensor in host_state(model).items()}
        trace |= {
            f"optimizer's {key} of {name}": bits_of(value)
            for name, parameter in own.items()
            for key, value in optimizer.state[parameter].items()
        }
        trace["output in eval mode"] = bits_of(model.eval()(host.inputs()))
        return trace

    return run


@pytest.fixture(scope="module")
def plain_trace(train: Callable[..., Trace]) -> Callable[[Any, str, str], Trace]:
    """The same training without any slot, once for each setting."""

    @functools.cache
    def trace(host: Any, precision: str, regime: str) -> Trace:
        return train(host, host.build(), precision, regime, None)

    return trace


def assert_same(trace: Trace, plain: Trace) -> None:
    assert trace.keys() == plain.keys()
    different = [name for name in plain if trace[name] != plain[name]]
    assert not different, f"{len(different)} differ, first: {different[:3]}"


def test_attach_and_detach_leave_no_trace(host: Any, fingerprint: Any) -> None:
    model = host.build()
    list(model.modules())[-1].eval()
    before = fingerprint(model)

    slots = attach(host, model)
    esper.detach(model)
    assert fingerprint(model) == before

    slots = attach(host, model)
    for slot in slots.values():
        slot.germinate(host.blueprint)
        slot.advance(force=True)
    CarriedState(model, state=lambda: {"grown": 1}, load=lambda _: None)  # as a callback has it
    slots.keep_out_of_wrappers()
    esper.detach(model)
    assert fingerprint(model) == before
    assert "esper_growth" not in model.state_dict()
    assert "_ddp_params_and_buffers_to_ignore" not in vars(model)


@pytest.mark.parametrize("attached", ["net", ""], ids=["to the part", "to the whole"])
def test_detaching_a_part_leaves_no_trace_on_what_is_around_it(attached: str) -> None:
    """A framework's callback hooks the whole, which it trains, and may be all that has slots."""
    whole = nn.Sequential(OrderedDict(net=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
    keys = list(whole.state_dict())
    model = whole.get_submodule(attached)
    slots = esper.attach(model, "*" if attached else "net.*", example=torch.ones(2, 4))
    CarriedState(whole, state=lambda: {"grown": 1}, load=lambda _: None)
    next(iter(slots.values())).germinate("mlp")
    slots.keep_out_of_wrappers(whole)
    esper.detach(whole.net[0])
    assert "esper_growth" in whole.state_dict(), "the other slot may grow on"
    esper.detach(whole.net)
    assert list(whole.state_dict()) == keys
    assert "_ddp_params_and_buffers_to_ignore" not in vars(whole)


@pytest.mark.parametrize("own", [[], {"bias"}, ("bias",)])
@pytest.mark.parametrize("blueprint", [None, "mlp"])
def test_what_a_user_lets_wrappers_leave_out_stays_as_it_is(own: Any, blueprint: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model._ddp_params_and_buffers_to_ignore = own
    slots = esper.attach(model, "0", example=torch.ones(2, 4))
    if blueprint:
        slots["0"].germinate(blueprint)
    slots.keep_out_of_wrappers()
    esper.detach(model)
    assert getattr(model, "_ddp_params_and_buffers_to_ignore", []) == own


class Changing(nn.Linear):
    """Draws a number, and changes itself in each forward, in eval mode too."""

    def __init__(self, change: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(4, 4)
        self.change = change
        self.codes = nn.Parameter(torch.tensor([0.0, torch.nan, 1.0, 2.0]), requires_grad=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("range", torch.empty(0))
        self.register_buffer("cache", None)
        self.calls = 0

    def forward(self, features: Tensor) -> Tensor:
        self.change(self, features)
        return super().forward(features) + torch.rand(())


CHANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "buffer moved": lambda m, x: m.mean.add_(x.mean(0)),
    "buffer replaced": lambda m, x: setattr(m, "mean", 0.9 * m.mean + 0.1 * x.mean(0)),
    "buffer resized": lambda m, x: m.range.set_(x.amin(0)),
    "buffer filled": lambda m, x: setattr(m, "cache", x.mean(0)),
    "buffer added": lambda m, x: m.register_buffer("late", x.mean(0)),
    "parameter moved": lambda m, _: m.codes.mul_(-0.9),
    "parameter moved beside autograd": lambda m, _: m.codes.data.mul_(-1.0),
    "parameter's data replaced": lambda m, _: setattr(m.codes, "data", m.weight.data[0]),
    "parameter replaced": lambda m, x: setattr(m, "codes", nn.Parameter(x[0])),
    "parameter tied": lambda m, _: setattr(m, "tied", m.weight),
    "attribute": lambda m, _: setattr(m, "calls", m.calls + 1),
    "attribute added": lambda m, x: setattr(m, "seen", x),
    "child added": lambda m, _: m.add_module("late", nn.BatchNorm1d(4, affine=False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_attach_leaves_no_trace_in_a_host_that_changes_itself_in_its_forward(
    change: str, fingerprint: Any
) -> None:
    model = nn.Sequential(Changing(CHANGES[change]), nn.Tanh())
    before, storage = fingerprint(model), model[0].codes.data_ptr()
    esper.attach(model, "0", example=torch.ones(2, 4))
    esper.detach(model)
    assert fingerprint(model) == before
    assert model[0].calls == 0
    assert model[0].codes.data_ptr() == storage


class Merging(nn.Linear):
    """Adds a low-rank part to its weight in eval mode, as loralib's layers do."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.up = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(4, 1))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (-1.0 if mode else 1.0) * self.up @ self.down
            self.merged = not mode
        return self


class FrozenNorm(nn.Sequential):
    """Keeps its BatchNorm in eval mode, whatever its own."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self[1].eval()
        return self


def test_a_host_whose_modes_are_more_than_flags_is_left_in_them(fingerprint: Any) -> None:
    inner = nn.Sequential(Merging(), nn.Tanh())
    model = FrozenNorm(Merging(), nn.BatchNorm1d(4), inner).train()
    inner.eval()
    inner[1].train()
    inputs, before = torch.randn(3, 4), fingerprint(model)
    esper.attach(model, "0", example=inputs)
    esper.detach(model)
    assert fingerprint(model) == before
    assert (model[0].merged, inner[0].merged) == (False, True)

    weights = [model[0].weight.clone(), inner[0].weight.clone()]
    esper.HeldOut(model, [(inputs, inputs)], loss=lambda out, x: (out - x).square().mean(1))()
    assert fingerprint(model)["modules"] == before["modules"]
    assert (model[0].merged, inner[0].merged) == (False, True)
    torch.testing.assert_close([model[0].weight, inner[0].weight], weights)


def test_germination_changes_no_bit_and_draws_no_random_number(
    host: Any, fingerprint: Any, bits_of: Any, test_blueprints: None
) -> None:
    def output() -> bytes:
        torch.manual_seed(5)
        return bits_of(copy.deepcopy(model)(host.inputs()))

    model = host.build()
    keys, plain = list(model.state_dict()), output()
    slots = attach(host, model)
    assert list(model.state_dict()) == keys
    assert output() == plain
    before = fingerprint(model)

    for slot in slots.values():
        slot.germinate("with_dropout")

    after = fingerprint(model)
    for part in ("state_dict", "tensors", "gradient_hooks"):
        assert after[part].items() >= before[part].items()
    assert after["random_state"] == before["random_state"]
    assert output() == plain


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.GERMINATED])
def test_host_trains_as_without_slots_before_the_seed_trains(
    host: Any,
    precision: str,
    stage: SeedStage,
    train: Callable[..., Trace],
    plain_trace: Callable[..., Trace],
) -> None:
    model = host.build()
    slots = attach(host, model)
    if stage is SeedStage.GERMINATED:
        for slot in slots.values():
            slot.germinate(host.blueprint)
    trace = train(host, model, precision, "clip", slots)
    assert_same(trace, plain_trace(host, precision, "clip"))


SEEDS = [
    ("with_dropout", "gate", "proximal"),
    ("with_dropout", "multiply", "plain"),
    ("turns_inf", "add", "proximal"),
    ("turns_nan", "gate", "plain"),
    ("turns_nan", "multiply", "proximal"),
    ("nan_gradient", "add", "plain"),
    ("with_dropout", "add", "norm_cap"),
    ("turns_inf", "gate", "correlation"),
    ("with_dropout", "gate", "shadow"),
    ("turns_nan", "add", "shadow"),
]


@pytest.mark.parametrize(("blueprint", "operator", "objective"), SEEDS)
@pytest.mark.parametrize("regime", ["clip", "scaler", "scaler and clip"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_host_trains_as_without_slots_while_seeds_train_behind_it(
    host: Any,
    precision: str,
    regime: str,
    blueprint: str,
    operator: str,
    objective: str,
    train: Callable[..., Trace],
    plain_trace: Callable[..., Trace],
    test_blueprints: None,
) -> None:
    model = host.build()
    slots = attach(host, model, blend_operator=operator, objective=objective)
    for slot in slots.values():
        slot.germinate(blueprint)
        slot.advance(force=True)
    born = [parameter.clone() for slot in slots.values() for parameter in slot.seed.parameters()]

    trace = train(host, model, precision, regime, slots)

    assert_same(trace, plain_trace(host, precision, regime))
    assert [slot.stage for slot in slots.values()] == [SeedStage.TRAINING] * 2
    now = [parameter for slot in slots.values() for parameter in slot.seed.parameters()]
    assert all(torch.isfinite(parameter).all() for parameter in now)
    if blueprint == "nan_gradient":
        assert all(int(slot.nonfinite_steps) > 0 for slot in slots.values())
    else:
        assert not any(torch.equal(a, b) for a, b in zip(born, now, strict=True))
    if blueprint.startswith("turns") and objective != "plain":
        assert all(int(slot.nonfinite_steps) > 0 for slot in slots.values())

"""Measurements: forced alphas, many variants in one forward, gradient norms, clipping."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

import esper
from esper import SeedStage, SlotConfig, SlotSet
from esper.lifecycle.learning import Isolation
from esper.slots import fused_losses, gradient_guard
from esper.slots.gradient_guard import GradientGuard, zero_if_broken
from esper.slots.gradient_health import GradientHealth

STAGES = [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY]


def attach(case: Any, **config: Any) -> tuple[nn.Module, SlotSet]:
    model = case.build()
    config = {"isolation": Isolation.SHADOWING, **config}
    slots = esper.attach(model, case.targets, example=case.inputs(), config=SlotConfig(**config))
    return model, slots


def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("stage", STAGES)
def test_forced_alpha_weighs_the_living_seed_whatever_its_stage(
    host: Any, stage: SeedStage, grow: Any, randomise: Any
) -> None:
    model, slots = attach(host)
    slot = slots[host.targets[1]]
    grow(slot, host.blueprint, SeedStage.FOSSILIZED)
    randomise(slot.branches)
    model.eval()
    committed = model(host.inputs())
    grow(slot, host.blueprint, stage)
    randomise(slot.living, seed=1)
    own = model(host.inputs())
    with slot.force_alpha(0.0):
        assert torch.equal(model(host.inputs()), committed)
    with slot.force_alpha(1):
        full = model(host.inputs())
    assert not torch.allclose(full, committed)
    if stage in (SeedStage.SHADOWING, SeedStage.PROBATIONARY):
        torch.testing.assert_close(full, own)
    with slot.force_alpha(torch.tensor([0.0, 1.0, 0.0, 1.0])):
        mixed = model(host.inputs())
    torch.testing.assert_close(mixed[::2], committed[::2])
    torch.testing.assert_close(mixed[1::2], full[1::2])
    assert torch.equal(model(host.inputs()), own)


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.PROBATIONARY])
def test_a_seed_runs_on_no_sample_whose_alpha_is_0(host: Any, stage: SeedStage, grow: Any) -> None:
    """So that it costs nothing there, and spoils nothing: this one is not finite."""
    model, slots = attach(host)
    slot = slots[host.targets[0]]
    model.eval()
    plain = model(host.inputs())
    grow(slot, host.blueprint, stage)
    assert slot.living is not None
    with torch.no_grad():
        for parameter in slot.living.parameters():
            parameter.fill_(math.nan)
    samples: list[int] = []
    slot.living.register_forward_pre_hook(lambda _, args: samples.append(len(args[0])))
    with slot.force_alpha(0.0):
        assert torch.equal(model(host.inputs()), plain)
    assert samples == []
    with slot.force_alpha(torch.tensor([0.0, 1.0, 0.0, 0.5])):
        mixed = model(host.inputs())
    assert samples == [2]
    torch.testing.assert_close(mixed[::2], plain[::2])
    assert mixed[1::2].isnan().all()


def test_forced_alpha_is_restored_when_the_block_raises_and_refused_in_train_mode(
    host: Any, grow: Any, randomise: Any
) -> None:
    model, slots = attach(host)
    slot = slots[host.targets[0]]
    model.eval()
    plain = model(host.inputs())
    with pytest.raises(ValueError, match="DORMANT; there is no trained seed"):
        slot.force_alpha(0.5).__enter__()
    slot.germinate(host.blueprint)
    with pytest.raises(ValueError, match="GERMINATED; there is no trained seed"):
        slot.force_alpha(0.5).__enter__()
    slot.advance(force=True)
    randomise(slot.living)

    with slot.force_alpha(0.5):
        assert not torch.equal(model(host.inputs()), plain)
    wrong = torch.zeros(1, 2, 3)
    with pytest.raises((RuntimeError, TypeError)), slot.force_alpha(0.5):
        model(wrong)
    assert torch.equal(model(host.inputs()), plain)
    with slot.force_alpha(0.5):
        inside = model(host.inputs())
        with slot.force_alpha(0.0):
            assert torch.equal(model(host.inputs()), plain)
        assert torch.equal(model(host.inputs()), inside)
    model.train()
    with pytest.raises(RuntimeError, match=r"train mode.*model\.eval\(\)"):
        slot.force_alpha(0.5).__enter__()


@pytest.mark.parametrize("stages", [(a, b) for a in STAGES for b in STAGES if a <= b])
def test_fused_losses_equal_separate_runs(
    host: Any, stages: tuple[SeedStage, SeedStage], grow: Any, randomise: Any
) -> None:
    model, slots = attach(host)
    first, second = host.targets
    for path, stage in zip(host.targets, stages, strict=True):
        grow(slots[path], host.blueprint, stage)
        randomise(slots[path].living)
    model(host.inputs())
    model.eval()
    inputs, labels = host.inputs(1, batch=6), host.labels(1, batch=6)
    variants = [{}, {first: 0.0}, {second: 0.0}, {first: 0.5, second: 1.0}]

    together = fused_losses(model, slots, inputs, labels, per_sample, variants)

    assert together.shape == (4, 6)
    for losses, variant in zip(together, variants, strict=True):
        alone = fused_losses(model, slots, inputs, labels, per_sample, [variant])[0]
        torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        own = per_sample(model(inputs), labels)
    torch.testing.assert_close(together[0], own, rtol=1e-5, atol=1e-6)
    assert len({round(float(row.mean()), 5) for row in together}) > 1
    F.cross_entropy(model.train()(inputs), labels).backward()


def test_fused_losses_take_what_models_take(hosts: Any, grow: Any, randomise: Any) -> None:
    class TakesMore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor, *, pair: Any, scale: float = 2.0) -> Tensor:
            assert isinstance(pair, tuple)
            return (self.layer(x) * scale + pair[0])[:, 0]

    model = TakesMore()
    x = torch.randn(3, 6)
    inputs = {"x": x, "pair": (torch.randn(3, 1), 7), "scale": 3.0}
    slots = esper.attach(model, "layer", example=inputs)
    grow(slots["layer"], "mlp", SeedStage.BLENDING)
    randomise(slots["layer"].living)
    model.eval()
    found = fused_losses(
        model, slots, inputs, None, lambda out, _: out, [{"layer": a} for a in (0.0, 0.3, 1.0)]
    )
    for row, alpha in zip(found, (0.0, 0.3, 1.0), strict=True):
        with slots["layer"].force_alpha(alpha):
            torch.testing.assert_close(row, model(**inputs))


@pytest.mark.parametrize("batch", [1, 4])
def test_where_a_host_folds_tokens_into_the_batch_samples_are_not_mistaken_for_others(
    batch: int, grow: Any, randomise: Any
) -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x.reshape(-1, 4))).reshape(x.shape[:2]).mean(1)

    torch.manual_seed(0)
    model, x = Folding(), torch.randn(batch, 3, 4)
    slots = esper.attach(model, "embed", example=torch.randn(2, 3, 4))
    grow(slots["embed"], "mlp_small", SeedStage.BLENDING)
    randomise(slots["embed"].living)
    model.eval()
    alphas = (0.0, 0.3, 1.0)
    found = fused_losses(
        model, slots, x, None, lambda out, _: out, [{"embed": alpha} for alpha in alphas]
    )
    for row, alpha in zip(found, alphas, strict=True):
        with slots["embed"].force_alpha(alpha):
            assert torch.equal(row, model(x))
    with (
        slots["embed"].force_alpha(torch.tensor([0.0, 1.0])),
        pytest.raises(ValueError, match=r"\(6, 8\) have not one row for each of 2 samples"),
    ):
        model(torch.randn(2, 3, 4))


class Graph(nn.Module):
    """Adds to each node what an edge brings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        features = self.layer(nodes)
        brought = features[edges[0]]
        return features + torch.zeros_like(features).index_add(0, edges[1], brought)


class Masked(nn.Module):
    """Takes a mask over tokens, of which there are as many as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        features = self.layer(x.unsqueeze(1).expand(-1, 5, -1))
        return (mask.softmax(1) @ features).mean(1)


class Normed(nn.Sequential):
    """Takes its statistics from the batch, in eval mode too."""

    def __init__(self) -> None:
        layer, norm = nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)
        super().__init__(OrderedDict(layer=layer, norm=norm))


class Returning(nn.Module):
    """Returns something made of its features."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.made = nn.Linear(6, 6), made

    def forward(self, x: Tensor) -> Any:
        return self.made(self.layer(x))


def likelihood(output: Normal) -> Tensor:
    return output.log_prob(torch.linspace(-1.0, 1.0, 30).reshape(5, 6)).sum(1)


def contrastive(outputs: Tensor, _: Any) -> Tensor:
    """Every sample's loss, with all others of the batch as its negatives."""
    unit = F.normalize(outputs, dim=1)
    return F.cross_entropy(unit @ unit.T.roll(1, 0), torch.arange(len(unit)), reduction="none")


@pytest.mark.parametrize(
    ("make", "loss", "shared"),
    [
        (Graph, lambda out, _: out[:, 0], torch.tensor([[0, 4, 2, 2], [1, 2, 3, 0]])),
        (Masked, lambda out, _: out[:, 0], torch.randn(5, 5)),
        (Normed, lambda out, _: out[:, 0], None),
        (lambda: Returning(lambda h: (h, h.mean())), lambda out, _: out[0][:, 0] - out[1], None),
        (
            lambda: Returning(lambda h: (h, {"mean": h.mean().item()})),
            lambda out, _: out[0][:, 0] - out[1]["mean"],
            None,
        ),
        (lambda: Returning(lambda h: Normal(h, 1.0)), lambda out, _: likelihood(out), None),
        (
            lambda: Returning(lambda h: (h, "of", Normal(h, 1.0))),
            lambda out, _: out[0][:, 0] + likelihood(out[2]),
            None,
        ),
        (lambda: Returning(Tensor.to_sparse), lambda out, _: out.to_dense()[:, 0], None),
        (Normed, contrastive, None),
        (lambda: nn.Sequential(OrderedDict(layer=nn.Linear(6, 6))), contrastive, None),
    ],
    ids=[
        "edges",
        "mask",
        "statistics of the batch",
        "a mean over the batch",
        "a number of the batch",
        "a distribution",
        "a distribution besides",
        "sparse",
        "statistics and loss",
        "contrastive loss",
    ],
)
def test_no_variant_meets_another_where_samples_of_a_batch_meet(
    make: Any, loss: Any, shared: Tensor | None, grow: Any, randomise: Any
) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 6)
    inputs = x if shared is None else (x, shared)
    slots = esper.attach(model, "layer", example=inputs)
    grow(slots["layer"], "mlp", SeedStage.BLENDING)
    randomise(slots["layer"].living)
    model.eval()
    variants = [{"layer": alpha} for alpha in (0.0, 0.3, 1.0)]
    found = fused_losses(model, slots, inputs, None, loss, variants)
    for row, variant in zip(found, variants, strict=True):
        with torch.no_grad(), slots["layer"].force_alpha(variant["layer"]):
            alone = loss(model(*inputs) if shared is not None else model(x), None)
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-6)


def test_what_collects_from_a_forward_sees_each_sample_once(grow: Any) -> None:
    """Also where the outputs could not be cut into those of several variants."""
    model, x, rows = Returning(lambda h: (h, h.mean())), torch.randn(5, 6), []

    def collect(features: Tensor, increment: Tensor) -> Tensor:
        rows.append(len(features))
        return increment

    slot = esper.attach(model, "layer", example=x)["layer"]
    grow(slot, "mlp", SeedStage.BLENDING)
    with slot.measure_as(collect):
        fused_losses(
            model.eval(), {"layer": slot}, x, None, lambda out, _: out[0][:, 0], [{"layer": 1.0}]
        )
    assert rows == [5]


@pytest.mark.parametrize("room", [6, 5])
def test_only_what_a_seed_raises_without_copies_of_the_batch_counts(
    host: Any, room: int, grow: Any, randomise: Any
) -> None:
    """As where memory is full: both seeds have no room for copies, weighed or not."""
    model, slots = attach(host)
    for path in host.targets:
        grow(slots[path], host.blueprint, SeedStage.BLENDING)
        randomise(slots[path].living)
        slots[path].set_alpha_target(0.5, 0)
    weighed, other = (slots[path] for path in host.targets)
    model.eval()
    inputs, labels = host.inputs(1, batch=6), host.labels(1, batch=6)
    variants = [{weighed.path: alpha} for alpha in (0.0, 0.5, 1.0)]
    expected = fused_losses(model, slots, inputs, labels, per_sample, variants)

    def fill(_: nn.Module, args: Any) -> None:
        if len(args[0]) > room:
            raise MemoryError(f"no room for {len(args[0])}")

    kind = other.kind
    for slot in slots.values():
        slot.living.register_forward_pre_hook(fill)
    found = fused_losses(model, {weighed.path: weighed}, inputs, labels, per_sample, variants)
    if room == 6:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert other.kind == kind
        assert not slots.tick()
    else:
        failed = [event.error for event in slots.tick() if event.type == "seed_failed"]
        assert failed == ["MemoryError: no room for 6"] * 2


def test_what_a_seed_has_raised_before_it_is_weighed_is_not_forgotten(
    hosts: Any, grow: Any
) -> None:
    host = hosts["mlp"]
    model, slots = attach(host)
    slot = slots[host.targets[0]]
    grow(slot, host.blueprint, SeedStage.BLENDING)
    slot.note_failure("RuntimeError: in the last step")
    variants = [{slot.path: alpha} for alpha in (0.0, 1.0)]
    fused_losses(model.eval(), slots, host.inputs(), host.labels(), per_sample, variants)
    assert slot.failed


def test_fused_losses_refuse_what_they_cannot_measure(host: Any, grow: Any) -> None:
    model, slots = attach(host)
    path = host.targets[0]
    inputs, labels = host.inputs(), host.labels()
    grow(slots[path], host.blueprint, SeedStage.TRAINING)
    with pytest.raises(RuntimeError, match="train mode"):
        fused_losses(model, slots, inputs, labels, per_sample, [{path: 0.0}])
    model.eval()
    with pytest.raises(ValueError, match=r"one value per sample, shape \(4,\), got \(\)"):
        fused_losses(model, slots, inputs, labels, F.cross_entropy, [{path: 0.0}])
    with pytest.raises(KeyError, match="no slot at 'nowhere'; slots: "):
        fused_losses(model, slots, inputs, labels, per_sample, [{"nowhere": 0.0}])
    with pytest.raises(ValueError, match="DORMANT"):
        fused_losses(model, slots, inputs, labels, per_sample, [{host.targets[1]: 0.0}])
    with pytest.raises(TypeError, match="no batched tensor in int"):
        fused_losses(model, slots, 3, labels, per_sample, [{path: 0.0}])
    assert slots[path].forced_alpha is None


def norm(parameters: Any) -> float:
    """The 2-norm of all gradients, by hand."""
    squares = [float(p.grad.double().square().sum()) for p in parameters if p.grad is not None]
    return math.sqrt(sum(squares))


def learn(model: nn.Module, host: Any, index: int, scale: float = 1.0) -> None:
    (scale * F.cross_entropy(model(host.inputs(index)), host.labels(index))).backward()


@pytest.mark.parametrize("loop", ["plain", "clipped", "closure"])
@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.PROBATIONARY])
def test_gradient_health_equals_norms_by_hand(
    host: Any, stage: SeedStage, loop: str, grow: Any, randomise: Any
) -> None:
    model, slots = attach(host)
    slots.gradient_health = GradientHealth(interval_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    slots.bind(optimizer)
    slot = slots[host.targets[0]]
    grow(slot, host.blueprint, stage)
    if stage is SeedStage.BLENDING:
        slot.set_alpha_target(0.5, 0)
    randomise(slot.living)
    own = [p for n, p in model.named_parameters() if "esper_slot" not in n]
    seed = list(slot.living.parameters())
    hosts, seeds = [], []
    for index in range(3):
        if loop == "closure":
            optimizer.step(lambda index=index: learn(model, host, index))
        else:
            learn(model, host, index)
        hosts.append(norm(own))
        seeds.append(norm(seed))
        if loop == "clipped":
            slots.clip_grad_norm_(1e-3)
        if loop != "closure":
            optimizer.step()
        optimizer.zero_grad()
    reading = slots.read_gradient_health(slot)
    assert reading.host_norm == pytest.approx(sum(hosts) / 3, rel=1e-5)
    assert reading.seed_norm == pytest.approx(sum(seeds) / 3, rel=1e-5)
    sizes = [sum(p.numel() for p in parameters) for parameters in (own, seed)]
    expected = reading.seed_norm / reading.host_norm * math.sqrt(sizes[0] / sizes[1])
    assert reading.ratio == pytest.approx(expected)
    assert (reading.vanishing, reading.exploding) == (False, False)
    assert slots.read_gradient_health(slot) is None


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_norms_are_those_before_the_scalers_factor(
    hosts: Any, fused: bool, grow: Any
) -> None:
    """A fused optimizer takes the factor out itself, after the hooks have run."""
    host = hosts["mlp"]
    model, slots = attach(host)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    slots.bind(optimizer)
    slot = slots[host.targets[0]]
    grow(slot, host.blueprint, SeedStage.TRAINING)
    model.dropout.p = 0.0
    learn(model, host, 0)
    own, seed = norm(slots.host_parameters()), norm(slot.living.parameters())
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    learn(model, host, 0, scale=float(scaler.scale(torch.ones(()))))
    scaler.step(optimizer)
    reading = slots.read_gradient_health(slot)
    assert reading.host_norm == pytest.approx(own, rel=1e-5)
    assert reading.seed_norm == pytest.approx(seed, rel=1e-5)


def test_a_seed_without_parameters_has_ratio_zero(host: Any, grow: Any) -> None:
    model, slots = attach(host)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    slots.bind(optimizer)
    slot = slots[host.targets[0]]
    grow(slot, "noop", SeedStage.TRAINING)
    learn(model, host, 0)
    slots.clip_grad_norm_(1.0)
    optimizer.step()
    reading = slots.read_gradient_health(slot)
    assert reading.ratio == 0.0
    assert reading.seed_norm == 0.0
    assert reading.vanishing


def test_a_nonfinite_gradient_of_a_seed_that_is_not_isolated_is_reported(
    hosts: Any, grow: Any, test_blueprints: None
) -> None:
    host = hosts["mlp"]
    model, slots = attach(host)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    slots.bind(optimizer)
    slot = slots[host.targets[0]]
    grow(slot, "nan_gradient", SeedStage.PROBATIONARY)
    learn(model, host, 0)
    optimizer.step()
    reading = slots.read_gradient_health(slot)
    assert reading.ratio is None
    assert reading.exploding
    assert math.isnan(reading.seed_norm)


@pytest.mark.parametrize("operator", ["add", "gate"])
def test_steps_with_nonfinite_gradients_of_an_isolated_seed_are_counted_and_those_zeroed(
    host: Any, operator: str, grow: Any, randomise: Any, test_blueprints: None
) -> None:
    model, slots = attach(host, blend_operator=operator)
    slot = slots[host.targets[0]]
    grow(slot, "nan_gradient", SeedStage.TRAINING)
    randomise(slot.living)
    broken = 4  # weight and bias of both linear maps; the gate's gradient is finite
    for step in range(1, 4):
        model.zero_grad()
        for micro_batch in range(step):
            learn(model, host, micro_batch)
        assert int(slot.nonfinite_steps) == step - 1
        slots.tick()
        assert int(slot.nonfinite_steps) == step
        gradients = [parameter.grad for parameter in slot.living.parameters()]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert sum(int(gradient.any()) for gradient in gradients) == len(gradients) - broken
    model.zero_grad()
    slots.tick()
    assert int(slot.nonfinite_steps) == 3, "nothing was broken since"
    learn(model, host, 4)
    slot.tick(learned=False)
    slots.tick()
    assert int(slot.nonfinite_steps) == 3, "a step that is not made is none"
    slot.prune()
    assert int(slot.nonfinite_steps) == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_value_that_is_not_finite_makes_a_whole_gradient_zero(
    hosts: Any, value: float, grow: Any, randomise: Any
) -> None:
    host = hosts["mlp"]
    model, slots = attach(host)
    slot = slots[host.targets[0]]
    grow(slot, "mlp", SeedStage.TRAINING)
    randomise(slot.living)
    weight = max(slot.living.parameters(), key=torch.numel)
    unit = torch.zeros_like(weight)
    unit.view(-1)[3] = 1.0
    weight.register_hook(lambda gradient: torch.where(unit > 0.0, value, gradient))
    learn(model, host, 0)
    assert not weight.grad.any()
    slots.tick()
    assert int(slot.nonfinite_steps) == 1
    others = [p.grad for p in slot.living.parameters() if p is not weight]
    assert all(bool(gradient.any()) for gradient in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("others", ["small", "largest", "equal"])
def test_a_gradient_is_looked_at_on_a_cpu_as_it_is_on_a_gpu(
    value: float, others: str, dtype: torch.dtype
) -> None:
    largest = 6e4 if dtype == torch.float16 else 3e38
    gradient = {
        "small": torch.randn(3, 5, dtype=dtype),
        "largest": torch.tensor([largest, -largest, largest], dtype=dtype),  # its norm is infinite
        "equal": torch.full((4,), value, dtype=dtype),
    }[others]
    gradient.view(-1)[1] = value
    was_finite = math.isfinite(value)
    for look in (arrive_under_a_guard, zero_if_broken):
        looked_at, broken = gradient.clone(), torch.zeros((), dtype=torch.bool)
        look(looked_at, lambda broken=broken: broken)
        assert bool(broken) is not was_finite
        assert torch.equal(looked_at, gradient if was_finite else torch.zeros_like(gradient))


def arrive_under_a_guard(gradient: Tensor, told: Callable[[], Tensor]) -> None:
    """Let a gradient come to a guarded parameter, and become what is there then."""
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(torch.zeros_like(gradient))
    guard = GradientGuard(holder, told)
    holder.weight.backward(gradient)
    guard.remove()
    gradient.copy_(holder.weight.grad)


def test_a_compiled_guard_reads_no_value() -> None:
    known = torch.compile(gradient_guard._is_known_finite, backend="eager", fullgraph=True)
    assert not known(torch.ones(3))


def test_a_sparse_gradient_is_looked_at_too() -> None:
    for value, was_finite in ((1.0, True), (math.nan, False)):
        rows = torch.nn.Embedding(5, 3, sparse=True)
        (rows(torch.tensor([1, 1, 4])) * torch.tensor([[1.0], [2.0], [value]])).sum().backward()
        given, broken = rows.weight.grad.to_dense(), torch.zeros((), dtype=torch.bool)
        zero_if_broken(rows.weight.grad, lambda broken=broken: broken)
        assert bool(broken) is not was_finite
        expected = given if was_finite else torch.zeros_like(given)
        assert torch.equal(rows.weight.grad.to_dense(), expected)


def test_a_norm_that_clipping_left_in_a_step_between_is_no_later_steps(
    hosts: Any, grow: Any
) -> None:
    host = hosts["mlp"]
    model, slots = attach(host)
    slots.gradient_health = GradientHealth(interval_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    slots.bind(optimizer)
    slot = slots[host.targets[0]]
    grow(slot, "mlp", SeedStage.TRAINING)
    expected = []
    for index in range(3):
        optimizer.zero_grad()
        learn(model, host, index)
        if index % 2 == 0:
            expected.append(norm(slots.host_parameters()))
        else:
            slots.clip_grad_norm_(1.0)
        optimizer.step()
    reading = slots.read_gradient_health(slot)
    assert reading.host_norm == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_clipping_is_per_owner(host: Any, grow: Any, randomise: Any) -> None:
    model, slots = attach(host)
    for path, stage in zip(host.targets, (SeedStage.TRAINING, SeedStage.FOSSILIZED), strict=True):
        grow(slots[path], host.blueprint, stage)
        randomise(slots[path].branches)
    learn(model, host, 0)
    seed = set(slots[host.targets[0]].living.parameters())
    own = [parameter for parameter in model.parameters() if parameter not in seed]
    before = {p: p.grad.clone() for p in model.parameters()}
    norms = norm(own), norm(seed)
    limit = 0.5 * min(norms)

    returned = slots.clip_grad_norm_(limit)

    assert float(returned) == pytest.approx(norms[0], rel=1e-5)
    for owner, total in ((own, norms[0]), (seed, norms[1])):
        assert norm(owner) == pytest.approx(limit, rel=1e-4)
        for parameter in owner:
            expected = before[parameter] * (limit / (total + 1e-6))
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-8)
    slots.clip_grad_norm_(10 * limit)
    assert norm(own) == pytest.approx(limit, rel=1e-4)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm must be above 0"):
            slots.clip_grad_norm_(bad)


def test_few_steps_are_sampled_by_default_and_some_after_each_decision(
    hosts: Any, grow: Any
) -> None:
    host = hosts["mlp"]
    model, slots = attach(host)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    slots.bind(optimizer)
    slot = slots[host.targets[0]]
    grow(slot, "mlp", SeedStage.TRAINING)
    for sampled in ((0, 10, 100), (0, 10)):
        norms: list[float] = []
        for step in range(sampled[-1] + 3):
            learn(model, host, step)
            if step in sampled:
                norms.append(norm(slots.host_parameters()))
            optimizer.step()
            optimizer.zero_grad()
        reading = slots.read_gradient_health(slot)
        assert reading.host_norm == pytest.approx(sum(norms) / len(sampled), rel=1e-5)
        slots.end_epoch()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GradientHealth(interval_steps=0)


def test_frozen_parameters_of_the_host_do_not_count_in_the_ratio(hosts: Any, grow: Any) -> None:
    """As its norm they cannot."""

    def ratio(frozen: int) -> float:
        case = hosts["mlp"]
        model = case.build()
        model.embedding = nn.Parameter(torch.zeros(frozen), requires_grad=False)
        slots = esper.attach(model, case.targets, example=case.inputs())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        slots.bind(optimizer)
        slot = slots[case.targets[0]]
        grow(slot, case.blueprint, SeedStage.TRAINING)
        torch.manual_seed(1)
        learn(model, case, 0)
        optimizer.step()
        reading = slots.read_gradient_health(slot)
        assert reading is not None
        assert reading.ratio is not None
        return reading.ratio

    assert ratio(100_000) == ratio(1)


def test_sparse_gradients_of_the_host_are_measured(grow: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 6, sparse=True), nn.Linear(6, 6))
    tokens = torch.tensor([[1, 2, 1], [3, 1, 2]])
    slots = esper.attach(model, "1", example=tokens)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    slots.bind(optimizer)
    grow(slots["1"], "mlp", SeedStage.TRAINING)
    model(tokens).square().sum().backward()
    dense = [parameter.grad.to_dense() for parameter in slots.host_parameters()]
    optimizer.step()
    reading = slots.read_gradient_health(slots["1"])
    assert reading is not None
    assert reading.host_norm == pytest.approx(
        float(torch.cat([gradient.flatten() for gradient in dense]).norm())
    )

"""What a run has cost: counted once per structure, yet equal to counting everything."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import bilinear, scaled_dot_product_attention

import esper
from esper.lifecycle.actions import Germinate
from esper.lifecycle.stages import SeedStage
from esper.training.checkpoints import Checkpoints
from esper.training.flop_formulas import flop_counter
from esper.training.loss_scaler import LossScaler
from esper.training.run_cost import CostMeter
from growth_problem import Problem, make_problem

EPOCHS = 30


def policy() -> esper.PlannedPolicy:
    """One seed that is committed, one that is pruned, one that lives at the end."""
    plan = {
        2: [Germinate(slot="embed", blueprint="mlp")],
        20: [Germinate(slot="embed", blueprint="noop")],
        29: [Germinate(slot="embed", blueprint="mlp")],
    }
    return esper.PlannedPolicy(plan, patience_epochs=4)


def train(problem: Problem, *, count_flops: bool = False) -> list[esper.training.EpochReport]:
    return problem.trainer(policy(), EPOCHS, count_flops=count_flops).fit()


def test_counting_by_structure_equals_counting_every_operation() -> None:
    counted, watched = make_problem(), make_problem()
    reports = train(counted, count_flops=True)
    with flop_counter() as everything:
        train(watched)
    cost = reports[-1].cost
    for part in (cost.training, cost.evaluation, cost.decision):
        assert part.flops
    assert cost.total.flops == everything.get_total_flops()
    with flop_counter() as one_evaluation:
        counted.held_out()  # with the seeds that were committed in the end
    assert cost.evaluation.flops is not None
    assert cost.evaluation.flops < EPOCHS * one_evaluation.get_total_flops()
    stages = {event.to_stage for event in counted.recorder.of(esper.lifecycle.events.StageChanged)}
    assert {SeedStage.FOSSILIZED, SeedStage.PRUNED} <= stages, "the run must meet both ends"


def test_counting_changes_no_bit() -> None:
    counted, plain = make_problem(), make_problem()
    with_counts = train(counted, count_flops=True)
    without = train(plain)
    assert [report.train_loss for report in with_counts] == [r.train_loss for r in without]
    assert without[-1].cost.total.flops is None
    for one, other in zip(counted.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_asking_which_blueprints_fit_costs_nothing(problem: Problem) -> None:
    """That is a forward of each on the meta device, remembered for an hour."""
    growth = esper.Growth(
        problem.slots, problem.optimizer, policy=esper.PlannedPolicy({}), count_flops=True
    )
    growth.after_epoch(lambda: 1.0)
    assert growth.meter.cost.decision.flops == 0


@pytest.mark.parametrize("reads_losses", [False, True])
def test_flops_are_published_with_the_metrics(problem: Problem, *, reads_losses: bool) -> None:
    """Plain evaluations among them only where the policy decides by them."""
    decides = policy()
    decides.reads_losses = reads_losses
    reports = problem.trainer(decides, EPOCHS, count_flops=True).fit()
    told = [metrics["flops"] for _, _, metrics in problem.recorder.metrics if "flops" in metrics]
    costs = [report.cost for report in reports]
    assert told == [
        (cost.total if reads_losses else cost.training + cost.decision).flops for cost in costs
    ]
    assert told == sorted(told)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_on_a_cpu_costs_its_matrix_products(heads: int) -> None:
    shape = (2, heads, 16, 8)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    one_product = 2 * 2 * heads * 16 * 16 * 8
    with flop_counter() as forward:
        output = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert forward.get_total_flops() == 2 * one_product
    with flop_counter() as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 5 * one_product


def operations(run: Callable[[], Any]) -> int:
    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("layer", "shape", "products"),
    [
        (partial(nn.Conv1d, 4, 6, 3), (2, 4, 9), 2 * 7 * 3 * 4 * 6),
        (partial(nn.Conv2d, 4, 6, 3, groups=2), (2, 4, 5, 7), 2 * 3 * 5 * 9 * 2 * 6),
        (partial(nn.Conv2d, 4, 8, 3, groups=4, stride=2), (2, 4, 5, 7), 2 * 2 * 3 * 9 * 8),
        (partial(nn.Conv3d, 4, 4, 2, groups=4, bias=False), (3, 4, 3, 4, 5), 3 * 2 * 3 * 4 * 8 * 4),
        (partial(nn.ConvTranspose1d, 4, 6, 3), (2, 4, 9), 2 * 9 * 3 * 4 * 6),
        (partial(nn.ConvTranspose2d, 4, 6, 3, groups=2), (2, 4, 5, 7), 2 * 5 * 7 * 9 * 2 * 6),
        (partial(nn.ConvTranspose3d, 4, 4, 2, groups=4), (3, 4, 2, 3, 4), 3 * 2 * 3 * 4 * 8 * 4),
    ],
    ids=str,
)
def test_a_convolution_costs_each_gradient_what_it_costs_itself(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], products: int
) -> None:
    """A channel meets those of its group alone."""
    convolution, inputs = layer(), torch.randn(shape, requires_grad=True)
    assert operations(lambda: convolution(inputs)) == 2 * products
    assert operations(convolution(inputs).sum().backward) == 2 * 2 * products
    assert operations(convolution(inputs.detach()).sum().backward) == 2 * products
    convolution.requires_grad_(requires_grad=False)
    assert operations(convolution(inputs).sum().backward) == 2 * products


def grouped(*operands: Tensor) -> Tensor:
    """Return three products; of a matrix, columns 0 to 15 belong to the first, and so on."""
    ends = torch.tensor([16, 32, 48], dtype=torch.int32)
    divided = any(operand.ndim == 2 for operand in operands)
    return nn.functional.grouped_mm(*operands, offs=ends if divided else None)


@pytest.mark.parametrize(
    ("compute", "shapes", "products", "num_gradients"),
    [
        (torch.mv, [(6, 4), (4,)], 6 * 4, 1),  # the matrix's is an elementwise product
        (torch.matmul, [(2, 3, 4), (4,)], 2 * 3 * 4, 1),
        (torch.addmv, [(6,), (6, 4), (4,)], 6 * 4, 1),
        (lambda matrix, vector: torch.zeros(6).addmv_(matrix, vector), [(6, 4), (4,)], 6 * 4, 1),
        (lambda a, b: torch.zeros(3, 5).addmm_(a, b), [(3, 4), (4, 5)], 3 * 4 * 5, 2),
        (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5, 2),
        (lambda a, b: torch.zeros(3, 5).addbmm_(a, b), [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5, 2),
        (lambda a, b: a.new_zeros(2, 3, 5).baddbmm_(a, b), [(2, 3, 4), (2, 4, 5)], 120, 2),
        (bilinear, [(7, 4), (7, 5), (3, 4, 5)], 7 * 3 * 4 * 5, 3),
        (grouped, [(48, 8), (3, 8, 16)], 48 * 8 * 16, 2),
        (grouped, [(3, 5, 8), (8, 48)], 5 * 8 * 48, 2),
        (grouped, [(5, 48), (48, 8)], 5 * 48 * 8, 2),
        (grouped, [(3, 5, 8), (3, 8, 16)], 3 * 5 * 8 * 16, 2),
    ],
)
def test_products_that_torch_counts_as_none_cost_what_they_are(
    compute: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    products: int,
    num_gradients: int,
) -> None:
    operands = [torch.randn(shape, requires_grad=True) for shape in shapes]
    assert operations(lambda: compute(*operands)) == 2 * products
    output = compute(*operands)
    gradient = torch.randn_like(output)
    assert operations(lambda: output.backward(gradient)) == num_gradients * 2 * products


@pytest.mark.parametrize("layers", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_a_recurrent_layer_on_a_cpu_costs_its_matrix_products(layers: dict[str, Any]) -> None:
    lstm, sequences = nn.LSTM(3, 5, **layers), torch.randn(7, 2, 3, requires_grad=True)
    products = 2 * 7 * 2 * sum(p.numel() for p in lstm.parameters() if p.ndim == 2)
    assert operations(lambda: lstm(sequences)) == products
    total = lstm(sequences)[0].sum()
    assert operations(total.backward) == 2 * products


def test_the_kernel_of_a_gpu_for_recurrent_layers_costs_as_much() -> None:
    lstm = nn.LSTM(3, 5, num_layers=2)
    counter = flop_counter()
    shapes = [tuple(parameter.shape) for parameter in lstm.parameters()]
    for name, times in (("_cudnn_rnn", 1), ("_cudnn_rnn_backward", 2)):
        formula = counter.flop_registry[getattr(torch.ops.aten, name)]
        found = formula(torch.empty(7, 2, 3), [torch.empty(shape) for shape in shapes])
        assert found == times * operations(lambda: lstm(torch.randn(7, 2, 3)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_evaluating_a_transformer_layer_costs_what_its_forward_in_training_does() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x, lengths = torch.randn(3, 5, 8), (5, 2, 4)
    padding = torch.tensor([[place >= length for place in range(5)] for length in lengths])
    alone = [operations(lambda n=n: layer(x[:1, :n])) for n in lengths]
    trained = [operations(lambda: layer(x)), operations(lambda: attention(x, x, x))]
    layer.eval()
    attention.eval()
    stack = nn.TransformerEncoder(layer, 1)
    with torch.inference_mode():
        evaluated = [operations(lambda: layer(x)), operations(lambda: attention(x, x, x))]
        nested = operations(lambda: stack(x, src_key_padding_mask=padding))
    assert evaluated == trained
    assert nested == sum(alone)


def test_padding_costs_a_transformer_layer_nothing_with_as_many_tokens_as_features() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, padding = torch.randn(3, 8, 8), torch.zeros(3, 8, dtype=torch.bool)
    trained = operations(lambda: layer(x, src_key_padding_mask=padding))
    layer.eval()
    with torch.inference_mode():
        assert operations(lambda: layer(x, src_key_padding_mask=padding)) == trained


def ticking(seconds: list[float]) -> Callable[[], float]:
    times: Iterator[float] = iter(seconds)
    return lambda: next(times)


def test_seconds_are_kept_apart() -> None:
    slots = esper.attach(nn.Sequential(nn.Linear(2, 2)), ["0"], example=torch.zeros(1, 2))
    meter = CostMeter(
        slots, count_flops=False, clock=ticking([10.0, 11.0, 14.0, 18.0, 19.0, 21.0, 50.0, 58.0])
    )
    with meter.decision():
        pass  # before the run has begun no clock is asked
    meter.start()
    with meter.decision(), meter.evaluation():
        pass
    meter.stop()
    with meter.decision():
        pass
    meter.start()  # the 29 seconds before it were the caller's own
    meter.stop()
    assert meter.cost.training.seconds == 1.0 + 2.0 + 8.0
    assert meter.cost.decision.seconds == 3.0 + 1.0
    assert meter.cost.evaluation.seconds == 4.0


def test_no_second_is_lost_where_the_meter_is_read_or_started_again() -> None:
    slots = esper.attach(nn.Sequential(nn.Linear(2, 2)), ["0"], example=torch.zeros(1, 2))
    meter = CostMeter(slots, count_flops=False, clock=ticking([10.0, 13.0, 17.0]))
    meter.start()
    kept = meter.state_dict()
    assert kept["training"]["seconds"] == 3.0
    meter.start()
    meter.stop()
    assert meter.cost.training.seconds == 3.0 + 4.0
    resumed = CostMeter(slots, count_flops=False, clock=ticking([50.0, 52.0]))
    resumed.load_state_dict(kept)
    resumed.start()
    resumed.stop()
    assert resumed.cost.training.seconds == 3.0 + 2.0


class Hours:
    """Batches of an hour each, and a sink that takes a hundred to be flushed."""

    def __init__(self, batches: list[Any]) -> None:
        self.now = 0.0
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self.now += 1.0
            yield batch

    def publish(self, record: Any) -> None: ...

    def measure(self, epoch: int, step: int, metrics: Any) -> None: ...

    def flush(self) -> None:
        self.now += 100.0


@pytest.mark.parametrize("interval_steps", [5, None])
def test_keeping_a_run_is_no_cost_of_it(
    interval_steps: int | None, problem: Problem, tmp_path: Path
) -> None:
    num_batches = len(problem.batches)
    hours = Hours(problem.batches)
    problem.batches = hours
    trainer = problem.trainer(policy(), epochs=3)
    growth = trainer.growth
    growth.meter = CostMeter(growth.slots, count_flops=False, clock=lambda: hours.now)
    growth.sinks.append(hours)
    trainer.keeper = Checkpoints(tmp_path, interval_steps=interval_steps)
    for report in trainer.run():
        assert report.cost.training.seconds == report.epoch * num_batches
        hours.now += 1000.0  # the caller's own
        with growth.held_up():
            hours.now += 1000.0


def test_what_goes_by_after_a_run_was_broken_off_is_no_cost_of_it(problem: Problem) -> None:
    hours = Hours(problem.batches)
    problem.batches = hours
    trainer = problem.trainer(policy(), epochs=1)
    meter = CostMeter(problem.slots, count_flops=False, clock=lambda: hours.now)
    trainer.growth.meter = meter
    stops = trainer.stops()
    next(stops)
    stops.close()
    hours.now += 1000.0
    meter.stop()
    assert meter.cost.total.seconds == len(hours._batches)


class MatrixSGD(torch.optim.SGD):
    """Makes a matrix product per step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(1e-6 * parameter.grad @ parameter.grad.T)


def test_a_step_of_the_optimizer_that_is_skipped_costs_its_passes_only() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    slots = esper.attach(model, ["0"], example=torch.zeros(1, 8))
    optimizer = MatrixSGD(model.parameters(), lr=0.1)
    growth = esper.Growth(slots, optimizer, policy=policy(), count_flops=True)
    scaler, product = LossScaler(torch.device("cpu"), enabled=True), 2 * 8 * 8 * 8
    expected = 0
    # Of a known size or not, a step is skipped or made.
    for rows, factor in ((1, math.inf), (1, 1.0), (1, 1.0), (1, math.inf), (1, 1.0), (2, math.inf)):
        inputs = torch.ones(rows, 8)
        with growth.meter.step([(inputs,)]):
            scaler.scale(model(inputs).sum() * factor).backward()
            scaler.step(optimizer)
        optimizer.zero_grad()
        growth.after_step()
        forward_and_weight_gradient = 2 * (2 * rows * 8 * 8)
        expected += forward_and_weight_gradient + product * (factor == 1.0)
        assert growth.meter.cost.training.flops == expected


def test_a_batch_of_another_size_is_counted_by_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    slots = esper.attach(model, ["0"], example=torch.zeros(1, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slots.bind(optimizer)
    meter = CostMeter(slots, count_flops=True)
    for rows in (8, 8, 3, 8):
        inputs = torch.randn(rows, 2)
        with meter.step([(inputs,)]):
            model(inputs).sum().backward()
            optimizer.step()
    forward_and_weight_gradient = 2 * (2 * 2 * 2)
    assert meter.cost.training.flops == (8 + 8 + 3 + 8) * forward_and_weight_gradient


def test_what_is_counted_apart_inside_a_step_is_none_of_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    slots = esper.attach(model, ["0"], example=torch.zeros(1, 2))
    meter, inputs = CostMeter(slots, count_flops=True), torch.randn(4, 2)
    forward = 2 * 4 * 2 * 2
    for made in (1, 2, 3):
        with meter.step([(inputs,)]):
            with meter.decision():
                model(inputs)
                with meter.evaluation():
                    model(inputs)
            model(inputs).sum().backward()
        assert meter.cost.training.flops == made * 2 * forward
        assert meter.cost.decision.flops == made * forward
        assert meter.cost.evaluation.flops == made * forward

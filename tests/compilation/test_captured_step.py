"""Replayed as CUDA graphs a step is the eager step; what changes, or cannot be, runs eagerly."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import esper
from compiled_run import WIDTH, Host, Run
from esper import SlotConfig
from esper.compilation import CapturedStep, CompiledHost
from esper.compilation.captured_step import WARM_UP_STEPS
from esper.compilation.placements import Placements
from esper.lifecycle.events import CompileFailed, StepCaptured
from esper.policies.named import named_policy
from esper.training.growth import Growth
from esper.training.trainer import Trainer
from esper.training.trainer_config import TrainerConfig
from waiting import waiting_raises


class Tokens(nn.Module):
    """A small attention block with dropout."""

    def __init__(self, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.block = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=dropout, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(16, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens))).mean(dim=1)


class Counting(Tokens):
    """Reads a value from the device in each forward."""

    def forward(self, tokens: Tensor) -> Tensor:
        assert float(tokens.abs().sum()) > 0.0
        return super().forward(tokens)


class Swapping(Tokens):
    """Swaps two buffers in each forward, and adds the first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(()))
        self.register_buffer("other", torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        self.one, self.other = self.other, self.one
        return super().forward(tokens) + self.one


HOSTS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...], str]] = {
    "cnn": (Host, "first", (3, 8, 8), "conv_light"),
    "tokens": (Tokens, "block", (6, 3), "mlp"),
}


class Loop:
    """A growing host on a GPU, its passes made as they are or captured."""

    def __init__(
        self,
        name: str = "tokens",
        *,
        captured: bool,
        host: Callable[[], nn.Module] | None = None,
        compiled: bool = False,
    ) -> None:
        factory, self.path, self.shape, self.blueprint = HOSTS[name]
        torch.manual_seed(0)
        self.host = (host or factory)().cuda()
        config = SlotConfig(max_committed=2, embargo_epochs=0)
        example = torch.zeros(4, *self.shape, device="cuda") + 0.1
        self.slots = esper.attach(self.host, [self.path], example=example, config=config)
        self.slot = self.slots[self.path]
        self.optimizer = torch.optim.SGD(self.host.parameters(), lr=0.05, momentum=0.9)
        self.slots.bind(self.optimizer)
        self.compiled = CompiledHost(self.slots) if compiled else None
        self.captured = (
            CapturedStep(self.slots, self.loss, compiled=self.compiled) if captured else None
        )
        self.events: list[Any] = []
        self.losses: list[Tensor] = []
        self.number = 0
        torch.cuda.manual_seed(1)
        self.random_state = torch.cuda.get_rng_state()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(self.host(inputs), targets)

    def batch(self, samples: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.number)
        inputs = torch.randn(samples, *self.shape, generator=generator).cuda()
        return inputs, inputs.flatten(1)[:, :2]

    def passes(self, samples: int) -> Tensor:
        batch = self.batch(samples)
        if self.captured is not None:
            return self.captured(*batch)
        loss = self.loss(*batch)
        loss.backward()
        return loss.detach()

    def steps(self, number: int = WARM_UP_STEPS + 3, *, samples: int = 4, batches: int = 1) -> None:
        torch.cuda.set_rng_state(self.random_state)
        for _ in range(number):
            for _ in range(batches):
                self.losses.append(self.passes(samples))
                self.number += 1
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.slots.tick()
            if self.compiled is not None and self.compiled.due():
                self.events += self.compiled.prepare()
            if self.captured is not None:
                self.events += self.captured.take_events()
        self.random_state = torch.cuda.get_rng_state()

    @property
    def graphs(self) -> int:
        """How many were captured."""
        return len([event for event in self.events if isinstance(event, StepCaptured)])

    def live(self) -> Iterator[str]:
        """Take a seed through its life, and yield where steps are to be made."""
        yield "dormant"
        self.slot.germinate(self.blueprint)
        self.slot.advance(force=True)
        yield "training"
        self.slot.advance(force=True)
        self.slot.set_alpha_target(1.0, 20)
        yield "blended"
        self.slot.advance(force=True)
        yield "shadowing"
        self.slot.advance(force=True)
        yield "on probation"
        self.slot.commit()
        yield "committed"

    def state(self) -> dict[str, Tensor]:
        return {**self.host.state_dict(), "losses": torch.stack(self.losses)}


class LearnedLoss(Loop):
    """Its loss has a parameter of its own."""

    def __init__(self, *, captured: bool) -> None:
        super().__init__(captured=captured)
        self.scale = nn.Parameter(torch.ones((), device="cuda"))
        self.optimizer.add_param_group({"params": [self.scale]})

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(self.scale * self.host(inputs), targets)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "scale": self.scale}


def assert_same(one: Loop, other: Loop) -> None:
    torch.cuda.synchronize()
    expected = other.state()
    for name, value in one.state().items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Kernels that round in the same way each time."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("deterministic")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
class TestOnAGPU:
    @pytest.mark.parametrize("name", HOSTS)
    def test_a_life_of_replayed_steps_is_the_eager_one_to_the_bit(self, name: str) -> None:
        eager, captured = Loop(name, captured=False), Loop(name, captured=True)
        for stage in zip(eager.live(), captured.live(), strict=True):
            before = captured.graphs
            for loop in (eager, captured):
                loop.steps()
            assert captured.graphs == before + 1, stage
            assert_same(captured, eager)

    def test_a_ramp_of_alpha_replays_one_graph(self) -> None:
        loop = Loop(captured=True)
        for stage in loop.live():
            if stage == "blended":
                loop.steps(WARM_UP_STEPS + 1)
                before, alphas = loop.graphs, []
                for _ in range(10):
                    loop.steps(1)
                    alphas.append(loop.slot.alpha)
                assert loop.graphs == before == 1
                assert alphas == sorted(set(alphas))
                break

    def test_another_shape_is_eager_and_the_first_is_replayed_when_it_returns(self) -> None:
        eager, captured = Loop(captured=False), Loop(captured=True)
        for loop in (eager, captured):
            for samples in (4, 3, 4, 3, 4, 5):
                loop.steps(WARM_UP_STEPS + 2, samples=samples)
        assert captured.graphs == 3
        assert_same(captured, eager)

    def test_gradients_of_several_batches_add_up(self) -> None:
        eager, captured = Loop(captured=False), Loop(captured=True)
        for loop in (eager, captured):
            loop.steps(batches=2)
            loop.steps(batches=3)
        assert captured.graphs == 1
        assert_same(captured, eager)

    def test_a_parameter_that_learns_from_now_on_begins_a_new_window(self) -> None:
        eager, captured = Loop(captured=False), Loop(captured=True)
        for loop in (eager, captured):
            loop.host.embed.requires_grad_(False)
            loop.steps()
            loop.host.embed.requires_grad_(True)
            loop.steps()
        assert captured.graphs == 2
        assert_same(captured, eager)

    def test_a_gradient_that_is_not_finite_is_zeroed_and_counted_in_a_replay_too(self) -> None:
        loop = Loop(captured=True)
        loop.slot.germinate("mlp")
        loop.slot.advance(force=True)
        loop.steps()
        assert loop.graphs == 1
        with torch.no_grad():
            next(iter(loop.slot.living.parameters())).fill_(float("nan"))
        loop.passes(4)
        gradients = [p.grad for p in loop.host.parameters() if p.grad is not None]
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        loop.optimizer.step()
        loop.slots.tick()
        assert int(loop.slot.nonfinite_steps) == 1

    def test_a_host_that_reads_a_value_runs_eagerly_and_training_goes_on(self) -> None:
        eager = Loop(host=Counting, captured=False)
        captured = Loop(host=Counting, captured=True)
        for loop in (eager, captured):
            loop.steps(10)
        (failure,) = captured.events
        assert isinstance(failure, CompileFailed)
        assert failure.place == "the step"
        assert_same(captured, eager)
        stream = torch.cuda.current_stream()
        assert stream == torch.cuda.default_stream()
        after = Loop(captured=True)  # what is captured next in this process
        after.steps()
        assert after.graphs == 1

    def test_a_seed_that_draws_behind_the_host_is_not_captured(self) -> None:
        loop = Loop(captured=True)
        loop.slot.germinate("block", source="own")  # a copy of what has dropout
        loop.slot.advance(force=True)
        assert loop.slot.draws_random_numbers
        loop.steps(10)
        assert loop.events == []
        loop.slot.advance(force=True)
        loop.steps()
        assert loop.graphs == 1

    def test_what_is_compiled_is_captured_once_it_is_ready(self) -> None:
        plain, captured = Loop("cnn", captured=False), Loop("cnn", captured=True, compiled=True)
        for loop in (plain, captured):
            for _stage in loop.live():
                loop.steps(8)
        assert not [event for event in captured.events if isinstance(event, CompileFailed)]
        assert captured.graphs >= 5
        torch.testing.assert_close(captured.state(), plain.state(), rtol=1e-3, atol=1e-4)

    def test_a_replay_does_not_wait_for_the_gpu(self) -> None:
        loop = Loop(captured=True)
        loop.slot.germinate("mlp")
        loop.slot.advance(force=True)
        loop.steps()
        batch = loop.batch(4)
        with waiting_raises():
            loop.captured(*batch)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            loop.slots.tick()

    def test_a_batch_that_requires_a_gradient_gets_it_in_eager_steps_and_that_is_told(self) -> None:
        loop = Loop(captured=True)
        inputs, targets = loop.batch(4)
        inputs.requires_grad_()
        for _ in range(WARM_UP_STEPS + 3):
            inputs.grad = None
            loop.captured(inputs, targets)
            assert inputs.grad is not None
        (failure,) = loop.captured.take_events()
        assert isinstance(failure, CompileFailed)
        assert "a tensor in the batch requires a gradient" in failure.error

    def test_a_batch_of_which_the_loss_wants_a_gradient_stays_in_eager_steps_too(self) -> None:
        loop = Loop(captured=True)
        loop.loss = lambda inputs, _: loop.host(inputs.requires_grad_()).mean()
        loop.captured = CapturedStep(loop.slots, loop.loss)
        loop.steps()
        (failure,) = loop.events
        assert "a tensor in the batch requires a gradient" in failure.error

    def test_a_batch_elsewhere_is_refused(self) -> None:
        loop = Loop(captured=True)
        with pytest.raises(ValueError, match=r"on cpu, and the model on cuda:0; move the batch"):
            loop.captured(torch.zeros(4, 6, 3), torch.zeros(4, 2))

    def test_parameters_of_the_loss_learn_as_those_of_the_model(self) -> None:
        eager, captured = LearnedLoss(captured=False), LearnedLoss(captured=True)
        for loop in (eager, captured):
            loop.steps(WARM_UP_STEPS + 4)
            loop.steps(batches=2)
        assert captured.graphs == 1
        assert_same(captured, eager)

    @pytest.mark.parametrize("change", ["moved", "frozen"])
    def test_a_parameter_of_the_loss_that_moves_or_is_frozen_ends_its_replays(
        self, change: str
    ) -> None:
        eager, captured = LearnedLoss(captured=False), LearnedLoss(captured=True)
        for loop in (eager, captured):
            loop.steps()
            if change == "moved":
                loop.scale.data = loop.scale.data.clone()
            else:
                loop.scale.requires_grad_(False)
            loop.steps()
        (failure,) = (event for event in captured.events if isinstance(event, CompileFailed))
        assert "a parameter that is not the model's" in failure.error
        assert_same(captured, eager)

    @pytest.mark.parametrize("part", ["module", "parameter"])
    def test_what_is_put_in_anothers_place_learns(self, part: str) -> None:
        eager, captured = Loop(captured=False), Loop(captured=True)
        for loop in (eager, captured):
            loop.steps()
            if part == "module":
                torch.manual_seed(2)
                loop.host.head = nn.Linear(16, 2, device="cuda")
            else:
                loop.host.head.weight = nn.Parameter(loop.host.head.weight.detach())
            loop.optimizer.param_groups[0]["params"].append(loop.host.head.weight)
            loop.steps()
        assert captured.graphs == 2
        assert_same(captured, eager)

    def test_a_host_that_assigns_a_buffer_runs_eagerly_and_that_is_told(self) -> None:
        eager = Loop(host=Swapping, captured=False)
        captured = Loop(host=Swapping, captured=True)
        for loop in (eager, captured):
            loop.steps(2 * WARM_UP_STEPS + 5)
        assert [type(event) for event in captured.events] == [CompileFailed] * 2
        assert "the step has assigned another tensor" in captured.events[0].error
        assert_same(captured, eager)

    @pytest.mark.parametrize("precision", ["float32", "float16"])
    def test_the_trainer_trains_the_same(self, precision: str) -> None:
        weights = []
        for cuda_graphs in (False, True):
            loop = Loop(captured=False)
            loop.slots.unbind()
            optimizer = torch.optim.SGD(loop.host.parameters(), lr=0.05)
            policy = named_policy("none", random_seed=0)
            growth = Growth(loop.slots, optimizer, policy=policy)
            loop.slot.germinate("mlp")
            loop.slot.advance(force=True)
            batches = [loop.batch(4) for _ in range(17)]
            config = TrainerConfig(
                epochs=2,
                precision=precision,
                max_gradient_norm=1.0,
                accumulation_steps=2,
                cuda_graphs=cuda_graphs,
            )
            trainer = Trainer(growth, batches, loss=mse_loss, evaluate=lambda: 1.0, config=config)
            reports = trainer.fit()
            weights.append({**loop.host.state_dict(), "loss": torch.tensor(reports[-1].train_loss)})
        for name, value in weights[0].items():
            assert torch.equal(value, weights[1][name]), name


def other_buffer(host: Host) -> None:
    host.first.norm.running_mean = torch.zeros(WIDTH)


def other_parameter(host: Host) -> None:
    host.head.bias = nn.Parameter(torch.zeros(2))


def other_module(host: Host) -> None:
    host.head = nn.Linear(WIDTH, 2)


def parameter_in_the_same_memory(host: Host) -> None:
    host.head.bias = nn.Parameter(host.head.bias.detach())


def first_buffer(host: Host) -> None:
    host.first.register_buffer("late", torch.zeros(1))


def moved(host: Host) -> None:
    host.head.weight.data = host.head.weight.clone()


def frozen(host: Host) -> None:
    host.stem.requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [
        other_buffer,
        other_parameter,
        other_module,
        parameter_in_the_same_memory,
        first_buffer,
        moved,
        frozen,
    ],
)
def test_what_lies_elsewhere_is_another_or_learns_otherwise_is_another_placement(
    change: Callable[[Host], None],
) -> None:
    host = Host()
    placements, kept = Placements(host, max_placements=2), host.first.norm.running_mean
    first = placements.number()
    change(host)
    changed = placements.number()
    assert changed != first
    assert placements.number() == changed
    if change is other_buffer:
        host.first.norm.running_mean = kept
        assert placements.number() == first


def test_a_host_that_assigns_a_buffer_in_each_step_never_returns_to_a_placement() -> None:
    host = Host()
    placements = Placements(host, max_placements=2)
    kept, numbers = host.first.norm.running_mean, {placements.number()}
    for _ in range(20):
        other_buffer(host)
        numbers.add(placements.number())
    host.first.norm.running_mean = kept  # which is forgotten
    numbers.add(placements.number())
    assert len(numbers) == 22


def test_a_life_of_steps_leaves_everything_where_it_is() -> None:
    run = Run(compiled=False, isolation="shadowing")
    placements = Placements(run.host, max_placements=2)
    for _stage in run.live("first", "conv_light"):
        run.step()  # gives the optimizer, and gradients, their places
        before = placements.number()
        for _ in range(3):
            run.step()
            assert placements.number() == before


def test_a_model_that_is_not_on_a_gpu_is_refused_before_anything_trains() -> None:
    host = Tokens()
    slots = esper.attach(host, ["block"], example=torch.zeros(2, 6, 3) + 0.1)
    with pytest.raises(ValueError, match="on one CUDA device; this one is on cpu: leave cuda_gra"):
        CapturedStep(slots, lambda x, y: mse_loss(host(x), y))
    optimizer = torch.optim.SGD(host.parameters(), lr=0.1)
    growth = Growth(slots, optimizer, policy=named_policy("none", random_seed=0))
    config = TrainerConfig(epochs=1, cuda_graphs=True)
    with pytest.raises(ValueError, match="on one CUDA device"):
        Trainer(growth, [], loss=mse_loss, evaluate=lambda: 1.0, config=config)

"""What slots and seeds cost in a task's training step, against plain modules, on this machine."""

import copy
import itertools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from esper.compilation import CompiledHost
from esper.experiments.config import CompileConfig, RunConfig
from esper.experiments.run import build_setup, prepare
from esper.experiments.settings import SettingsError
from esper.experiments.timing import Ratio, ratio_over_blocks, timed_in_turn
from esper.lifecycle.events import CompileFailed
from esper.lifecycle.learning import Isolation
from esper.policies.named import NEVER
from esper.slots.attach import attach
from esper.slots.bake import bake
from esper.slots.counterfactual import call_model
from esper.slots.germination import GerminationError
from esper.slots.nested import to_device
from esper.slots.slot_set import SlotSet
from esper.training.flop_formulas import flop_counter
from esper.training.precision import autocast

NUM_BLOCKS = 10
_COMPILED_NUM_MAKES = 2
"""How often networks are made where that takes the compiler's time."""
_WARM_UP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a training step of one network costs.

    Attributes:
        network: What it is, in words.
        param_count: Of the network.
        flops: Floating-point operations of a step.
        milliseconds: Of a step, the median.
        against: The network of plain modules that it is held against; None for one of those.
        ratio: Of its time to that one's.
    """

    network: str
    param_count: int
    flops: int
    milliseconds: float
    against: str | None = None
    ratio: Ratio | None = None


class Bench:
    """A task's host on one of its batches, and networks made of it, to be timed in turn.

    Each network with slots is held against plain modules that compute as much: dormant slots
    against the host alone, a seed against the host with that seed baked in.

    Args:
        config: Of the run whose steps they are; compiled if it says so.
        slot: Where a seed stands; None takes the first of the task's.
        blueprint: Of the seed; None takes the first that the heuristic would try there, else the
            cheapest that fits.

    Raises:
        SettingsError, TaskDataError, ModuleNotFoundError: As `esper.experiments.prepare`.
        SettingsError: There is no such slot, or the seed cannot grow in it.

    Effects: those of `esper.experiments.prepare`.
    """

    def __init__(
        self, config: RunConfig, *, slot: str | None = None, blueprint: str | None = None
    ) -> None:
        self.config = config.model_copy(update={"policy": NEVER})
        self.setup = build_setup(config)
        self.device = torch.device(config.device)
        self.inputs, self.targets = to_device(next(iter(self.setup.batches)), self.device)
        self._trained()  # is told here if the settings cannot be carried out
        slots = self._slotted()
        self.slot = next(iter(slots)) if slot is None else slot
        if self.slot not in slots:
            raise SettingsError(f"slot {slot!r}: the task's are {', '.join(map(repr, slots))}")
        self.blueprint = self._fitting(slots, blueprint)
        self._committed()  # the same

    def measure(
        self, block_steps: int, *, tell: Callable[[str], None] = lambda _: None
    ) -> list[StepCost]:
        """Time steps of each network, one of each in turn, in ten blocks.

        All are made anew for each block, twice in all where they are compiled: where weights and
        features come to lie in memory decides over some percent of a step, for as long as they
        live.

        Args:
            block_steps: Of each network in a block.
            tell: Is told in words what is under way.

        Raises:
            SettingsError: Something does not compile.
        """
        networks, counts = self._networks(), self._counts()
        num_makes = _COMPILED_NUM_MAKES if self.config.compile.enabled else NUM_BLOCKS
        seconds: dict[str, list[list[float]]] = {name: [] for name in networks}
        for number in range(NUM_BLOCKS):
            if number % (NUM_BLOCKS // num_makes) == 0:
                made = _made(networks, backwards=number % 2 == 1, tell=tell)
            tell(f"block {number + 1} of {NUM_BLOCKS} …")
            steps = [made[name].step for name in networks]
            timed_in_turn(steps, _WARM_UP_STEPS)
            block = timed_in_turn(steps, block_steps, first_round=number * block_steps)
            for name, of_network in zip(networks, block, strict=True):
                seconds[name].append(of_network)
        return [
            StepCost(
                network=name,
                param_count=counts[name][0],
                flops=counts[name][1],
                milliseconds=1e3 * statistics.median(itertools.chain(*seconds[name])),
                against=network.against,
                ratio=None
                if network.against is None
                else ratio_over_blocks(seconds[name], seconds[network.against]),
            )
            for name, network in networks.items()
        ]

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _networks(self) -> dict[str, "_Network"]:
        host, baked = "host alone", "host with the seed baked in"
        networks = {
            host: _Network(make=self._plain),
            "the same again": _Network(make=self._plain, against=host),
            "dormant slots": _Network(make=lambda: _Slotted(self, self._slotted()), against=host),
            "dormant, esper's loop": _Network(make=self._trained, against=host),
            baked: _Network(make=self._baked),
        }
        live = self.config.slot.isolation is Isolation.NONE
        for stage in (*(_LIVE if live else _APART), _COMMITTED):
            make = partial(self._with_seed, stage)
            networks[f"seed {stage.name}"] = _Network(make=make, against=baked)
        return networks

    def _counts(self) -> dict[str, tuple[int, int]]:
        """Return each network's parameters and operations; what is compiled cannot be counted."""
        eager = copy.copy(self)
        eager.config = self.config.model_copy(update={"compile": CompileConfig()})
        networks = eager._networks()  # noqa: SLF001 – its own copy
        made = {name: network.make() for name, network in networks.items()}
        return {name: (_params(network), _flops(network)) for name, network in made.items()}

    def _host(self) -> nn.Module:
        return copy.deepcopy(self.setup.model).train()

    def _plain(self) -> "_Plain":
        return _Plain(self, self._host())

    def _slotted(self) -> SlotSet:
        setup, config = self.setup, self.config.slot
        return attach(self._host(), setup.targets, example=setup.example, config=config)

    def _trained(self) -> "_Trained":
        return _Trained(self, self._host())

    def _grown(self, stage: "_Stage") -> SlotSet:
        slots = self._slotted()
        slot = slots[self.slot]
        slot.germinate(self.blueprint)
        for _ in range(stage.advances):
            slot.advance(force=True)
        if stage.alpha is not None:
            slot.set_alpha_target(stage.alpha, 0)
        return slots

    def _with_seed(self, stage: "_Stage") -> "_Slotted":
        return _Slotted(self, self._grown(stage))

    def _committed(self) -> SlotSet:
        try:
            return self._grown(_COMMITTED)
        except (GerminationError, ValueError) as error:
            raise SettingsError(f"{self.blueprint} in slot {self.slot!r}: {error}") from error

    def _baked(self) -> "_Plain":
        return _Plain(self, bake(self._committed().model).train())

    def _fitting(self, slots: SlotSet, wanted: str | None) -> str:
        fitting = [choice.name for choice in slots.choices(self.slot)]
        if wanted is not None and wanted not in fitting:
            raise SettingsError(
                f"blueprint {wanted!r} does not fit slot {self.slot!r}; those that do: "
                f"{', '.join(fitting)}"
            )
        tried = [name for name in self.config.heuristic.blueprints or () if name in fitting]
        return wanted or next(iter([*tried, *fitting]))


class _Steps(Protocol):
    """A network that can be trained."""

    model: nn.Module

    def step(self) -> None:
        """Make a training step, and wait for the device."""


@dataclass(frozen=True, kw_only=True)
class _Network:
    """How a network is made, and the plain one that it is held against."""

    make: Callable[[], _Steps]
    against: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """How a seed stands when it is measured."""

    name: str
    advances: int
    """Stages after GERMINATED."""
    alpha: float | None = None
    """That it is set to; None leaves it."""


_LIVE = (_Stage(name="live", advances=2, alpha=1.0),)
_APART = (
    _Stage(name="behind the host", advances=1),
    _Stage(name="half blended in", advances=2, alpha=0.5),
)
_COMMITTED = _Stage(name="committed", advances=5)


class _Plain:
    """A network of plain modules, trained as anyone would write it."""

    def __init__(self, bench: Bench, model: nn.Module) -> None:
        self.model = model
        self._bench = bench
        self._forward = self._compiled() if bench.config.compile.enabled else model
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=bench.config.learning_rate,
            weight_decay=bench.config.weight_decay,
            fused=True,
        )

    def step(self) -> None:
        bench = self._bench
        self._before_step()
        self._loss().backward()
        max_norm = bench.config.trainer.max_gradient_norm
        if max_norm is not None:
            self._clip(max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._after_step()
        bench.wait()

    def _loss(self) -> Tensor:
        bench = self._bench
        with autocast(bench.device, bench.config.trainer.precision):
            return bench.setup.loss(call_model(self._forward, bench.inputs), bench.targets)

    def _compiled(self) -> nn.Module:
        """Return what is called instead of the model."""
        return cast("nn.Module", torch.compile(self.model, mode=self._bench.config.compile.mode))

    def _clip(self, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def _before_step(self) -> None:
        """Do what slots ask for."""

    def _after_step(self) -> None:
        """Do what slots ask for."""


class _Slotted(_Plain):
    """A network with slots, in the same loop."""

    def __init__(self, bench: Bench, slots: SlotSet) -> None:
        self._slots = slots
        self._compiled_host: CompiledHost | None = None
        super().__init__(bench, slots.model)
        slots.bind(self._optimizer)

    def _compiled(self) -> nn.Module:
        self._compiled_host = CompiledHost(self._slots, mode=self._bench.config.compile.mode)
        return self.model

    def _clip(self, max_norm: float) -> Tensor:
        return self._slots.clip_grad_norm_(max_norm)

    def _before_step(self) -> None:
        self._slots.shadow_pass(self._loss)

    def _after_step(self) -> None:
        self._slots.tick()
        if self._compiled_host is not None and self._compiled_host.due():
            for event in self._compiled_host.prepare():
                if isinstance(event, CompileFailed):
                    raise SettingsError(f"{event.place} does not compile: {event.error}")


class _Trained:
    """A network with dormant slots, in the steps that `esper grow` makes."""

    def __init__(self, bench: Bench, model: nn.Module) -> None:
        self.model = model
        self._bench = bench
        run = prepare(bench.config, setup=replace(bench.setup, model=model))
        self._growth, self._step = run.growth, run.trainer.training_step

    def step(self) -> None:
        self._step.make([(self._bench.inputs, self._bench.targets)])
        self._growth.after_step()
        self._bench.wait()


def _made(
    networks: Mapping[str, _Network], *, backwards: bool, tell: Callable[[str], None]
) -> dict[str, _Steps]:
    """Return all networks, made in one order or the other, so that none has the better place.

    Each has made a step, in which it is compiled if it is to be.
    """
    torch.compiler.reset()
    names = list(networks)[:: -1 if backwards else 1]
    made = {}
    for number, name in enumerate(names, start=1):
        tell(f"making network {number} of {len(names)}, {name} …")
        made[name] = networks[name].make()
        made[name].step()
    return made


def _params(network: _Steps) -> int:
    return sum(parameter.numel() for parameter in network.model.parameters())


def _flops(network: _Steps) -> int:
    with flop_counter() as counter:
        network.step()
    flops: int = counter.get_total_flops()
    return flops

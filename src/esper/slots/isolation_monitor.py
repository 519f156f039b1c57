"""Proof at run time that no gradient of an isolated seed reaches the host."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

import torch
from torch import Tensor, nn

from esper.lifecycle.stages import SeedStage
from esper.slots.branch import SeedBranch
from esper.slots.gradient_projection import GradientProjections
from esper.slots.modes import beside_the_step
from esper.slots.slot import SeedSlot
from esper.slots.slot_forward import ForwardMode
from esper.slots.slot_set import SlotSet

DEFAULT_INTERVAL_STEPS = 200
"""Keeps the cost under 2 %: benchmarks/isolation_monitor.py."""

_TOLERANCE_ON_CPU = 1e-5
_TOLERANCE_ELSEWHERE = 1e-3

_NOISE_FLOOR = 1e-2
"""A parameter's gradient counts as at least this share of the host's: of one that vanishes by
construction (a bias in front of a normalisation) nothing but rounding is left to compare."""

_CHECKED_STAGES = (SeedStage.TRAINING, SeedStage.BLENDING)
_NEVER = math.inf

_WHERE_IT_RAISED = (
    "raised in a check of the isolation monitor, which runs forward and backward twice beside the "
    "step; TrainerConfig(isolation_check_steps=None) switches it off"
)


@dataclass(frozen=True, kw_only=True)
class IsolationReading:
    """What was found in one slot since the last reading.

    Attributes:
        slot: Its path.
        blueprint: Of the seed that was checked.
        seed_lives: That seed is still the slot's living one.
        checks: How many were made.
        violations: Checks in which a gradient of the seed reached the host.
        without_verdict: Checks in which a gradient was not finite.
        reached: Every host parameter that was reached, worst first, with the leak's projection
            over the norm of the gradient that it
            has without the seed.
    """

    slot: str
    blueprint: str
    seed_lives: bool
    checks: int
    violations: int
    without_verdict: int
    reached: dict[str, float]


class IsolationMonitor:
    """Compares the host's gradients with those of a pass in which the seed cannot reach it.

    A check covers one slot whose seed is isolated, in TRAINING or BLENDING. Beside the step it runs
    forward and backward twice on the same batch, once as the step will and once with what the seed
    computes cut off the graph, and compares a few random projections of each host parameter's
    gradient. Both run eagerly: two compiled graphs round differently, in bfloat16 by more than a
    leak. The step stays bitwise what it is without a check.

    A seed is checked on its second step in TRAINING (in the first, an output layer that is still
    zero lets no gradient through), halfway to the steps that G2 asks for, and on the first step
    with alpha above 0. Otherwise one check falls in every `interval_steps`, the slots with such
    seeds taking turns. At most one check is made per step, so that a violation is known to be its
    slot's.

    A leak is found if a projection of it exceeds `relative_tolerance` times the norm of the
    parameter's own gradient, or times 1 % of the norm of all gradients where that is more. A
    projection's root mean square is the leak's norm: a leak of 10 times the tolerance into one
    matrix is found by one check in more than 99 of 100 cases, whatever its rank. Signs change from
    check to check.

    Args:
        slots: From `esper.attach`.
        interval_steps: Optimizer steps between two checks; None makes none.
        relative_tolerance: Must exceed what two equal backwards differ by. None: 1e-5 on a CPU,
            where they do not differ, and 1e-3 elsewhere, for atomic additions in half precision.

    Raises:
        ValueError: An argument is out of its range.

    Source: original; random projections that keep norms as in Achlioptas 2003
        (doi 10.1016/S0022-0000(03)00025-4).
    """

    def __init__(
        self,
        slots: SlotSet,
        *,
        interval_steps: int | None = DEFAULT_INTERVAL_STEPS,
        relative_tolerance: float | None = None,
    ) -> None:
        if interval_steps is not None and interval_steps < 1:
            raise ValueError(f"interval_steps must be at least 1, got {interval_steps}")
        if relative_tolerance is not None and not 0.0 < relative_tolerance < 1.0:
            raise ValueError(
                f"relative_tolerance must lie between 0 and 1, got {relative_tolerance}"
            )
        self.interval_steps = interval_steps
        self.relative_tolerance = relative_tolerance
        self._slots = slots
        self._records: dict[str, _Record] = {}
        self._checks = 0
        self._last_step: int | None = None
        self._settled_until: float = 0.0
        """No seed needs its first check in a phase before this step, while these slots have seeds
        and are in these stages: most steps need to know no more."""
        self._settled_slots: tuple[SeedSlot, ...] = ()
        self._settled_stages: list[SeedStage] = []

    def due(self, step: int) -> SeedSlot | None:
        """Return the slot that is to be checked in this optimizer step, if any."""
        interval, last = self.interval_steps, self._last_step
        # The gradients of a sharded host arrive past autograd, so a check would find none at all.
        if interval is None or last == step or self._slots.sharded:
            return None
        waited = last is None or step - last >= interval
        slots = self._slots.living_slots
        stages = [slot.stage for slot in slots]
        # Another tuple is made whenever a seed comes or goes.
        settled = slots is self._settled_slots and stages == self._settled_stages
        if settled and step < self._settled_until and not waited:
            return None
        self._settled_until = _NEVER
        self._settled_slots, self._settled_stages = slots, stages
        longest: tuple[int, SeedSlot] | None = None
        for slot in slots:
            checked = self._last_check(slot) if _checkable(slot) else None
            if checked is not None:
                self._settled_until = min(self._settled_until, step + _steps_to_next_phase(slot))
                if waited and (longest is None or checked < longest[0]):
                    longest = checked, slot
            elif slot.stage in _CHECKED_STAGES:
                self._settled_until = step
                if _checkable(slot):
                    return slot
        return None if longest is None else longest[1]

    def check(self, loss: Callable[[], Tensor], *, step: int) -> None:
        """Make a check if one is due; call it before a step's forward, with nothing pending.

        Args:
            loss: Runs the model on the step's batch and returns the loss, scaled if it is scaled
                for the backward.
            step: Counts optimizer steps.

        Effects, when due: `loss` is called twice, so module hooks and tensor hooks on host
        parameters run twice more; hooks on accumulated gradients do not. Random streams, buffers
        and every `.grad` are left as they were. No host–device synchronisation.
        """
        slot = self.due(step)
        parameters = {} if slot is None else self._host_parameters()
        if slot is None or not parameters:
            return
        self._checks += 1
        self._last_step = step
        modes = self._modes()
        found = GradientProjections(parameters, number=self._checks)
        expected = GradientProjections(parameters, number=self._checks)
        try:
            with self._beside_the_step():
                self._run(loss, found)
            with self._beside_the_step(), slot.sever():
                self._run(loss, expected)
        except Exception as error:
            error.add_note(_WHERE_IT_RAISED)
            raise
        record = self._record(slot, step)
        if self._modes() == modes:  # else a seed's forward raised, and its slot passes it by
            record.judge(found, expected, tuple(parameters), self._tolerance(slot))

    def read(self) -> list[IsolationReading]:
        """Return what was found since the last reading, by slot. Waits for the device."""
        readings = []
        for path, record in self._records.items():
            reading = record.read(path, self._slots[path])
            if reading is not None:
                readings.append(reading)
        return readings

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted, and when; tensors are copies."""
        return {
            "checks": self._checks,
            "last_step": self._last_step,
            "records": {
                path: {**record.state_dict(), "lives": record.is_of(self._slots[path])}
                for path, record in self._records.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the slots have their state of then by now."""
        self._checks, self._last_step = state["checks"], state["last_step"]
        self._settled_until = 0.0
        self._records = {
            path: _Record.from_state(kept, self._slots[path])
            for path, kept in state["records"].items()
        }

    @staticmethod
    def _run(loss: Callable[[], Tensor], projections: GradientProjections) -> None:
        value = loss()
        if value.requires_grad:
            projections.take(value)

    @contextmanager
    def _beside_the_step(self) -> Iterator[None]:
        """Leave everything but gradients as it was, and run compiled code eagerly."""
        with ExitStack() as stack:
            stack.enter_context(beside_the_step(self._slots.model))
            for slot in self._slots.values():
                stack.enter_context(slot.unchanged_stream())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _tolerance(self, slot: SeedSlot) -> float:
        if self.relative_tolerance is not None:
            return self.relative_tolerance
        on_cpu = slot.blend_alpha.device.type == "cpu"
        return _TOLERANCE_ON_CPU if on_cpu else _TOLERANCE_ELSEWHERE

    def _modes(self) -> list[ForwardMode]:
        return [slot.mode for slot in self._slots.values()]

    def _host_parameters(self) -> dict[str, nn.Parameter]:
        host = set(self._slots.host_parameters())
        named = self._slots.model.named_parameters()
        return {name: value for name, value in named if value in host and value.requires_grad}

    def _last_check(self, slot: SeedSlot) -> int | None:
        """Return the step of the seed's last check in the phase that it is in."""
        record = self._records.get(slot.path)
        if record is None or not record.is_of(slot):
            return None
        return record.last_step.get(_phase(slot))

    def _record(self, slot: SeedSlot, step: int) -> "_Record":
        record = self._records.get(slot.path)
        if record is None or not record.is_of(slot):
            record = self._records[slot.path] = _Record.of(slot)
        record.last_step[_phase(slot)] = step
        return record


class _Phase(Enum):
    """Parts of a seed's life at whose beginning it is checked."""

    YOUNG = 0
    RIPE = 1
    BLENDING = 2


class _Record:
    """What was found of one seed, on the device until it is read."""

    def __init__(self, slot: SeedSlot, blueprint: str, branch: SeedBranch | None) -> None:
        self.last_step: dict[_Phase, int] = {}
        self._branch = None if branch is None else weakref.ref(branch)
        self._blueprint = blueprint
        self._checks = 0
        self._device = slot.blend_alpha.device
        self._violations = torch.zeros((), device=self._device, dtype=torch.int32)
        self._without_verdict = torch.zeros_like(self._violations)
        self._reached: dict[tuple[str, ...], Tensor] = {}
        """Worst relative size so far, by the parameters that the host had at the time."""

    @classmethod
    def of(cls, slot: SeedSlot) -> Self:
        """Begin a record of the slot's living seed."""
        branch = slot.living
        assert branch is not None
        return cls(slot, branch.blueprint, branch)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], slot: SeedSlot) -> Self:
        """Return the record that a state is of."""
        record = cls(slot, state["blueprint"], slot.living if state["lives"] else None)
        record.last_step = {_Phase[name]: step for name, step in state["last_step"].items()}
        record._checks = state["checks"]
        record._violations.copy_(state["violations"])
        record._without_verdict.copy_(state["without_verdict"])
        record._reached = {
            tuple(names): sizes.to(record._device) for names, sizes in state["reached"]
        }
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted; tensors are copies."""
        return {
            "blueprint": self._blueprint,
            "last_step": {phase.name: step for phase, step in self.last_step.items()},
            "checks": self._checks,
            "violations": self._violations.clone(),
            "without_verdict": self._without_verdict.clone(),
            "reached": [[list(names), sizes.clone()] for names, sizes in self._reached.items()],
        }

    def is_of(self, slot: SeedSlot) -> bool:
        """Whether the slot's living seed is the one recorded here."""
        branch = None if self._branch is None else self._branch()
        return branch is not None and slot.living is branch

    def judge(
        self,
        found: GradientProjections,
        expected: GradientProjections,
        names: tuple[str, ...],
        tolerance: float,
    ) -> None:
        """Compare the two passes and count, without waiting for the device."""
        device = self._device
        norms = expected.norms(device)
        host_norm = torch.linalg.vector_norm(norms)
        scale = torch.maximum(norms, _NOISE_FLOOR * host_norm)
        leak = (found.projections(device) - expected.projections(device)).abs_().amax(1)
        known = torch.isfinite(leak).all() & torch.isfinite(host_norm)
        reached = (leak > tolerance * scale) & known
        sizes = torch.where(reached, leak / scale, torch.zeros_like(leak))
        worst = self._reached.get(names)
        self._reached[names] = sizes if worst is None else torch.maximum(worst, sizes)
        self._checks += 1
        self._violations += reached.any()
        self._without_verdict += known.logical_not()

    def read(self, path: str, slot: SeedSlot) -> IsolationReading | None:
        """Return what was counted since the last reading; None if there was no check."""
        if self._checks == 0:
            return None
        reached: dict[str, float] = {}
        for names, sizes in self._reached.items():
            for name, size in zip(names, sizes.tolist(), strict=True):
                if size > 0.0:
                    reached[name] = max(size, reached.get(name, 0.0))
        reading = IsolationReading(
            slot=path,
            blueprint=self._blueprint,
            seed_lives=self.is_of(slot),
            checks=self._checks,
            violations=int(self._violations),
            without_verdict=int(self._without_verdict),
            reached=dict(sorted(reached.items(), key=lambda item: -item[1])),
        )
        self._checks = 0
        self._violations.zero_()
        self._without_verdict.zero_()
        self._reached = {}
        return reading


def _checkable(slot: SeedSlot) -> bool:
    """Whether a leak of the slot's seed could show in a backward now."""
    if not slot.isolated or not slot.training or slot.fading:
        return False
    if slot.stage is SeedStage.TRAINING:
        in_step = slot.mode is ForwardMode.STRAIGHT_THROUGH  # a shadow pass has no way to the host
        return in_step and slot.measurements.training_steps > 0
    return slot.stage is SeedStage.BLENDING and slot.alpha > 0.0


def _phase(slot: SeedSlot) -> _Phase:
    if slot.stage is SeedStage.BLENDING:
        return _Phase.BLENDING
    return _Phase.YOUNG if _steps_to_ripe(slot) > 0 else _Phase.RIPE


def _steps_to_ripe(slot: SeedSlot) -> int:
    """Return how many steps of training are left until halfway to those that G2 asks for."""
    halfway = math.ceil(slot.config.thresholds.min_training_steps / 2)
    return halfway - slot.measurements.training_steps


def _steps_to_next_phase(slot: SeedSlot) -> float:
    """Return in how many steps the seed of a slot is in another phase of the same stage."""
    if slot.stage is SeedStage.BLENDING or _steps_to_ripe(slot) <= 0:
        return _NEVER
    return _steps_to_ripe(slot)

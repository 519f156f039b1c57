"""Gates G0 to G5: pure functions from measurements and thresholds to a readable verdict."""

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from esper.lifecycle.record import Record
from esper.lifecycle.stages import SeedStage

Comparison = Literal[">=", "<=", "=="]
NonNegative = Annotated[FiniteFloat, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]


class Gate(StrEnum):
    """The guard at the entry of a stage."""

    G0 = "G0"
    G1 = "G1"
    G2 = "G2"
    G3 = "G3"
    G4 = "G4"
    G5 = "G5"


GATE_INTO: Mapping[SeedStage, Gate] = MappingProxyType(
    {
        SeedStage.GERMINATED: Gate.G0,
        SeedStage.TRAINING: Gate.G1,
        SeedStage.BLENDING: Gate.G2,
        SeedStage.SHADOWING: Gate.G3,
        SeedStage.PROBATIONARY: Gate.G4,
        SeedStage.FOSSILIZED: Gate.G5,
    }
)
"""Which gate guards the entry into which stage. Recovery stages have none."""


class GateThresholds(Record):
    """What a seed must show to pass. Every value is finite; none is clamped.

    Fractions are relative to the size of the host's held-out loss.
    """

    min_training_steps: Count = 40
    """G2: optimizer steps the seed has learned behind the host."""
    min_gradient_ratio: NonNegative = 1e-4
    """G2: lower end of the seed's normalised gradient ratio."""
    max_gradient_ratio: NonNegative = 1e3
    """G2: upper end of the seed's normalised gradient ratio."""
    min_line_search_gain_fraction: FiniteFloat = 0.005
    """G2: held-out loss saved at the best amplitude before blending."""
    min_steps_at_target: Count = 20
    """G3: steps that alpha has stood at its target."""
    max_loss_increase_fraction: NonNegative = 0.10
    """G3 to G5: held-out loss since just before blending began."""
    min_contribution_fraction: FiniteFloat = 0.01
    """G4 and G5: held-out loss saved by the seed."""
    max_linear_share: NonNegative = 0.99
    """G4: of the seed's increment, what a linear map of the same features explains."""
    min_over_linear_fraction: FiniteFloat | None = 0.02
    """G4 and G5: held-out loss saved by the seed over the best linear map of the same features in
    its place. None does not ask: what a seed does best after its trial cannot be seen in it."""
    standard_errors: NonNegative = 2.0
    """How far below its mean a saving is judged, where losses per sample are known."""
    max_step_time_ratio: NonNegative | None = None
    """G4: median step time against that before germination. None sets no budget: a verdict by the
    wall clock makes a run depend on what else the machine does."""
    trial_epochs: Annotated[int, Field(ge=1)] = 2
    """G5: length of the trial window; each of the last so many measurements must meet
    `min_contribution_fraction`."""


class GateInputs(Record):
    """Everything measured of a seed that a gate may look at.

    `None` means not measured; a check of a missing or non-finite value fails.
    """

    identity_error: float | None = None
    """Largest absolute difference of the fresh seed's output from its input."""
    shape_matches: bool | None = None
    """The seed's output has the shape and dtype of its input."""
    parameters_finite: bool | None = None
    parameters_unshared: bool | None = None
    """No parameter of the seed has another owner."""
    prewarmed: bool | None = None
    """The seed has run once in the slot's shape on the slot's device."""
    breaker_closed: bool | None = None
    isolation_leaks: int | None = None
    """Paths found at germination on which a gradient of the isolated seed reaches the host, and
    checks at run time that found one."""
    live: bool = False
    """Inserted at alpha 1 without training behind the host."""
    training_steps: int = 0
    host_learns: bool = True
    """Some parameter of the host's own does; a frozen one has no gradient to compare with."""
    gradient_ratio: float | None = None
    """Seed's gradient norm over the host's, normalised by sqrt(host params / seed params)."""
    line_search_gain_fraction: float | None = None
    alpha: float = 0.0
    steps_at_target: int = 0
    loss_increase_fraction: float | None = None
    contribution_fraction: float | None = None
    """Where losses per sample are known, standard errors below the mean; else the mean."""
    linear_share: float | None = None
    """Of the increment's sum of squares, what the best linear map of the same features explains; 0
    where nothing of the host learns, which could not take such a map over."""
    over_linear_fraction: float | None = None
    """The same against the best linear map of the features in the seed's place; against the host
    alone where nothing of the host learns."""
    step_time_ratio: float | None = None
    trial_contributions: tuple[float, ...] = ()
    """Contribution fractions measured while PROBATIONARY, oldest first."""
    trial_over_linear: tuple[float, ...] = ()
    """Contributions over the linear map measured while PROBATIONARY, oldest first."""


class Check(Record):
    """One measured value against one threshold."""

    name: str
    measured: float | None
    comparison: Comparison
    threshold: FiniteFloat
    passed: bool

    def __str__(self) -> str:
        measured = "not measured" if self.measured is None else f"{self.measured:.4g}"
        mark = "ok" if self.passed else "FAILS"
        return f"{self.name} {measured} {self.comparison} {self.threshold:.4g} {mark}"


class GateResult(Record):
    """The verdict of a gate with every check behind it."""

    gate: Gate
    checks: tuple[Check, ...]
    forced: bool = False
    """The verdict was overridden by the caller."""

    @property
    def passed(self) -> bool:
        """Whether every check passed; a forced entry does not change the verdict."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed, in order."""
        return tuple(check for check in self.checks if not check.passed)

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "refused"
        return f"{self.gate} {verdict}: " + "; ".join(str(check) for check in self.checks)


_COMPARE: Mapping[Comparison, Callable[[float, float], bool]] = {
    ">=": lambda measured, threshold: measured >= threshold,
    "<=": lambda measured, threshold: measured <= threshold,
    "==": lambda measured, threshold: measured == threshold,
}


def compare(name: str, measured: float | None, comparison: Comparison, threshold: float) -> Check:
    """Judge one value; a missing or non-finite one fails.

    Raises:
        pydantic.ValidationError: `threshold` is not finite.
    """
    known = measured is not None and math.isfinite(measured)
    passed = known and _COMPARE[comparison](float(measured or 0.0), threshold)
    return Check(
        name=name,
        measured=None if measured is None else float(measured),
        comparison=comparison,
        threshold=threshold,
        passed=passed,
    )


def _holds(name: str, fact: bool | None) -> Check:
    return compare(name, None if fact is None else float(fact), "==", 1.0)


def _still_isolated(inputs: GateInputs) -> list[Check]:
    """A live seed is not isolated; its gradients belong in the host."""
    return [] if inputs.live else [compare("isolation_leaks", inputs.isolation_leaks, "==", 0.0)]


def _not_harmed(inputs: GateInputs, limits: GateThresholds) -> Check:
    increase = inputs.loss_increase_fraction
    return compare("loss_increase_fraction", increase, "<=", limits.max_loss_increase_fraction)


def _g0(inputs: GateInputs, _: GateThresholds) -> list[Check]:
    return [
        compare("identity_error", inputs.identity_error, "==", 0.0),
        _holds("shape_matches", inputs.shape_matches),
        _holds("parameters_finite", inputs.parameters_finite),
        _holds("parameters_unshared", inputs.parameters_unshared),
    ]


def _g1(inputs: GateInputs, _: GateThresholds) -> list[Check]:
    return [
        _holds("prewarmed", inputs.prewarmed),
        _holds("breaker_closed", inputs.breaker_closed),
        compare("isolation_leaks", inputs.isolation_leaks, "==", 0.0),
    ]


def _g2(inputs: GateInputs, limits: GateThresholds) -> list[Check]:
    if inputs.live:
        return [
            compare("identity_error", inputs.identity_error, "==", 0.0),
            _holds("parameters_finite", inputs.parameters_finite),
        ]
    gain, least = inputs.line_search_gain_fraction, limits.min_line_search_gain_fraction
    ratio = [
        compare("gradient_ratio", inputs.gradient_ratio, ">=", limits.min_gradient_ratio),
        compare("gradient_ratio", inputs.gradient_ratio, "<=", limits.max_gradient_ratio),
    ]
    return [
        compare("training_steps", inputs.training_steps, ">=", limits.min_training_steps),
        _holds("parameters_finite", inputs.parameters_finite),
        compare("isolation_leaks", inputs.isolation_leaks, "==", 0.0),
        *(ratio if inputs.host_learns else []),
        compare("line_search_gain_fraction", gain, ">=", least),
    ]


def _g3(inputs: GateInputs, limits: GateThresholds) -> list[Check]:
    return [
        compare("alpha", inputs.alpha, "==", 1.0),
        compare("steps_at_target", inputs.steps_at_target, ">=", limits.min_steps_at_target),
        _not_harmed(inputs, limits),
        *_still_isolated(inputs),
    ]


def _g4(inputs: GateInputs, limits: GateThresholds) -> list[Check]:
    contribution, least = inputs.contribution_fraction, limits.min_contribution_fraction
    checks = [
        compare("contribution_fraction", contribution, ">=", least),
        compare("linear_share", inputs.linear_share, "<=", limits.max_linear_share),
    ]
    if limits.min_over_linear_fraction is not None:
        over_linear, least = inputs.over_linear_fraction, limits.min_over_linear_fraction
        checks.append(compare("over_linear_fraction", over_linear, ">=", least))
    checks.append(_not_harmed(inputs, limits))
    if limits.max_step_time_ratio is not None:
        ratio = inputs.step_time_ratio
        checks.append(compare("step_time_ratio", ratio, "<=", limits.max_step_time_ratio))
    return checks + _still_isolated(inputs)


def _g5(inputs: GateInputs, limits: GateThresholds) -> list[Check]:
    epochs, least = limits.trial_epochs, limits.min_contribution_fraction
    worst = _worst(inputs.trial_contributions[-epochs:])
    checks = [
        compare("trial_epochs", len(inputs.trial_contributions), ">=", epochs),
        compare("worst_in_trial_window", worst, ">=", least),
    ]
    if limits.min_over_linear_fraction is not None:
        worst, least = _worst(inputs.trial_over_linear[-epochs:]), limits.min_over_linear_fraction
        checks.append(compare("worst_over_linear_in_window", worst, ">=", least))
    return [*checks, _not_harmed(inputs, limits)]


def _worst(window: tuple[float, ...]) -> float | None:
    """Return the least value; one that is not finite is the worst there is."""
    return min(window, default=None, key=lambda value: value if math.isfinite(value) else -math.inf)


_CHECKS: Mapping[Gate, Callable[[GateInputs, GateThresholds], list[Check]]] = {
    Gate.G0: _g0,
    Gate.G1: _g1,
    Gate.G2: _g2,
    Gate.G3: _g3,
    Gate.G4: _g4,
    Gate.G5: _g5,
}


def evaluate_gate(gate: Gate, inputs: GateInputs, thresholds: GateThresholds) -> GateResult:
    """Judge `inputs` at `gate`. Pure: the same arguments give the same result."""
    return GateResult(gate=gate, checks=tuple(_CHECKS[gate](inputs, thresholds)))

"""What a decision was worth, in components that are small pure functions.

An episode is one training run. At each of its N decisions the agent takes one action, and then the
network trains on; after the last one the run is over, and the episode terminates. The reward of a
decision is

    progress + parameter rent + compute rent + intervention [+ terminal + diverged, at the end].

The unit is nats of loss: 0.01 is worth as much as 1 % off the final loss.

**Progress changes nothing in what is best.** It is gamma * Phi(s') - Phi(s), and Phi is 0 in the
terminal state. Discounted by the same gamma and summed over decisions 0 … N-1 it telescopes,

    sum gamma^t (gamma Phi(s_t+1) - Phi(s_t)) = gamma^N Phi(s_N) - Phi(s_0) = -Phi(s_0),

which no action has a part in. So every policy loses the same, from any state on:
Q'(s, a) = Q(s, a) - Phi(s), and the same actions are best. It holds path by path, so for a Phi that
is a noisy measurement, too: a lucky peak is paid for by the fall that follows. Two conditions: the
learner discounts by this gamma, and does not clip rewards.

**What is left is hard to game.** Nothing but the final loss pays. It is measured on data that no
decision has seen, without seeds that still live uncommitted; what was pruned or never committed has
no part in it, and has cost interventions and rent.

Source: Ng, Harada and Russell 1999 ("Policy invariance under reward transformations", theorem 1);
    Grzes 2017 ("Reward shaping in episodic reinforcement learning") for the terminal state. The
    components are original.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

from pydantic import Field, FiniteFloat

from esper.lifecycle import Operation, Record

Weight = Annotated[FiniteFloat, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class Potential(StrEnum):
    """What progress is measured by."""

    NONE = "none"
    LOSS = "loss"
    CONTRIBUTION = "contribution"


class RewardConfig(Record):
    """Weights of the components; 0 switches one off. The defaults are chosen, not tuned."""

    gamma: Annotated[FiniteFloat, Field(gt=0.0, le=1.0)] = 1.0
    """The learner's discount per decision. An episode is finite, so none is needed."""
    potential: Potential = Potential.LOSS
    progress: Weight = 1.0
    parameter_rent: Weight = 0.05
    """For twice the host's parameters during a whole run."""
    compute_rent: Weight = 0.0
    """For twice the host's operations during a whole run, which must be counted."""
    intervention: Weight = 0.001
    """For an action."""
    terminal: Weight = 1.0
    """For a final loss that is lower by the factor e."""
    diverged: Weight = 10.0
    """To be more than rent and the worst final loss can cost, or diverging is a way out."""


class Episode(Record):
    """What is the same at every decision of an episode."""

    num_decisions: Count
    """That were planned, also where the run diverges before."""
    host_param_count: Count
    """At the start."""
    reference_loss: float
    """What the final loss is measured against: the held-out loss at the first decision, before any
    action, or the final loss of the same run without growth."""


class Standing(Record):
    """What was measured of the network at a decision, or at the end."""

    held_out_loss: float
    """On the data that decisions are made by; at the end it is not read, and may be NaN."""
    reference_loss: float | None = None
    """Held-out loss of the same run without growth at the same decision; None takes that of the
    episode. It depends on the time alone, so Phi may hold it."""
    contribution_fractions: tuple[float, ...] = ()
    """Of the seeds that have been measured, living and committed."""
    param_count: Annotated[int, Field(ge=0)]
    """With the seeds, living and committed."""
    flops: float | None = None
    """Spent on training since the last decision; None where not counted."""
    host_flops: float | None = None
    """What the bare host would have spent."""


class Reward(Record):
    """What one decision was worth, by component."""

    progress: FiniteFloat
    parameter_rent: FiniteFloat
    compute_rent: FiniteFloat
    intervention: FiniteFloat
    terminal: FiniteFloat = 0.0
    diverged: FiniteFloat = 0.0

    @property
    def components(self) -> dict[str, float]:
        """Every component by name, in the order of the fields."""
        return self.model_dump()

    @property
    def total(self) -> float:
        """Their sum."""
        return math.fsum(self.components.values())


def step_reward(
    config: RewardConfig,
    episode: Episode,
    before: Standing,
    operations: Sequence[Operation],
    after: Standing,
) -> Reward:
    """Return what a decision was worth that another one follows.

    Args:
        config: The weights.
        episode: What stays the same.
        before: The network as the agent saw it.
        operations: What the agent asked for, whether or not it was legal and a gate let it through;
            one for an agent of the environment, policies may ask for more at once.
        after: The network at the next decision, before the next action. Rent is for what it holds,
            so a seed pays from its first steps on.

    Raises:
        ValueError: A measurement is not finite, or a loss not positive. For a run that diverged
            call `terminal_reward`.
    """
    return Reward(
        progress=progress(config, episode, before, after),
        parameter_rent=parameter_rent(config, episode, after),
        compute_rent=compute_rent(config, episode, after),
        intervention=intervention_cost(config, operations),
    )


def terminal_reward(
    config: RewardConfig,
    episode: Episode,
    before: Standing,
    operations: Sequence[Operation],
    after: Standing,
    *,
    final_loss: float,
) -> Reward:
    """Return what a decision was worth that ended the episode.

    Args:
        config: The weights.
        episode: What stays the same.
        before: The network as the agent saw it.
        operations: What the agent asked for.
        after: The network at the end, with its living seeds: they pay rent to the last.
        final_loss: On data that no decision has seen, without the seeds that live uncommitted. If
            it is not finite, the run diverged.

    Raises:
        ValueError: Another measurement is not finite, or a loss not positive.
    """
    return Reward(
        progress=progress(config, episode, before, None),
        parameter_rent=parameter_rent(config, episode, after),
        compute_rent=compute_rent(config, episode, after),
        intervention=intervention_cost(config, operations),
        terminal=terminal_bonus(config, episode, final_loss),
        diverged=divergence_penalty(config, final_loss),
    )


def potential(config: RewardConfig, episode: Episode, standing: Standing) -> float:
    """Return Phi of a state in which a decision is to be made.

    By loss it is weight * log(reference_loss / held_out_loss), so 0 at the first decision; by
    contribution, weight * the sum of the measured contribution fractions.
    """
    if config.potential is Potential.LOSS:
        reference = standing.reference_loss
        if reference is None:
            reference = episode.reference_loss
        gain = _log_gain("progress", "held_out_loss", standing.held_out_loss, reference)
        return config.progress * gain
    if config.potential is Potential.CONTRIBUTION:
        fractions = standing.contribution_fractions
        for fraction in fractions:
            _check_finite("progress", "a contribution fraction", fraction)
        return config.progress * math.fsum(fractions)
    return 0.0


def progress(
    config: RewardConfig, episode: Episode, before: Standing, after: Standing | None
) -> float:
    """Return the shaping term gamma * Phi(after) - Phi(before).

    Args:
        config: The weights.
        episode: What stays the same.
        before: At this decision.
        after: At the next one; None for the terminal state, whose Phi is 0 whatever is measured
            there, or the terms would not telescope to a constant.
    """
    next_potential = 0.0 if after is None else potential(config, episode, after)
    return config.gamma * next_potential - potential(config, episode, before)


def parameter_rent(config: RewardConfig, episode: Episode, standing: Standing) -> float:
    """Return -weight * (param_count - host_param_count) / host_param_count / num_decisions."""
    ratio = standing.param_count / episode.host_param_count
    return config.parameter_rent * (1.0 - ratio) / episode.num_decisions


def compute_rent(config: RewardConfig, episode: Episode, standing: Standing) -> float:
    """Return -weight * (flops / host_flops - 1) / num_decisions; 0 where the weight is 0.

    Raises:
        ValueError: There is a weight, and operations were not counted, or are not positive.
    """
    if config.compute_rent == 0.0:
        return 0.0
    flops, host_flops = standing.flops, standing.host_flops
    if flops is None or host_flops is None:
        raise ValueError(
            f"compute_rent: operations were not counted, got flops {flops} and host_flops "
            f"{host_flops}; count them, or set the weight {config.compute_rent} to 0"
        )
    _check_positive("compute_rent", "flops", flops)
    _check_positive("compute_rent", "host_flops", host_flops)
    return config.compute_rent * (1.0 - flops / host_flops) / episode.num_decisions


def intervention_cost(config: RewardConfig, operations: Sequence[Operation]) -> float:
    """Return -weight for each operation but WAIT, which is free."""
    asked = sum(operation is not Operation.WAIT for operation in operations)
    return config.intervention * -asked  # a free one is 0.0, not -0.0


def terminal_bonus(config: RewardConfig, episode: Episode, final_loss: float) -> float:
    """Return weight * log(reference_loss / final_loss), in nats; 0 where the run diverged."""
    if not math.isfinite(final_loss):
        return 0.0
    return config.terminal * _log_gain("terminal", "final_loss", final_loss, episode.reference_loss)


def divergence_penalty(config: RewardConfig, final_loss: float) -> float:
    """Return -weight where the final loss is not finite, else 0."""
    return 0.0 if math.isfinite(final_loss) else -config.diverged


def _log_gain(component: str, name: str, loss: float, reference_loss: float) -> float:
    _check_positive(component, "reference_loss", reference_loss)
    _check_positive(component, name, loss)
    return math.log(reference_loss) - math.log(loss)


def _check_positive(component: str, name: str, value: float) -> None:
    _check_finite(component, name, value)
    if value <= 0.0:
        raise ValueError(f"{component}: {name} must be above 0, got {value}")


def _check_finite(component: str, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"{component}: {name} must be finite, got {value}; if the run diverged, end the "
            "episode by terminal_reward with a final_loss that is not finite"
        )

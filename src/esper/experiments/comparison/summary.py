"""A comparison in figures: one row per arm, and the verdict."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from esper.experiments.comparison.config import MIN_SEEDS_FOR_A_CLAIM
from esper.experiments.comparison.curves import Runs, curve_of, losses_at
from esper.experiments.comparison.intervals import (
    REACH,
    Crossing,
    Curve,
    Interval,
    crossing,
    mean_interval,
)
from esper.experiments.comparison.plan import GROWN, HOST, RANDOM_TIMES, STATIC, Comparison
from esper.experiments.comparison.runs import SCHEDULED_POLICIES, RunResult
from esper.experiments.comparison.search import at_edge

Arm = TypeVar("Arm")


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm at equal steps, and what it takes to reach the static network's loss.

    Figures relative to the static network are None where nothing grew; the share at which its loss
    is reached also where the seeds' runs enclose no cost in common, or one of them diverged.

    Attributes:
        learning_rate: Chosen by validation loss.
        rate_at_edge: The best rate is the lowest or highest tried, or the only one: a better one
            may lie beyond.
        flops_fraction: Mean share of what the static network spent on the same seed.
        difference: Paired test loss minus the static network's.
        flops_to_static: Share of the static network's operations at which its loss is reached.
        seconds_to_static: The same in wall time.
        curve: Mean cost in operations and mean test loss of every budget, rising.
    """

    arm: str
    num_seeds: int
    learning_rate: float
    rate_at_edge: bool
    param_count: float
    steps: float
    flops: float
    seconds: float
    flops_fraction: float | None
    test_loss: Interval
    metrics: Mapping[str, Interval]
    difference: Interval | None
    flops_to_static: Crossing | None
    seconds_to_static: Crossing | None
    curve: Curve
    mean_germinated: float
    mean_pruned: float

    def label(self, of_seeds: int) -> str:
        """Return the arm's name, with its number of random seeds where there are more of others."""
        if self.num_seeds == of_seeds:
            return self.arm
        return f"{self.arm} ({self.num_seeds} of {of_seeds} seeds)"


class Outcome(StrEnum):
    """What a comparison says."""

    PAYS = "growth pays here"
    PAYS_PER_STEP = "growth pays here, if data is what is short"
    DOES_NOT_PAY = "growth does not pay here"
    UNDECIDED = "not decided"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome with its reasons, each a sentence."""

    outcome: Outcome
    reasons: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class EqualFlops:
    """The grown network beside networks that never grew, at the operations that it took.

    Attributes:
        same_steps: Paired test loss of the grown network minus that of a size which takes as many
            operations in as many steps, interpolated between the next smaller and the next larger
            one, or of `cheaper`; None where these do not enclose it, or are the host and the grown
            size with none in between, too far apart for a line.
        cheaper: The arm of a size that takes fewer operations in as many steps and has a lower mean
            loss than the interpolated one; None where that is lowest, or there is none.
        rival: The arm with the lowest mean loss at those operations, in however many steps; None
            where no size has runs that enclose them on every seed.
        any_steps: Paired test loss of the grown network minus the rival's.
        nothing_between: No network grew by more than one seed: there is no size in between.
    """

    same_steps: Interval | None
    rival: str | None
    any_steps: Interval | None
    cheaper: str | None = None
    nothing_between: bool = False


def summarise(comparison: Comparison) -> list[ArmSummary]:
    """Return every arm that has finished runs of the configured length."""
    summaries = []
    reference = comparison.at_equal_steps(STATIC)
    for arm in comparison.arms:
        full = comparison.at_equal_steps(arm)
        if full:
            summaries.append(_summarise_arm(comparison, arm, full, reference))
    return summaries


def _summarise_arm(
    comparison: Comparison,
    arm: str,
    full: Mapping[int, RunResult],
    reference: Mapping[int, RunResult],
) -> ArmSummary:
    runs = {seed: runs for seed, runs in comparison.runs(arm).items() if seed in full}
    paired = [seed for seed in full if seed in reference]
    static = {seed: reference[seed] for seed in paired}
    rates = comparison.rates(arm)
    first = next(iter(full.values()))

    def mean(value: Callable[[RunResult], float]) -> float:
        return statistics.fmean(value(result) for result in full.values())

    def reached(cost: Callable[[RunResult], float]) -> Crossing | None:
        curves = {seed: curve_of(runs[seed], cost) for seed in paired}
        targets = {seed: (cost(run), run.test["loss"]) for seed, run in static.items()}
        return crossing(curves, targets) if paired and arm != STATIC else None

    return ArmSummary(
        arm=arm,
        num_seeds=len(full),
        learning_rate=first.request.learning_rate,
        rate_at_edge=at_edge(rates),
        param_count=mean(lambda run: run.param_count),
        steps=mean(lambda run: run.steps),
        flops=mean(lambda run: run.flops),
        seconds=mean(lambda run: run.seconds),
        flops_fraction=(
            statistics.fmean(full[seed].flops / static[seed].flops for seed in paired)
            if paired
            else None
        ),
        test_loss=mean_interval([run.test["loss"] for run in full.values()]),
        metrics={
            name: mean_interval([run.test[name] for run in full.values()]) for name in first.test
        },
        difference=(
            mean_interval([full[s].test["loss"] - static[s].test["loss"] for s in paired])
            if paired and arm != STATIC
            else None
        ),
        flops_to_static=reached(lambda run: run.flops),
        seconds_to_static=reached(lambda run: run.seconds),
        curve=_mean_curve(runs, full),
        mean_germinated=mean(lambda run: run.num_germinated),
        mean_pruned=mean(lambda run: run.num_pruned),
    )


def _mean_curve(runs: Runs, full: Mapping[int, RunResult]) -> Curve:
    """Return mean cost and loss of each budget that every seed has, counted from equal steps.

    Seeds may have unlike budgets: what is longer for one is shorter for another, or the same run.
    """
    by_place = [
        {place - results.index(full[seed]): run for place, run in enumerate(results)}
        for seed, results in runs.items()
    ]
    common = set[int].intersection(*map(set, by_place))
    return [
        (
            statistics.fmean(found[place].flops for found in by_place),
            statistics.fmean(found[place].test["loss"] for found in by_place),
        )
        for place in sorted(common)
    ]


def at_equal_flops(comparison: Comparison) -> EqualFlops:
    """Return the grown network beside networks of the same compute that never grew.

    Every size counts, the host included, at a budget that its runs enclose; taking the best of
    several afterwards favours them, not growth. Where a loss is interpolated, that favours growth:
    between sizes always, between budgets only where growth is found to be worse all the same, since
    the plan asks for a run at the grown one's operations else.
    """
    grown = comparison.at_equal_steps(GROWN)
    if not grown:
        return EqualFlops(same_steps=None, rival=None, any_steps=None)
    static = list(filter(comparison.never_grows, comparison.arms))
    candidates: dict[str, list[float]] = {}
    for rival in static:
        losses = losses_at({s: comparison.runs(rival).get(s, ()) for s in grown}, grown)
        if losses is not None:
            candidates[rival] = losses
    best = _lowest(candidates)
    sizes = {
        seed: [full[seed] for full in map(comparison.at_equal_steps, static) if seed in full]
        for seed in grown
    }
    enough = all(len(sizes[seed]) > 2 or not run.committed for seed, run in grown.items())
    between = losses_at(sizes, grown) if enough else None
    cheaper = None
    if between is not None:
        in_as_many = _cheaper_sizes(comparison, grown)
        cheaper = _lowest({**in_as_many, None: between})
        between = between if cheaper is None else in_as_many[cheaper]
    return EqualFlops(
        same_steps=None if between is None else _difference(grown, between),
        cheaper=cheaper,
        rival=best,
        any_steps=None if best is None else _difference(grown, candidates[best]),
        nothing_between=all(len(run.committed) <= 1 for run in grown.values()),
    )


def _cheaper_sizes(
    comparison: Comparison, grown: Mapping[int, RunResult]
) -> dict[str, list[float]]:
    """Return losses in as many steps, seed by seed, of sizes with no more operations on any."""
    found = {}
    for arm in filter(comparison.never_grows, comparison.arms):
        full = comparison.at_equal_steps(arm)
        if all(seed in full and full[seed].flops <= run.flops for seed, run in grown.items()):
            found[arm] = [full[seed].test["loss"] for seed in grown]
    return found


def _lowest(losses: Mapping[Arm, Sequence[float]]) -> Arm | None:
    """Return the arm with the lowest mean loss; None if there is none."""
    return min(losses, key=lambda arm: statistics.fmean(losses[arm]), default=None)


def _difference(grown: Mapping[int, RunResult], losses: Sequence[float]) -> Interval:
    return mean_interval(
        [run.test["loss"] - loss for run, loss in zip(grown.values(), losses, strict=True)]
    )


def judge(comparison: Comparison) -> Verdict:
    """Return whether growth pays.

    It does if the grown network is better than the host, reaches the static network's loss with
    fewer operations, and is better than networks that never grew at the operations that it took:
    in as many steps than a size in between, if there is one, and than any cheaper one, and than a
    smaller one in more. If it is not known to be better than the last, and is than the former, it
    pays where data, not compute, is short. "Better" is told by the whole 95 % interval, and nothing
    is claimed for growth while a network that never grew does best at the last learning rate tried
    on a side.
    """
    summaries = {summary.arm: summary for summary in summarise(comparison)}
    grown = summaries.get(GROWN)
    if comparison.missing() or grown is None:
        return _undecided(f"about {len(comparison.ahead())} runs are missing yet")
    num_seeds = len(comparison.config.random_seeds)
    too_few = (
        f"{num_seeds} seeds are too few for a claim, which takes {MIN_SEEDS_FOR_A_CLAIM}"
        if num_seeds < MIN_SEEDS_FOR_A_CLAIM
        else None
    )
    diverged = _diverged(comparison)
    if diverged:
        return _undecided(*diverged)
    if STATIC not in summaries:
        alone = f"nothing was committed on any of {num_seeds} seeds; the host stayed alone"
        if too_few is not None:
            return _undecided(too_few, alone)
        return Verdict(outcome=Outcome.DOES_NOT_PAY, reasons=[alone])
    to_static, equal = grown.flops_to_static, at_equal_flops(comparison)
    host = comparison.at_equal_steps(HOST)
    to_host = _difference(
        comparison.at_equal_steps(GROWN), [run.test["loss"] for run in host.values()]
    )
    reasons = [
        f"in as many steps the grown network's loss is {_tell_difference(to_host)} the host's",
        _tell_cost(to_static),
        *_tell_equal(comparison, equal),
        *_tell_timing(comparison, summaries),
    ]
    if too_few is not None:
        return _undecided(too_few, *reasons)
    outcome = conclude(to_host, to_static, equal)
    at_an_edge = [
        s.arm for s in summaries.values() if comparison.never_grows(s.arm) and s.rate_at_edge
    ]
    if at_an_edge and outcome is not Outcome.DOES_NOT_PAY:
        return _undecided(_tell_edge(at_an_edge), *reasons)
    return Verdict(outcome=outcome, reasons=reasons)


def _diverged(comparison: Comparison) -> list[str]:
    """Tell which runs that a verdict needs have ended without a finite loss."""
    arms = [arm for arm in comparison.arms if arm == GROWN or comparison.never_grows(arm)]
    return [
        f"{arm} diverged on random seed {seed}, at the learning rate that was its best on others"
        for arm in arms
        for seed, runs in comparison.runs(arm).items()
        if any(run.diverged for run in runs)
    ]


def conclude(to_host: Interval, to_static: Crossing | None, equal: EqualFlops) -> Outcome:
    """Return what the figures of a finished comparison say.

    Args:
        to_host: The grown network's loss minus the host's in as many steps.
        to_static: Where the grown network reaches the static network's loss; None if not told.
        equal: Beside networks of the same compute.
    """
    same_steps, any_steps = equal.same_steps, equal.any_steps
    rival_is_better = any_steps is not None and any_steps.above_zero
    if _costs_more(to_static) or to_host.above_zero:
        return Outcome.DOES_NOT_PAY
    if same_steps is not None and same_steps.above_zero:
        return Outcome.DOES_NOT_PAY
    if rival_is_better and _seems_to_cost_more(to_static):
        return Outcome.DOES_NOT_PAY
    beats_between = same_steps is not None and same_steps.below_zero
    if not (beats_between or equal.nothing_between):
        return Outcome.UNDECIDED
    if not (to_host.below_zero and _costs_less(to_static)):
        return Outcome.UNDECIDED
    if any_steps is not None and any_steps.below_zero:
        return Outcome.PAYS
    return Outcome.PAYS_PER_STEP if beats_between else Outcome.UNDECIDED


def _undecided(*reasons: str) -> Verdict:
    return Verdict(outcome=Outcome.UNDECIDED, reasons=reasons)


def _costs_less(found: Crossing | None) -> bool:
    """Whether the loss is reached before the static network's cost, with confidence."""
    return found is not None and found.high is not None and found.high < 1.0


def _costs_more(found: Crossing | None) -> bool:
    """Whether the loss is reached only beyond the static network's cost, with confidence.

    A curve that is not told to be worse at its first cost may have come down anywhere before.
    """
    if found is None:
        return False
    if found.low is None:
        return found.last * REACH > 1.0
    return found.low > max(1.0, found.first)


def _seems_to_cost_more(found: Crossing | None) -> bool:
    """Whether the mean reaches the loss beyond the static network's cost, if at all."""
    if found is None:
        return False
    if found.above:
        return found.last * REACH > 1.0
    return found.ratio is not None and found.ratio >= 1.0


def _tell_cost(found: Crossing | None) -> str:
    if found is None:
        return (
            "at which share of the static network's FLOPs it reaches that one's loss is not told: "
            "its runs on the random seeds have no cost in common"
        )
    if found.above:
        told = f"it does not reach the static network's loss with {found.last:.2f} of its FLOPs"
    elif found.ratio is None:
        told = f"it reaches the static network's loss with {found.first:.2f} of its FLOPs, or less"
    else:
        told = f"it reaches the static network's loss with {found.ratio:.2f} of its FLOPs"
    bounds = tell_bounds(found, " to ")
    return f"{told} (95 %: {bounds})" if bounds else told


def tell_bounds(found: Crossing, between: str) -> str:
    """Return where a loss is reached with 95 % confidence, or nothing where that says no more."""
    if found.low is None or (found.below and found.high == found.first):
        return ""
    low = f"≤ {found.low:.2f}" if found.low == found.first else f"{found.low:.2f}"
    high = f"> {found.last:.2f}" if found.high is None else f"{found.high:.2f}"
    return f"{low}{between}{high}"


def _tell_edge(arms: Sequence[str]) -> str:
    """Tell why nothing is claimed for growth, and what to do."""
    return (
        f"the best learning rate of {' and of '.join(arms)} is the only one tried, or the last on "
        "its side, and a better one may lie beyond, so try more: --rates, in a comparison of its "
        "own"
    )


def _tell_equal(comparison: Comparison, equal: EqualFlops) -> list[str]:
    told = []
    if equal.same_steps is not None:
        told.append(
            f"its loss is {_tell_difference(equal.same_steps)} that of {_tell_size(equal.cheaper)}"
        )
    elif equal.nothing_between:
        told.append("a single seed was grown, so that there is no size in between")
    elif not comparison.config.intermediate_sizes:
        told.append(
            "the sizes in between were left out, and one may do as well with the same FLOPs and "
            "steps, so train them too: --sizes, in a comparison of its own"
        )
    elif any(len(topology) == 1 for topology in comparison.topologies.values()):
        told.append(
            "a single seed was grown on some random seed, so that there is no size in between to "
            "compare with, with the same FLOPs and steps"
        )
    else:
        told.append(
            "the sizes in between cost less or more in as many steps on some seed, and none can be "
            "compared with it there"
        )
    if equal.any_steps is None:
        told.append("no network that never grew was trained with as many FLOPs in other steps")
        return told
    told.append(
        f"it is {_tell_difference(equal.any_steps)} that of the best network with the same FLOPs "
        f"in however many steps ({equal.rival})"
    )
    return told


def _tell_size(cheaper: str | None) -> str:
    if cheaper is not None:
        return f"{cheaper}, which takes no more FLOPs in as many steps"
    return (
        "a size from the start with the same FLOPs and steps, interpolated between the next "
        "smaller and the next larger"
    )


def _tell_difference(difference: Interval) -> str:
    """Return how far below or above, with the interval in the same direction."""
    sign, direction = (-1.0, "below") if difference.mean <= 0.0 else (1.0, "above")
    told = f"{abs(difference.mean):.4f}"
    if difference.low is not None and difference.high is not None:
        ends = sorted((sign * difference.low, sign * difference.high))
        told += f" (95 %: {ends[0]:.4f} to {ends[1]:.4f})"
    return f"{told} {direction}"


def _tell_timing(comparison: Comparison, summaries: Mapping[str, ArmSummary]) -> list[str]:
    random, grown = summaries.get(RANDOM_TIMES), summaries[GROWN]
    if random is None:
        return []
    gap = random.test_loss.mean - grown.test_loss.mean
    direction = "higher" if gap >= 0.0 else "lower"
    told = (
        f"grown at random times, to {random.param_count / grown.param_count:.2f} of its size, its "
        f"loss is {abs(gap):.4f} {direction}, with {random.flops / grown.flops:.2f} of the FLOPs"
    )
    if comparison.config.run.policy not in SCHEDULED_POLICIES:
        told += (
            "; evaluations are not counted at random times, and are where a policy decides by the "
            "loss"
        )
    return [told]

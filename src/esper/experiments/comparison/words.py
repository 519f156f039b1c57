"""Figures of a comparison in words, for a terminal and for a page."""

from collections.abc import Sequence

from esper.experiments.comparison.intervals import Crossing, Interval
from esper.experiments.comparison.plan import Comparison
from esper.experiments.comparison.summary import ArmSummary, tell_bounds


def spread(interval: Interval, *, signed: bool = False) -> str:
    """Return a mean and half its interval."""
    mean = f"{interval.mean:+.4f}" if signed else f"{interval.mean:.4f}"
    return mean if interval.half_width is None else f"{mean} ± {interval.half_width:.4f}"


def reached(found: Crossing | None, *, bounds: bool = True) -> str:
    """Return at which share of a cost a loss is reached, with the interval of that if wanted."""
    if found is None:
        return ""
    if found.above:
        told = f"> {found.last:.2f}"
    elif found.ratio is None:
        told = f"≤ {found.first:.2f}"
    else:
        told = f"{found.ratio:.2f}"
    interval = tell_bounds(found, "–") if bounds else None
    return f"{told} ({interval})" if interval else told


def rate(summary: ArmSummary) -> str:
    """Return an arm's learning rate, marked where a better one may lie beyond those tried."""
    return f"{summary.learning_rate:.3g}{'*' if summary.rate_at_edge else ''}"


def notes(comparison: Comparison, summaries: Sequence[ArmSummary]) -> list[str]:
    """Return what has to be known to read the table."""
    told = [
        f"mean ± half of the 95 % interval over {len(comparison.config.random_seeds)} seeds, at "
        f"equal steps ({comparison.epochs} epochs); static: the grown size from the start; static "
        "1, 2 …: with the first so many of its seeds",
        "FLOPs: as a share of static's, growing arms with pruned seeds, probes and decisions; to "
        "match: the share at which an arm reaches static's loss, every point a run to its end",
    ]
    if any(summary.rate_at_edge for summary in summaries):
        told.append(
            "* the best learning rate is the only one tried, or the last on its side; more of "
            "them: --rates, in a comparison of its own"
        )
    return told

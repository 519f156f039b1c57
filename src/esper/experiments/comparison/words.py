"""Figures of a comparison in words, for a terminal and for a page."""

from collections.abc import Collection, Sequence

from esper.experiments.comparison.intervals import Crossing, Interval
from esper.experiments.comparison.plan import STATIC, Comparison, intermediate
from esper.experiments.comparison.summary import ArmSummary, tell_bounds


def spread(interval: Interval, *, signed: bool = False) -> str:
    """Return a mean and half its interval."""
    mean = f"{interval.mean:+.4f}" if signed else f"{interval.mean:.4f}"
    return mean if interval.half_width is None else f"{mean} ± {interval.half_width:.4f}"


def reached(summary: ArmSummary, found: Crossing | None, *, bounds: bool = True) -> str:
    """Return at which share of a cost an arm reaches the static network's loss.

    Nothing for that network itself, and where there is none of the same random seeds.

    Args:
        summary: Of the arm.
        found: That share of operations or seconds.
        bounds: Whether its interval is told too.
    """
    if summary.difference is None:
        return ""
    if found is None:
        return "not told"
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
    return f"{summary.learning_rate:.3g}{edge_mark(summary)}"


def edge_mark(summary: ArmSummary) -> str:
    """Return the sign of an arm for which a better learning rate may lie beyond those tried."""
    return "*" if summary.rate_at_edge else ""


def notes(
    comparison: Comparison, summaries: Sequence[ArmSummary], *, as_shares: bool = False
) -> list[str]:
    """Return what has to be known to read the table of these arms.

    Args:
        comparison: What the table is of.
        summaries: Its rows.
        as_shares: Whether its FLOPs are shares of the static network's where there is one.
    """
    arms = {summary.arm for summary in summaries}
    told = [_means(comparison, arms), _costs(summaries, as_shares=as_shares)]
    if any(summary.rate_at_edge for summary in summaries):
        told.append(
            "* the best learning rate is the only one tried, or the last on its side; more of "
            "them: --rates, in a comparison of its own"
        )
    return told


def _means(comparison: Comparison, arms: Collection[str]) -> str:
    told = (
        f"mean ± half of the 95 % interval over {len(comparison.config.random_seeds)} seeds, at "
        f"equal steps ({comparison.epochs} epochs)"
    )
    if STATIC in arms:
        told += "; static: the grown size from the start"
    if any(arm.startswith(intermediate("")) for arm in arms):
        told += "; static 1, 2 …: with the first so many of its seeds"
    return told


def _costs(summaries: Sequence[ArmSummary], *, as_shares: bool) -> str:
    shared = [summary.flops_fraction is not None for summary in summaries]
    of_what = "of a whole run"
    if as_shares and any(shared):
        whole = "" if all(shared) else ", whole where there is none of the same seeds"
        of_what = f"as a share of static's{whole}"
    told = f"FLOPs: {of_what}, growing arms with pruned seeds, probes and decisions"
    if any(shared):
        told += (
            "; to match: the share of static's at which an arm reaches its loss, where every "
            "seed's own runs enclose it, each a run to its end"
        )
    return told

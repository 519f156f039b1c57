"""What seeds save, and how they learn."""

import math
from collections.abc import Callable, Sequence

from esper.report.chart import SEED_COLOURS, Chart, Trace, layout_of, log_axis, seed_name
from esper.report.story import RunStory, SeedStory

_SYMBOLS = ("circle", "diamond", "triangle-up", "x")
"""Of slots that have the same colour."""

Measurement = tuple[int, float | None, float | None]
"""A step, a value, and its standard error."""


def contribution_chart(story: RunStory) -> Chart | None:
    """Return what each seed saves of the held-out loss; None if none was weighed."""
    weighed = [seed for seed in story.seeds if seed.contributions]
    if not weighed:
        return None
    summary = (
        "How much lower the held-out loss is with the seed than without it, in percent of the loss "
        "without it; bars are one standard error."
    )
    last = [(_percent(seed.contribution_fraction), seed_name(seed, story.unit)) for seed in weighed]
    known = [(share, name) for share, name in last if math.isfinite(share)]
    if known:
        share, name = max(known)
        summary += f" Last measured, the most is saved by {name}: {share:.1f} %."

    def saved(seed: SeedStory) -> list[Measurement]:
        events = [(visit.step, visit.event) for visit in seed.contributions]
        return [
            (step, _percent(event.contribution_fraction), _percent(event.standard_error_fraction))
            for step, event in events
        ]

    return Chart(
        key="contribution",
        title="What each seed saves",
        summary=summary,
        figure={
            "data": _by_slot(story, saved, unit=" %"),
            "layout": layout_of(y={"title": {"text": "% of the loss"}, "zeroline": True}),
        },
    )


def gradient_chart(story: RunStory) -> Chart | None:
    """Return gradient norms of seeds over the host's; None if none were read."""
    ratios = [visit.ratio for seed in story.seeds for visit in seed.gradient_ratios]
    if not ratios:
        return None

    def read(seed: SeedStory) -> list[Measurement]:
        return [
            (visit.step, visit.ratio if visit.ratio > 0.0 else None, None)
            for visit in seed.gradient_ratios
        ]

    return Chart(
        key="gradient",
        title="Gradients of seeds, over the host's",
        summary=f"Ratio of gradient norms per parameter{_limits(story)}. "
        f"Here from {min(ratios):.3g} to {max(ratios):.3g}.",
        figure={
            "data": _by_slot(story, read, unit=""),
            "layout": layout_of(y=log_axis("ratio", ratios)),
        },
    )


def _limits(story: RunStory) -> str:
    """Return what ratios the gates ask for, as far as one has judged a seed by it."""
    results = (visit.event.result for seed in story.seeds for visit in seed.gates)
    limits = {
        check.comparison: check.threshold
        for result in results
        for check in result.checks
        if check.name == "gradient_ratio"
    }
    if not limits:
        return ""
    low, high = limits[">="], limits["<="]
    return f"; below {low:,g} a seed learns nothing, above {high:,g} it explodes"


def _percent(fraction: float | None) -> float:
    return float("nan") if fraction is None else 100.0 * fraction


def _by_slot(
    story: RunStory, measured: Callable[[SeedStory], Sequence[Measurement]], *, unit: str
) -> list[Trace]:
    """Return a line per slot, with gaps between the lives of its seeds: it holds one at a time."""
    traces = []
    for index, slot in enumerate(story.slots):
        steps: list[int | None] = []
        values: list[float | None] = []
        errors: list[float | None] = []
        names: list[str] = []
        for seed in story.seeds:
            if seed.slot == slot:
                for step, value, error in [*measured(seed), (None, None, None)]:
                    steps.append(step)
                    values.append(value)
                    errors.append(error)
                    names.append(seed_name(seed, story.unit))
        if any(value is not None for value in values):
            turn, place = divmod(index, len(SEED_COLOURS))
            colour, symbol = SEED_COLOURS[place], _SYMBOLS[turn % len(_SYMBOLS)]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": slot,
                    "x": steps,
                    "y": values,
                    "error_y": {"type": "data", "array": errors, "thickness": 1, "width": 0},
                    "customdata": names,
                    "hovertemplate": f"%{{y:.3g}}{unit} at step %{{x}}<br>%{{customdata}}"
                    "<extra></extra>",
                    "line": {"color": colour, "width": 2},
                    "marker": {"size": 5, "color": colour, "symbol": symbol},
                    "showlegend": True,
                }
            )
    return traces

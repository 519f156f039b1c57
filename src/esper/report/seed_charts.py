"""What seeds save, and how they learn."""

from collections.abc import Sequence

from esper.report.chart import SEED_COLOURS, Chart, Trace, layout_of, seed_name
from esper.report.story import RunStory, SeedStory


def contribution_chart(story: RunStory) -> Chart | None:
    """Return what each seed saves of the held-out loss; None if none was weighed."""
    measured = [(seed, seed.contributions) for seed in story.seeds if seed.contributions]
    if not measured:
        return None
    data = []
    for index, (seed, visits) in enumerate(measured):
        percents = [100.0 * visit.event.contribution_fraction for visit in visits]
        errors = [visit.event.standard_error_fraction for visit in visits]
        data.append(
            {
                **_seed_line(seed, index, [visit.step for visit in visits], percents),
                "error_y": {
                    "type": "data",
                    "array": [None if error is None else 100.0 * error for error in errors],
                    "thickness": 1,
                    "width": 0,
                },
                "hovertemplate": "%{y:.1f} % at step %{x}<extra>%{fullData.name}</extra>",
            }
        )
    best = max(measured, key=lambda pair: pair[1][-1].event.contribution_fraction)[0]
    return Chart(
        key="contribution",
        title="What each seed saves",
        summary="Held-out loss that would be lost without the seed, in percent of the loss without "
        "it; bars are one standard error. Last measured, the most is saved by "
        f"{seed_name(best)}: {100.0 * (best.contribution_fraction or 0.0):.1f} %.",
        figure={
            "data": data,
            "layout": layout_of(y={"title": {"text": "% of the loss"}, "zeroline": True}),
        },
    )


def gradient_chart(story: RunStory) -> Chart | None:
    """Return gradient norms of seeds over the host's; None if none were read."""
    read = [(seed, seed.gradient_ratios) for seed in story.seeds if seed.gradient_ratios]
    if not read:
        return None
    data = []
    for index, (seed, visits) in enumerate(read):
        ratios = [visit.ratio if visit.ratio > 0.0 else None for visit in visits]
        line = _seed_line(seed, index, [visit.step for visit in visits], ratios)
        hover = "%{y:.3g} at step %{x}<extra>%{fullData.name}</extra>"
        data.append({**line, "hovertemplate": hover})
    values = [visit.ratio for _, visits in read for visit in visits]
    return Chart(
        key="gradient",
        title="Gradients of seeds, over the host's",
        summary="Ratio of gradient norms per parameter; below 0.0001 a seed learns nothing, above "
        f"1,000 it explodes. Here from {min(values):.3g} to {max(values):.3g}.",
        figure={
            "data": data,
            "layout": layout_of(
                y={"title": {"text": "ratio"}, "type": "log", "exponentformat": "power"}
            ),
        },
    )


def _seed_line(
    seed: SeedStory, index: int, steps: Sequence[int], values: Sequence[float | None]
) -> Trace:
    colour = SEED_COLOURS[index % len(SEED_COLOURS)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": seed_name(seed),
        "x": list(steps),
        "y": list(values),
        "line": {"color": colour, "width": 2},
        "marker": {"size": 5 if len(steps) > 1 else 8, "color": colour},
    }

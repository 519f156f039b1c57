"""The report of a comparison: its verdict, loss against cost, and every arm."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from esper.experiments.comparison.plan import Comparison
from esper.experiments.comparison.summary import ArmSummary, Outcome, judge, summarise
from esper.experiments.comparison.words import notes, rate, reached, spread
from esper.report.chart import SEED_COLOURS, Chart, Trace, layout_of, log_axis, si
from esper.report.cost_charts import Reference
from esper.report.markup import chip, figures, settings_table, table, text, two_lines
from esper.report.page import Section, page

_KINDS = {
    Outcome.PAYS: "good",
    Outcome.PAYS_PER_STEP: "good",
    Outcome.DOES_NOT_PAY: "bad",
    Outcome.UNDECIDED: "warn",
}
_HEIGHT = 460
_NEVER_COLOUR = SEED_COLOURS[0]
_OTHER_COLOURS = (SEED_COLOURS[2], *SEED_COLOURS[1:2], *SEED_COLOURS[3:])


def comparison_report(comparison: Comparison, *, name: str) -> str:
    """Return the report of a comparison as a page of HTML.

    Args:
        comparison: Finished or not.
        name: Of its folder.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    config, summaries, verdict = comparison.config, summarise(comparison), judge(comparison)
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict.reasons)
    lead = f'<section class="card"><h2>Why</h2><ul class="reasons">{reasons}</ul></section>'
    sections = [
        Section(title="Every arm at equal steps", body=_arms(comparison, summaries)),
        Section(
            title="Settings",
            body=settings_table(config.model_dump(mode="json"), caption="Settings"),
            folded=True,
        ),
    ]
    seeds = len(config.random_seeds)
    return page(
        title=comparison_title(comparison),
        heading=f"{escape(config.run.task)} {chip(verdict.outcome, _KINDS[verdict.outcome])}",
        subheading=f"a comparison over {seeds} random seeds · <code>{escape(name)}</code>",
        lead=figures(_key_figures(summaries)) + lead,
        charts=comparison_charts(comparison),
        sections=sections,
    )


def comparison_title(comparison: Comparison) -> str:
    """Return what was compared, and the verdict."""
    return f"{comparison.config.run.task}: {judge(comparison).outcome}"


def comparison_charts(comparison: Comparison) -> list[Chart]:
    """Return the pictures of a comparison; none where no arm has finished with a finite loss."""
    summaries = [s for s in summarise(comparison) if math.isfinite(s.test_loss.mean)]
    return [_flops_chart(summaries), _size_chart(summaries)] if summaries else []


def references_of(comparison: Comparison) -> list[Reference]:
    """Return a comparison's networks to show a run beside; those that diverged are left out."""
    return [
        Reference(
            label=summary.arm,
            param_count=summary.param_count,
            loss=summary.test_loss.mean,
            loss_half_width=summary.test_loss.half_width,
            flops=summary.flops,
            grown=not comparison.never_grows(summary.arm),
        )
        for summary in summarise(comparison)
        if math.isfinite(summary.test_loss.mean)
    ]


def _key_figures(summaries: Sequence[ArmSummary]) -> Iterable[tuple[str, str, str]]:
    for summary in summaries:
        share = (
            ""
            if summary.flops_fraction is None
            else f", {summary.flops_fraction:.2f} of static's FLOPs"
        )
        remark = f"test loss, {summary.param_count:,.0f} parameters{share}"
        yield summary.arm, f"{summary.test_loss.mean:.4f}", remark


def _arms(comparison: Comparison, summaries: Sequence[ArmSummary]) -> str:
    if not summaries:
        return "<p>No arm is finished yet.</p>"
    seeds = len(comparison.config.random_seeds)
    metrics = [name for name in summaries[0].metrics if name != "loss"]
    rows = [
        (
            escape(summary.label(seeds)),
            escape(rate(summary)),
            text(round(summary.param_count)),
            f"{si(summary.flops)}",
            "" if summary.flops_fraction is None else f"{summary.flops_fraction:.2f}",
            f"{summary.seconds:.1f}",
            two_lines(spread(summary.test_loss), " ±"),
            *(two_lines(spread(summary.metrics[name]), " ±") for name in metrics),
            ""
            if summary.difference is None
            else two_lines(spread(summary.difference, signed=True), " ±"),
            two_lines(reached(summary, summary.flops_to_static), " ("),
            two_lines(reached(summary, summary.seconds_to_static), " ("),
        )
        for summary in summaries
    ]
    columns = (
        *("arm", "learning rate", "parameters", "FLOPs", "of static's", "seconds"),
        "test loss",
        *(f"test {name}" for name in metrics),
        *("loss, less static's", "FLOPs to match", "time to match"),
    )
    told = "".join(f'<p class="quiet">{escape(note)}</p>' for note in notes(comparison, summaries))
    numbers = range(1, len(columns))
    return table(columns, rows, caption="Every arm at equal steps", numbers=numbers) + told


def _flops_chart(chosen: Sequence[ArmSummary]) -> Chart:
    data = _arms_over(chosen, lambda summary: summary.flops)
    for summary, colour in _coloured(chosen):
        others = [point for point in summary.curve if math.isfinite(point[1])]
        if len(others) > 1:
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"{summary.arm}, other budgets",
                    "x": [cost for cost, _ in others],
                    "y": [loss for _, loss in others],
                    "line": {"color": colour, "width": 1, "dash": "dot"},
                    "marker": {"size": 5, "color": colour, "symbol": "circle-open"},
                    "hovertemplate": "%{x:.4s} operations, loss %{y:.4g}"
                    "<extra>%{fullData.name}</extra>",
                    "showlegend": False,
                }
            )
    costs = [cost for summary in chosen for cost, _ in [*summary.curve, (summary.flops, 0.0)]]
    x = {"exponentformat": "SI", **log_axis("operations of one run", costs)}
    layout = _frame(chosen, x)
    return Chart(
        key="flops",
        title="Loss against compute",
        summary="Test loss of every arm over the operations of a whole run; each point is a run to "
        "its end, bars are 95 % of the difference to static by seed, dotted lines other budgets.",
        figure={"data": data, "layout": layout},
        wide=True,
    )


def _size_chart(chosen: Sequence[ArmSummary]) -> Chart:
    data = _arms_over(chosen, lambda summary: summary.param_count)
    return Chart(
        key="size",
        title="Loss against size",
        summary="Test loss of every arm over the parameters that it ends with, at equal steps.",
        figure={
            "data": data,
            "layout": _frame(chosen, {"title": {"text": "parameters"}, "exponentformat": "SI"}),
        },
        wide=True,
    )


def _frame(summaries: Sequence[ArmSummary], x: dict[str, object]) -> Trace:
    """Show all means; an interval of few seeds may be many times as wide, and is cut off."""
    losses = [loss for summary in summaries for _, loss in summary.curve if math.isfinite(loss)]
    losses += [summary.test_loss.mean for summary in summaries]
    room = 0.35 * (max(losses) - min(losses) or 1.0)
    y = {"title": {"text": "test loss"}, "range": [min(losses) - room, max(losses) + room]}
    return layout_of(x={**x, "rangemode": "normal"}, y=y, height=_HEIGHT)


def _arms_over(summaries: Sequence[ArmSummary], cost: Callable[[ArmSummary], float]) -> list[Trace]:
    """Return a point per arm; those that never grew are joined, from the smallest on."""
    never = [summary for summary in summaries if Comparison.never_grows(summary.arm)]
    traces = [_points("never grew, by size", never, cost, _NEVER_COLOUR, joined=True)]
    traces += [
        _points(summary.arm, [summary], cost, colour)
        for summary, colour in _coloured(summaries)
        if summary not in never
    ]
    return traces


def _coloured(summaries: Sequence[ArmSummary]) -> Iterable[tuple[ArmSummary, str]]:
    others = iter(_OTHER_COLOURS * len(summaries))
    for summary in summaries:
        never = Comparison.never_grows(summary.arm)
        yield summary, _NEVER_COLOUR if never else next(others)


def _points(
    name: str,
    summaries: Sequence[ArmSummary],
    cost: Callable[[ArmSummary], float],
    colour: str,
    *,
    joined: bool = False,
) -> Trace:
    points = sorted(summaries, key=cost)
    reaches = [s.difference.half_width if s.difference is not None else None for s in points]
    return {
        "type": "scatter",
        "mode": "lines+markers+text" if joined else "markers",
        "name": name,
        "x": [cost(summary) for summary in points],
        "y": [summary.test_loss.mean for summary in points],
        "error_y": {"type": "data", "array": reaches, "thickness": 1.2, "width": 5},
        "text": [summary.arm for summary in points],
        "textposition": "bottom right",
        "textfont": {"size": 12, "color": colour},
        "cliponaxis": False,
        "line": {"color": colour, "width": 1},
        "marker": {"size": 12 if not joined else 9, "color": colour},
        "customdata": [spread(summary.test_loss) for summary in points],
        "hovertemplate": "%{text}: %{x:.4s}, loss %{customdata}<extra></extra>",
    }

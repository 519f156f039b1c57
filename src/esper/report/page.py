"""Self-contained HTML: charts, tables, script and style in one file that needs no network."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

from esper.report.chart import Chart

_PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="esper">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main class="page">
<header>
<h1>$heading</h1>
<p class="quiet">$subheading</p>
</header>
$lead
<section class="charts" id="charts" aria-label="Pictures"></section>
<noscript><p class="card">The pictures need JavaScript; everything below does not.</p></noscript>
$sections
</main>
<script id="charts-data" type="application/json">$charts</script>
<script>$plotly</script>
<script>$script</script>
<script>
esperCharts.draw(
  document.getElementById("charts"),
  JSON.parse(document.getElementById("charts-data").textContent),
);
</script>
</body>
</html>
"""
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page below its charts.

    Attributes:
        body: HTML.
        folded: Only the title is seen at first.
    """

    title: str
    body: str
    folded: bool = False


def page(
    *,
    title: str,
    heading: str,
    subheading: str,
    lead: str,
    charts: Sequence[Chart],
    sections: Sequence[Section],
) -> str:
    """Return a whole page.

    Args:
        title: Plain text.
        heading: HTML.
        subheading: HTML.
        lead: HTML between heading and charts.
        charts: In this order.
        sections: In this order.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    data = json.dumps([chart.as_json() for chart in charts], separators=(",", ":"))
    return _PAGE.substitute(
        title=escape(title),
        heading=heading,
        subheading=subheading,
        lead=lead,
        sections="\n".join(map(_section, sections)),
        charts=data.replace("<", "\\u003c"),
        style=static_file("esper.css"),
        script=static_file("charts.js"),
        plotly=plotly_script(),
    )


def static_file(name: str) -> str:
    """Return a file of this package's static ones."""
    return (files("esper.report") / "static" / name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """Return plotly.js, from the installed package.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs  # noqa: PLC0415 – an optional extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reports need plotly: pip install 'esper-lite[report]'"
        ) from error
    script: str = get_plotlyjs()
    return script


def _section(section: Section) -> str:
    title = escape(section.title)
    if section.folded:
        return (
            f'<section class="card long"><details><summary><h2>{title}</h2></summary>'
            f"{section.body}</details></section>"
        )
    return f'<section class="card long"><h2>{title}</h2>{section.body}</section>'

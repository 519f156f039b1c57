"""What people look at after a run: its story, its report, and its pictures."""

from esper.report.chart import Chart
from esper.report.charts import run_charts
from esper.report.cost_charts import Reference
from esper.report.figure import new_figure
from esper.report.png import draw_charts
from esper.report.run_page import run_report
from esper.report.story import RunStory, SeedStory, StoryTeller, tell

__all__ = [
    "Chart",
    "Reference",
    "RunStory",
    "SeedStory",
    "StoryTeller",
    "draw_charts",
    "new_figure",
    "run_charts",
    "run_report",
    "tell",
]

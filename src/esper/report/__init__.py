"""What people look at after a run: its story, its report, and its pictures."""

from esper.report.chart import Chart
from esper.report.charts import run_charts
from esper.report.cost_charts import Reference
from esper.report.figure import new_figure
from esper.report.png import draw_charts
from esper.report.run_page import run_report
from esper.report.story import RunStory, SeedStory, StoryTeller, tell, tell_run
from esper.report.training_charts import training_charts
from esper.report.training_page import training_report
from esper.report.training_story import TrainingStory, tell_training

__all__ = [
    "Chart",
    "Reference",
    "RunStory",
    "SeedStory",
    "StoryTeller",
    "TrainingStory",
    "draw_charts",
    "new_figure",
    "run_charts",
    "run_report",
    "tell",
    "tell_run",
    "tell_training",
    "training_charts",
    "training_report",
]

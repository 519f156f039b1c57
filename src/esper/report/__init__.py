"""What people look at after a run: its story, and its picture."""

from esper.report.figure import new_figure
from esper.report.picture import draw_run
from esper.report.story import RunStory, SeedStory, tell

__all__ = ["RunStory", "SeedStory", "draw_run", "new_figure", "tell"]

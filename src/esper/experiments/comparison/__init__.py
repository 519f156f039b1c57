"""Whether growth pays: a grown network against every network that never grew."""

from esper.experiments.comparison.config import MIN_SEEDS_FOR_A_CLAIM, CompareConfig
from esper.experiments.comparison.folder import (
    ComparisonFolder,
    holds_comparison,
    read_comparison,
)
from esper.experiments.comparison.page import (
    comparison_charts,
    comparison_report,
    comparison_title,
    references_of,
)
from esper.experiments.comparison.plan import Comparison
from esper.experiments.comparison.runs import RunRequest, RunResult, check_runs
from esper.experiments.comparison.scheduler import Outlook, run_missing
from esper.experiments.comparison.summary import (
    ArmSummary,
    Outcome,
    Verdict,
    at_equal_flops,
    judge,
    summarise,
    tell_bounds,
)

__all__ = [
    "MIN_SEEDS_FOR_A_CLAIM",
    "ArmSummary",
    "CompareConfig",
    "Comparison",
    "ComparisonFolder",
    "Outcome",
    "Outlook",
    "RunRequest",
    "RunResult",
    "Verdict",
    "at_equal_flops",
    "check_runs",
    "comparison_charts",
    "comparison_report",
    "comparison_title",
    "holds_comparison",
    "judge",
    "read_comparison",
    "references_of",
    "run_missing",
    "summarise",
    "tell_bounds",
]

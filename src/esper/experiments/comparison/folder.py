"""A comparison on disk: its settings, and one file per finished run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper.experiments.comparison.config import CompareConfig
from esper.experiments.comparison.plan import Comparison
from esper.experiments.comparison.runs import RunResult
from esper.experiments.series_folder import SeriesFiles, SeriesFolder
from esper.telemetry.run_folder import write_whole

RESULTS_FOLDER = "runs"
SUMMARY_FILE = "summary.json"
PICTURE_FILE = "compare.png"

_FILES = SeriesFiles(
    noun="comparison",
    config=CompareConfig,
    config_file="compare.json",
    run=RunResult,
    run_files=f"{RESULTS_FOLDER}/*.json",
)


class ComparisonFolder(SeriesFolder[CompareConfig, RunResult]):
    """Keeps a comparison.

    Args:
        path: Is created; may hold the same comparison, begun earlier.
        config: Of the comparison.

    Raises:
        SeriesFolderError, SettingsError: As `SeriesFolder`.
    """

    def __init__(self, path: Path, config: CompareConfig) -> None:
        policies = (config.run.policy, *config.policies)
        super().__init__(_FILES, path, config, device=config.run.device, policies=policies)

    @staticmethod
    def config_of(path: Path) -> CompareConfig:
        """Return the settings of the comparison in a folder.

        Raises:
            SeriesFolderError: There is none, or not one that this version can read.
        """
        return _FILES.config_of(path)

    def file_of(self, run: RunResult) -> Path:
        """Return where a finished run is kept."""
        return self.path / RESULTS_FOLDER / f"{run.request.key}.json"

    def made_with(self, run: RunResult) -> tuple[str, str | None]:
        """Return the policy that decided in a run, and the SHA-256 of its file if it has one."""
        return run.request.policy, run.policy_sha256

    def is_complete(self, runs: Sequence[RunResult]) -> bool:
        """Return whether no run is missing besides these."""
        return not Comparison(self.config, runs).missing()

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write the figures of the table as JSON."""
        write_whole(self.path / SUMMARY_FILE, json.dumps(summary, indent=2, allow_nan=False))

    @property
    def picture(self) -> Path:
        """Where the picture goes."""
        return self.path / PICTURE_FILE


def holds_comparison(path: Path) -> bool:
    """Whether a comparison was begun in a folder."""
    return _FILES.begun_in(path)


def read_comparison(path: Path) -> Comparison:
    """Return the comparison in a folder as far as it has come, whatever machine made it.

    Raises:
        SeriesFolderError: There is none, a file is damaged, or of another version.
    """
    return Comparison(_FILES.config_of(path), _FILES.runs_in(path))

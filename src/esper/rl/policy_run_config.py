"""What the training of a policy can be told."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from esper.experiments.config import RunConfig, SharedRunConfig, load_run_config
from esper.experiments.settings import (
    SettingsError,
    explain,
    key_of,
    known_keys,
    merge,
    parse_setting,
    read_settings,
)
from esper.lifecycle.record import Record
from esper.policies.learned import ActionChoices, NetworkConfig, ObservationConfig
from esper.rl.demonstrations import DemonstrationConfig
from esper.rl.policy_training import PolicyTrainingConfig
from esper.rl.rewards import RewardConfig
from esper.telemetry.run_kind import POLICY_TRAINING
from esper.telemetry.run_reader import RunReader


class EpisodeConfig(Record):
    """Which runs are episodes, and what they are measured against."""

    num_runs: Annotated[int, Field(ge=1)] = 32
    """How many different runs there are, by random seed. They are other ones than those that
    policies are evaluated with by default, 0 to 4, where `first_random_seed` is left as it is."""
    first_random_seed: Annotated[int, Field(ge=0, lt=2**32)] = 1000
    referenced: bool = True
    """Whether the return is what growth has brought beyond the same run without it. Runs differ
    more by their seeds than by what is decided; each worker makes each reference once."""


class PolicyRunConfig(Record):
    """Everything that the training of a policy can be told; in config.json of its folder."""

    run: SharedRunConfig
    """Of the runs that are its episodes, but for the random seed."""
    training: PolicyTrainingConfig = PolicyTrainingConfig()
    episodes: EpisodeConfig = EpisodeConfig()
    rewards: RewardConfig = RewardConfig()
    network: NetworkConfig = NetworkConfig()
    observation: ObservationConfig = ObservationConfig()
    actions: ActionChoices = ActionChoices()
    demonstrations: DemonstrationConfig | None = None
    """What is imitated first; None begins with a policy that knows nothing."""
    ray: str | None = None
    """Address of the Ray cluster that the environments run on, "local" for one of this machine;
    None runs them in processes of this machine."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.training.gamma != self.rewards.gamma:
            raise ValueError(
                f"training.gamma is {self.training.gamma}, and rewards.gamma {self.rewards.gamma}: "
                "shaping leaves what is best as it is with the learner's own discount only; set "
                "both alike"
            )
        if self.rewards.compute_rent > 0.0 and not self.run.count_flops:
            raise ValueError(
                "rewards.compute_rent is paid for operations, which are not counted; add "
                "count_flops=true"
            )
        return self

    @property
    def demonstrated(self) -> Self:
        """The same with the runs that are demonstrated, which follow those that are learned from.

        As many as episodes, since a policy that draws nothing plays a run the same each time.
        """
        episodes, shown = self.episodes, self.demonstrations
        num_runs = 1 if shown is None else shown.num_episodes
        first = episodes.first_random_seed + episodes.num_runs
        return self._with_episodes(num_runs=num_runs, first_random_seed=first)

    @property
    def unreferenced(self) -> Self:
        """The same without references, for an environment that plays nothing."""
        return self._with_episodes(referenced=False)

    def _with_episodes(self, **changes: Any) -> Self:
        episodes = self.episodes.model_copy(update=changes)
        return self.model_copy(update={"episodes": episodes})


SECTIONS = tuple(name for name in PolicyRunConfig.model_fields if name != "run")
"""Of settings; every other key is one of the runs."""


def load_policy_run_config(
    task: str, file: Path | None, settings: Sequence[str], options: Mapping[str, Any]
) -> PolicyRunConfig:
    """Merge the task's defaults, a TOML file, `key=value` settings and options, later ones last.

    A key that begins with one of `SECTIONS` is of the training, any other of its runs. Operations
    are not counted unless asked for, as counting takes time.

    Raises:
        SettingsError: As `esper.experiments.load_run_config`.
    """
    of_runs, mine = _split(settings)
    chosen: dict[str, Any] = {}
    merged: dict[str, Any] = {"training": {"num_workers": os.cpu_count() or 1}}
    if file is not None:
        for key, value in read_settings(file).items():
            _check_section(key)
            merge(merged if key in SECTIONS else chosen, {key: value})
    for setting in of_runs:  # over the file's
        merge(chosen, parse_setting(setting, RunConfig))
    for setting in mine:
        merge(merged, parse_setting(setting, PolicyRunConfig))
    merge(merged, {key: value for key, value in options.items() if key in SECTIONS})
    merge(chosen, {key: value for key, value in options.items() if key not in SECTIONS})
    run = load_run_config(task, None, ["count_flops=false", *of_runs], chosen)
    try:
        return PolicyRunConfig.model_validate({**merged, "run": run})
    except ValidationError as error:
        raise SettingsError(explain(error, PolicyRunConfig)) from error


def _split(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which settings are of the runs, and which of the training."""
    of_runs: list[str] = []
    mine: list[str] = []
    for setting in settings:
        key = key_of(setting)
        _check_section(key)
        (mine if key.split(".")[0] in SECTIONS else of_runs).append(setting)
    return of_runs, mine


def _check_section(key: str) -> None:
    """Raise if a key is neither of a training nor of its runs: each alone knows half of them."""
    sections = {*SECTIONS, *RunConfig.model_fields}
    if key.split(".", maxsplit=1)[0] in sections:
        return
    mine = [name for name in known_keys(PolicyRunConfig) if not name.startswith("run.")]
    known = [*mine, *known_keys(RunConfig), *sections]
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise SettingsError(f"unknown key {key!r}{hint}")


def policy_run_config(folder: Path, *, total_steps: int | None = None) -> PolicyRunConfig:
    """Return the settings of the training in a folder.

    Args:
        folder: Of the training.
        total_steps: Up to where it is to go on; None is as it was begun.

    Raises:
        RunFolderError: It is no folder of a run.
        SettingsError: It holds no training of a policy, or one of another version.
    """
    kept = RunReader(folder).config()
    if POLICY_TRAINING not in kept:
        raise SettingsError(
            f"{folder} holds a run of {kept.get('task')}, and no training of a policy; go on with "
            "it by esper resume"
        )
    try:
        config = PolicyRunConfig.model_validate(kept[POLICY_TRAINING])
    except ValidationError as error:
        raise SettingsError(f"{folder} is of another version: {error}") from error
    if total_steps is None:
        return config
    training = config.training.model_copy(update={"total_steps": total_steps})
    return config.model_copy(update={"training": training})

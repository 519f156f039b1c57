"""The runs of a task as episodes."""

from dataclasses import dataclass

from esper.experiments.config import RunConfig
from esper.experiments.run import build_setup, prepare
from esper.rl.growth_episode import DecidedOutside, HostRun
from esper.training.policy import Policy


@dataclass(frozen=True)
class TaskRuns:
    """Makes a run of a task from a random seed, as `esper grow` would begin it.

    The end is evaluated on the task's selection data, or where there is none on its validation
    data; never on the test split, which is for the final figures of finished policies.

    Attributes:
        config: Of all runs, but for the random seed and the policy.
    """

    config: RunConfig

    def __call__(self, random_seed: int, policy: Policy | None = None) -> HostRun:
        """Return a fresh run.

        Args:
            random_seed: Fixes the host's weights and the order of the data.
            policy: Says what is to be weighed; None is `DecidedOutside`.

        Raises:
            SettingsError, TaskDataError, ModuleNotFoundError: As `esper.experiments.prepare`.
        """
        config = self.config.model_copy(update={"random_seed": random_seed})
        setup = build_setup(config)
        run = prepare(
            config, run_id=f"episode-{random_seed}", setup=setup, policy=policy or DecidedOutside()
        )
        return HostRun(trainer=run.trainer, final=setup.selection or setup.validation)

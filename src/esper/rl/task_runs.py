"""The runs of a task as episodes."""

from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from esper.experiments.config import RunConfig
from esper.experiments.run import build_setup, prepare
from esper.experiments.settings import SettingsError, explain
from esper.rl.growth_episode import DecidedOutside, HostRun, Reference, reference_of
from esper.training.random_states import random_streams_apart


@dataclass(frozen=True)
class TaskRuns:
    """Makes a run of a task from a random seed, as `esper grow` would begin it.

    The end is evaluated on the task's selection data, or where there is none on its validation
    data; never on the test split, which is for the final figures of finished policies.

    Attributes:
        config: Of all runs, but for the random seed and the policy.
        first_random_seed: What random seed 0 stands for; others follow.
        num_runs: How many different ones there are, the seed counting modulo that; None: as many as
            there are random seeds.
        referenced: Whether each is measured against itself without growth. That run is made when it
            is first needed, and remembered, so it wants a small `num_runs`.
    """

    config: RunConfig
    first_random_seed: int = 0
    num_runs: int | None = None
    referenced: bool = False
    _references: dict[int, Reference | None] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __call__(self, random_seed: int) -> HostRun:
        """Return a fresh run.

        Args:
            random_seed: Fixes the host's weights and the order of the data.

        Raises:
            SettingsError, TaskDataError, ModuleNotFoundError: As `esper.experiments.prepare`.
            ValueError: As `reference_of`, if it is referenced.

        Effects: seeds the process's random streams, as `esper grow` does: the run and the one that
        it is measured against draw the same from there.
        """
        if self.num_runs is not None:
            random_seed %= self.num_runs
        random_seed += self.first_random_seed
        run = self._fresh(random_seed)
        return replace(run, reference=self._reference(random_seed)) if self.referenced else run

    def _fresh(self, random_seed: int) -> HostRun:
        config = self.config.model_copy(update={"random_seed": random_seed})
        setup = build_setup(config)
        run = prepare(config, setup=setup, policy=DecidedOutside())
        return HostRun(trainer=run.trainer, final=setup.selection or setup.validation)

    def _reference(self, random_seed: int) -> Reference | None:
        if random_seed not in self._references:
            with random_streams_apart():  # it draws what the run itself will draw
                self._references[random_seed] = reference_of(self._fresh(random_seed))
        return self._references[random_seed]


def check_policy(policy: str, config: RunConfig) -> None:
    """Begin a run, so that what the policy could not carry out is told before any is made.

    Args:
        policy: By name, or a file.
        config: Of all runs, but for the policy.

    Raises:
        SettingsError: There is no such policy, or it cannot decide for these runs.
        TaskDataError, ModuleNotFoundError: As `esper.experiments.prepare`.

    Effects: sets the process's matmul precision.
    """
    try:
        run = RunConfig.model_validate({**config.model_dump(), "policy": policy})
    except ValidationError as error:
        raise SettingsError(f"{policy}: {explain(error, RunConfig)}") from error
    with random_streams_apart():
        prepare(run)

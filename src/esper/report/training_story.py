"""What became of the training of a policy, rollout by rollout."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from esper.lifecycle.events import EnvironmentRestarted, EventRecord, RunFailed
from esper.telemetry.run_kind import training_settings
from esper.telemetry.run_reader import MetricRow, RunReader

TRAINING_WORDS = "learning a policy"
"""What a training is called where runs are named by their policy."""

RETURN, PART, FINAL = "mean_return", "return/", "final/"
_OF_EPISODES = (RETURN, "mean_episode_steps", PART, FINAL)
_WINDOW_ROLLOUTS = 5
_WINDOWS = 20
_NOTHING = 1e-9
"""A component that never is above it is not in use: progress sums to rounding errors."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What was measured of one rollout.

    Attributes:
        number: From 1.
        timesteps: Decisions so far, this rollout's included.
        values: Finite ones, by name.
    """

    number: int
    timesteps: int
    values: dict[str, float]


@dataclass(kw_only=True)
class TrainingStory:
    """A training that may still be going on, told as its rows come in.

    Attributes:
        settings: Of the training, from config.json.
        restarts: Of environments, with why.
        last_failure: The error that it ended by, of which its folder's status tells whether it has
            gone on since; None if there was none.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    restarts: list[tuple[EventRecord, EnvironmentRestarted]] = field(default_factory=list)
    last_failure: str | None = None
    _rollouts: dict[int, Rollout] = field(default_factory=dict)

    def take(self, record: EventRecord) -> None:
        """Go on with one event."""
        if isinstance(record.event, EnvironmentRestarted):
            self.restarts.append((record, record.event))
        elif isinstance(record.event, RunFailed):
            self.last_failure = record.event.error

    def take_values(self, rows: Iterable[MetricRow]) -> None:
        """Go on with values, oldest first."""
        for row in rows:
            if math.isfinite(row.value):
                rollout = self._rollouts.get(row.epoch)
                if rollout is None:
                    rollout = Rollout(number=row.epoch, timesteps=row.step, values={})
                    self._rollouts[row.epoch] = rollout
                rollout.values[row.name] = row.value

    @property
    def rollouts(self) -> list[Rollout]:
        """Every rollout, oldest first."""
        return list(self._rollouts.values())

    @property
    def timesteps(self) -> int:
        """Decisions so far."""
        return max((rollout.timesteps for rollout in self._rollouts.values()), default=0)

    @property
    def planned_steps(self) -> int | None:
        """Decisions that there are to be; a training that goes on may have been told of more."""
        for rollout in reversed(self._rollouts.values()):
            if "total_steps" in rollout.values:
                return planned_steps(self.settings, asked=round(rollout.values["total_steps"]))
        return planned_steps(self.settings)

    @property
    def window(self) -> int:
        """Rollouts that a mean is taken over: 5 or a 20th of all, but no more than half."""
        number = len(self._rollouts)
        return min(max(1, number // 2), max(_WINDOW_ROLLOUTS, number // _WINDOWS))

    @property
    def names(self) -> list[str]:
        """What was measured, in the order in which it came."""
        return list(dict.fromkeys(n for r in self._rollouts.values() for n in r.values))

    @property
    def parts(self) -> list[str]:
        """Components of the return that are in use."""
        return [
            name
            for name in self.names
            if name.startswith(PART)
            and any(abs(r.values.get(name, 0.0)) > _NOTHING for r in self._rollouts.values())
        ]

    @property
    def finals(self) -> list[str]:
        """What was measured at the end of episodes, besides the return."""
        names = [name for name in self.names if name.startswith(FINAL)]
        return [name for name in names if name != f"{FINAL}return"]

    def sum_of(self, name: str) -> float:
        """Return the sum of a value over all rollouts."""
        return math.fsum(rollout.values.get(name, 0.0) for rollout in self._rollouts.values())

    def first_and_last(self, name: str) -> tuple[float, float] | None:
        """Return means over the first and over the last window; None if it was not measured."""
        measured = [rollout for rollout in self.rollouts if name in rollout.values]
        first = mean_of(measured[: self.window], name)
        last = mean_of(measured[-self.window :], name)
        return None if first is None or last is None else (first, last)


def planned_steps(settings: Mapping[str, Any], *, asked: int | None = None) -> int | None:
    """Return how many decisions a training makes, as it makes whole rollouts only.

    Args:
        settings: Of the training, from config.json.
        asked: Decisions that it was told to make; None is as it was begun.

    Returns:
        None if the settings do not tell.

    >>> training = {"total_steps": 64, "num_workers": 1, "steps_per_fragment": 128}
    >>> planned_steps({"training": training}), planned_steps({"training": training}, asked=129)
    (128, 256)
    """
    names = ("total_steps", "num_workers", "steps_per_fragment")
    total, workers, steps = (setting(settings, "training", name) for name in names)
    total = total if asked is None else asked
    known = all(isinstance(number, int) and number > 0 for number in (total, workers, steps))
    return math.ceil(total / (workers * steps)) * workers * steps if known else None


def tell_training(reader: RunReader) -> TrainingStory:
    """Return the story of the training in a folder.

    Raises:
        EventSchemaError: An event was written by another version.
        RunFolderError: The folder is damaged.
    """
    story = TrainingStory(settings=training_settings(reader.config()) or {})
    for record in reader.events():
        story.take(record)
    story.take_values(reader.metrics())
    return story


def mean_of(rollouts: Sequence[Rollout], name: str) -> float | None:
    """Return the mean of a value; each episode counts alike, else each rollout.

    Args:
        rollouts: Those that the value was not measured in are left out.
        name: Of the value.

    Returns:
        None if it was measured in none.
    """
    measured = [rollout for rollout in rollouts if name in rollout.values]
    if not measured:
        return None
    weights = [_weight(rollout, name) for rollout in measured]
    weighed = [w * r.values[name] for w, r in zip(weights, measured, strict=True)]
    return math.fsum(weighed) / math.fsum(weights)


def running_means(
    rollouts: Sequence[Rollout], name: str, *, window: int
) -> list[tuple[int, float]]:
    """Return `mean_of` over each `window` rollouts in a row, with the last one's decisions.

    The first mean is that of the first whole window.
    """
    measured = [rollout for rollout in rollouts if name in rollout.values]
    weights = [_weight(rollout, name) for rollout in measured]
    weighed = [w * r.values[name] for w, r in zip(weights, measured, strict=True)]
    counts, sums = [0.0, *accumulate(weights)], [0.0, *accumulate(weighed)]
    return [
        (
            measured[end - 1].timesteps,
            (sums[end] - sums[end - window]) / (counts[end] - counts[end - window]),
        )
        for end in range(window, len(measured) + 1)
    ]


def _weight(rollout: Rollout, name: str) -> float:
    of_episodes = name.startswith(_OF_EPISODES)
    return max(1.0, rollout.values.get("episodes", 1.0)) if of_episodes else 1.0


def training_facts(config: Mapping[str, Any]) -> list[str]:
    """Return in a few words each how a training was set up, of what its config.json tells."""
    settings = training_settings(config) or {}
    trainer = setting(settings, "run", "trainer")
    epochs, interval = setting(trainer, "epochs"), setting(trainer, "decision_interval_steps")
    workers = setting(settings, "training", "num_workers")
    steps = setting(settings, "training", "steps_per_fragment")
    shown = setting(settings, "demonstrations", "policy")
    facts = {
        f"runs of {epochs} epochs": epochs,
        f"a decision every {interval} steps": interval,
        f"{workers} x {steps} decisions a rollout": workers and steps,
        f"after imitating {shown}": shown,
        f"random seed {config.get('random_seed')}": config.get("random_seed"),
        f"learning rate {config.get('learning_rate')}": config.get("learning_rate"),
    }
    return [words for words, known in facts.items() if known is not None]


def setting(settings: object, *path: str) -> Any:
    """Return a nested setting, or None if there is none."""
    for key in path:
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings


def several(number: int, one: str) -> str:
    """Return so many of something in words.

    >>> several(1, "rollout"), several(1200, "rollout")
    ('1 rollout', '1,200 rollouts')
    """
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def words_of(name: str) -> str:
    """Return a value's name as people read it: "parameter rent" for "return/parameter_rent"."""
    plain = name.removeprefix(PART).removeprefix(FINAL)
    words = {"param_count": "parameters", "committed": "seeds committed"}
    return words.get(plain, plain.replace("_", " "))

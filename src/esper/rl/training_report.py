"""What a rollout, and the learning from it, came to."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Self

from esper.lifecycle.record import Record
from esper.rl.distributed_ppo import Rollout


class TrainingReport(Record):
    """What one rollout, and the learning from it, came to."""

    rollout: int
    """From 1."""
    timesteps: int
    """So far, of all environments."""
    total_steps: int
    """As was asked for; the last rollout may go beyond."""
    episodes: int
    """That ended in this rollout."""
    mean_return: float | None
    """Of them; None if there was none."""
    mean_episode_steps: float | None
    return_parts: dict[str, float]
    """Means over them of the reward's components, summed over each."""
    final: dict[str, float]
    """Means over them of the numbers in the last step's `info["final"]`."""
    entropy: float
    approx_kl: float
    """Between the policy before and after the last pass."""
    clip_fraction: float
    policy_loss: float
    value_loss: float
    explained_variance: float
    restarts: int
    """Of workers, so far in this process."""
    problems: tuple[str, ...] = ()
    """Why workers were started again, episodes could not begin, or a state could not be kept, in
    this rollout."""
    collect_seconds: float
    seconds: float
    """Of collecting and learning."""
    steps_per_second: float

    @classmethod
    def of(cls, rollout: Rollout, learned: Mapping[str, Any], **known: Any) -> Self:
        """Return the report of a rollout.

        Args:
            rollout: What was collected.
            learned: What the library has logged of learning from it.
            known: The other fields.
        """
        episodes = rollout.episodes
        return cls(
            rollout=rollout.number + 1,
            episodes=len(episodes),
            mean_return=_mean([episode.episode_return for episode in episodes]),
            mean_episode_steps=_mean([episode.num_steps for episode in episodes]),
            return_parts=_means([episode.return_parts for episode in episodes]),
            final=_means([episode.final for episode in episodes]),
            entropy=-float(learned["train/entropy_loss"]),
            approx_kl=float(learned["train/approx_kl"]),
            clip_fraction=float(learned["train/clip_fraction"]),
            policy_loss=float(learned["train/policy_gradient_loss"]),
            value_loss=float(learned["train/value_loss"]),
            explained_variance=float(learned["train/explained_variance"]),
            collect_seconds=rollout.seconds,
            **known,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Every number of it by name, parts as `return/NAME`, final values as `final/NAME`."""
        dump = self.model_dump()
        parts = {f"return/{name}": value for name, value in dump.pop("return_parts").items()}
        final = {f"final/{name}": value for name, value in dump.pop("final").items()}
        numbers = {name: float(value) for name, value in dump.items() if isinstance(value, Real)}
        return {**numbers, **parts, **final}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _means(named: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means of what is a number, over those that have it."""
    values: dict[str, list[float]] = {}
    for mapping in named:
        for name, value in mapping.items():
            if isinstance(value, Real):
                values.setdefault(name, []).append(float(value))
    return {name: sum(found) / len(found) for name, found in values.items()}

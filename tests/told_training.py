"""A training of a policy that nobody made: its folder is written as a real one writes it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from esper.lifecycle.events import EnvironmentRestarted, EventRecord
from esper.rl.training_report import TrainingReport
from esper.telemetry import RunStore
from esper.telemetry.run_kind import POLICY_TRAINING

STEPS = 80
"""Decisions of a rollout."""
TOTAL = 800
CONFIG: Mapping[str, Any] = {
    "task": "digits",
    "policy": "being learned",
    "random_seed": 3,
    "learning_rate": 0.0003,
    POLICY_TRAINING: {
        "run": {"trainer": {"epochs": 40, "decision_interval_steps": None}},
        "training": {"total_steps": TOTAL, "num_workers": 2, "steps_per_fragment": 40},
        "demonstrations": {"policy": "heuristic"},
    },
}


def report(number: int, *, episodes: int = 2, gain: float = 0.1, **changed: Any) -> TrainingReport:
    """Return the report of a rollout whose return is `gain` above the one before it."""
    terminal = 1.0 + gain * number
    told = {
        "rollout": number,
        "timesteps": STEPS * number,
        "total_steps": TOTAL,
        "episodes": episodes,
        "mean_return": terminal - 0.25,
        "mean_episode_steps": 40.0,
        "return_parts": {"terminal": terminal, "parameter_rent": -0.25, "diverged": 0.0},
        "final": {"loss": 0.5 / number, "accuracy": 0.9, "committed": 1.5, "return": 1.0},
        "entropy": 2.0 / number,
        "approx_kl": 0.01,
        "clip_fraction": 0.1,
        "policy_loss": -0.02,
        "value_loss": 0.1,
        "explained_variance": 1.0 - 1.0 / number,
        "restarts": 0,
        "collect_seconds": 9.0,
        "seconds": 10.0,
        "steps_per_second": STEPS / 10.0,
    }
    return TrainingReport.model_validate({**told, **changed})


def no_episode(number: int) -> TrainingReport:
    """Return the report of a rollout in which no episode has ended."""
    return report(
        number,
        episodes=0,
        mean_return=None,
        mean_episode_steps=None,
        return_parts={},
        final={},
        explained_variance=float("nan"),
    )


def tell(store: RunStore, told: TrainingReport, *problems: str) -> None:
    """Write a rollout, and the restarts in it."""
    store.measure(told.rollout, told.timesteps, told.metrics)
    for number, problem in enumerate(problems, start=1):
        event = EnvironmentRestarted(reason=problem, num_restarts=number)
        place = {"epoch": told.rollout, "step": told.timesteps}
        store.publish(EventRecord(time_seconds=1e9 + told.rollout, event=event, **place))


def begin(folder: Path, **config: Any) -> RunStore:
    return RunStore(
        folder,
        config={**CONFIG, **config},
        environment={"device": "cpu", "packages": {"torch": "2.13"}},
    )


def write_training(
    folder: Path,
    reports: Sequence[TrainingReport] | int = 10,
    *,
    restarts: Mapping[int, str] = MappingProxyType({}),
    **config: Any,
) -> None:
    """Write a whole training.

    Args:
        folder: Of it.
        reports: Of its rollouts, or how many there are.
        restarts: Why an environment was restarted, by rollout.
        config: Other settings than those of `CONFIG`.
    """
    store = begin(folder, **config)
    if isinstance(reports, int):
        reports = [report(number) for number in range(1, reports + 1)]
    for told in reports:
        tell(store, told, *([restarts[told.rollout]] if told.rollout in restarts else []))
    store.set_status("finished")
    store.close()

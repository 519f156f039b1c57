"""One episode: a training run, stopped at each decision, with a reward for what was decided."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from esper.lifecycle.actions import Action, GrowthState
from esper.lifecycle.events import Event, EventRecord, RewardGiven, RunWentBack
from esper.policies.tending import asked_to_be_weighed
from esper.rl.rewards import (
    Episode,
    Reward,
    RewardConfig,
    Standing,
    step_reward,
    terminal_reward,
)
from esper.training.held_out import Evaluate, metrics_of
from esper.training.safeguard import TrainingDivergedError
from esper.training.trainer import DecisionDue, EpochReport, Trainer


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What became of the same run without growth.

    Attributes:
        losses: Held-out loss at each decision.
        final_loss: As the episode's own end is evaluated.
    """

    losses: tuple[float, ...]
    final_loss: float


@dataclass(frozen=True, kw_only=True)
class HostRun:
    """A training run for an episode, which nobody has begun to train.

    Attributes:
        trainer: With a growth whose `max_epochs` is set. Its policy says what is to be weighed, and
            is never asked to decide: `DecidedOutside` where there is none.
        final: Evaluates the network at the end, best on data that no decision has seen; the reward
            of the whole run hangs on it.
        reference: What rewards are measured against, so that the return of a run is what growth has
            brought; runs differ much more by their seeds. None takes the loss at the first
            decision.
    """

    trainer: Trainer
    final: Evaluate
    reference: Reference | None = None


MakeHostRun = Callable[[int], HostRun]
"""Random seed of the run to a fresh run; the same seed makes the same one."""


class DecidedOutside:
    """The policy of a run that somebody else decides for."""

    name = "outside"
    reads_losses = True

    def weighs(self, state: GrowthState) -> Sequence[str]:
        """Return every slot whose next gate may ask."""
        return asked_to_be_weighed(state)

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Refuse.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "this run is decided for from outside: take its decisions at trainer.stops(), and pass "
            "them to growth.conclude(actions)"
        )


def reference_of(run: HostRun) -> Reference | None:
    """Train a run without growth, and return what became of it.

    Returns:
        None if it diverges on the way, or has lost a decision by going back: then it is not known
        what each decision's loss would have been.

    Raises:
        ValueError: As `GrowthEpisode` and its `play`.
    """
    episode = GrowthEpisode(run, RewardConfig())
    while not episode.over:
        episode.play([])
    losses = tuple(episode.growth.losses)
    planned = episode.growth.max_epochs
    if episode.diverged or len(losses) != planned or not all(map(math.isfinite, losses)):
        return None
    return Reference(losses=losses, final_loss=episode.final_metrics["loss"])


class GrowthEpisode:
    """Plays a run decision by decision; the first one is due when it is made.

    Args:
        run: Fresh.
        rewards: What decisions are weighed by.

    Raises:
        ValueError: It is not known how many decisions the run has, its first held-out loss is not
            finite or not positive, or operations are to be paid for and are not counted.

    Effects: trains up to the first decision.
    """

    def __init__(self, run: HostRun, rewards: RewardConfig) -> None:
        self.growth = run.trainer.growth
        if self.growth.max_epochs is None:
            raise ValueError(
                "an episode must know how many decisions its run has; pass it: "
                "esper.Growth(…, max_epochs=…)"
            )
        if rewards.compute_rent > 0.0 and self.growth.meter.cost.training.flops is None:
            raise ValueError(
                f"compute_rent is {rewards.compute_rent}, and operations are not counted; count "
                "them (count_flops=true, or esper.Growth(…, count_flops=True)), or set it to 0"
            )
        self.rewards = rewards
        self.over = False
        """No decision is left."""
        self.diverged = False
        self.final_metrics: Mapping[str, float] = {}
        """Of the network at its end, without seeds that lived on uncommitted."""
        self.caused: list[Event] = []
        """What has happened since the last decision was due."""
        self._run = run
        self._stops: Iterator[EpochReport | DecisionDue] = run.trainer.stops()
        self._flops_before = self._steps_before = 0
        self._host_step_flops: float | None = None
        self.growth.sinks.append(_Heard(self.caused))
        if not self._train():
            raise ValueError(
                "the host's run came to its end, or diverged, before its first decision; give it "
                "more steps, or a smaller learning rate"
            )
        first = self.growth.losses[-1]
        if not (math.isfinite(first) and first > 0.0):
            raise ValueError(
                f"the host's first held-out loss must be finite and above 0, got {first}: rewards "
                "are measured by its logarithm; give it a smaller learning rate if it diverged, or "
                "another loss"
            )
        reference = run.reference
        self._episode = Episode(
            num_decisions=self.growth.max_epochs,
            host_param_count=self.state.host_param_count,
            reference_loss=first if reference is None else reference.final_loss,
        )
        self._standing = self._measured()

    @property
    def state(self) -> GrowthState:
        """What there is to decide by."""
        return self.growth.state()

    def play(self, actions: Sequence[Action]) -> Reward:
        """Carry out actions, in this order, train on to the next decision, and weigh what came.

        Raises:
            ValueError: A measurement is one that no reward can be made of; its component is named.
            RuntimeError: The episode is over.
        """
        if self.over:
            raise RuntimeError("the episode is over; begin another one")
        before, operations = self._standing, [action.operation for action in actions]
        self.caused.clear()
        self.growth.conclude(actions)
        goes_on = self._train() and math.isfinite(self.growth.losses[-1])
        self._standing = self._measured()
        if goes_on:
            reward = step_reward(self.rewards, self._episode, before, operations, self._standing)
        else:
            self.over = True
            reward = terminal_reward(
                self.rewards,
                self._episode,
                before,
                operations,
                self._standing,
                final_loss=self._final_loss(),
            )
        self.growth.publish([RewardGiven(components=reward.components, total=reward.total)])
        return reward

    def _train(self) -> bool:
        """Train up to the next decision; return whether there is one."""
        try:
            return any(isinstance(stop, DecisionDue) for stop in self._stops)
        except TrainingDivergedError:
            self.diverged = True
            return False

    def _measured(self) -> Standing:
        growth, cost = self.growth, self.growth.meter.cost.training
        fractions = []
        for slot in growth.slots.values():
            if slot.living is not None:
                fractions.append(slot.measurements.contribution_fraction)
            fractions += [seed.contribution_fraction for seed in slot.committed]
        flops = host_flops = None
        steps = growth.step - self._steps_before
        for event in self.caused:
            if isinstance(event, RunWentBack):  # what was thrown away was paid for
                steps += event.from_step - event.to_step
        if cost.flops is not None and steps > 0:
            flops = float(cost.flops - self._flops_before)
            if self._host_step_flops is None:  # nothing has grown yet
                self._host_step_flops = flops / steps
            host_flops = self._host_step_flops * steps
            self._flops_before, self._steps_before = cost.flops, growth.step
        elif self._host_step_flops is not None:  # it diverged at once: no step, and no rent
            flops = host_flops = self._host_step_flops
        reference = self._run.reference
        return Standing(
            held_out_loss=growth.losses[-1],
            reference_loss=None if reference is None else reference.losses[growth.epoch - 1],
            contribution_fractions=tuple(
                share for share in fractions if share is not None and math.isfinite(share)
            ),
            param_count=growth.state().param_count,
            flops=flops,
            host_flops=host_flops,
        )

    def _final_loss(self) -> float:
        """Evaluate the network at its end, without living seeds; NaN if it has diverged."""
        if not math.isfinite(self.growth.losses[-1]):
            self.diverged = True
        if self.diverged:
            return math.nan
        with self.growth.slots.as_committed():
            self.final_metrics = metrics_of(self._run.final())
        self.diverged = not math.isfinite(self.final_metrics["loss"])
        return self.final_metrics["loss"]


class _Heard:
    """A sink that keeps events in a list."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def publish(self, record: EventRecord) -> None:
        self._events.append(record.event)

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass

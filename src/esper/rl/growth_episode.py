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


class DivergedAtOnceError(ValueError):
    """A run has diverged before its first decision, so that there is no episode of it."""


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
        None if it diverges, be it before its first decision, or has lost a decision by going back:
        then it is not known what each decision's loss would have been. None too if a loss is not
        above 0, of which there is no logarithm.

    Raises:
        ValueError: As `GrowthEpisode`.
    """
    try:
        episode = GrowthEpisode(run, RewardConfig())
    except DivergedAtOnceError:
        return None
    while not episode.over:
        episode.train_on([])
    if episode.diverged or len(episode.growth.losses) != episode.growth.max_epochs:
        return None
    reference = Reference(
        losses=tuple(episode.growth.losses), final_loss=episode.final_metrics["loss"]
    )
    return reference if min(*reference.losses, reference.final_loss) > 0.0 else None


class GrowthEpisode:
    """Plays a run decision by decision; the first one is due when it is made.

    Args:
        run: Fresh.
        rewards: What decisions are weighed by.

    Raises:
        DivergedAtOnceError: The run has diverged, or its first held-out loss is not finite.
        ValueError: It is not known how many decisions the run has, it has none, its first held-out
            loss is not positive, or operations are to be paid for and are not counted.

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
        """No decision is left, or none can be made any more, since carrying out one has raised."""
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
        first = self._first_loss()
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

    @property
    def loss(self) -> float:
        """Held-out loss at the last decision; NaN if the run has gone back to before its first."""
        losses = self.growth.losses
        return losses[-1] if losses else math.nan

    def play(self, actions: Sequence[Action]) -> Reward:
        """Carry out actions, in this order, train on to the next decision, and weigh what came.

        Raises:
            ValueError: A measurement is one that no reward can be made of; its component is named.
            RuntimeError: The episode is over.

        Effects: the episode is over if this raises anything.
        """
        before = self._standing
        goes_on = self.train_on(actions)
        self.over = True  # until all has gone well
        self._standing = self._measured()
        operations = [action.operation for action in actions]
        weighed = self.rewards, self._episode, before, operations, self._standing
        if goes_on:
            reward = step_reward(*weighed)
        else:
            final_loss = self.final_metrics.get("loss", math.nan)
            reward = terminal_reward(*weighed, final_loss=final_loss)
        self.growth.publish([RewardGiven(components=reward.components, total=reward.total)])
        self.over = not goes_on
        return reward

    def train_on(self, actions: Sequence[Action]) -> bool:
        """Do what `play` does and weigh nothing; return whether another decision is due.

        Raises:
            RuntimeError: The episode is over.

        Effects: the episode is over if this raises anything.
        """
        if self.over:
            raise RuntimeError("the episode is over; begin another one")
        self.over = True  # until all has gone well
        self.caused.clear()
        self.growth.conclude(actions)
        goes_on = self._train() and math.isfinite(self.loss)
        if not goes_on:
            self._end()
        self.over = not goes_on
        return goes_on

    def _first_loss(self) -> float:
        """Train up to the first decision, and return the loss there."""
        lower = "lower its learning rate, or clip its gradients (max_gradient_norm)"
        if not self._train():
            if self.diverged:
                raise DivergedAtOnceError(
                    f"the host's run diverged before its first decision; {lower}"
                )
            raise ValueError(
                "the host's run came to its end before its first decision; give it more steps"
            )
        if not math.isfinite(self.loss):
            raise DivergedAtOnceError(
                f"the host's first held-out loss must be finite, got {self.loss}; {lower}"
            )
        if self.loss <= 0.0:
            raise ValueError(
                f"the host's first held-out loss must be above 0, got {self.loss}: rewards are "
                "measured by its logarithm; give it another loss"
            )
        return self.loss

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
        reference_loss = None
        if reference is not None and growth.epoch > 0:  # not gone back to before its first decision
            reference_loss = reference.losses[growth.epoch - 1]
        return Standing(
            held_out_loss=self.loss,
            reference_loss=reference_loss,
            contribution_fractions=tuple(
                share for share in fractions if share is not None and math.isfinite(share)
            ),
            param_count=growth.state().param_count,
            flops=flops,
            host_flops=host_flops,
        )

    def _end(self) -> None:
        """Evaluate the network at its end, without living seeds, unless it has diverged."""
        self.diverged |= not math.isfinite(self.loss)
        if self.diverged:
            return
        with self.growth.slots.as_committed():
            self.final_metrics = metrics_of(self._run.final())
        self.diverged = not math.isfinite(self.final_metrics["loss"])


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

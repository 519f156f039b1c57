"""The growth engine: what a training loop calls after a step and after an epoch."""

from __future__ import annotations  # so that help() says Event, and not all its classes

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from esper.compilation.compiled_host import CompiledHost
from esper.lifecycle.actions import (
    Action,
    GrowthState,
    IllegalAction,
    Wait,
    check_action,
)
from esper.lifecycle.events import (
    ActionApplied,
    ActionRefused,
    Event,
    EventRecord,
    RunStarted,
    SeedCommitted,
    SeedFailed,
)
from esper.slots.isolation_monitor import IsolationMonitor
from esper.slots.modes import device_of, forked_random_state
from esper.slots.slot import SeedSlot
from esper.slots.slot_set import SlotSet
from esper.slots.state_fields import check_fields
from esper.telemetry.sink import Sink, as_floats
from esper.telemetry.sink_guard import SinkGuard
from esper.training.action_runner import ActionRunner
from esper.training.asked_policy import decided, upcoming, weighed
from esper.training.growth_arguments import check_arguments
from esper.training.held_out import Evaluate, check_evaluates, metrics_of
from esper.training.policy import ForesightedPolicy, FrugalPolicy, Policy, checked_policy
from esper.training.policy_state import policy_remembering, policy_state
from esper.training.probing import probe_seeds
from esper.training.run_cost import Cost, CostMeter, RunCost
from esper.training.seed_readings import SeedReadings
from esper.training.step_times import StepTimes
from esper.training.told_steps import ToldSteps

_STATE_FIELDS = (
    *("slots", "isolation_monitor", "policy", "meter", "epoch", "step"),
    *("losses", "train_losses", "step_seconds_before"),
)


class Growth:
    """Grows a model while any loop trains it.

    Call `after_step` after each optimizer step and `after_epoch` wherever decisions may fall: after
    each epoch, or every N steps. An epoch here is the time between two decisions.

    Args:
        slots: From `esper.attach`.
        optimizer: Trains the host; gets one parameter group per slot.
        policy: Decides, as `esper.HeuristicPolicy()`; without one nothing happens by itself, and
            slots do what they are told by their methods: `publish` tells the sinks of that.
        scheduler: A learning-rate scheduler made before; one made afterwards needs nothing.
        max_epochs: How many decisions will come, for policies that plan by it.
        sinks: Receive every event and metric. One that raises is told once and stops nothing; see
            `SinkGuard`.
        compiled: The host and its seeds run compiled; None leaves that to the caller.
        clock: Unix seconds, for event records.
        count_flops: Whether `meter` counts operations besides taking times: the first step of each
            structure then runs slower, and so do decisions.

    Raises:
        TypeError: `slots`, `policy`, `scheduler`, `max_epochs` or `sinks` is something else.
        ValueError: The host learns, and the optimizer holds none of its parameters; a scheduler
            exists that was not passed, or it is another optimizer's; `max_epochs` is below 0.
    """

    def __init__(
        self,
        slots: SlotSet,
        optimizer: Optimizer,
        *,
        policy: Policy | None = None,
        scheduler: Any | None = None,
        max_epochs: int | None = None,
        sinks: Sequence[Sink] = (),
        compiled: CompiledHost | None = None,
        clock: Callable[[], float] = time.time,
        count_flops: bool = False,
    ) -> None:
        check_arguments(slots, optimizer, scheduler=scheduler, max_epochs=max_epochs, sinks=sinks)
        self.slots = slots
        self.policy = checked_policy(policy)
        self.max_epochs = max_epochs
        self.sink_guard = SinkGuard(sinks, stamp=self._stamped, beginning=self._started)
        self.compiled = compiled
        self.isolation_monitor = IsolationMonitor(slots)
        self.meter = CostMeter(slots, count_flops=count_flops)
        """What the run costs. A loop of one's own makes its steps in `meter.step`, and calls
        `meter.start` where time begins to count and `meter.stop` where it does not."""
        self.epoch = 0
        self.step = 0
        self.losses: list[float] = []
        """Held-out loss after each epoch."""
        self.train_losses: list[float] = []
        self.awaits_decision = False
        """Whether a look was taken that is not concluded yet."""
        self._clock = clock
        self._told_steps = ToldSteps()
        self._caused: list[Event] | None = None
        """What the action that is being carried out has caused so far; None where none is."""
        self._untold_params = 0  # of commits that sinks are told of next
        self._step_times = StepTimes()
        self._readings = SeedReadings(slots, self.isolation_monitor)
        self._runner = ActionRunner(self._readings, self._step_times)
        slots.bind(optimizer, scheduler)

    def check_isolation(self, loss: Callable[[], Tensor]) -> None:
        """Prove now and then that no gradient of an isolated seed reaches the host.

        Optional. Call it before a step's forward, with gradient accumulation before the last
        micro-batch's; it does nothing unless a check is due. The step is bitwise the same with it
        and without.

        Args:
            loss: Computes the step's loss as the step will: `lambda: criterion(model(x), y)`.

        Effects: as `IsolationMonitor.check`.
        """
        if self.isolation_monitor.due(self.step) is not None:
            with self.meter.decision():
                self.isolation_monitor.check(loss, step=self.step)

    def shadow_pass(self, loss: Callable[[], Tensor]) -> None:
        """Give each seed that learns in shadow the gradient of the loss at full alpha.

        Needed with SlotConfig(objective="shadow"), else it does nothing. Call it before each
        forward, with gradient accumulation each micro-batch's, after `optimizer.zero_grad()`. The
        step is bitwise the same for the host with it and without.

        Args:
            loss: Computes the batch's loss as the step will: `lambda: criterion(model(x), y)`.

        Effects: as `SlotSet.shadow_pass`.
        """
        self.slots.shadow_pass(loss)

    def after_step(self) -> None:
        """Let one optimizer step pass: alpha moves, ramps end, a failed seed is pruned.

        Call it once per optimizer step, with gradient accumulation after the last micro-batch.
        Never waits for the device, but where a new seed of a `compiled` host is made ready.

        Raises:
            RuntimeError: A seed learns in shadow, and `shadow_pass` was not called for this step.
        """
        self.sink_guard.begin()
        self.step += 1
        self._step_times.step()
        binding = self.slots.binding
        if binding is not None:
            made = binding.untold_steps
            self._told_steps.add(made=made)
            if made == 0:
                self.meter.optimizer_has_skipped()
        events = self.slots.tick()
        if events:
            self.publish(events)
        self._compile_seeds()

    def after_epoch(
        self, evaluate: Evaluate, *, train_loss: float | None = None
    ) -> dict[str, float]:
        """Evaluate, measure the seeds, let the policy decide, and carry that out.

        Args:
            evaluate: Returns the held-out loss, or metrics with a "loss". A `HeldOut` measures
                seeds in one fused forward, and tells how certain the measurement is; any other
                function is called once more per variant, with the model in eval mode.
            train_loss: Mean over the epoch's steps, for policies that decide by it.

        Returns:
            The metrics, as evaluated before any decision.

        Raises:
            TypeError: `evaluate` returned no loss.
            ValueError: It is a `HeldOut` of another model.
            RuntimeError: The optimizer has stepped without an `after_step` after it, or another one
                than this is stepped.

        Effects: as `look`. Structure may change: the next backward must be a new step.
        """
        metrics = self.look(evaluate, train_loss=train_loss)
        try:
            self.conclude()
        except BaseException:  # Ctrl-C too: whoever goes on trains on, and decides the next time
            if self.awaits_decision:
                self.awaits_decision = False
                self.publish(self.slots.end_epoch())
            raise
        return metrics

    def look(self, evaluate: Evaluate, *, train_loss: float | None = None) -> dict[str, float]:
        """Evaluate and measure the seeds: the first half of `after_epoch`.

        For a loop that lets somebody else decide: `state` is then what there is to decide by, and
        `conclude` must follow before the next step.

        Args:
            evaluate: As `after_epoch`.
            train_loss: The same.

        Returns:
            The metrics.

        Raises:
            TypeError: `evaluate` returned no loss.
            ValueError: It is a `HeldOut` of another model.
            RuntimeError: The last look was not concluded, or steps were not told of.
            Whatever is raised, the look counts for none.

        Effects: waits for the device. Random streams are left as they were.
        """
        if self.awaits_decision:
            raise RuntimeError(
                "growth has looked already and nothing was decided; call growth.conclude(actions) "
                "once after each growth.look(…), with [] to wait"
            )
        if self.slots.binding is not None:
            self._told_steps.check(self.slots.binding)
        check_evaluates(evaluate, self.slots)
        self.sink_guard.begin()
        before = self.epoch, list(self.losses), list(self.train_losses)
        if train_loss is not None:
            self.train_losses.append(float(train_loss))
        try:
            with self.meter.decision():
                metrics = self._look(evaluate)
        except BaseException:  # Ctrl-C too: whoever goes on looks again
            self.epoch, self.losses, self.train_losses = before
            raise
        self.awaits_decision = True
        return metrics

    def conclude(self, actions: Sequence[Action] | None = None) -> None:
        """Carry out what is decided, and let the epoch end: the second half of `after_epoch`.

        Args:
            actions: In this order; None asks the policy. Where several processes train one model,
                all of them must pass the same.

        Raises:
            RuntimeError: There was no look since the last time.
            ValueError: The policy is asked, and remembers what it has decided for another model.

        Effects: structure may change: the next backward must be a new step.
        """
        if not self.awaits_decision:
            raise RuntimeError(
                "nothing is to be decided now; call growth.look(evaluate) first, or "
                "growth.after_epoch(evaluate), which does both"
            )
        replication = self.slots.replication
        with self.meter.decision():
            if replication is not None:  # before a stage is left
                replication.share_failures(self.slots)
            self._readings.share()
            if actions is None:
                actions = decided(self.policy, self.state(), self.slots)
            for action in actions:
                self.apply(action)
            self._prune_failed()
            self.awaits_decision = False
            self.publish(self.slots.end_epoch())
            if self.compiled is not None and isinstance(self.policy, ForesightedPolicy):
                self.compiled.foresee(upcoming(self.policy, self.state(), replication))
            self._compile_seeds()
            self.sink_guard.flush()

    def _look(self, evaluate: Evaluate) -> dict[str, float]:
        self._step_times.pause()
        replication = self.slots.replication
        if replication is not None:  # before anything is attached
            replication.check_equal("the network", self._network())
        # Iterating a DataLoader draws from torch's: how often a run evaluates would order its data.
        with self.meter.evaluation(), forked_random_state(device_of(self.slots.model)):
            metrics = metrics_of(evaluate())
        if replication is not None:
            metrics = replication.from_first(metrics)
        self.epoch += 1  # what follows belongs to the decision that is due
        self.losses.append(metrics["loss"])
        self._readings.note_loss(metrics["loss"])
        self.publish(self._readings.read_gradient_health())
        for path, reason in self._readings.broken_behind_the_host().items():
            self.publish(self.slots[path].prune(reason=reason))
        self.publish(self._readings.read_isolation())
        host_learns = self.slots.host_learns()
        for slot in self.slots.values():
            slot.measurements.host_learns = host_learns
        weighed = self._weighed()
        self.publish(probe_seeds(self.slots.model, weighed, evaluate, host_learns=host_learns))
        for path, slot in self.slots.items():
            ratio = self._step_times.ratio_with_seed(path)
            if slot.living is not None and ratio is not None:
                slot.measurements.step_time_ratio = ratio
        median = self._step_times.median_seconds
        timing = {} if median is None else {"step_seconds": median}
        self.measure({**metrics, **timing})
        return metrics

    def _compile_seeds(self) -> None:
        if self.compiled is not None and self.compiled.due():
            self.publish(self.compiled.prepare())

    def _network(self) -> Any:
        """Return what has to be the same in all processes that train one model."""
        slots = {}
        for path, slot in self.slots.items():
            snapshot = slot.snapshot()
            slots[path] = {
                "seeds": [recipe.model_dump(mode="json") for recipe in snapshot.recipes],
                "stage": snapshot.life.stage.value,
                "alpha": snapshot.life.alpha.model_dump(mode="json"),
            }
        return {"epoch": self.epoch, "step": self.step, "slots": slots}

    def _weighed(self) -> Mapping[str, SeedSlot]:
        """Return the slots whose seeds the policy wants to be weighed now."""
        if not isinstance(self.policy, FrugalPolicy):
            return self.slots
        paths = weighed(self.policy, self.state(), self.slots.replication)
        return {path: self.slots[path] for path in paths}

    def state(self) -> GrowthState:
        """Return what a policy sees now."""
        branches = [slot.branches.parameters() for slot in self.slots.values()]
        total, grown = _num_params(self.slots.model.parameters()), sum(map(_num_params, branches))
        return GrowthState(
            epoch=self.epoch,
            step=self.step,
            max_epochs=self.max_epochs,
            losses=tuple(self.losses),
            train_losses=tuple(self.train_losses),
            slots=tuple(slot.state() for slot in self.slots.values()),
            param_count=total,
            host_param_count=total - grown,
        )

    def apply(self, action: Action) -> Sequence[Event]:
        """Carry out one action if it is legal now, and publish what happened.

        Returns:
            What was published: first that the action was applied or refused, nothing for WAIT. A
            gate may still have refused the stage.
        """
        self._step_times.pause()
        caused: list[Event] = []
        self._caused = caused
        try:
            check_action(self.state(), action)
        except IllegalAction as error:
            self.publish([ActionRefused(action=action, reason=str(error))])
        else:
            if not isinstance(action, Wait):
                self.publish([ActionApplied(action=action)])
                loss = next((loss for loss in reversed(self.losses) if math.isfinite(loss)), None)
                slot = self.slots[action.slot]
                for events in self._runner.carry_out(slot, action, held_out_loss=loss):
                    self.publish(events)
        finally:
            self._caused = None
        return caused

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Count the time that a run waits for somebody, or is kept, as no step's and no cost."""
        self._step_times.pause()
        with self.meter.paused():
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return all that growth remembers, the slots' part and the policy's included.

        Mappings, lists, plain values and tensors, which are copies. Take it between two steps. What
        is in the state dicts of model and optimizer is not in it.

        Raises:
            RuntimeError: A decision is due, which no state can hold.
        """
        if self.awaits_decision:
            raise RuntimeError(
                "a decision is due, and no state holds what it is made of; call "
                "growth.conclude(actions) first"
            )
        return {
            "slots": self.slots.state_dict(),
            "isolation_monitor": self.isolation_monitor.state_dict(),
            "policy": policy_state(self.policy),
            "meter": self.meter.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "losses": list(self.losses),
            "train_losses": list(self.train_losses),
            "step_seconds_before": self._step_times.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; call it before the state dicts of model and optimizer are loaded.

        Raises:
            ValueError: The policy or the slots are others, or a field is missing; nothing has
                changed.
            BlueprintError: A blueprint is not registered here; nothing has changed.
        """
        monitor = self.isolation_monitor
        check_fields(state, _STATE_FIELDS, of="growth")
        check_fields(state["isolation_monitor"], monitor.state_dict(), of="the isolation monitor")
        self.meter.check_state(state["meter"])
        with policy_remembering(self.policy, state["policy"]):
            self.slots.load_state_dict(state["slots"])
        monitor.load_state_dict(state["isolation_monitor"])
        self.meter.load_state_dict(state["meter"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.losses = list(state["losses"])
        self.train_losses = list(state["train_losses"])
        self._step_times.load_state_dict(state["step_seconds_before"])
        self.awaits_decision = False

    def spent(self, cost: RunCost) -> Cost:
        """Return what a run had to spend: training, and what growth took to decide.

        A plain evaluation counts where the policy decides by its loss, and nowhere else: watching
        is not growth's.

        Args:
            cost: Of the run, up to wherever is asked for.
        """
        spent = cost.training + cost.decision
        if isinstance(self.policy, FrugalPolicy) and not self.policy.reads_losses:
            return spent
        return spent + cost.evaluation

    @property
    def sinks(self) -> list[Sink]:
        """Return what receives every event and metric; may be added to."""
        return self.sink_guard.sinks

    def publish(self, events: Sequence[Event]) -> None:
        """Send events to the sinks, stamped with time, epoch and step."""
        if self._caused is not None:
            self._caused.extend(events)
        if not self.sinks:
            return
        self._untold_params = sum(e.param_count for e in events if isinstance(e, SeedCommitted))
        self.sink_guard.begin()
        self._untold_params = 0
        for event in events:
            self.sink_guard.publish(self._stamped(event))

    def measure(self, metrics: Mapping[str, float]) -> None:
        """Send metrics to the sinks, with epoch and step.

        Raises:
            TypeError: A metric is no number.
        """
        self.sink_guard.measure(self.epoch, self.step, as_floats(metrics))

    def _stamped(self, event: Event) -> EventRecord:
        return EventRecord(
            time_seconds=self._clock(), epoch=self.epoch, step=self.step, event=event
        )

    def _started(self) -> Event:
        """Return that the run begins; the host has what was committed, but what is told next."""
        living = [slot.living.parameters() for slot in self.slots.living_slots if slot.living]
        size = _num_params(self.slots.model.parameters()) - sum(map(_num_params, living))
        return RunStarted(slots=tuple(self.slots), host_param_count=size - self._untold_params)

    def prune_failed(self) -> None:
        """Prune, in all processes, seeds that raised after the last step: no state holds them."""
        if self.slots.replication is not None:
            self.slots.replication.share_failures(self.slots)
        self._prune_failed()

    def _prune_failed(self) -> None:
        for slot in self.slots.living_slots:
            error = slot.take_failure()
            if error is not None:
                blueprint = slot.state().blueprint
                assert blueprint is not None
                failed = SeedFailed(slot=slot.path, blueprint=blueprint, error=error)
                self.publish([failed, *slot.prune(reason=f"its forward raised {error}")])


def _num_params(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)

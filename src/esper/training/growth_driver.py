"""Growth driven from the hooks of a training loop that is someone else's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.lifecycle.learning import Isolation, SeedObjective
from esper.slots.modes import device_of
from esper.slots.slot_set import SlotSet
from esper.training.ema import EMA, check_average
from esper.training.growth import Growth
from esper.training.held_out import Evaluate
from esper.training.optimizer_state import order_parameters, parameter_names
from esper.training.step_losses import StepLosses


class GrowthDriver:
    """Does what a loop of one's own does around its steps; frameworks' callbacks call it.

    Args:
        growth: Slots, optimizer and policy.
        model: What the optimizer trains, the slots' model or one that contains it.
        evaluate: As `Growth.after_epoch`.
        decision_interval_steps: Optimizer steps between growth decisions; None decides after each
            epoch.
        ema: Averages the weights after each step.
    """

    def __init__(
        self,
        growth: Growth,
        model: nn.Module,
        *,
        evaluate: Evaluate,
        decision_interval_steps: int | None,
        ema: EMA | None,
    ) -> None:
        check_average(ema, growth.slots)
        self.growth = growth
        self.ema = ema
        self._model = model
        self._evaluate = evaluate
        self._interval = decision_interval_steps
        self._losses = StepLosses()
        """Of the steps since the last decision."""
        self._decides = False
        """Whether a decision is being made now, with evaluations of its own."""
        self._decided_at = growth.step
        """The step after which a decision was made last."""

    def note_loss(self, loss: Tensor | float, *, num_batches: int = 1) -> None:
        """Take note of a training loss, the mean over so many batches, for policies to see."""
        value = torch.as_tensor(loss, device=device_of(self._model))
        self._losses.add(value.detach().float(), num_batches=num_batches)

    def after_step(self) -> None:
        """Let one optimizer step pass; one that a loss scaler has skipped counts in no average."""
        binding = self.growth.slots.binding
        assert binding is not None
        made = binding.has_stepped
        self.growth.after_step()
        if self.ema is not None and made:
            self.ema.update()

    def decide(self, *, epoch_ends: bool) -> dict[str, float] | None:
        """Decide if it is time, between two steps.

        Args:
            epoch_ends: Whether the epoch is at its end.

        Returns:
            The held-out metrics if a decision was made.
        """
        step, every = self.growth.step, self._interval
        if every is None:
            due = epoch_ends and self._decided_at < step
        else:
            due = step // every > self._decided_at // every
        return self._decide() if due else None

    def _decide(self) -> dict[str, float]:
        epoch = self.growth.epoch
        train_loss = self._losses.mean() if self._losses else None
        self._decides = True
        try:
            return self.growth.after_epoch(self._evaluate, train_loss=train_loss)
        finally:
            self._decides = False
            if self.growth.epoch > epoch:  # a look that raised counts for none
                self._decided_at = self.growth.step
                self._losses.clear()

    def after_validation(self) -> None:
        """Prune seeds that raised in the loop's own validation, after which it may save."""
        if not self._decides:
            self.growth.prune_failed()

    def state_dict(self) -> dict[str, Any]:
        """Return what a framework's own checkpoint does not hold."""
        binding = self.growth.slots.binding
        assert binding is not None
        return {
            "growth": self.growth.state_dict(),
            "trained": parameter_names(binding.optimizer, self._model),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "losses": self._losses.state_dict(),
            "decided_at": self._decided_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; call it before the optimizer's state is loaded.

        Raises:
            ValueError: The slots, the optimizer or the average are not as they were then.
            BlueprintError: A blueprint is not registered here.
        """
        binding = self.growth.slots.binding
        assert binding is not None
        if (state["ema"] is None) != (self.ema is None):
            had = "no average" if state["ema"] is None else "an average"
            raise ValueError(f"the run had {had} of its weights; make the callback as it was then")
        self.growth.load_state_dict(state["growth"])
        order_parameters(binding.optimizer, self._model, state["trained"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self._decided_at = state["decided_at"]
        self._losses.load_state_dict(state["losses"], device=device_of(self._model))


def check_loop(slots: SlotSet, *, joint_clipping: bool, several: bool, scaled: bool) -> None:
    """Raise where a framework's loop would do something to seeds that they cannot stand.

    Args:
        slots: That will grow.
        joint_clipping: Whether the loop clips all gradients by one norm.
        several: Whether several processes train the model.
        scaled: Whether gradients are scaled for float16.

    Raises:
        ValueError: It would; the message says how to do without.
    """
    behind = [path for path, slot in slots.items() if slot.config.isolation is not Isolation.NONE]
    shadow = [path for path in behind if slots[path].config.objective is SeedObjective.SHADOW]
    if shadow:
        raise ValueError(
            f"seeds in {shadow[0]!r} learn in shadow, which takes a pass of their own before each "
            "backward, and a callback has no place for it; choose another objective, or use "
            "esper.Trainer"
        )
    if joint_clipping and (behind or several):
        why = f"seeds in {behind[0]!r} learn behind the host" if behind else "several processes run"
        raise ValueError(
            f"{why}, and the loop clips by one norm over host and seeds, which would change the "
            "host's step; let the callback clip: GrowthCallback(…, max_gradient_norm=…), and turn "
            "the loop's own clipping off"
        )
    if several and scaled:
        raise ValueError(
            "several processes with float16 would each skip steps of their own, since what grows "
            "is averaged after gradients are unscaled; train in bfloat16"
        )

"""One optimizer step, from its batches to new weights or to why there are none."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper.compilation.captured_step import CapturedStep
from esper.lifecycle.events import SeedBlamed, StepSkipped
from esper.slots.counterfactual import call_model
from esper.slots.modes import beside_the_step, device_of, sole_device
from esper.slots.nested import to_device
from esper.slots.slot import SeedSlot
from esper.slots.slot_set import SlotSet
from esper.training.governor import Governor
from esper.training.growth import Growth
from esper.training.loss_scaler import LossScaler
from esper.training.precision import Precision, autocast
from esper.training.running_statistics import RunningStatistics
from esper.training.safeguard import blamed

Batch = tuple[Any, Any]
"""Inputs of the model, and targets of the loss."""


class TrainingStep:
    """Makes optimizer steps: forwards, backwards, the governor's verdict, clipping, the optimizer.

    Args:
        growth: Slots and optimizer.
        governor: Refuses bad steps.
        loss: `(outputs, targets)` to a scalar.
        forward: The slots' model, or a wrapper of it.
        precision: Autocast dtype; float16 also scales gradients.
        max_gradient_norm: Clips host and seeds each on their own; None does not clip.
        cuda_graphs: Whether forward and backward are replayed as CUDA graphs.

    Raises:
        ValueError: Several processes run, and nothing in `forward` makes one model of theirs.
    """

    def __init__(
        self,
        growth: Growth,
        governor: Governor,
        *,
        loss: Callable[[Any, Any], Tensor],
        forward: nn.Module,
        precision: Precision,
        max_gradient_norm: float | None,
        cuda_graphs: bool,
    ) -> None:
        model, binding = growth.slots.model, growth.slots.binding
        assert binding is not None
        _replicate(growth.slots, forward)
        self.loss = loss
        self.forward = forward
        device = device_of(model)
        self.scaler = LossScaler(device, enabled=precision == "float16")
        self._growth = growth
        self._slots = growth.slots
        self._governor = governor
        self._optimizer = binding.optimizer
        self._statistics = RunningStatistics(growth.slots)
        self._max_gradient_norm = max_gradient_norm
        self._input_device = sole_device(model)
        self._autocast = functools.partial(autocast, device, precision)
        self._under_way = False
        self._captured: CapturedStep | None = None
        if cuda_graphs:
            self._captured = CapturedStep(
                growth.slots,
                functools.partial(self._loss_of, forward),
                scale=self.scaler.scale,
                compiled=growth.compiled,
            )

    def make(self, batches: Sequence[Batch]) -> Tensor | None:
        """Make one optimizer step.

        Args:
            batches: Whose gradients it takes together; each counts alike.

        Returns:
            Their mean loss, 0-dim; None if the step was skipped, which is published. Where the
            governor refused it, running statistics are what they were before.
        """
        with self._growth.meter.step(batches):
            if self._under_way:  # the last one was interrupted, as by Ctrl-C in a notebook
                self.scaler.drop()
                self.drop_gradients()
            self._under_way = True
            self._statistics.keep()
            total: Tensor | None = None
            for number, batch in enumerate(batches, start=1):
                inputs, targets = to_device(batch, self._input_device)
                last = number == len(batches)
                # Beside the step the model itself runs: a wrapper would wait for its gradients.
                beside = functools.partial(
                    self._loss_of, self._slots.model, inputs, targets, len(batches)
                )
                scaled = functools.partial(self._scaled, beside)
                if last:
                    self._growth.check_isolation(scaled)
                self._growth.shadow_pass(scaled)
                total = self._passes(inputs, targets, len(batches), total, look=last)
            self._slots.average_gradients()
            norm = None
            if self._max_gradient_norm is not None:
                self.scaler.unscale(self._optimizer)
                norm = self._slots.clip_grad_norm_(self._max_gradient_norm, only_bound=True)
            # With a scaler a gradient that is not finite is its affair: it skips, and is lowered.
            skipped = self._refusal(None if self.scaler.enabled else norm)
            if skipped is None:
                skipped = self.scaler.step(self._optimizer)
            else:
                self._statistics.put_back()
                self.scaler.drop()
            self._governor.count(skipped)
            self.drop_gradients()
            self._under_way = False
        if skipped is not None:
            self._growth.publish([skipped])
        return None if skipped is not None else total

    def drop_gradients(self) -> None:
        """Let no parameter have a gradient, those of the host besides that nothing trains."""
        self._optimizer.zero_grad(set_to_none=True)
        for parameter in self._slots.host_parameters():
            parameter.grad = None

    def blame(self, suspects: Sequence[SeedSlot], batches: Sequence[Batch]) -> SeedBlamed | None:
        """Return what tells that a step is bad with a slot's seed and not without, if it is so.

        Args:
            suspects: Slots with a seed in the forward path, in the order in which they are tried.
            batches: Of the step.

        Effects: runs the model on the batches, and once more for each suspect that is tried, beside
        the step. Of several processes all must ask.
        """
        if not suspects:
            return None

        def total() -> float:
            moved = (to_device(batch, self._input_device) for batch in batches)
            model, num_batches = self._slots.model, len(batches)
            return sum(float(self._loss_of(model, x, y, num_batches)) for x, y in moved)

        with beside_the_step(self._slots.model), torch.no_grad():
            loss = total()
            if not self._anywhere(bad=self._governor.is_bad(loss)):
                return None
            for slot in suspects:
                with slot.left_out():
                    without = total()
                if not self._anywhere(bad=self._governor.is_bad(without)):
                    return blamed(slot, loss=loss, without=without)
        return None

    def _passes(
        self, inputs: Any, targets: Any, num_batches: int, total: Tensor | None, *, look: bool
    ) -> Tensor:
        """Make one batch's forward and backward.

        Args:
            inputs: Of the model.
            targets: Of the loss.
            num_batches: In the step.
            total: The loss of the step's batches so far.
            look: The governor takes a look at the loss of all of them.

        Returns:
            The loss of the step's batches with this one.
        """

        def see(loss: Tensor) -> None:
            nonlocal total
            total = loss if total is None else total + loss
            if look:  # before the backward, so that the loss is read meanwhile
                self._governor.look(total)

        if self._captured is None:
            loss = self._loss_of(self.forward, inputs, targets, num_batches)
            see(loss.detach())
            if self._slots.have_backward(loss):
                self.scaler.scale(loss).backward()
        else:
            self._captured(inputs, targets, num_batches, between=see)
            self._growth.publish(self._captured.take_events())
        assert total is not None
        return total

    def _refusal(self, norm: Tensor | None) -> StepSkipped | None:
        """Return why the optimizer must not step, in this process or, of several, in any."""
        refusal = self._governor.judge(norm)
        if refusal is None and self._anywhere(bad=False):
            refusal = StepSkipped(reason="the step is bad in another process", value=math.nan)
        elif refusal is not None:
            self._anywhere(bad=True)
        return refusal

    def _anywhere(self, *, bad: bool) -> bool:
        """Return whether it is so here or in another process; all of them must ask."""
        replication = self._slots.replication
        return bad if replication is None else replication.any(bad)

    def _loss_of(self, model: nn.Module, inputs: Any, targets: Any, num_batches: int) -> Tensor:
        """Return one batch's share of the step's loss."""
        with self._autocast():
            loss = self.loss(call_model(model, inputs), targets)
            _check_scalar(loss)
            return loss / num_batches

    def _scaled(self, loss: Callable[[], Tensor]) -> Tensor:
        """Return the loss as the step's backward will see it."""
        return self.scaler.scale(loss())


def _check_scalar(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(
            "loss must be one number for a batch, a tensor that leads back to the model, got "
            f"{got}; of one loss per sample take the mean"
        )


def _replicate(slots: SlotSet, forward: nn.Module) -> None:
    """Let slots stay one model with the processes that a wrapper is of, wherever it is wrapped.

    Raises:
        ValueError: Several processes run, and no wrapper tells which of them train the model.
    """
    wrapper = nn.parallel.DistributedDataParallel
    found = next((part for part in forward.modules() if isinstance(part, wrapper)), None)
    if found is not None:
        slots.replicate(found.process_group)
    elif slots.replication is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"{dist.get_world_size()} processes run, and no DistributedDataParallel is in the "
            f"{type(forward).__name__} that is the forward: each would grow seeds of its own; pass "
            "forward=DistributedDataParallel(model), or call slots.replicate() first"
        )

"""All slots of one model, as a training loop meets them."""

from __future__ import annotations  # so that help() says Event, and not all its classes

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from esper.lifecycle.events import CachesSwept, Event
from esper.lifecycle.learning import Isolation, SeedObjective
from esper.lifecycle.stages import SeedStage
from esper.seeds.block_masks import block_masks
from esper.slots.branch import SeedBranch
from esper.slots.caches import CacheStatistics
from esper.slots.gradient_health import GradientReading, gradient_norm
from esper.slots.modes import device_of
from esper.slots.optimizer_binding import OptimizerBinding, skips_step
from esper.slots.owned_slots import OwnedSlots, owner_name
from esper.slots.ownership import HOST
from esper.slots.replication import AskedBy, Replication, keep_out_of_wrappers
from esper.slots.shadow_pass import teach_in_shadow
from esper.slots.sharded import keep_sharded, whole
from esper.slots.slot import SeedSlot
from esper.slots.slot_snapshot import SlotSnapshot
from esper.slots.state_fields import check_set_state, check_slot_states

_LEARNING_STAGES = frozenset({SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.PROBATIONARY})


class SlotSet(OwnedSlots):
    """The slots by target path, in module order.

    Made by `esper.attach`. Methods that change something return the events that happened.
    """

    # Training

    def bind(self, optimizer: Optimizer, scheduler: Any | None = None) -> None:
        """Make the optimizer train what grows: one parameter group per slot, for good.

        Args:
            optimizer: Built from the model's parameters, after committed seeds were loaded into it;
                of a host that is frozen it may hold none.
            scheduler: A learning-rate scheduler that was made before; one made afterwards needs
                nothing.

        Raises:
            ValueError: The host learns, and the optimizer holds none of its parameters; another
                optimizer is bound, this one is bound to other slots, or a scheduler exists that was
                not passed.
            TypeError: The optimizer takes one parameter group only, or matrices only.
            OwnershipError: The optimizer would train a teacher.
        """
        if self.binding is not None:
            raise ValueError(
                f"the slots are bound to a {type(self.binding.optimizer).__name__} already; "
                "call unbind() first"
            )
        self.ledger.check_optimizer(optimizer)
        self._host_parameters = None  # another optimizer may be there because modules are others
        self.binding = OptimizerBinding(
            optimizer,
            self._slots,
            model=self.model,
            host_parameters=self.host_parameters(),
            scheduler=scheduler,
            before_step=self._before_step,
        )
        self.binding.forget(self._pruned.alive())

    def unbind(self) -> None:
        """Let go of the optimizer; its empty groups stay."""
        if self.binding is not None:
            self.binding.release()
            self.binding = None

    def replicate(self, group: dist.ProcessGroup | None = None) -> None:
        """Stay one model with the other processes that train it.

        Call it where the model is wrapped, `DistributedDataParallel(model)`: the wrapper averages
        the host's gradients, and the slots those of whatever grows. Call `average_gradients` after
        each step's last backward; clipping and the optimizer's step do it where it was forgotten.

        Args:
            group: Of processes; None is all of them.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        self.replication = Replication(group)

    def keep_out_of_wrappers(self, model: nn.Module | None = None) -> None:
        """Let a DDP wrapper that is made next leave out what has grown, which the slots average.

        Needed where seeds are there before the model is wrapped: a wrapper waits for the gradients
        of all it was given, and a seed that is pruned has none.

        Args:
            model: That will be wrapped, if another module contains the slots' model.

        Effects: sets the attribute that DistributedDataParallel asks the model for, until the slots
        are detached.
        """
        whole = self.model if model is None else model
        self.wrapped.add(whole)
        keep_out_of_wrappers(whole, [slot.branches for slot in self._slots.values()])

    def replicate_sharded(
        self, shard: Callable[[nn.Module], Any], group: dist.ProcessGroup | None = None
    ) -> None:
        """Stay one model with the other processes, each of which holds a part of it. Experimental.

        Call it where the model is sharded, `fully_shard(model)`, after attaching and before the
        optimizer is made. A seed is sharded when it germinates, before it is attached; limits are
        in docs/distributed.md.

        Args:
            shard: Does it, in place: `lambda seed: fully_shard(seed, mesh=mesh)`.
            group: Of processes; None is all of them.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: A parameter of the model is not sharded, or a slot's seeds learn in shadow.
        """
        for path, slot in self._slots.items():
            objective, isolation = slot.config.objective, slot.config.isolation
            if objective is SeedObjective.SHADOW and isolation is not Isolation.NONE:
                raise ValueError(
                    f"seeds in {path!r} learn in shadow, by a backward of their own, and the "
                    "gradients of sharded parameters do not arrive there; choose another objective"
                )
        keep_sharded(self.model)
        self.replication = Replication(group, sharded=True)
        self._shard = shard

    def average_gradients(self) -> None:
        """Average the gradients of seeds over the processes, after a step's last backward.

        Does nothing unless `replicate` was called.

        Raises:
            LostReplicaError: A process has died.
        """
        self._average_gradients("loop")

    def _average_gradients(self, asked_by: AskedBy) -> None:
        if self.replication is not None:
            self.replication.average_gradients(self._slots, asked_by=asked_by)

    def shadow_pass(self, loss: Callable[[], Tensor]) -> None:
        """Give each seed that learns in shadow the gradient of the loss at full alpha.

        Does nothing unless a seed in TRAINING has the SHADOW objective. Call it before each forward
        that the step's gradient comes from, after `optimizer.zero_grad()`, in train mode.

        Args:
            loss: Runs the model on the batch and returns the loss, scaled if it is scaled for the
                backward: `lambda: criterion(model(x), y)`.

        Effects: as `teach_in_shadow`, for one seed after the other.
        """
        for slot in self.living_slots:
            if slot.learns_in_shadow and slot.training:
                teach_in_shadow(slot, self.model, self._slots.values(), loss)

    def tick(self) -> list[Event]:
        """Let one batch pass in every slot; call after each optimizer step.

        Where the optimizer has not stepped, as when a loss was not finite, alpha moves all the
        same, and no seed counts a step of learning.

        Raises:
            RuntimeError: A seed learns in shadow, and no pass was made since the last tick.
            LostReplicaError: Another process that trains the model has died.
        """
        if self.replication is not None:
            self.replication.end_step(self._slots)
        learned = self.binding is None or self.binding.take_step()
        events: list[Event] = []
        for slot in self.living_slots:
            events += slot.tick(learned=learned)
        return events

    def end_epoch(self) -> list[Event]:
        """Let one epoch pass in every slot and sweep the caches."""
        events = [event for slot in self._slots.values() for event in slot.end_epoch()]
        self.gradient_health.decided()
        self._fitting.cache.sweep()
        self._renew_block_masks()
        caches: dict[str, CacheStatistics] = {
            "shape_probes": self._fitting.cache,
            "block_masks": block_masks,
        }
        swept = CachesSwept(
            sizes={name: len(cache) for name, cache in caches.items()},
            hits={name: cache.hits for name, cache in caches.items()},
            misses={name: cache.misses for name, cache in caches.items()},
        )
        return [*events, swept]

    def clip_grad_norm_(
        self,
        max_norm: float,
        *,
        others: Sequence[nn.Parameter] = (),
        only_bound: bool = False,
    ) -> Tensor:
        """Clip gradients to `max_norm` per owner: the host alone, and each living seed alone.

        With one norm over everything a seed's gradients would change the host's step.

        Args:
            max_norm: Above 0.
            others: Parameters outside of the model that count as the host's, as a loss may have.
            only_bound: No other optimizer than the bound one trains any of them: leave out what it
                does not hold, whose gradients nobody may drop.

        Returns:
            The host's norm before clipping, 0-dim, on its device.

        Raises:
            ValueError: `max_norm` is not above 0.
        """
        if not max_norm > 0.0:
            raise ValueError(f"max_norm must be above 0, got {max_norm}")
        self._average_gradients("clipping")
        every = [*self.host_parameters(), *others]
        bound = self._in_training(every)
        host = bound if only_bound else every
        own = {} if len(bound) == len(host) else {HOST: gradient_norm(bound)}
        norms = {HOST: whole(clip_grad_norm_(host, max_norm))}
        for owner, seed in self._living_seeds().items():
            norms[owner] = whole(clip_grad_norm_(list(seed.parameters()), max_norm))
        self.gradient_health.note_before_clipping({**norms, **own})
        return norms[HOST]

    @contextmanager
    def as_committed(self) -> Iterator[None]:
        """Run the model without the seeds that live uncommitted."""
        with ExitStack() as left_out:
            for slot in self.living_slots:
                left_out.enter_context(slot.left_out())
            yield

    def _in_training(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Return those that the optimizer holds; all where none is bound."""
        if self.binding is None:
            return parameters
        groups = self.binding.optimizer.param_groups
        held = {parameter for group in groups for parameter in group["params"]}
        return [parameter for parameter in parameters if parameter in held]

    def host_learns(self) -> bool:
        """Return whether any parameter of the host's own does, those of seeds left out."""
        committed = {
            parameter
            for slot in self._slots.values()
            for branch in list(slot.branches)[: slot.num_committed]
            for parameter in branch.parameters()
        }
        return any(p.requires_grad and p not in committed for p in self.host_parameters())

    def have_backward(self, loss: Tensor) -> bool:
        """Return whether a step's loss leads back to anything.

        Not so where the host is frozen and no seed is in its path; a loss that is detached from a
        host that learns is an error, which its backward raises.
        """
        return loss.requires_grad or self.host_learns()

    def read_gradient_health(self, slot: SeedSlot) -> GradientReading | None:
        """Return the slot's gradient norms since the last reading. Waits for the device."""
        branch = slot.living
        if branch is None:
            return None
        return self.gradient_health.read(
            owner_name(slot.path),
            host_params=_num_learning(self._in_training(self.host_parameters())),
            seed_params=_num_learning(branch.parameters()),
        )

    def _before_step(self) -> None:
        self._average_gradients("step")
        for slot in self.living_slots:
            slot.check_shadow_gradient()
        assert self.binding is not None
        if skips_step(self.binding.optimizer):
            self.gradient_health.note_before_clipping({})
            return
        if not self.gradient_health.step_is_due():
            return
        learning = {
            owner_name(slot.path): slot.living.parameters()
            for slot in self.living_slots
            if slot.stage in _LEARNING_STAGES and slot.living is not None
        }
        # GradScaler leaves its factor to a fused optimizer, under this attribute.
        scale = getattr(self.binding.optimizer, "grad_scale", None)
        host = self._in_training(self.host_parameters())
        self.gradient_health.measure(host, learning, HOST, gradient_scale=scale)

    # Keeping

    def state_dict(self) -> dict[str, Any]:
        """Return all that growth has to remember and the model's state dict does not hold.

        Mappings, lists, plain values and tensors, which are copies. With it, the model's state dict
        and `esper.training.optimizer_state` the slots go on as if nothing had happened. An
        optimizer's own state dict goes by the parameters' places, which growth changes.

        Raises:
            RuntimeError: A seed's forward has raised, and `tick` has not pruned it yet.
        """
        return {
            "slots": {path: slot.growth_state() for path, slot in self._slots.items()},
            "gradient_health": self.gradient_health.state_dict(),
            "breakers": {name: breaker.state_dict() for name, breaker in self._breakers.items()},
            "binding": None if self.binding is None else self.binding.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what the slots were; call it before loading the model and the optimizer.

        What has grown since then is gone afterwards, and what was there is built again where it is
        not, in the optimizer's groups too.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: The slots are others, or a field is missing.
            BlueprintError: A blueprint is not registered here.
            In both cases nothing has changed.

        Effects: random streams are left as they were. Weights are those of fresh seeds until the
        model's state dict is loaded.
        """
        check_set_state(state, self._slots, health_fields=self.gradient_health.state_dict())
        if (state["binding"] is None) != (self.binding is None):
            bound = "no optimizer" if state["binding"] is None else "an optimizer"
            raise ValueError(f"the slots were bound to {bound} when their state was taken")
        self.restore(state["slots"])
        self.gradient_health.load_state_dict(state["gradient_health"], device=device_of(self.model))
        self._breakers = {}
        for name, kept in state["breakers"].items():
            self.breaker(name).load_state_dict(kept)
        if self.binding is not None:
            self.binding.load_state_dict(state["binding"])

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Give each slot back its seeds and its life; the part of `load_state_dict` about slots.

        Args:
            states: By path, as `SeedSlot.growth_state` returns them.

        Raises:
            ValueError: As `load_state_dict`.
            BlueprintError: As `load_state_dict`.
        """
        check_slot_states(states, self._slots)
        snapshots = {path: SlotSnapshot.from_dump(kept["slot"]) for path, kept in states.items()}
        branches = {path: self._slots[path].branches_of(snapshots[path]) for path in snapshots}
        removed: list[SeedBranch] = []
        for path, slot in self._slots.items():
            removed += slot.load_growth_state(snapshots[path], states[path], branches[path])
            self._pruned.forget(path)
        self._note_seeds_changed()
        self._renew_block_masks()
        if self.replication is not None:
            self.replication.start_anew()
        if self.binding is not None:
            self.binding.regroup(removed)


def _num_learning(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many numbers can have a gradient."""
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)

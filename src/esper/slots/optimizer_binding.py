"""One parameter group per slot, made once, so that the number of groups never changes."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from esper.lifecycle.stages import SeedStage
from esper.slots.branch import SeedBranch
from esper.slots.left_out_seeds import warn_of_left_out
from esper.slots.slot import SeedSlot

GROUP_KEY = "slot"
"""Key under which a parameter group carries the path of its slot."""

_bound: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that train some slots' seeds."""

_PER_GROUP_ATTRIBUTES = (
    "base_lrs",
    "lr_lambdas",
    "max_lrs",
    "min_lrs",
    "base_momentums",
    "max_momentums",
    "_last_lr",
    "base_values",  # timm's
    "warmup_steps",
)


class OptimizerBinding:
    """Keeps the slots' parameter groups filled with what lives in the slots.

    A slot's group starts with the hyperparameters of the host's group that trains the module which
    the slot stands behind, and committed seeds join that group: `_host_group` says which it is. A
    seed's learning-rate multiplier and warm-up act around each step only, so no scheduler sees
    them. The warm-up counts from the first step after GERMINATED.

    Args:
        optimizer: Trains the host, or the seeds alone of a host that is frozen.
        slots: By path.
        model: That the slots are in.
        host_parameters: Of the model, committed seeds included.
        scheduler: A learning-rate scheduler that the optimizer has already.
        before_step: Called before each optimizer step.

    Raises:
        ValueError: The host learns, and the optimizer holds no parameter of it; it trains other
            slots' seeds already, or a scheduler exists that was not passed.
        TypeError: The optimizer takes one parameter group only, or matrices only.

    Effects: warns of committed seeds that the optimizer lacks though it trains all around them.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        slots: Mapping[str, SeedSlot],
        *,
        model: nn.Module,
        host_parameters: list[nn.Parameter],
        scheduler: Any | None,
        before_step: Callable[[], None],
    ) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(host_parameters) and any(p.requires_grad for p in host_parameters):
            raise ValueError(
                f"the {type(optimizer).__name__} holds none of the host's parameters; build it "
                "from the parameters of the model that was attached to, or, where seeds alone are "
                "to learn, freeze the host before any germinates: model.requires_grad_(False)"
            )
        _refuse_unable(optimizer)
        if optimizer in _bound:
            raise ValueError(
                f"the {type(optimizer).__name__} trains the seeds of other slots already, and the "
                "groups of both would be mixed up; attach all slots in one call, to the model that "
                "contains every target, or call unbind() on the other slots first"
            )
        self.optimizer = optimizer
        missing = [path for path in slots if path not in self._groups()]
        if missing and scheduler is None and "initial_lr" in optimizer.param_groups[0]:
            raise ValueError(
                "the optimizer already has a learning-rate scheduler, which counts its groups; "
                "pass it to what binds: esper.Growth(…, scheduler=…) or slots.bind(optimizer, "
                "scheduler=…), or make the scheduler afterwards"
            )
        warn_of_left_out(optimizer, model, slots, unbound=missing)
        self._slots = slots
        self._host_groups = _host_groups(optimizer, model, slots)
        """Index of the group that a slot's is like, by path; the host's own are never moved."""
        self._before_step = before_step
        self._steps = dict.fromkeys(slots, 0)
        self._restore: list[tuple[dict[str, Any], Any]] = []
        self._filled: list[tuple[SeedSlot, dict[str, Any]]] | None = None
        """Slots that hold a living seed, with their groups; None after a change."""
        self._filled_of: list[dict[str, Any]] = []
        """The optimizer's groups that this was found in."""
        self._untold_steps = 0
        before = len(optimizer.param_groups)
        for path in missing:
            self._add_group(path)
        if scheduler is not None:
            _adopt_groups(scheduler, before, [self._host_groups[path] for path in missing])
        for slot in slots.values():
            self._catch_up(slot, was_bound=slot.path not in missing)
            if slot.living is not None:
                self._withdraw(slot.living.parameters())
                self.add(slot.path, slot.living)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._step_begins),
            optimizer.register_step_post_hook(self._step_ends),
        ]
        _bound.add(optimizer)

    def add(self, path: str, branch: SeedBranch) -> None:
        """Fill the slot's group with a new seed; its optimizer state starts fresh."""
        self._put(self._groups()[path], path, branch)
        self._steps[path] = 0

    def copy_state(
        self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], *, source: str
    ) -> None:
        """Let parameters begin with a copy of the optimizer state of others.

        Args:
            pairs: Original and copy, of the same shape.
            source: What the originals belong to, for errors.

        Raises:
            ValueError: The optimizer holds no state of any original, or one that is more than
                tensors and numbers. Nothing has changed.
        """
        optimizer = type(self.optimizer).__name__
        states = {
            copy: {key: _copied(value, key, optimizer) for key, value in state.items()}
            for original, copy in pairs
            if (state := self.optimizer.state.get(original))
        }
        if not states:
            raise ValueError(
                f"the {optimizer} holds no state of {source!r} to copy: it has not made a step "
                "yet, keeps none, or the seed is no copy; leave copy_optimizer_state out"
            )
        for parameter, state in states.items():
            self.optimizer.state[parameter] = state

    def remove(self, path: str, branch: SeedBranch) -> None:
        """Empty the slot's group and drop the seed's optimizer state."""
        self._empty(self._groups()[path])
        self.forget(branch.parameters())

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop what is in no slot any more from every group, with its state and gradient."""
        gone = list(parameters)
        self._withdraw(gone)
        for parameter in gone:
            self.optimizer.state.pop(parameter, None)
            parameter.grad = None

    def commit(self, path: str, branch: SeedBranch) -> None:
        """Move a committed seed to the host's group; its optimizer state goes with it."""
        group, host = self._groups()[path], self._host_group(path)
        host["params"].extend(group["params"])
        if "param_names" in host:
            host["param_names"].extend(group["param_names"])
        self._empty(group)

    def state_dict(self) -> dict[str, Any]:
        """Return how far each slot's warm-up is."""
        return {"steps": dict(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._steps = dict(state["steps"])
        self._untold_steps = 0

    def regroup(self, removed: Sequence[SeedBranch]) -> None:
        """Bring the groups in step with slots that have become what they were.

        A committed seed stays in whichever group of the host it is in; without one it joins its
        slot's. Seeds that were there before keep their optimizer state.

        Args:
            removed: Seeds that are in no slot any more.
        """
        for branch in removed:
            self.forget(branch.parameters())
        own = self._groups()
        for path, slot in self._slots.items():
            for index in range(len(slot.branches)):
                branch = slot.branch(index)
                lives = branch is slot.living
                places = self._places(branch)
                if lives:
                    right = all(group is own[path] for group in places)
                else:
                    right = all(GROUP_KEY not in group for group in places)
                if not (places and right):
                    self._withdraw(branch.parameters())
                    self._put(own[path] if lives else self._host_group(path), path, branch)

    @property
    def untold_steps(self) -> int:
        """How often the optimizer has stepped since a step was taken note of."""
        return self._untold_steps

    @property
    def has_stepped(self) -> bool:
        """Whether it has at all."""
        return self._untold_steps > 0

    def take_step(self) -> bool:
        """Take note of a step, and return whether the optimizer has made it."""
        stepped, self._untold_steps = self._untold_steps > 0, 0
        return stepped

    def holds(self, parameter: Tensor) -> bool:
        """Whether a group or the optimizer's state still has this parameter."""
        in_group = any(
            parameter is held for group in self.optimizer.param_groups for held in group["params"]
        )
        return in_group or parameter in self.optimizer.state

    def release(self) -> None:
        """Take the hooks off the optimizer; empty groups stay, since schedulers count them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _bound.discard(self.optimizer)

    def _groups(self) -> dict[str, dict[str, Any]]:
        """Return the slots' groups by path, as they are now: loading a state replaces them."""
        groups = self.optimizer.param_groups
        return {group[GROUP_KEY]: group for group in groups if GROUP_KEY in group}

    def _host_group(self, path: str) -> dict[str, Any]:
        """Return the host's group that a slot's is like, and that its committed seeds join."""
        return self.optimizer.param_groups[self._host_groups[path]]

    def _add_group(self, path: str) -> None:
        template = self._host_group(path)
        group = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in template.items()
            if key not in ("params", "param_names")
        }
        if "param_names" in template:
            group["param_names"] = []
        if "name" in template:  # which frameworks want to be another one for each group
            group["name"] = path
        self.optimizer.add_param_group({**group, "params": [], GROUP_KEY: path})

    def _catch_up(self, slot: SeedSlot, *, was_bound: bool) -> None:
        """Do what commits and prunes would have done while the optimizer was not bound.

        Args:
            slot: That may have changed meanwhile.
            was_bound: Before; else committed seeds that the optimizer lacks were left out of it on
                purpose, as parameters of the host can be.
        """
        group = self._groups()[slot.path]
        for index in range(slot.num_committed):
            branch = slot.branch(index)
            places = self._places(branch)
            if any(place is group for place in places) or (was_bound and not places):
                self._withdraw(branch.parameters())
                self._put(self._host_group(slot.path), slot.path, branch)
        living = set() if slot.living is None else set(slot.living.parameters())
        self.forget([parameter for parameter in group["params"] if parameter not in living])

    def _put(self, group: dict[str, Any], path: str, branch: SeedBranch) -> None:
        self._filled = None
        group["params"].extend(branch.parameters())
        if "param_names" in group:
            prefix = f"{path}.{branch.blueprint}"
            group["param_names"].extend(f"{prefix}.{n}" for n, _ in branch.named_parameters())

    def _places(self, branch: SeedBranch) -> list[dict[str, Any]]:
        """Return the groups that hold any of a branch's parameters."""
        seed = set(branch.parameters())
        groups = self.optimizer.param_groups
        return [group for group in groups if not seed.isdisjoint(group["params"])]

    def _withdraw(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take parameters out of every group."""
        self._filled = None
        seed = set(parameters)
        for group in self.optimizer.param_groups:
            keep = [index for index, p in enumerate(group["params"]) if p not in seed]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][index] for index in keep]

    def _empty(self, group: dict[str, Any]) -> None:
        self._filled = None
        group["params"] = []
        if "param_names" in group:
            group["param_names"] = []

    def _step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if self._restore:  # a step that raised did not get to it
            self._restore_learning_rates()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the optimizer comes first
        changed = None
        if closure is None:
            self._gradients_came()
        else:  # the backward is in there, as Lightning has it
            kept = {key: value for key, value in kwargs.items() if key != "closure"}
            changed = ((args[0], self._measured_after(closure), *args[2:]), kept)
        for slot, group in self._filled_groups():
            config, steps = slot.config, self._steps[slot.path]
            factor = config.learning_rate_multiplier
            if steps < config.warmup_steps:
                factor *= (steps + 1) / config.warmup_steps
            if factor != 1.0:
                self._restore.append((group, group["lr"]))
                group["lr"] = group["lr"] * factor
        return changed

    def _measured_after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def measured() -> Any:
            result = closure()
            self._gradients_came()
            return result

        return measured

    def _gradients_came(self) -> None:
        for slot, group in self._filled_groups():
            if slot.frozen:  # its guard drops what a backward brings, and sees nothing else
                for parameter in group["params"]:
                    parameter.grad = None
        self._before_step()

    def _step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._restore:
            self._restore_learning_rates()
        if skips_step(optimizer):
            return
        self._untold_steps += 1
        for slot, _ in self._filled_groups():
            if slot.stage is not SeedStage.GERMINATED:
                self._steps[slot.path] += 1

    def _filled_groups(self) -> Sequence[tuple[SeedSlot, dict[str, Any]]]:
        """Return the slots that hold a living seed, with their groups."""
        groups = self.optimizer.param_groups
        if self._filled is None or self._filled_of is not groups:  # loading a state replaces them
            found = ((self._slots.get(group.get(GROUP_KEY, "")), group) for group in groups)
            self._filled_of = groups
            self._filled = [
                (slot, group) for slot, group in found if slot is not None and group["params"]
            ]
        return self._filled

    def _restore_learning_rates(self) -> None:
        for group, learning_rate in self._restore:
            group["lr"] = learning_rate
        self._restore = []


def _refuse_unable(optimizer: Optimizer) -> None:
    """Raise TypeError for an optimizer that cannot train seeds."""
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "LBFGS takes one parameter group only and would silently never train a seed; use "
            "another optimizer"
        )
    muon = getattr(torch.optim, "Muon", None)
    if muon is not None and isinstance(optimizer, muon):
        raise TypeError(
            "Muon trains matrices only, and seeds have biases and norms besides, at which its step "
            "would raise; use another optimizer"
        )


def skips_step(optimizer: Optimizer) -> bool:
    """Return whether the call of `step` that is under way changes nothing.

    GradScaler always calls a fused optimizer, which skips by itself where a gradient is not finite.

    Effects: waits for the device, under a GradScaler with a fused optimizer only.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _copied(value: Any, key: str, optimizer: str) -> Any:
    """Return a copy of one entry of a parameter's optimizer state: a tensor, or a number."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ValueError(
        f"the {optimizer} keeps {key!r} per parameter, a {type(value).__name__}; only tensors and "
        "numbers can be copied: leave copy_optimizer_state out"
    )


def _host_groups(
    optimizer: Optimizer, model: nn.Module, slots: Mapping[str, SeedSlot]
) -> dict[str, int]:
    """Return the index of the host's group that each slot's group is like, by path.

    Of the host's groups it is the one that holds most numbers of the module which the slot stands
    behind. Where none holds any, as of an activation or of a layer that was left out, the module
    around that one counts, and so on up to the model; of a host that no group holds it is the
    first. Seeds do not count, so that it stays the same whatever grows.
    """
    seeds = {p for slot in slots.values() for p in slot.branches.parameters()}
    index_of = {
        parameter: index
        for index, group in enumerate(optimizer.param_groups)
        if GROUP_KEY not in group
        for parameter in group["params"]
        if parameter not in seeds
    }
    held = [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter in index_of
    ]
    found = {}
    for path in slots:
        name, numbers = path, Counter[int]()
        while held and not numbers:
            prefix = f"{name}." if name else ""
            for parameter in {p for own, p in held if own.startswith(prefix)}:
                numbers[index_of[parameter]] += parameter.numel()
            name = name.rpartition(".")[0]
        found[path] = max(numbers, key=lambda index: (numbers[index], -index), default=0)
    return found


def _adopt_groups(scheduler: Any, before: int, like: Sequence[int]) -> None:
    """Give a scheduler that exists its per-group values for new groups.

    Args:
        scheduler: Or one that holds others.
        before: How many groups it knows.
        like: Index of the group whose values each new one gets.
    """
    for name in _PER_GROUP_ATTRIBUTES:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == before:
            values.extend(
                value.clone() if isinstance(value, Tensor) else value
                for value in [values[index] for index in like]
            )
    for child in getattr(scheduler, "_schedulers", ()):
        _adopt_groups(child, before, like)

"""Committed seeds that nothing trains, as the optimizer was made before they were there."""

import warnings
from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from esper.slots.slot import SeedSlot


def warn_of_left_out(
    optimizer: Optimizer,
    model: nn.Module,
    slots: Mapping[str, SeedSlot],
    *,
    unbound: Iterable[str],
) -> None:
    """Warn of committed seeds that an optimizer lacks, though it trains all around them.

    It holds none of their parameters that learn, and every other one that learns of the module they
    stand behind, or, where none does, of the nearest module around it that has any. This is no
    error, since another optimizer may train them.

    Args:
        optimizer: That is to be bound.
        model: That the slots are in.
        slots: By path.
        unbound: Paths of those whose commits the optimizer was not told of.
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    seeds = {p for slot in slots.values() for p in slot.branches.parameters()}
    left_out = [
        f"{branch.blueprint!r} in {path!r}"
        for path in unbound
        for branch in map(slots[path].branch, range(slots[path].num_committed))
        if (learning := _learning(branch))
        and held.isdisjoint(learning)
        and held.issuperset(_learning_around(model, path, seeds))
    ]
    if left_out:
        warnings.warn(
            f"the {type(optimizer).__name__} trains what is around the committed seeds "
            f"{', '.join(left_out)}, and not these: unless another optimizer does, they never "
            "move, and clipping counts their gradients, which nobody drops; make the optimizer "
            "after esper.from_pretrained or slots.load_state_dict, or freeze them: "
            "slots[path].branches.requires_grad_(False)",
            stacklevel=4,
        )


def _learning_around(model: nn.Module, path: str, seeds: set[nn.Parameter]) -> set[nn.Parameter]:
    """Return what learns of a module, seeds left out, or of the nearest around it that has any."""
    learning = _learning(model.get_submodule(path)) - seeds
    if learning or not path:
        return learning
    return _learning_around(model, path.rpartition(".")[0], seeds)


def _learning(module: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if parameter.requires_grad}

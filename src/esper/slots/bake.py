"""A grown model as a plain module: no slot, no hook of a slot, the same output to the bit."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from esper.lifecycle.alpha import BlendOperator
from esper.seeds.graph_free_copy import graph_free_copy
from esper.slots.attach import find_slots, leave_no_hooks, refuse_wrapped
from esper.slots.branch import SeedBranch
from esper.slots.forwards import give_forwards_back
from esper.slots.grown_module import GrownModule
from esper.slots.placement import remove_slots, slot_behind, take_later_hooks
from esper.slots.replication import rename_left_out
from esper.slots.undecided import refuse_undecided


@torch.inference_mode(mode=False)
def bake(model: nn.Module, *, fold: bool = False) -> nn.Module:
    """Return a copy of a grown model that is an ordinary module again.

    A module with committed seeds behind it becomes a `GrownModule`; every other one is as it was,
    under the same state-dict keys. Seeds that are not in the forward path are left out. Of hooks
    there are the user's, and one on each GroupNorm of a library's own in a seed, a subclass of
    torch's, whose backward could end the process on a CPU without it. An encoder layer of torch's
    that a slot stood in stays off its fast path, which rounds otherwise. The model itself is not
    changed and can go on growing.

    Args:
        model: Grown, before `torch.compile`, DDP or FSDP.
        fold: Multiply linear seeds (LoRA) into the weight of a linear layer that they stand
            directly behind. Saves their cost; equal within rounding instead of to the bit.

    Raises:
        ValueError: The model has no slots, or a living seed is in the forward path; the message
            says how to keep or remove it.
        RuntimeError: The model is compiled or wrapped.

    Example:
        >>> import torch, esper
        >>> host = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> slots = esper.attach(host, ["0"], example=torch.zeros(2, 4))
        >>> plain = esper.bake(host)
        >>> list(plain.state_dict()) == ["0.weight", "0.bias"]
        True
    """
    refuse_wrapped(model, "bake")
    slots = find_slots(model)
    if not slots:
        raise ValueError(f"{type(model).__name__} has no slots; it is a plain module already")
    refuse_undecided(slots, "baking")
    plain = graph_free_copy(model)
    grown = _committed_branches(plain)
    later_hooks = {
        path: take_later_hooks(module, slot)
        for path in grown
        if (slot := slot_behind(module := plain.get_submodule(path))) is not None
    }
    _keep_off_fast_paths(plain)
    remove_slots(plain)
    give_forwards_back(plain)
    leave_no_hooks(plain)
    shared = _shared_parameters(plain)
    for path, branches in grown.items():
        parent_path, _, name = path.rpartition(".")
        module = plain.get_submodule(path)
        if fold:
            branches = _fold(module, branches, shared)  # noqa: PLW2901 – what is left of them
        whole = GrownModule(module, branches) if branches else module
        for hook in later_hooks[path]:
            whole.register_forward_hook(
                hook.function, with_kwargs=hook.with_kwargs, always_call=hook.always_call
            )
        if branches:
            rename_left_out(plain, path, inner="module")
            if not path:
                return whole  # the last of them
            plain.get_submodule(parent_path).add_module(name, whole)
    return plain


def _committed_branches(model: nn.Module) -> dict[str, list[SeedBranch]]:
    """Return the committed seeds by the path of the module they stand behind, innermost first."""
    found = {}
    for path, module in model.named_modules():
        slot = slot_behind(module)
        if slot is not None and slot.num_committed:
            branches = list(slot.branches)[: slot.num_committed]
            found[path] = [branch for branch in branches if isinstance(branch, SeedBranch)]
    # An outer module is wrapped after those inside it, so that their paths still hold.
    return dict(sorted(found.items(), key=lambda item: (not item[0], -item[0].count("."))))


def _keep_off_fast_paths(model: nn.Module) -> None:
    """Let torch's encoder layers that a slot stands in compute without its hook as with it.

    Their fast path rounds otherwise, and computes by its children's weights: it would skip dropout
    and activation with what has grown behind them.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and find_slots(module):
            module.activation_relu_or_gelu = 0


def _fold(
    module: nn.Module, branches: Sequence[SeedBranch], shared: set[nn.Parameter]
) -> list[SeedBranch]:
    """Multiply the leading linear seeds into a linear layer; return those that are left."""
    left = list(branches)
    while left:
        matrix = left[0].seed.linear_map()
        additive = left[0].blend_operator is BlendOperator.ADD
        if matrix is None or not additive or not _multiply(module, matrix, shared):
            break
        left.pop(0)
    return left


@torch.no_grad()
def _multiply(module: nn.Module, matrix: Tensor, shared: set[nn.Parameter]) -> bool:
    """Make a linear layer compute `(I + M)(W x + b)`; False if it is no such layer."""
    hooked = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001 – no public list
    if hooked:
        return False  # a hook may change what the seeds would see
    if type(module) is nn.Linear:
        transposed = False
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        transposed = True  # Hugging Face's linear layer, with weight `inputs outputs`
    else:
        return False
    weight, bias = module.weight, module.bias
    if not isinstance(weight, nn.Parameter):
        return False  # computed from others, as pruned and spectrally normalised weights are
    if any(parameter in shared for parameter in module.parameters(recurse=False)):
        return False  # a tied weight has another user, who must not see the seed
    exact = matrix.double() + torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    old = weight.double()
    weight.copy_(old @ exact.T if transposed else exact @ old)
    if isinstance(bias, nn.Parameter):
        bias.copy_(exact @ bias.double())
    return True


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    owners: dict[nn.Parameter, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[parameter] = owners.get(parameter, 0) + 1
    return {parameter for parameter, count in owners.items() if count > 1}

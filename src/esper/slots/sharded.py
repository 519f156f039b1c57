"""Tensors of which each process holds a part (DTensor, as FSDP2 makes of parameters).

Told by what they can do: importing their class takes longer than all of this package.
"""

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds a part of a tensor only."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return the part that this process holds, sharing its memory; all of any other tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor, which every process must ask for at once."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def sharded_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return a tensor that every process has, sharded as the reference is, if that is."""
    if not is_sharded(reference) or is_sharded(tensor) or tensor.shape != reference.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415 – see above

    assert isinstance(reference, DTensor)
    moved = tensor.to(reference.device)
    return distribute_tensor(moved, reference.device_mesh, reference.placements, src_data_rank=None)


def keep_sharded(module: nn.Module) -> None:
    """Let sharded modules be so again after each forward, the outermost too.

    FSDP leaves that one whole until its backward. What was changed in its weights meanwhile, as an
    amplitude is, would be lost, and its parameters would be other objects than the optimizer's.

    Raises:
        ValueError: A parameter of the module is not sharded.
    """
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 – see above

    for name, parameter in module.named_parameters():
        if not is_sharded(parameter):
            raise ValueError(
                f"parameter {name!r} of the {type(module).__name__} is not sharded; "
                "torch.distributed.fsdp.fully_shard shards a module in place"
            )
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(True, recurse=False)

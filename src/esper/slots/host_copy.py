"""A copy of one of the host's modules, which a seed is built of."""

import difflib

from torch import Tensor, nn

from esper.seeds.copied_block import copy_module
from esper.slots.placement import SLOT_NAME, remove_slots


def copy_of_host_module(model: nn.Module, name: object) -> nn.Module:
    """Return a copy of a module of the host that learns, without hooks, slots and seeds.

    Args:
        model: The host.
        name: Path of the module.

    Raises:
        ValueError: The name is no string, or the host has no such module; the nearest ones are
            listed. Or a hook may compute weights of the module, which a copy would lack.
    """
    if not isinstance(name, str):
        raise ValueError(  # noqa: TRY004 – as for any other value that names no module
            f"source must be the path of a module of the host, got a {type(name).__name__}"
        )
    names = [path for path, _ in model.named_modules() if path and SLOT_NAME not in path]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
        raise ValueError(f"source={name!r}: {type(model).__name__} has no such module{hint}")
    original = model.get_submodule(name)
    _refuse_computed_weights(name, original)
    module = copy_module(original)
    remove_slots(module)
    for part in module.modules():  # hooks are the host's or its user's, not a seed's
        part._forward_hooks.clear()  # noqa: SLF001 – torch has no other way to drop them
        part._forward_pre_hooks.clear()  # noqa: SLF001
        part._backward_hooks.clear()  # noqa: SLF001
        part._backward_pre_hooks.clear()  # noqa: SLF001
    return module.requires_grad_(requires_grad=True)


def _refuse_computed_weights(name: str, module: nn.Module) -> None:
    """Refuse what hooks may compute before each forward: tensors, no parameters and no buffers.

    Whether a hook or the module's own forward has computed them cannot be told from outside.
    """
    for path, part in module.named_modules(prefix=name):
        if SLOT_NAME in path or not part._forward_pre_hooks:  # noqa: SLF001 – no public list
            continue
        computed = [key for key, value in vars(part).items() if isinstance(value, Tensor)]
        if computed:
            raise ValueError(
                f"source={name!r}: {path!r} ({type(part).__name__}) has a forward pre-hook, which "
                f"no copy gets, and keeps {', '.join(map(repr, computed))}, no parameter and no "
                "buffer. If the hook computes it, a copy would keep it as it is now: make it "
                "permanent, as torch.nn.utils.prune.remove, remove_weight_norm and "
                "remove_spectral_norm do, or use torch.nn.utils.parametrizations, which are "
                "copied. If the module's own forward does, remove the hook until the seed is there"
            )

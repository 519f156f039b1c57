"""Putting slots behind named modules of a host, and taking them away without a trace."""

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from esper.lifecycle.stages import LIVING_STAGES
from esper.seeds.registry import Family
from esper.slots.batch_dimension import refuse_unless_batch_first
from esper.slots.config import SlotConfig, choose
from esper.slots.forwards import give_forwards_back, has_forward
from esper.slots.grown_module import first_parameter
from esper.slots.modes import unchanged_parameters
from esper.slots.placement import SLOT_NAME, place, remove_slots
from esper.slots.probe import (
    feature_layout,
    observe_features,
    overwritten_in_training,
    seed_dtype,
)
from esper.slots.replication import let_wrappers_in
from esper.slots.slot import SeedSlot
from esper.slots.slot_set import SlotSet
from esper.slots.state_hooks import remove_state_hooks
from esper.slots.unread import unread_features


@torch.inference_mode(mode=False)
def attach(
    model: nn.Module,
    targets: str | Sequence[str],
    *,
    example: Any,
    config: SlotConfig | Mapping[str, SlotConfig] | None = None,
    family: Family | str | Mapping[str, Family | str] | None = None,
) -> SlotSet:
    """Put a slot behind each target module, without touching the host's code or keys.

    Args:
        model: Any module, before `torch.compile`, DDP or FSDP.
        targets: Module paths or patterns, matched part by part (`"layer[23]"`, `"blocks.*"`). What
            is a module's path names that module alone, whatever it would match as a pattern.
        example: One batch as the model takes it: a tensor, a tuple of positional arguments, a dict
            of keyword arguments, or a batch whose first element is the input. Run twice in eval
            mode, the second time with gradient, for which nothing is saved, and once in train mode;
            where features have another dimension as large as the batch once more, with all samples
            twice, and where they seem to be read by nobody some times more. Random streams,
            parameters, buffers and attributes of modules are left as they were, with a copy of the
            parameters in main memory until then; what is inside an attribute, as the items of a
            list, is not looked at.
        config: For all slots, or by path; None is the default `SlotConfig`.
        family: None reads it off the features: `B C H W` is CNN, `B T D` and `B D` TRANSFORMER.
            Or one by path, for those that it names.

    Returns:
        The slots by target path.

    Raises:
        ValueError: A target matches nothing, the model already has slots, cannot run on the example
            or makes parameters when it does, a target was not run or ran several times, nobody
            reads its output, or its features have a layout that slots do not take, as one whose
            first dimension is not the batch.
        TypeError: A target is no path, its output no floating-point tensor, or it has no forward.
        RuntimeError: The model is compiled, wrapped or scripted.
        In each case the model is as it was.

    Example:
        >>> import torch, esper
        >>> host = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> slots = esper.attach(host, ["0"], example=torch.zeros(2, 4))
        >>> slots["0"].stage.name
        'DORMANT'
    """
    refuse_wrapped(model, "attach")
    _refuse_attached(model)
    patterns = [targets] if isinstance(targets, str) else list(targets)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                "targets are paths of modules, as model.named_modules() has them, got "
                f"{type(pattern).__name__} {pattern!r}"
            )
    paths = _resolve(model, patterns)
    locations = {path: _location(model, path) for path in paths}
    _refuse_shared(model, locations)
    configs, families = _configs(paths, config), _families(paths, family)
    with unchanged_parameters(model):
        return _slots_behind(model, locations, example, configs, families)


def detach(model: nn.Module) -> None:
    """Take every slot away; the model is bitwise what it would be without.

    Living seeds are pruned. Empty parameter groups stay in a bound optimizer, since schedulers
    count them; a later `bind` uses them again. Of a part of the model that was attached to, the
    slots of the rest stay in their `SlotSet`, bound as they were.

    Raises:
        ValueError: The model has no slots, or a slot has committed seeds, which are the host's and
            must not vanish: `esper.bake` keeps them.
        RuntimeError: The model is compiled or wrapped.
    """
    refuse_wrapped(model, "detach")
    slots = find_slots(model)
    if not slots:
        raise ValueError(f"{type(model).__name__} has no slots to detach")
    grown = [slot.path for slot in slots if slot.committed]
    if grown:
        raise ValueError(
            f"slots {', '.join(map(repr, grown))} hold committed seeds, which belong to the host; "
            "detaching would lose them: esper.bake(model) makes a plain module that keeps them"
        )
    for slot in slots:
        if slot.owner is not None and slot.stage in LIVING_STAGES:
            slot.prune(reason="detached")
    owners = [slot.owner for slot in slots if isinstance(slot.owner, SlotSet)]
    for owner in owners:  # afterwards, so that the optimizer has let go of every seed
        if {slot for slot in find_slots(owner.model) if slot.owner is owner} <= set(slots):
            owner.unbind()
        else:
            owner.drop(slots)
    for slot in slots:
        slot.release()
    remove_slots(model)
    give_forwards_back(model)
    for whole in {model, *(module for owner in owners for module in owner.wrapped)}:
        if not find_slots(whole):
            leave_no_hooks(whole)


def leave_no_hooks(model: nn.Module) -> None:
    """Take away what was there for slots, which are gone: callbacks' hooks, names for wrappers."""
    for part in model.modules():
        remove_state_hooks(part)
        let_wrappers_in(part)


def find_slots(model: nn.Module) -> list[SeedSlot]:
    """Return the slots of a model in module order."""
    return [module for module in model.modules() if isinstance(module, SeedSlot)]


def refuse_wrapped(model: nn.Module, verb: str) -> None:
    """Raise RuntimeError if a compiled, wrapped or scripted model cannot be acted on.

    Raises:
        TypeError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"esper.{verb} takes the model, an nn.Module, got {type(model).__name__}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    for name, module in model.named_modules():
        where = f"module {name!r} of the model" if name else "the model"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            problem = "compiled, and a compiled graph silently ignores hooks that come later"
        elif isinstance(module, wrappers):
            problem = f"wrapped in {type(module).__name__}, which would not see the seeds"
        elif any(
            "FSDP" in base.__name__ or "FullySharded" in base.__name__
            for base in type(module).__mro__
        ):
            problem = "sharded by FSDP, which would not see the seeds"
        elif isinstance(module, torch.jit.ScriptModule):
            problem = "a ScriptModule, whose forward cannot be hooked"
        else:
            continue
        raise RuntimeError(
            f"cannot {verb}: {where} is {problem}. Right order: esper.attach(model, …), "
            "slots.bind(optimizer), then torch.compile, DDP or FSDP; detach and bake the plain "
            "model, which is inside"
        )


def _slots_behind(
    model: nn.Module,
    locations: Mapping[str, nn.Module],
    example: Any,
    configs: Mapping[str, SlotConfig],
    families: Mapping[str, Family],
) -> SlotSet:
    """Run the model, and put a slot behind each location."""
    features = observe_features(model, locations, example)
    overwritten = overwritten_in_training(model, locations, example)
    layouts, dtypes = {}, {}
    for path, calls in features.items():
        _refuse_unless_once(path, len(calls))
        dtypes[path] = seed_dtype(model, path, calls[0])
        layouts[path] = feature_layout(
            path,
            calls[0],
            families.get(path),
            dtype=dtypes[path],
            overwritten=calls[0].overwritten or path in overwritten,
        )
    first_calls = {path: calls[0] for path, calls in features.items()}
    refuse_unless_batch_first(model, locations, first_calls, example)
    slots = SlotSet(model)
    try:
        for path, location in locations.items():
            slot = SeedSlot(
                path,
                layouts[path],
                configs[path],
                device=features[path][0].tensor.device,
                dtype=dtypes[path],
                call=features[path][0].call,
                first_parameter=first_parameter(location),
                owner=slots,
            )
            place(slot, location)
            slots.add(slot)
        _refuse_useless(model, locations, slots, example)
    except BaseException:
        remove_slots(model)
        raise
    return slots


def _refuse_attached(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, SLOT_NAME):
            raise ValueError(
                f"module {name!r} already has a slot; give all targets in one call, or "
                "esper.detach(model) first"
            )


def _resolve(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    if not patterns:
        raise ValueError("attach needs at least one target path")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    matched: set[str] = set()
    for pattern in patterns:
        exact = pattern in names
        hits = [pattern] if exact else [name for name in names if _matches(name, pattern)]
        if not hits:
            nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            hint = (
                f"did you mean {' or '.join(map(repr, nearest))}?"
                if nearest
                else (f"its modules: {', '.join(names[:12])}")
            )
            raise ValueError(f"{type(model).__name__} has no module {pattern!r}; {hint}")
        matched.update(hits)
    return [name for name in names if name in matched]


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _location(model: nn.Module, path: str) -> nn.Module:
    """Return the module to hook: the target, or a chain's last child, whose output is the same."""
    module = model.get_submodule(path)
    if not has_forward(module):
        raise TypeError(
            f"module {path!r} is a {type(module).__name__}, which has no forward; name the modules "
            f"in it ({path + '.*'!r})"
        )
    while type(module).forward is nn.Sequential.forward:
        chain = list(cast("nn.Sequential", module))  # `children` leaves out what comes again
        if not chain:
            raise TypeError(f"module {path!r} is an empty Sequential; there is nothing to stand on")
        module = chain[-1]
    return module


def _refuse_shared(model: nn.Module, locations: Mapping[str, nn.Module]) -> None:
    for path, location in locations.items():
        names = [
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if module is location
        ]
        if len(names) > 1:
            what, remedy = "stands", "name a module that is used once"
            if path not in names:
                what = "ends in a module that stands"
                remedy += ", or let the chain end in one of its own, as nn.Identity()"
            raise ValueError(
                f"module {path!r} {what} at several places ({', '.join(names)}); one seed behind "
                f"all of them would be ambiguous, {remedy}"
            )
        same = [other for other, module in locations.items() if module is location]
        if len(same) > 1:
            raise ValueError(
                f"targets {' and '.join(map(repr, same))} are one module or end in the same one; "
                "name only one of them"
            )


def _refuse_unless_once(path: str, calls: int) -> None:
    if calls == 0:
        raise ValueError(
            f"module {path!r} did not run on the example; a slot there would never grow"
        )
    if calls > 1:
        raise ValueError(
            f"module {path!r} ran {calls} times in one forward; a seed needs one place in the "
            "network, name a module that is called once"
        )


def _refuse_useless(
    model: nn.Module, locations: Mapping[str, nn.Module], slots: SlotSet, example: Any
) -> None:
    """Refuse a target that would run the slot as one of its children, and one that nobody reads."""
    calls = dict.fromkeys(slots, 0)

    def count(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            calls[path] += 1

        return hook

    handles = [slot.register_forward_pre_hook(count(path)) for path, slot in slots.items()]
    try:
        unread = unread_features(model, locations, example)
    finally:
        for handle in handles:
            handle.remove()
    for path, number in calls.items():
        if number:
            raise ValueError(
                f"module {path!r} runs all its children itself, and would run the slot as one of "
                "them; name its last child instead"
            )
        if path in unread:
            raise ValueError(
                f"module {path!r} ran on the example, and nobody read what a seed there would "
                "change: its output, or the first element of it; it would never learn. Name a "
                "module whose output is used, as the head that takes an RNN's last state, or give "
                "an example with which the model uses this one's"
            )


def _families(
    paths: Sequence[str], family: Family | str | Mapping[str, Family | str] | None
) -> dict[str, Family]:
    if family is None:
        return {}
    by_path = family if isinstance(family, Mapping) else dict.fromkeys(paths, family)
    unknown = [path for path in by_path if path not in paths]
    if unknown:
        raise ValueError(
            f"family names {', '.join(map(repr, unknown))}, which are no slots; slots: "
            f"{', '.join(map(repr, paths))}"
        )
    return {path: choose(Family, value, "family") for path, value in by_path.items()}


def _configs(
    paths: Sequence[str], config: SlotConfig | Mapping[str, SlotConfig] | None
) -> dict[str, SlotConfig]:
    if config is None or isinstance(config, SlotConfig):
        return dict.fromkeys(paths, config or SlotConfig())
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config must be a SlotConfig, or a mapping of slot path to one; got "
            f"{type(config).__name__}"
        )
    unknown = [path for path in config if path not in paths]
    if unknown:
        raise ValueError(
            f"config names {', '.join(map(repr, unknown))}, which are no slots; slots: "
            f"{', '.join(map(repr, paths))}"
        )
    for path, value in config.items():
        if not isinstance(value, SlotConfig):
            raise TypeError(
                f"config of slot {path!r} must be a SlotConfig, got {type(value).__name__}"
            )
    return {path: config.get(path, SlotConfig()) for path in paths}

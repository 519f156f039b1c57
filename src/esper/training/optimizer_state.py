"""An optimizer's state by the names of parameters, so that it survives growth."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from esper.slots.nested import map_tensors
from esper.slots.sharded import sharded_like


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return groups and per-parameter state, parameters by their names in the model.

    `Optimizer.state_dict` numbers them instead, and growth changes the numbers.

    Args:
        optimizer: Between two steps.
        model: Has all of its parameters.

    Returns:
        Mappings, lists, plain values and tensors, which are copies.

    Raises:
        ValueError: It trains a parameter that is not the model's.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    trained = parameter_names(optimizer, model)
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {**_copies(group), "params": params}
            for group, params in zip(optimizer.param_groups, trained, strict=True)
        ],
        "state": {names[p]: _copies(state) for p, state in optimizer.state.items() if state},
    }


def parameter_names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters that each group trains, in their order.

    `Optimizer.state_dict` goes by this order.

    Raises:
        ValueError: It trains a parameter that is not the model's.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"group {number} of the {type(optimizer).__name__} trains a parameter of shape "
                    f"{tuple(parameter.shape)} that is not the {type(model).__name__}'s, so that "
                    "no checkpoint would have it; make it a part of the model"
                )
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def order_parameters(
    optimizer: Optimizer, model: nn.Module, names: Sequence[Sequence[str]]
) -> None:
    """Let each group train the parameters of these names, in this order.

    Afterwards `Optimizer.load_state_dict` gives each parameter the state that was its own when the
    names were taken. State that the optimizer has stays with its parameters.

    Args:
        optimizer: With as many groups as then.
        model: Has the parameters by the same names.
        names: From `parameter_names`.

    Raises:
        ValueError: The number of groups is another one, or the model lacks a parameter. The
            optimizer is as it was.
    """
    kind = type(optimizer).__name__
    _check_num_groups(optimizer, len(names))
    parameters = dict(model.named_parameters())
    for name in (name for group in names for name in group):
        if name not in parameters:
            raise ValueError(
                f"the {kind} trained {name!r}, which the {type(model).__name__} has not; build the "
                "host as it was, and give the slots their state first"
            )
    for group, kept in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [parameters[name] for name in kept]


def check_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise unless a state is of an optimizer that was built as this one is.

    Args:
        optimizer: Bound to its slots, if it was then.
        state: From `optimizer_state`.

    Raises:
        ValueError: The class or the number of groups is another one.
    """
    kind = type(optimizer).__name__
    if kind != state["class"]:
        raise ValueError(f"the state is of a {state['class']}, and this is a {kind}")
    _check_num_groups(optimizer, len(state["groups"]))


def _check_num_groups(optimizer: Optimizer, num_groups: int) -> None:
    if num_groups != len(optimizer.param_groups):
        raise ValueError(
            f"the {type(optimizer).__name__} had {num_groups} parameter groups, and has "
            f"{len(optimizer.param_groups)}; build it as it was built then, and bind the slots"
        )


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give an optimizer back what it was; the model has its parameters of then by now.

    Args:
        optimizer: Of the same class and with as many groups as then.
        model: Has the parameters by the same names.
        state: From `optimizer_state`.

    Raises:
        ValueError: The class or the number of groups is another one, or the model lacks a
            parameter. The optimizer is as it was.
    """
    check_optimizer_state(optimizer, state)
    groups, parameters = state["groups"], dict(model.named_parameters())
    wanted = [name for group in groups for name in group["params"]]
    unknown = [name for name in state["state"] if name not in wanted]
    if unknown:
        raise ValueError(f"the state has {unknown[0]!r} in none of its groups")
    order_parameters(optimizer, model, [group["params"] for group in groups])
    numbers = {name: number for number, name in enumerate(wanted)}
    optimizer.load_state_dict(
        {
            "state": {
                numbers[name]: map_tensors(
                    functools.partial(sharded_like, reference=parameters[name]), _copies(kept)
                )
                for name, kept in state["state"].items()
            },
            "param_groups": [
                {**_copies(group), "params": [numbers[name] for name in group["params"]]}
                for group in groups
            ],
        }
    )
    for name, kept in state["state"].items():  # torch gives it the parameter's dtype
        loaded = optimizer.state[parameters[name]]
        for key, value in kept.items():
            if hasattr(value, "dtype") and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device, copy=True)


def _copies(value: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = map_tensors(
        lambda tensor: tensor.detach().clone(), {k: v for k, v in value.items() if k != "params"}
    )
    return copied

"""One forward on an example, to learn what features each target has."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from esper.seeds.registry import Family
from esper.slots.call_arguments import CallArguments
from esper.slots.channels_first import ChannelsFirst
from esper.slots.germination import FeatureLayout
from esper.slots.grown_module import first_parameter
from esper.slots.modes import (
    MadeParametersError,
    device_of,
    evaluation_mode,
    forked_random_state,
    training_mode,
    unchanged_attributes,
    unchanged_buffers,
)
from esper.slots.nested import tensors_in, to_device

_LAYOUTS = {Family.CNN: "B C H W", Family.TRANSFORMER: "B … D, features in the last dimension"}


class _NoFeaturesError(TypeError):
    """A module's output holds no features; not the example's fault."""


def example_arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that `example` stands for.

    A tensor is the only argument. A mapping holds keyword arguments; of a batch with more keys,
    those that `forward` accepts. A tuple or list holds positional arguments if `forward` takes that
    many, and is a batch whose first element is the input otherwise.

    Raises:
        TypeError: The example is none of these, or no key of the mapping is a parameter.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    parameters = inspect.signature(model.forward).parameters
    if isinstance(example, Mapping):
        keywords = {str(key): value for key, value in example.items()}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return (), keywords
        accepted = {key: value for key, value in keywords.items() if key in parameters}
        if not accepted:
            raise TypeError(
                f"no key of the example ({', '.join(keywords)}) is a parameter of "
                f"{type(model).__name__}.forward ({', '.join(parameters)})"
            )
        return (), accepted
    if isinstance(example, Sequence) and not isinstance(example, str) and len(example) > 0:
        positional = [
            parameter
            for parameter in parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
        if variadic or len(example) <= len(positional):
            return tuple(example), {}
        return example_arguments(model, example[0])
    raise TypeError(
        "example must be a tensor, a tuple of positional arguments, a dict of keyword arguments, "
        f"or a batch that has one of these; got {type(example).__name__}"
    )


def first_tensor(output: Any, path: str) -> Tensor:
    """Return the features in a module's output: the tensor, or the first element of a tuple.

    Raises:
        TypeError: There is none, or it does not hold floating-point numbers.
    """
    features = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(features, Tensor) or not features.is_floating_point():
        what = f"a tensor of {features.dtype}" if isinstance(features, Tensor) else type(features)
        raise _NoFeaturesError(
            f"module {path!r} returned {what}; a slot needs a floating-point tensor, or a tuple "
            "that begins with one: choose a module inside it"
        )
    if features.is_nested:
        raise _NoFeaturesError(
            f"module {path!r} returned a nested tensor, which slots do not take; build the encoder "
            "with enable_nested_tensor=False"
        )
    if features.layout is not torch.strided:
        raise _NoFeaturesError(
            f"module {path!r} returned a tensor of layout {features.layout}, which slots do not "
            "take; choose a module whose features are dense"
        )
    return features


def run_on_example(
    model: nn.Module, example: Any, *, training: bool = False, gradient: bool = False
) -> Any:
    """Run the model once; all that it is stays, but for values of parameters.

    Args:
        model: The host.
        example: As `attach` takes it.
        training: In train mode, else in eval mode.
        gradient: Let autograd follow it.

    Returns:
        Its output.

    Raises:
        ValueError: The forward raised; model and example shapes are named. Or it made parameters
            that learn. Or it is on the meta device.
    """
    device = device_of(model)
    if device.type == "meta":
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where nothing is computed; build it "
            "where it is to run, or move it there by model.to_empty(device=…) and load its weights"
        )
    args, kwargs = to_device(example_arguments(model, example), device)
    try:
        with (
            unchanged_attributes(model),
            unchanged_buffers(model),
            training_mode(model) if training else evaluation_mode(model),
            forked_random_state(device),
            torch.set_grad_enabled(gradient),
        ):
            return model(*args, **kwargs)
    except (_NoFeaturesError, MadeParametersError):
        raise
    except Exception as error:
        shapes = ", ".join(
            f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
            for value in (*args, *kwargs.values())
        )
        raise ValueError(
            f"{type(model).__name__} cannot run on the example ({shapes}): "
            f"{type(error).__name__}: {error}. Give attach(…, example=…) one batch as the model "
            "takes it"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Features:
    """What came out of a module in one call."""

    tensor: Tensor
    call: CallArguments
    """What the module was called with besides."""
    autocast: bool
    """Whether autocast was on where they came out."""
    overwritten: bool
    """A later operation of the host changed the tensor in place, or may: a later module with
    `inplace=True` received it, or it left the model, whose caller may change it."""
    channels_first: bool
    """They are `B C T`, as 1-d convolutions make them, as far as that can be told."""


def observe_features(
    model: nn.Module, locations: Mapping[str, nn.Module], example: Any, *, training: bool = False
) -> dict[str, list[Features]]:
    """Return the features that came out of each location in one run, one entry per call.

    Args:
        model: The host.
        locations: Its modules by path.
        example: As `attach` takes it.
        training: Run in train mode, else in eval mode.

    Raises:
        TypeError: A location's output is no tensor.
        ValueError: The model cannot run on the example.
    """
    seen: dict[str, list[tuple[Features, int]]] = {path: [] for path in locations}
    handed_over: set[int] = set()
    channels_first = ChannelsFirst()

    def recorder(path: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            features = first_tensor(output, path)
            observed = Features(
                tensor=features,
                call=CallArguments.of_call(args, kwargs, first_parameter(module)),
                autocast=torch.is_autocast_enabled(features.device.type),
                overwritten=False,
                channels_first=channels_first.describes(features),
            )
            seen[path].append((observed, _changes(features)))

        return record

    def note_inplace(module: nn.Module, args: Any) -> None:
        if getattr(module, "inplace", False):
            handed_over.update(_storages(value for value in args if isinstance(value, Tensor)))

    handles = channels_first.watch(model)  # before a location's own hook asks
    handles += [
        module.register_forward_hook(recorder(path), with_kwargs=True)
        for path, module in locations.items()
    ]
    handles += [module.register_forward_pre_hook(note_inplace) for module in model.modules()]
    try:
        output = run_on_example(model, example, training=training)
    finally:
        for handle in handles:
            handle.remove()
    handed_over |= _storages(tensors_in(output))

    def overwritten(tensor: Tensor, changes: int) -> bool:
        return _changes(tensor) != changes or not handed_over.isdisjoint(_storages([tensor]))

    return {
        path: [
            replace(observed, overwritten=overwritten(observed.tensor, changes))
            for observed, changes in calls
        ]
        for path, calls in seen.items()
    }


def overwritten_in_training(
    model: nn.Module, locations: Mapping[str, nn.Module], example: Any
) -> set[str]:
    """Return the locations whose features the host changes in place, or may, where it trains.

    Those are all of them where it does not run on the example in train mode, as one that wants
    targets then, or BatchNorm with a batch of one: nothing can be told there.

    Args:
        model: The host; it runs.
        locations: Its modules by path.
        example: As `attach` takes it.

    Raises:
        MadeParametersError: It makes parameters there.
    """
    try:
        seen = observe_features(model, locations, example, training=True)
    except MadeParametersError:
        raise
    except Exception:  # noqa: BLE001 – whatever the host wants in train mode; see above
        return set(locations)
    return {path for path, calls in seen.items() if any(call.overwritten for call in calls)}


def _changes(tensor: Tensor) -> int:
    """Return how often the tensor was changed in place; autograd's notes name the counter so."""
    return tensor._version  # noqa: SLF001


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    """Return where the tensors' memory begins, of those that have one: sparse ones have not."""
    return {t.untyped_storage().data_ptr() for t in tensors if t.layout is torch.strided}


def seed_dtype(model: nn.Module, path: str, observed: Features) -> torch.dtype:
    """Return what dtype seeds behind a module have: that of the features, but for autocast's.

    Where autocast has made half-precision features out of float32 parameters, seeds are float32,
    as a module would be that somebody writes there by hand.

    Args:
        model: The host.
        path: Of the module.
        observed: What came out of it.
    """
    made = observed.tensor.dtype
    half = made in (torch.float16, torch.bfloat16)
    if not half or (not observed.autocast and made in _parameter_dtypes(model)):
        return made
    nearest = _parameter_dtypes(model.get_submodule(path))
    while path and not nearest:
        path = path.rpartition(".")[0]
        nearest = _parameter_dtypes(model.get_submodule(path))
    return torch.float32 if torch.float32 in nearest else made


def _parameter_dtypes(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters() if p.is_floating_point()}


def feature_layout(
    path: str,
    observed: Features,
    family: Family | None,
    *,
    dtype: torch.dtype,
    overwritten: bool,
) -> FeatureLayout:
    """Return family and width: 4 dimensions are `B C H W`, 2 or 3 are `B D` or `B T D`.

    Args:
        path: Of the module, for errors.
        observed: What came out of it.
        family: Overrides the rule, for maps with features in the last dimension.
        dtype: Of seeds there.
        overwritten: The host changes the features in place, or may.

    Raises:
        ValueError: The number of dimensions is another one, or not one of the family given. Or the
            features are `B C T`, and no family is given.
    """
    features = observed.tensor
    ndim = features.ndim
    if family is None:
        if ndim not in (2, 3, 4):
            raise ValueError(
                f"module {path!r} returned features of shape {tuple(features.shape)}; slots take "
                "B C H W, B T D or B D (pass family= if features are in the last dimension)"
            )
        if observed.channels_first:
            raise ValueError(
                f"module {path!r} returned features of shape {tuple(features.shape)} with channels "
                "in dimension 1 (B C T, as torch's 1-d convolutions, norms of channels and "
                "poolings have them), where a seed would mix time steps; slots take B T D: name a "
                "module that returns them transposed, or pass family='transformer' if the last "
                "dimension does hold the features"
            )
        family = Family.CNN if ndim == 4 else Family.TRANSFORMER
    elif ndim < 2 or (family is Family.CNN and ndim != 4):
        raise ValueError(
            f"module {path!r} returned features of shape {tuple(features.shape)}; the "
            f"{family.name} family takes {_LAYOUTS[family]}"
        )
    dim = features.shape[1] if family is Family.CNN else features.shape[-1]
    return FeatureLayout(
        family=family,
        shape=tuple(features.shape),
        dim=dim,
        overwritten=overwritten,
        cast=features.dtype != dtype and not observed.autocast,
    )

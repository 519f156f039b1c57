"""An exponential moving average of the weights that follows growth by the names of parameters."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.slots.branch import SeedBranch
from esper.slots.sharded import local_part, sharded_like
from esper.slots.slot_set import SlotSet

_FOREIGN = (
    "{what} pairs weights and averages by position, which growth changes: layers would silently be "
    "mixed. Make an average of your own for the growing model: esper.EMA(slots, decay=…)"
)


class EMA:
    """Averages a growing model's parameters: `average = decay * average + (1 - decay) * weight`.

    A seed's parameters join with the values that they have after their first step, are rescaled as
    the seed is where it begins to blend, stay when the host takes the seed over, and leave with a
    seed that is pruned. They go where the weights go, and have their dtype; of integers and of
    numbers of 8 bits the average is the value. Buffers, as running statistics, are not averaged.
    Where other parameters take the names, as after `load_state_dict(…, assign=True)`, their
    averages begin anew.

    Args:
        slots: From `esper.attach`; their model is averaged.
        decay: Between 0 and 1; 0.999 remembers about a thousand steps.

    Raises:
        ValueError: `decay` is out of its range.

    Example:
        >>> import torch, esper
        >>> host = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> slots = esper.attach(host, ["0"], example=torch.zeros(2, 4))
        >>> ema = esper.EMA(slots, decay=0.9)
        >>> ema.update()  # after each optimizer step
        >>> with ema.applied():
        ...     averaged = host(torch.zeros(2, 4))

    Source: Polyak and Juditsky 1992, with exponential weights.
    """

    def __init__(self, slots: SlotSet, *, decay: float = 0.999) -> None:
        if not isinstance(slots, SlotSet):
            raise TypeError(
                f"EMA averages the model of a SlotSet, as esper.attach returns it, got a "
                f"{type(slots).__name__}"
            )
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        self.slots = slots
        self.decay = decay
        self._weights: dict[str, nn.Parameter] = {}
        self._averages: dict[str, Tensor] = {}
        self._mixed: tuple[list[Tensor], list[Tensor]] = ([], [])
        """Averages, and what is taken into each."""
        self._copied: list[tuple[Tensor, Tensor]] = []
        """Averages that are the value, with what that is."""
        self._structure: Hashable = None
        self._scales = self._scales_now()
        """By how much each seed was rescaled, when that was looked at last."""
        self._follow()

    def update(self) -> None:
        """Take the weights of a step into the average. No host–device synchronisation."""
        self._scale_along()
        self._follow()
        with torch.no_grad():
            if self._mixed[0]:
                torch._foreach_lerp_(*self._mixed, 1.0 - self.decay)
            for average, weight in self._copied:
                average.copy_(weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averages inside the block, and its own weights again afterwards.

        Train nothing inside it.
        """
        averages = self.averages()
        weights = dict(self.slots.model.named_parameters())
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            _set(weights, averages)
            yield
        finally:
            _set(weights, kept)

    def averages(self) -> Mapping[str, Tensor]:
        """Return the average of each parameter, by its name; do not change them.

        One that has not joined yet is there as it is.
        """
        self._scale_along()
        return {
            name: self._averages[name] if self._weights.get(name) is weight else weight.detach()
            for name, weight in self.slots.model.named_parameters()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, by name, of a seed once it has joined; tensors are copies."""
        weights = dict(self.slots.model.named_parameters())
        living = self._names_of_living(weights)
        averages = {
            name: average.clone()
            for name, average in self.averages().items()
            if name not in living or self._weights.get(name) is weights[name]
        }
        return {"decay": self.decay, "averages": averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from averages that were kept; the slots have their state of then by now.

        Raises:
            ValueError: They are of other parameters, or another average's that pairs by position.
                Nothing has changed.
        """
        if "n_averaged" in state:
            raise ValueError(_FOREIGN.format(what="torch.optim.swa_utils.AveragedModel"))
        if "averages" not in state:
            raise ValueError(_FOREIGN.format(what="A state without names of averages"))
        weights, averages = dict(self.slots.model.named_parameters()), state["averages"]
        missing = weights.keys() - averages - self._names_of_living(weights)
        unknown = averages.keys() - weights
        if missing or unknown:
            raise ValueError(
                f"the averages lack {', '.join(sorted(missing)[:3]) or 'nothing'} and have "
                f"{', '.join(sorted(unknown)[:3]) or 'nothing'} beyond; give the slots their state "
                "first"
            )
        for name, average in averages.items():
            if weights[name].shape != average.shape:
                raise ValueError(
                    f"the average of {name!r} has shape {tuple(average.shape)}, the parameter "
                    f"{tuple(weights[name].shape)}"
                )
        self.decay = state["decay"]
        self._weights = {name: weights[name] for name in averages}
        self._averages = {
            name: sharded_like(average, weights[name]).to(weights[name].device, copy=True)
            for name, average in averages.items()
        }
        self._structure = None
        self._scales = self._scales_now()

    def _names_of_living(self, weights: Mapping[str, nn.Parameter]) -> set[str]:
        """Return the names of what may not have joined yet."""
        living = {
            parameter
            for slot in self.slots.values()
            if slot.living is not None
            for parameter in slot.living.parameters()
        }
        return {name for name, weight in weights.items() if weight in living}

    def _scales_now(self) -> dict[SeedBranch, float]:
        slots = self.slots.values()
        branches = [slot.branch(index) for slot in slots for index in range(len(slot.branches))]
        return {branch: branch.rescaled for branch in branches}

    def _scale_along(self) -> None:
        """Rescale the averages of seeds that were rescaled since."""
        before, self._scales = self._scales, self._scales_now()
        for branch, scale in self._scales.items():
            factor = scale / before.get(branch, scale)
            if factor != 1.0:
                layers = branch.seed.output_layers
                scaled = {parameter for layer in layers for parameter in layer.parameters()}
                for name in [name for name, weight in self._weights.items() if weight in scaled]:
                    self._averages[name].mul_(factor)

    def _follow(self) -> None:
        """Bring the averages in step with the parameters that the model has now."""
        parameters = list(self.slots.model.parameters())
        first, identities = parameters[0], tuple(map(id, parameters))
        structure = (self.slots.structure(), identities, first.device, first.dtype)
        if structure == self._structure:
            return
        weights = dict(self.slots.model.named_parameters())
        self._averages = {
            # A later seed may have the name of one that was pruned, and is another parameter.
            name: self._averages[name].to(weight.device, weight.dtype)
            if self._weights.get(name) is weight
            else weight.detach().clone()
            for name, weight in weights.items()
        }
        self._weights = weights
        pairs = [(self._averages[name], weight) for name, weight in weights.items()]
        mixed = [pair for pair in pairs if _can_be_mixed(pair[1].dtype)]
        self._mixed = ([average for average, _ in mixed], [weight for _, weight in mixed])
        self._copied = [pair for pair in pairs if not _can_be_mixed(pair[1].dtype)]
        self._structure = structure


def _can_be_mixed(dtype: torch.dtype) -> bool:
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize >= 2)


def _set(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            if local_part(weight).data_ptr() != local_part(values[name]).data_ptr():
                weight.copy_(values[name])


def check_average(average: Any, slots: SlotSet) -> None:
    """Raise unless an average, if there is one, follows these slots.

    Raises:
        TypeError: It is another kind of average, which pairs by position.
        ValueError: It is of another model.
    """
    if average is None:
        return
    if not isinstance(average, EMA):
        kind = f"{type(average).__module__}.{type(average).__qualname__}"
        raise TypeError(_FOREIGN.format(what=kind))
    if average.slots is not slots:
        raise ValueError("the average is of another model's slots; make it of these")

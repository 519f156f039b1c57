"""Where in its data a run is, so that it can go on there."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch

from esper.training.random_states import random_states, set_random_states


@runtime_checkable
class StatefulBatches(Protocol):
    """Batches that remember something from one epoch to the next, as an order of their own."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return it, before an epoch begins."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what was remembered then."""


class DataPosition:
    """Iterates batches anew each epoch, and finds its way back into the middle of one.

    What the batches are made of, random streams and the batches' own state, is kept as it was when
    the epoch began; going back draws the batches that were seen once more, and drops them.

    Args:
        batches: With `state_dict` and `load_state_dict`, or drawing from the global random streams
            and the `generator` that they, their samplers or their data set have, as a DataLoader
            does. Where one of these has `set_epoch` it is told the epoch's number.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._begun: dict[str, Any] | None = None
        """As it was when the epoch began that has batches left; None where none has."""
        self._num_seen = 0
        self._exhausted = False
        """Whether the epoch under way has no batches left, and is not over yet."""
        self._go_on_with: dict[str, Any] | None = None
        """Random streams to go on with, once the way back is found."""

    def epoch(self, number: int) -> Iterator[Any]:
        """Yield the batches of the next epoch, or what is left of one that was begun.

        It is under way until `end_epoch`: whoever takes several batches at once finds that there
        are no more before the last of them are used.

        Args:
            number: From 0; `DistributedSampler` and its like draw another order by it.

        Raises:
            ValueError: The epoch has no batches, or fewer than were seen of it.
        """
        if self._go_on_with is not None:
            yield from self._rest(self._go_on_with, number)
        else:
            # Before it is told: what draws then, draws the same when the way back is found.
            self._begun, self._num_seen, self._exhausted = self._state(), 0, False
            self._tell(number)
            yield from self._counted(iter(self._batches))
        self._begun, self._exhausted = None, True

    @property
    def begins_epoch(self) -> bool:
        """Whether the next `epoch` is one from its beginning, and not the rest of one."""
        return self._go_on_with is None

    def end_epoch(self) -> None:
        """Let the epoch be over, all that its batches have led to included."""
        self._exhausted = False

    def state_dict(self) -> dict[str, Any]:
        """Return where it is: before an epoch, after so many batches of one, or after all."""
        begun = self._state() if self._begun is None else self._begun
        num_seen = 0 if self._begun is None else self._num_seen
        random = random_states() if self._go_on_with is None else self._go_on_with
        return {
            "begun": begun,
            "num_seen": num_seen,
            "exhausted": self._exhausted,
            "random": random,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there with the next `epoch`, random streams included."""
        self._begun, self._num_seen = dict(state["begun"]), state["num_seen"]
        self._exhausted = state["exhausted"]
        self._go_on_with = dict(state["random"])

    def _rest(self, random: Mapping[str, Any], number: int) -> Iterator[Any]:
        begun, num_seen = self._begun, self._num_seen
        assert begun is not None
        self._go_on_with = None
        set_random_states(begun["random"])
        self._load(begun["batches"])
        if self._exhausted:
            return
        self._tell(number)
        batches = iter(self._batches)
        seen = sum(1 for _ in islice(batches, num_seen))
        if seen < num_seen:
            raise ValueError(
                f"the run was {num_seen} batches into an epoch, and the data has only {seen} now; "
                "go on with the data that it was trained on"
            )
        if num_seen > 0:
            set_random_states(random)
        yield from self._counted(batches)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._num_seen += 1
            yield batch
        if self._num_seen == 0:
            raise ValueError(
                "the data has no batches in this epoch; pass what can be iterated anew, as a list "
                "or a DataLoader"
            )

    def _state(self) -> dict[str, Any]:
        own: Any
        if _remembers(self._batches):
            own = copy.deepcopy(self._batches.state_dict())
        else:
            own = [generator.get_state() for generator in _generators_of(self._batches)]
        return {"random": random_states(), "batches": own}

    def _load(self, own: Any) -> None:
        if _remembers(self._batches):
            self._batches.load_state_dict(copy.deepcopy(own))
        else:
            for generator, state in zip(_generators_of(self._batches), own, strict=True):
                generator.set_state(state)

    def _tell(self, number: int) -> None:
        """Tell the epoch's number to what orders batches by it."""
        for part in _parts_of(self._batches):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(number)


@contextmanager
def unchanged_generators(batches: Iterable[Any]) -> Iterator[None]:
    """Let batches be drawn the same again, as far as the generators go that they have themselves.

    Args:
        batches: As `DataPosition` finds their generators.
    """
    kept = [(generator, generator.get_state()) for generator in _generators_of(batches)]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)


def _generators_of(batches: Iterable[Any]) -> list[torch.Generator]:
    found = (getattr(part, "generator", None) for part in _parts_of(batches))
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _parts_of(batches: Iterable[Any]) -> list[Any]:
    """Return the batches, and the parts of a DataLoader that they are drawn by."""
    sampler, batch_sampler, data = (
        getattr(batches, name, None) for name in ("sampler", "batch_sampler", "dataset")
    )
    inner = getattr(batch_sampler, "sampler", None)
    return [batches, sampler, batch_sampler, inner, data]


def _remembers(batches: Any) -> TypeGuard[StatefulBatches]:
    """Whether batches have a state; a loader of accelerate has the methods without one, too."""
    inner = getattr(batches, "base_dataloader", batches)
    return isinstance(batches, StatefulBatches) and isinstance(inner, StatefulBatches)

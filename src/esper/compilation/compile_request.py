"""What is to be compiled ahead, as far as its graphs depend on it."""

import hashlib
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from esper.compilation.feature_guards import FeatureGuards
from esper.compilation.process_settings import ProcessSettings
from esper.compilation.structures import code_of_module, structure_of_slot
from esper.lifecycle.record import Record
from esper.seeds.registry import Family
from esper.slots.call_arguments import CallArguments
from esper.slots.nested import map_tensors
from esper.slots.slot import SeedSlot


class CompileRequest(Record):
    """A slot's seeds on features of one kind; equal requests have equal graphs."""

    blueprints: tuple[str, ...]
    """Of the committed seeds, then of the living one."""
    family: Family
    dim: int
    structure: str
    """Digest of what the seeds are made of."""
    code: str
    """Digest of the files that their classes are written in."""
    kinds: tuple[str, ...]
    """The kinds of forward."""
    features: FeatureGuards
    arguments: str
    """Digest of what a call passes beyond the features; empty where no seed reads it."""
    options: dict[str, Any]
    """Of torch.compile."""
    settings: ProcessSettings

    @classmethod
    def of(
        cls,
        slot: SeedSlot,
        features: FeatureGuards,
        call: CallArguments,
        options: Mapping[str, Any],
    ) -> Self:
        """Return the request for a slot's seeds, from their birth on, as this process is set."""
        arguments = repr(map_tensors(_described, (call.args, call.kwargs)))
        return cls(
            blueprints=tuple(slot.branch(index).blueprint for index in range(len(slot.branches))),
            family=slot.family,
            dim=slot.dim,
            structure=_digest(repr(structure_of_slot(slot))),
            code=code_of_module(slot.branches),
            kinds=tuple(
                f"{kind.mode.name} {kind.graph}" for kind in slot.kinds_to_come(from_birth=True)
            ),
            features=features,
            arguments=_digest(arguments) if call.args or call.kwargs else "",
            options=dict(options),
            settings=ProcessSettings.here(),
        )

    @property
    def digest(self) -> str:
        """64 hexadecimal digits; other requests have others."""
        return _digest(self.model_dump_json())

    @property
    def living(self) -> str:
        """The living seed's blueprint, or the last committed one's."""
        return self.blueprints[-1]


def _described(tensor: Tensor) -> Any:
    return FeatureGuards.of(tensor)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

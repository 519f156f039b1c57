"""Actions as numbers: one choice per head, and which choices are legal.

Legend: S slots, K blueprints, C choices of the operation head, 1 + 5 S.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from esper.lifecycle.actions import (
    Action,
    Advance,
    Commit,
    Fraction,
    Germinate,
    GrowthState,
    Operation,
    Prune,
    SetAlphaTarget,
    SlotState,
    Steps,
    Wait,
    legal_operations,
)
from esper.lifecycle.alpha import AlphaCurve, BlendOperator
from esper.lifecycle.record import Record

SLOT_OPERATIONS: tuple[Operation, ...] = tuple(op for op in Operation if op is not Operation.WAIT)
"""What may be asked of a slot, in the order of the operation head."""


class Head(IntEnum):
    """The parts of an action, in their order.

    OPERATION names operation and slot together: 0 waits, 1 + 5 i + j asks the j-th of
    `SLOT_OPERATIONS` of slot i. In heads of their own a third of the pairs would be illegal,
    although each part by itself is legal (measured).
    """

    OPERATION = 0
    BLUEPRINT = 1
    BLEND_OPERATOR = 2
    ALPHA_TARGET = 3
    RAMP_STEPS = 4
    RAMP_CURVE = 5


_RAMP = (Head.RAMP_STEPS, Head.RAMP_CURVE)
READ_HEADS: Mapping[Operation, tuple[Head, ...]] = MappingProxyType(
    {
        Operation.WAIT: (),
        Operation.GERMINATE: (Head.BLUEPRINT, Head.BLEND_OPERATOR),
        Operation.ADVANCE: _RAMP,
        Operation.SET_ALPHA_TARGET: (Head.ALPHA_TARGET, *_RAMP),
        Operation.PRUNE: (Head.RAMP_STEPS,),
        Operation.COMMIT: (),
    }
)
"""Which heads an operation reads; the others mean nothing with it."""


class ActionChoices(Record):
    """What the heads offer that are the same for every slot."""

    blend_operators: Annotated[tuple[BlendOperator, ...], Field(min_length=1)] = tuple(
        BlendOperator
    )
    alpha_targets: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.5, 1.0)
    ramp_steps: Annotated[tuple[Steps, ...], Field(min_length=1)] = (0, 20, 50)
    """Of a ramp of alpha, and of a fade-out."""
    ramp_curves: Annotated[tuple[AlphaCurve, ...], Field(min_length=1)] = tuple(AlphaCurve)


class ActionCoder:
    """Translates actions for the slots and blueprints of one host, in both directions.

    Args:
        slots: Paths, in the order of the host.
        blueprints: Names, in the order of the blueprint head.
        choices: Of the other heads.

    Raises:
        ValueError: There is no slot, or no blueprint.
    """

    def __init__(
        self,
        slots: Sequence[str],
        blueprints: Sequence[str],
        choices: ActionChoices | None = None,
    ) -> None:
        if not slots:
            raise ValueError(
                "there is no slot to decide about; attach at least one: "
                "esper.attach(model, [PATH], example=…)"
            )
        if not blueprints:
            raise ValueError(
                f"no blueprint with parameters fits any of the slots {', '.join(slots)}; register "
                "one for their family, see docs/blueprints.md"
            )
        self.slots = tuple(slots)
        self.blueprints = tuple(blueprints)
        self.choices = choices or ActionChoices()
        self.sizes = head_sizes(len(self.slots), len(self.blueprints), self.choices)
        """How many choices each head has, in the order of `Head`."""

    @classmethod
    def of(cls, state: GrowthState, choices: ActionChoices | None = None) -> "ActionCoder":
        """Return the coder of a host: its slots, and every blueprint with parameters that fits one.

        Raises:
            ValueError: As the constructor.
        """
        fitting = {
            choice.name for slot in state.slots for choice in slot.choices if choice.param_count > 0
        }
        return cls([slot.path for slot in state.slots], sorted(fitting), choices)

    def decode(self, numbers: Sequence[int], state: GrowthState) -> Action:
        """Return the action that one number per head stands for.

        A blueprint that does not fit the chosen slot stands for the next one in the head's order
        that does, the first following the last. Whether the action is legal is not looked at.

        Args:
            numbers: One per head, in the order of `Head`.
            state: Says which blueprints fit.

        Raises:
            ValueError: There are more or fewer numbers than heads, or one is out of its range.
        """
        self._check(numbers)
        operation, slot = self._asked(numbers[Head.OPERATION])
        if slot is None:
            return Wait()
        choices = self.choices
        steps = choices.ramp_steps[numbers[Head.RAMP_STEPS]]
        curve = choices.ramp_curves[numbers[Head.RAMP_CURVE]]
        if operation is Operation.GERMINATE:
            return Germinate(
                slot=slot,
                blueprint=self._fitting(numbers[Head.BLUEPRINT], state.slot(slot)),
                blend_operator=choices.blend_operators[numbers[Head.BLEND_OPERATOR]],
            )
        if operation is Operation.ADVANCE:
            return Advance(slot=slot, ramp_steps=steps, ramp_curve=curve)
        if operation is Operation.SET_ALPHA_TARGET:
            target = choices.alpha_targets[numbers[Head.ALPHA_TARGET]]
            return SetAlphaTarget(slot=slot, target=target, steps=steps, curve=curve)
        if operation is Operation.PRUNE:
            return Prune(slot=slot, over_steps=steps, reason="decided by the policy")
        return Commit(slot=slot)

    def encode(self, action: Action) -> list[int]:
        """Return one number per head for an action.

        It is 0 in heads that the action does not read, or whose part it leaves to the slot.

        Raises:
            ValueError: A part of it is none of the head's choices.
        """
        numbers = [0] * len(Head)
        if isinstance(action, Wait):
            return numbers
        place = _index(self.slots, action.slot, "slot")
        numbers[Head.OPERATION] = self.operation_number(place, action.operation)
        choices = self.choices
        if isinstance(action, Germinate):
            numbers[Head.BLUEPRINT] = _index(self.blueprints, action.blueprint, "blueprint")
            if action.blend_operator is not None:
                operators = choices.blend_operators
                found = _index(operators, action.blend_operator, "blend operator")
                numbers[Head.BLEND_OPERATOR] = found
        elif isinstance(action, SetAlphaTarget):
            numbers[Head.ALPHA_TARGET] = _index(choices.alpha_targets, action.target, "target")
            numbers[Head.RAMP_STEPS] = _index(choices.ramp_steps, action.steps, "ramp steps")
            numbers[Head.RAMP_CURVE] = _index(choices.ramp_curves, action.curve, "ramp curve")
        elif isinstance(action, Prune):
            numbers[Head.RAMP_STEPS] = _index(choices.ramp_steps, action.over_steps, "fade steps")
        elif isinstance(action, Advance):
            if action.ramp_steps is not None:
                steps = _index(choices.ramp_steps, action.ramp_steps, "ramp steps")
                numbers[Head.RAMP_STEPS] = steps
            if action.ramp_curve is not None:
                curve = _index(choices.ramp_curves, action.ramp_curve, "ramp curve")
                numbers[Head.RAMP_CURVE] = curve
        return numbers

    def operation_number(self, place: int, operation: Operation) -> int:
        """Return the choice of the operation head that asks `operation` of the slot at `place`."""
        return 1 + len(SLOT_OPERATIONS) * place + SLOT_OPERATIONS.index(operation)

    def masks(self, state: GrowthState) -> list[list[bool]]:
        """Return for each head which choices are legal, as far as one head alone can tell.

        A head that no legal operation reads offers its first choice only. The blueprint head offers
        what fits any slot that may germinate; `fits` says which slot. Every head always has a legal
        choice.
        """
        operations = [True, *(legal for slot in state.slots for legal in self._legal(slot))]
        asked = {op for slot in state.slots for op in legal_operations(slot)}
        read = {head for operation in asked for head in READ_HEADS[operation]}
        masks = [operations]
        for head in list(Head)[1:]:
            size = self.sizes[head]
            offered = [True] * size if head in read else [index == 0 for index in range(size)]
            masks.append(offered)
        growing = [s for s in state.slots if self._may_germinate(s)]
        if growing:
            fitting = {choice.name for slot in growing for choice in slot.choices}
            masks[Head.BLUEPRINT] = [name in fitting for name in self.blueprints]
        assert all(any(mask) for mask in masks)
        return masks

    def fits(self, state: GrowthState) -> Iterator[list[bool]]:
        """Yield for each slot which blueprints fit it."""
        for slot in state.slots:
            names = {choice.name for choice in slot.choices}
            yield [name in names for name in self.blueprints]

    def check_host(self, state: GrowthState) -> None:
        """Raise unless the state is of the host that this coder is for.

        Raises:
            ValueError: It has other slots.
        """
        paths = tuple(slot.path for slot in state.slots)
        if paths != self.slots:
            raise ValueError(
                f"the state has the slots {', '.join(paths) or 'none'}, and this coder is for "
                f"{', '.join(self.slots)}; make one of this host: ActionCoder.of(state)"
            )

    def _legal(self, slot: SlotState) -> list[bool]:
        legal = legal_operations(slot)
        return [
            self._may_germinate(slot) if operation is Operation.GERMINATE else operation in legal
            for operation in SLOT_OPERATIONS
        ]

    def _may_germinate(self, slot: SlotState) -> bool:
        """Whether a seed may germinate that has parameters, and is so one of the head's choices."""
        fitting = any(choice.name in self.blueprints for choice in slot.choices)
        return fitting and Operation.GERMINATE in legal_operations(slot)

    def _asked(self, number: int) -> tuple[Operation, str | None]:
        if number == 0:
            return Operation.WAIT, None
        place, operation = divmod(number - 1, len(SLOT_OPERATIONS))
        return SLOT_OPERATIONS[operation], self.slots[place]

    def _fitting(self, number: int, slot: SlotState) -> str:
        names = {choice.name for choice in slot.choices}
        following = self.blueprints[number:] + self.blueprints[:number]
        return next((name for name in following if name in names), self.blueprints[number])

    def _check(self, numbers: Sequence[int]) -> None:
        if len(numbers) != len(Head):
            heads = ", ".join(head.name.lower() for head in Head)
            raise ValueError(f"an action has {len(Head)} numbers ({heads}), got {len(numbers)}")
        for head, number in zip(Head, numbers, strict=True):
            if not 0 <= number < self.sizes[head]:
                raise ValueError(
                    f"{head.name.lower()} must be from 0 to {self.sizes[head] - 1}, got {number}"
                )


def head_sizes(num_slots: int, num_blueprints: int, choices: ActionChoices) -> list[int]:
    """Return how many choices each head has, in the order of `Head`."""
    return [
        1 + len(SLOT_OPERATIONS) * num_slots,
        num_blueprints,
        len(choices.blend_operators),
        len(choices.alpha_targets),
        len(choices.ramp_steps),
        len(choices.ramp_curves),
    ]


def read_table(num_slots: int) -> Tensor:
    """Return which heads each choice of the operation head reads: bool, shape `C 6`.

    The operation head itself is always read.
    """
    rows = [Operation.WAIT, *(SLOT_OPERATIONS * num_slots)]
    return torch.tensor(
        [[head is Head.OPERATION or head in READ_HEADS[row] for head in Head] for row in rows]
    )


def _index(known: Sequence[object], value: object, noun: str) -> int:
    if value not in known:
        offered = ", ".join(map(str, known))
        raise ValueError(f"{noun} {value} is none of the head's choices: {offered}")
    return known.index(value)

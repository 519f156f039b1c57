"""How likely each action is: one distribution over all heads together.

Legend: N batch, S slots, K blueprints, C choices of the operation head, 1 + 5 S.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.lifecycle.actions import Operation
from esper.policies.learned.action_coder import SLOT_OPERATIONS, Head, read_table

SLOT_HEADS: tuple[Head, ...] = tuple(head for head in Head if head is not Head.OPERATION)
"""The heads that mean something about the slot only that the operation head chose."""

_NEVER = -1e9
"""Logit of what may not be chosen: exp is 0, and 0 times it is 0, as it is finite."""


@dataclass(frozen=True, kw_only=True)
class HeadLogits:
    """What a network says about each head, before anything is masked."""

    operation: Tensor
    """Shape `N C`."""
    of_slots: Mapping[Head, Tensor]
    """Of each of `SLOT_HEADS`, if that slot is chosen; shape `N S size`."""


class JointDistribution:
    """The distribution over actions, legal ones only.

    With o the choice of the operation head, s(o) its slot and R(o) the heads that it reads,

        log p(action) = log p(o) + sum over h in R(o) of log p_h(choice of h | s(o))
        entropy = H(o) + sum over o of p(o) * sum over h in R(o) of H_h(s(o)).

    A head that is not read has no part in either, and is 0 in what is drawn: credit for a return
    goes to what caused it.

    Args:
        logits: Any floating dtype; half precision is computed in single.
        legal: Which operations are; bool, shape `N C`.
        fits: Which blueprints fit a slot; bool, shape `N S K`.

    Raises:
        ValueError: A shape is another, no operation is legal in a row, or a seed may germinate in
            a slot where nothing fits.

    Effects:
        Waits for the device, to look at the masks.

    Source: the chain rule of entropy, with a fixed table of what depends on what (measured
        against heads that always count).
    """

    def __init__(self, logits: HeadLogits, *, legal: Tensor, fits: Tensor) -> None:
        _check_shapes(logits, legal, fits)
        _check_masks(legal, fits)
        num_slots = fits.shape[1]
        self._reads = read_table(num_slots).to(legal.device)  # C 6
        self._operation = _log_probs(logits.operation, legal)
        self._of_slots = {
            head: _log_probs(logits.of_slots[head], fits if head is Head.BLUEPRINT else None)
            for head in SLOT_HEADS
        }

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one action per row, long, shape `N 6`.

        Effects:
            Draws from `generator`, or else from torch's own.
        """
        return self._chosen(
            lambda logs: torch.multinomial(logs.exp(), 1, generator=generator).squeeze(1)
        )

    def mode(self) -> Tensor:
        """Return the likeliest operation, and then the likeliest choice of each head that it reads.

        An action of another operation may be likelier as a whole: this does not count against an
        operation that there are many ways to carry it out.
        """
        return self._chosen(lambda logs: logs.argmax(dim=1))

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the logarithm of how likely each action is, shape `N`.

        Args:
            actions: Whole numbers of any dtype, shape `N 6`. Heads that are not read may hold any
                choice of theirs. One that is not legal gets a finite, very negative value.
        """
        actions = actions.long()
        operation = actions[:, Head.OPERATION]
        total = self._operation.gather(1, operation[:, None]).squeeze(1)
        reads, slot = self._reads[operation], _slot_of(operation)
        for head, logs in self._of_slots.items():
            of_choice = _at(logs, slot).gather(1, actions[:, head, None]).squeeze(1)
            total = total + torch.where(reads[:, head], of_choice, 0.0)
        return total

    def entropy(self) -> Tensor:
        """Return the entropy in nats, exactly, shape `N`."""
        total = _entropy(self._operation)
        likely = self._operation.exp()
        for head, logs in self._of_slots.items():
            read = (likely * self._reads[:, head])[:, 1:]
            asks_slot = read.unflatten(1, (-1, len(SLOT_OPERATIONS))).sum(dim=2)  # N S
            total = total + (asks_slot * _entropy(logs)).sum(dim=1)
        return total

    def _chosen(self, choose: Callable[[Tensor], Tensor]) -> Tensor:
        operation = choose(self._operation)
        reads, slot = self._reads[operation], _slot_of(operation)
        columns = [operation]
        columns += [
            torch.where(reads[:, head], choose(_at(self._of_slots[head], slot)), 0)
            for head in SLOT_HEADS
        ]
        return torch.stack(columns, dim=1)


def _slot_of(operation: Tensor) -> Tensor:
    """Return the place of the slot that each asks; of WAIT, which reads no head, the first."""
    return (operation - 1).clamp(min=0) // len(SLOT_OPERATIONS)


def _at(of_slots: Tensor, slot: Tensor) -> Tensor:
    """Return what is said of one slot per row: `N S size` to `N size`."""
    return of_slots[torch.arange(len(slot), device=slot.device), slot]


def _log_probs(logits: Tensor, possible: Tensor | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if possible is not None:
        logits = torch.where(possible, logits, _NEVER)
    return F.log_softmax(logits, dim=-1)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def _check_shapes(logits: HeadLogits, legal: Tensor, fits: Tensor) -> None:
    num_rows, num_slots, num_blueprints = fits.shape
    operations = (num_rows, 1 + len(SLOT_OPERATIONS) * num_slots)
    expected = {
        "logits of OPERATION": (logits.operation, operations),
        "legal": (legal, operations),
        "logits of BLUEPRINT": (
            logits.of_slots[Head.BLUEPRINT],
            (num_rows, num_slots, num_blueprints),
        ),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} should have the shape {shape} for fits of {tuple(fits.shape)}, and has "
                f"{tuple(tensor.shape)}"
            )


def _check_masks(legal: Tensor, fits: Tensor) -> None:
    germinates = legal[:, 1 + SLOT_OPERATIONS.index(Operation.GERMINATE) :: len(SLOT_OPERATIONS)]
    stuck = ~legal.any(dim=1)
    empty = (germinates & ~fits.any(dim=2)).any(dim=1)
    if not (stuck | empty).any():
        return
    if stuck.any():
        row = int(stuck.nonzero()[0])
        raise ValueError(
            f"no operation is legal in row {row}; WAIT always is, so the mask is of something else"
        )
    row = int(empty.nonzero()[0])
    raise ValueError(
        f"a seed may germinate in row {row} in a slot where no blueprint fits; mask and fits must "
        "be of one state"
    )

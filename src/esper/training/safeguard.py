"""What is done where skipping bad steps does not help: a seed is pruned, or the run goes back."""

from collections.abc import Mapping
from typing import Any

from esper.lifecycle.events import RunWentBack, SeedBlamed
from esper.lifecycle.stages import SeedStage
from esper.slots.slot import SeedSlot
from esper.slots.slot_set import SlotSet
from esper.training.governor import GovernorConfig

_AGES = (SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY)
"""Stages in the forward path, from the one entered first to the one entered last in a life."""


class TrainingDivergedError(RuntimeError):
    """Training came to the same bad steps again after going back; it cannot go on by itself."""


class Safeguard:
    """Keeps the last good state of a run in memory.

    A snapshot counts as good once the step after it was: a state whose weights are spoilt shows in
    the next loss. Two copies of model and optimizer are held for that one step, one otherwise.

    Args:
        config: Of the governor.
    """

    def __init__(self, config: GovernorConfig) -> None:
        self.config = config
        self._candidate: Mapping[str, Any] | None = None
        self._good: Mapping[str, Any] | None = None
        self._kept_step: int | None = None
        """Of the snapshot that was taken or gone back to last."""
        self._returns = 0
        """To the good snapshot."""

    def due(self, step: int) -> bool:
        """Whether a snapshot is to be taken after this step; the first is, where a run goes on."""
        every = self.config.snapshot_steps
        if every is None or step == self._kept_step:
            return False
        return self._kept_step is None or step % every == 0

    def note_good_step(self) -> None:
        """Count on the snapshot that was taken before a good step."""
        if self._candidate is not None:
            self._good, self._candidate, self._returns = self._candidate, None, 0

    def keep(self, state: Mapping[str, Any]) -> None:
        """Take a snapshot, good if the next step is."""
        self._candidate = state
        self._kept_step = state["growth"]["step"]

    def way_back(self, step: int) -> tuple[Mapping[str, Any], bool] | None:
        """Return the good snapshot, and whether to see the same batches again; None without one.

        Raises:
            TrainingDivergedError: The run has gone back to it too often.
        """
        self._candidate = None
        if self._good is None:
            return None
        self._kept_step = self._good["growth"]["step"]
        if self._returns == self.config.max_returns:
            raise TrainingDivergedError(
                f"training diverged at step {step} again, {self._returns} times after going back "
                f"to step {self._kept_step}, the last of them with other batches; lower the "
                "learning rate, clip gradients (max_gradient_norm), or look at the data"
            )
        self._returns += 1
        return self._good, self._returns == 1


def suspects(slots: SlotSet) -> list[SeedSlot]:
    """Return the slots with a seed in the forward path, the youngest by stage first."""
    in_path = [slot for slot in slots.values() if slot.in_forward_path]
    return sorted(in_path, key=lambda slot: (_AGES.index(slot.stage), slot.state().steps_in_stage))


def blamed(slot: SeedSlot, *, loss: float, without: float) -> SeedBlamed:
    """Return the event that tells why a seed is pruned."""
    blueprint = slot.state().blueprint
    assert blueprint is not None
    return SeedBlamed(slot=slot.path, blueprint=blueprint, loss=loss, loss_without=without)


def went_back(state: Mapping[str, Any], *, from_step: int, same_batches: bool) -> RunWentBack:
    """Return the event that tells of a way back."""
    return RunWentBack(
        from_step=from_step, to_step=state["growth"]["step"], same_batches=same_batches
    )

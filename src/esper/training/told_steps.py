"""Whether a loop tells of the steps that the optimizer makes."""

from esper.slots.optimizer_binding import OptimizerBinding

_STEPS_WITHOUT_THE_OPTIMIZER = 50
"""More than float16's loss scaler skips in a row until it has found its scale."""

_STEPS_OF_ONE_BATCH = 8
"""Most that a loop makes of one batch on purpose, and tells of together."""


class ToldSteps:
    """Compares the steps that a loop tells of with those that its optimizer makes.

    Alpha would stand still, and seeds never be judged, where a loop forgets to tell.
    """

    def __init__(self) -> None:
        self._count = 0
        """Here; a run that goes on has made others before."""
        self._any_made = False
        """Whether the optimizer has made any of them."""
        self._told = self._made = 0
        """Since the last check: how often it was told of steps, and how many were made."""
        self._were_told_at_once = False
        """Whether one call told of many steps, up to the last check."""

    def add(self, *, made: int) -> None:
        """Take note of a step that was told of.

        Args:
            made: How often the optimizer has stepped since the last one was.
        """
        self._count += 1
        self._any_made = self._any_made or made > 0
        self._told += 1
        self._made += made

    def check(self, binding: OptimizerBinding) -> None:
        """Raise if the loop and its optimizer disagree.

        Raises:
            RuntimeError: The optimizer has stepped and nobody has told of it, it has made none of
                many steps, or one call alone told of many, up to this check and up to the last.
        """
        optimizer = type(binding.optimizer).__name__
        if binding.has_stepped:
            raise RuntimeError(
                f"the {optimizer} has stepped, and growth.after_step() was not called after it; "
                "call it after each optimizer.step()"
            )
        if not self._any_made and self._count >= _STEPS_WITHOUT_THE_OPTIMIZER:
            raise RuntimeError(
                f"growth.after_step() was called {self._count} times, and the {optimizer} that "
                "Growth was given has made no step: seeds would never train; train with that one, "
                "or give Growth the one that trains"
            )
        at_once = self._told == 1 and self._made > _STEPS_OF_ONE_BATCH
        if at_once and self._were_told_at_once:  # once alone may be a loop that was broken off
            raise RuntimeError(
                f"growth.after_step() was called once since the last decision and once before it, "
                f"and the {optimizer} has made {self._made} steps since: alpha and gates would "
                "count them as one; call it after each optimizer.step()"
            )
        self._told, self._made, self._were_told_at_once = 0, 0, at_once

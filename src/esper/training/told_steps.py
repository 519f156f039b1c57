"""Whether a loop tells of the steps that the optimizer makes."""

from esper.slots.optimizer_binding import OptimizerBinding

_STEPS_WITHOUT_THE_OPTIMIZER = 50
"""More than float16's loss scaler skips in a row until it has found its scale."""


class ToldSteps:
    """Compares the steps that a loop tells of with those that its optimizer makes.

    Alpha would stand still, and seeds never be judged, where a loop forgets to tell.
    """

    def __init__(self) -> None:
        self._count = 0
        """Here; a run that goes on has made others before."""
        self._any_made = False
        """Whether the optimizer has made any of them."""

    def add(self, *, made: bool) -> None:
        """Take note of a step that was told of.

        Args:
            made: Whether the optimizer has made it.
        """
        self._count += 1
        self._any_made = self._any_made or made

    def check(self, binding: OptimizerBinding) -> None:
        """Raise if the loop and its optimizer disagree.

        Raises:
            RuntimeError: The optimizer has stepped and nobody has told of it, or it has made none
                of many steps.
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

"""Events in words, as a terminal and the bus tell them."""

import pytest

from esper.lifecycle.events import EventRecord, SeedCommitted
from esper.lifecycle.words import in_words, notable


@pytest.mark.parametrize(
    ("fraction", "told"),
    [
        (0.0123, "saves at least +1.2% of the loss"),
        (0.0, "saves at least +0.0% of the loss"),
        (-0.2, "saves at least -20.0% of the loss"),
        (None, "what it saves was never weighed"),
    ],
)
def test_a_commit_tells_what_the_seed_saves_or_that_nobody_weighed_it(
    fraction: float | None, told: str
) -> None:
    event = SeedCommitted(
        slot="stage1", blueprint="norm", param_count=8, contribution_fraction=fraction
    )
    record = EventRecord(time_seconds=0.0, epoch=3, step=60, event=event)
    assert in_words(record) == f"norm committed in stage1, {told}"
    assert notable(record) == f"epoch 3: norm committed in stage1, {told}"

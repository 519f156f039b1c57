"""What every test shares: one thread, no deadlines, and random states of a growing model."""

import signal

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from esper.lifecycle import AlphaMode, BlueprintChoice, GrowthState, SeedStage, SlotState

settings.register_profile("esper", deadline=None)
settings.load_profile("esper")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or programs under test ignore it too


def _slot_states(path: str) -> st.SearchStrategy[SlotState]:
    choices = st.lists(
        st.builds(
            BlueprintChoice,
            name=st.sampled_from(["noop", "norm", "conv_light", "lora", "mlp"]),
            param_count=st.integers(0, 1000),
        ),
        max_size=3,
        unique_by=lambda choice: choice.name,
    )
    return st.builds(
        SlotState,
        path=st.just(path),
        family=st.sampled_from(["cnn", "transformer"]),
        dim=st.integers(1, 64),
        stage=st.sampled_from(SeedStage),
        alpha=st.floats(0.0, 1.0),
        alpha_mode=st.sampled_from(AlphaMode),
        live=st.booleans(),
        fading=st.booleans(),
        epochs_in_stage=st.integers(0, 12),
        refusals_in_stage=st.integers(0, 3),
        committed=st.integers(0, 3),
        max_committed=st.integers(1, 3),
        choices=choices.map(tuple),
    )


@pytest.fixture(scope="session")
def growth_states() -> st.SearchStrategy[GrowthState]:
    """Draw states of a growing model with none to three slots, legal or odd."""
    losses = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-10.0, 10.0)
    return st.builds(
        GrowthState,
        epoch=st.integers(0, 40),
        step=st.integers(0, 4000),
        max_epochs=st.none() | st.integers(1, 40),
        losses=st.lists(losses, max_size=20).map(tuple),
        slots=st.integers(0, 3).flatmap(
            lambda count: st.tuples(*(_slot_states(f"layer{index}") for index in range(count)))
        ),
    )

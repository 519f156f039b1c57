"""What of a host's module a seed can be a copy of."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils.prune import l1_unstructured, remove

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.actions import Germinate

WIDTH = 8
Prepare = Callable[[nn.Module], object]


def host() -> nn.Module:
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    return nn.Sequential(nn.Linear(3, WIDTH), block, nn.Linear(WIDTH, 2))


COMPUTED: dict[str, Prepare] = {
    "prune": lambda layer: l1_unstructured(layer, "weight", amount=0.5),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("trained", [False, True])
def test_a_block_whose_weight_a_hook_computes_is_not_copied(kind: str, trained: bool) -> None:
    model, inputs = host(), torch.randn(4, 3)
    COMPUTED[kind](model[1][0])
    (slot,) = esper.attach(model, "1", example=inputs).values()
    if trained:
        model(inputs).sum().backward()
    with pytest.raises(
        ValueError,
        match=r"source='1': '1\.0' \(Linear\) has a forward pre-hook, .* keeps 'weight', .* a copy "
        r"would .*torch\.nn\.utils\.prune\.remove.*torch\.nn\.utils\.parametrizations",
    ):
        slot.germinate("block", source="own")
    slot.germinate("mlp")


@pytest.mark.parametrize(
    "prepare",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: remove(l1_unstructured(layer, "weight", amount=0.5), "weight"),
        lambda layer: layer.register_forward_pre_hook(lambda _module, args: None),
        lambda layer: setattr(layer, "unit", torch.ones(())),
    ],
    ids=["weight_norm", "spectral_norm", "pruned for good", "a user's hook", "a constant"],
)
def test_a_block_that_holds_its_weight_is_copied(prepare: Prepare) -> None:
    torch.manual_seed(0)
    model, inputs = host(), torch.randn(4, 3)
    prepare(model[1][0])
    (slot,) = esper.attach(model, "1", example=inputs).values()
    model(inputs).sum().backward()
    slot.germinate("block", source="own")
    features = torch.randn(4, WIDTH)
    torch.nn.init.ones_(slot.seed.output_layers[0].weight)
    copied = slot.seed.eval()(features)
    torch.testing.assert_close(copied, model[1].eval()(features))


def test_an_action_may_copy_what_would_not_fit_built_anew() -> None:
    model, inputs = host(), torch.randn(4, 3)
    slots = esper.attach(model, "1", example=inputs)
    assert "block" not in {choice.name for choice in slots["1"].state().choices}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growth = esper.Growth(slots, optimizer, policy=esper.HeuristicPolicy())
    growth.apply(Germinate(slot="1", blueprint="block", options={"depth": 2}))
    assert slots["1"].stage is SeedStage.DORMANT
    growth.apply(Germinate(slot="1", blueprint="block", options={"source": "own"}))
    assert slots["1"].seed is not None


class Remembers(nn.Module):
    """Keeps what it has computed, as blocks keep their attention maps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.seen = torch.tanh(self.layer(features))
        return features + self.seen


def test_a_block_that_remembers_what_it_computed_is_copied_and_built_again() -> None:
    model, inputs = nn.Sequential(nn.Linear(3, WIDTH), Remembers()), torch.randn(4, 3)
    slots = esper.attach(model, "1", example=inputs, config=SlotConfig(max_committed=2))
    slot = slots["1"]
    model(inputs).sum().backward()
    slot.germinate("block", source="own", depth=2)
    state = slots.state_dict()
    slot.prune()
    slots.load_state_dict(state)  # as when a governor goes back
    while slot.stage is not SeedStage.FOSSILIZED:
        slot.advance(force=True)
    model(inputs).sum().backward()  # the committed copy keeps something now, too
    slot.foreseen("mlp")


def test_a_hook_beside_what_a_block_remembers_may_be_removed_until_it_is_copied() -> None:
    model, inputs = nn.Sequential(nn.Linear(3, WIDTH), Remembers()), torch.randn(4, 3)
    (slot,) = esper.attach(model, "1", example=inputs).values()
    timer = model[1].register_forward_pre_hook(lambda _module, args: None)
    model(inputs)
    with pytest.raises(
        ValueError, match=r"'seen', .* If the module's own forward does, remove the hook"
    ):
        slot.germinate("block", source="own")
    timer.remove()
    slot.germinate("block", source="own")

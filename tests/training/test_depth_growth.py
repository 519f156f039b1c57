"""Depth growth of a decoder by schedule, beside the plain decoder that never grows."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.events import ActionRefused, GateEvaluated, SeedCommitted, SeedPruned
from esper.lifecycle.gates import Gate, GateThresholds
from esper.policies import GrowthScheduleConfig, GrowthSchedulePolicy
from esper.tasks.text.host import TextHost
from esper.tasks.text.task import mean_loss, window_losses
from growth_problem import Recorder

EPOCHS, EPOCH_STEPS, EVENT = 20, 6, 5
ANY = GateThresholds(
    min_steps_at_target=1,
    max_loss_increase_fraction=1e9,
    min_contribution_fraction=-1e9,
    min_over_linear_fraction=-1e9,
)
"""These runs are too short for a block to pay; that gates can refuse is tested with `NONE`."""
NONE = ANY.model_copy(update={"min_contribution_fraction": 1e9})


def decoder() -> TextHost:
    torch.manual_seed(0)
    return TextHost(width=16, depth=2, context=12)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, 256, (EPOCH_STEPS, 4, 13), generator=generator)
    return [(window[:, :-1], window[:, 1:]) for window in windows]


@dataclass
class Grown:
    """A decoder that is trained and grown, one epoch at a time."""

    model: TextHost
    slots: esper.SlotSet
    optimizer: torch.optim.Optimizer
    growth: esper.Growth
    held_out: esper.HeldOut
    recorder: Recorder

    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = step(self.model, self.optimizer, batch)
        self.growth.after_step()
        return loss

    def epochs(self, number: int) -> None:
        for _ in range(number):
            self.model.train()
            for batch in batches():
                self.step(batch)
            self.growth.after_epoch(self.held_out)


def step(model: TextHost, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    loss = mean_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def grown(thresholds: GateThresholds = ANY, **settings: Any) -> Grown:
    model, recorder = decoder(), Recorder()
    slots = esper.attach(
        model,
        "blocks.*",
        example=batches()[0][0],
        config=SlotConfig(thresholds=thresholds, max_committed=2),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    policy = GrowthSchedulePolicy(GrowthScheduleConfig(**settings))
    growth = esper.Growth(slots, optimizer, policy=policy, max_epochs=EPOCHS, sinks=[recorder])
    held_out = esper.HeldOut(model, batches()[:2], loss=window_losses)
    return Grown(model, slots, optimizer, growth, held_out, recorder)


def plain(epochs: int) -> tuple[TextHost, torch.optim.Optimizer]:
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for batch in batches():
            step(model, optimizer, batch)
    return model, optimizer


def host_parameters(model: TextHost) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "esper_slot" not in n}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def depth(slots: esper.SlotSet) -> int:
    stacks = [slot.seed for slot in slots.values() if slot.seed is not None]
    return sum(len(stack.blocks) for stack in stacks)


@pytest.mark.parametrize("source", [None, "own"])
def test_the_event_changes_no_bit_of_the_loss_nor_of_the_optimizer_state(source: str | None):
    run = grown(options={} if source is None else {"source": source})
    run.epochs(EVENT - 1)
    assert depth(run.slots) == 0
    run.epochs(1)
    assert depth(run.slots) == 4
    assert all(slot.alpha == 1.0 for slot in run.slots.values())
    twin, optimizer = plain(EVENT)
    twin_held_out = esper.HeldOut(twin, batches()[:2], loss=window_losses)
    assert run.held_out() == twin_held_out()

    old = host_parameters(run.model)
    twins = dict(twin.named_parameters())
    for name, parameter in old.items():
        assert_same(run.optimizer.state[parameter], optimizer.state[twins[name]])
    new = [p for n, p in run.model.named_parameters() if "esper_slot" in n]
    assert new
    assert not any(parameter in run.optimizer.state for parameter in new)

    # The first step: the same loss, the same step of the old layers; the new ones begin to count.
    run.model.train()
    assert torch.equal(run.step(batches()[0]), step(twin, optimizer, batches()[0]))
    assert_same(dict(old), twins)
    steps = EVENT * EPOCH_STEPS + 1
    assert {float(run.optimizer.state[p]["step"]) for p in old.values()} == {steps}
    assert {float(run.optimizer.state[p]["step"]) for p in new} == {1.0}
    run.step(batches()[1])
    step(twin, optimizer, batches()[1])
    assert not torch.equal(old["blocks.0.expand.weight"], twins["blocks.0.expand.weight"])


def test_copies_can_begin_with_the_optimizer_state_of_their_layers():
    run = grown(options={"source": "own"}, copy_optimizer_state=True)
    run.epochs(EVENT)
    for path, slot in run.slots.items():
        own = host_parameters(run.model.get_submodule(path))
        copies = slot.seed.copies
        assert len(copies) == 2
        for copy in copies:
            for name, parameter in copy.named_parameters():
                assert_same(run.optimizer.state[parameter], run.optimizer.state[own[name]])
    run.epochs(EPOCHS - EVENT)
    assert len(run.recorder.of(SeedCommitted)) == 2


def test_blocks_learn_until_the_verdict_are_committed_and_bake_to_a_plain_decoder():
    run = grown(verdict_fraction=0.6)
    run.epochs(11)
    assert {slot.stage for slot in run.slots.values()} == {SeedStage.BLENDING}
    judged = {event.result.gate for event in run.recorder.of(GateEvaluated)}
    assert judged == {Gate.G0, Gate.G1, Gate.G2}
    run.epochs(1)
    assert {slot.stage for slot in run.slots.values()} == {SeedStage.PROBATIONARY}
    run.epochs(EPOCHS - 12)
    assert {slot.stage for slot in run.slots.values()} == {SeedStage.FOSSILIZED}
    assert not run.recorder.of(ActionRefused)
    inputs = batches()[0][0]
    assert torch.equal(esper.bake(run.model)(inputs), run.model.eval()(inputs))


def test_a_block_that_contributes_nothing_is_pruned_by_the_late_verdict():
    run = grown(thresholds=NONE, patience_epochs=2, fade_steps=0)
    run.epochs(EPOCHS)
    assert not run.recorder.of(SeedCommitted)
    pruned = run.recorder.of(SeedPruned)
    assert [event.slot for event in pruned] == ["blocks.0", "blocks.1"]
    assert {event.from_stage for event in pruned} == {SeedStage.SHADOWING}
    assert list(host_parameters(run.model)) == [n for n, _ in run.model.named_parameters()]


def test_two_events_make_four_layers_of_two_and_then_six():
    run = grown(fractions=(0.2, 0.45))
    depths = []
    for _ in range(EPOCHS):
        run.epochs(1)
        living = sum(slot.seed is not None for slot in run.slots.values())
        depths.append(2 + living + sum(len(slot.committed) for slot in run.slots.values()))
    # The second event is due in epoch 9; the verdict on the first one's seeds takes three.
    assert depths == [2] * 3 + [4] * 8 + [6] * 9
    assert len(run.recorder.of(SeedCommitted)) == 4
    assert not run.recorder.of(ActionRefused)

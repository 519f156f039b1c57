"""A seed that learns in shadow: from the loss at full alpha, beside a step that does not see it."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper import SeedStage, SlotConfig, SlotSet
from esper.lifecycle.learning import Isolation
from esper.slots import IsolationMonitor


def attach(host: Any, model: nn.Module, **config: Any) -> SlotSet:
    return esper.attach(
        model,
        host.targets,
        example=host.inputs(),
        config=SlotConfig(isolation=Isolation.SHADOWING, objective="shadow", **config),
    )


class Loop:
    """A host with a seed in TRAINING in each slot asked for, and the losses of its batches."""

    def __init__(self, host: Any, *paths: str, blueprint: str | None = None, **config: Any) -> None:
        self.host, self.model = host, host.build()
        self.slots = attach(host, self.model, **config)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.slots.bind(self.optimizer)
        for path in paths:
            self.slots[path].germinate(blueprint or host.blueprint)
            self.slots[path].advance(force=True)

    def loss(self, batch: int = 0) -> Tensor:
        return F.cross_entropy(self.model(self.host.inputs(batch)), self.host.labels(batch))

    def step(self) -> None:
        self.slots.shadow_pass(self.loss)
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.slots.tick()

    def gradients(self, path: str) -> dict[str, Tensor | None]:
        branch = self.slots[path].living
        assert branch is not None
        return {name: p.grad for name, p in branch.named_parameters()}


def by_hand(host: Any, model: nn.Module, branch: nn.Module, path: str) -> dict[str, Tensor]:
    """The gradients of the loss of the plain host with `h.detach() + u(h.detach())` at a path."""
    model.requires_grad_(requires_grad=False)

    def inlined(module: nn.Module, args: Any, features: Tensor) -> Tensor:
        return features.detach() + branch(features.detach(), features.detach())

    location = model.get_submodule(path)
    sequence = isinstance(location, nn.Sequential)
    handle = (location[-1] if sequence else location).register_forward_hook(inlined)
    F.cross_entropy(model(host.inputs()), host.labels()).backward()
    handle.remove()
    return {name: p.grad for name, p in branch.named_parameters()}


@pytest.mark.parametrize("operator", ["add", "multiply", "gate"])
@pytest.mark.parametrize("which", [0, 1])
def test_the_gradient_is_that_of_the_hand_written_host_at_full_alpha(
    host: Any, operator: str, which: int, randomise: Any
) -> None:
    path = host.targets[which]
    loop = Loop(host, path, blend_operator=operator)
    slot = loop.slots[path]
    randomise(slot.living)
    plain, branch = host.build(), copy.deepcopy(slot.living)
    random_state = torch.get_rng_state()
    expected = by_hand(host, plain, branch, path)
    torch.set_rng_state(random_state)

    loop.slots.shadow_pass(loop.loss)

    found = loop.gradients(path)
    assert found.keys() == expected.keys()
    assert any(float(gradient.abs().max()) > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert all(p.grad is None for p in loop.slots.host_parameters())


def leaves_of(loss: Tensor) -> set[int]:
    """The ids of the tensors that a backward from here would reach."""
    reached, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return reached


def test_nothing_upstream_of_the_slot_is_kept_for_the_backward(host: Any) -> None:
    path = host.targets[1]
    loop = Loop(host, path)
    losses: list[Tensor] = []

    def watched() -> Tensor:
        losses.append(loop.loss())
        return losses[-1]

    loop.slots.shadow_pass(watched)
    reached = leaves_of(losses[0])
    upstream = [id(p) for p in loop.model.get_submodule(host.targets[0]).parameters()]
    seed = [id(p) for p in loop.slots[path].living.parameters()]
    assert reached.isdisjoint(upstream)
    assert reached.issuperset(seed)
    loop.step()
    assert leaves_of(loop.loss()).issuperset(upstream)


def test_beside_another_seed_it_learns_what_it_learns_alone(host: Any, randomise: Any) -> None:
    first, second = host.targets
    alone, together = Loop(host, first), Loop(host, first, second)
    for loop in (alone, together):
        for path in loop.slots:
            if loop.slots[path].living is not None:
                randomise(loop.slots[path].living)
        torch.manual_seed(3)
        loop.slots.shadow_pass(loop.loss)
    for name, gradient in alone.gradients(first).items():
        assert torch.equal(together.gradients(first)[name], gradient)
    assert any(float(g.abs().max()) > 0 for g in together.gradients(second).values())


def test_it_learns_through_what_other_slots_have_blended_in(host: Any, randomise: Any) -> None:
    """A seed that adapts to the host is part of the rest of it; gradients pass through."""
    first, second = host.targets
    found = []
    for severed in (False, True):
        loop = Loop(host, first, second)
        randomise(loop.slots[first].living)
        randomise(loop.slots[second].living)
        blended = loop.slots[second]
        blended.advance(force=True)
        blended.set_alpha_target(1.0, 0)
        blended.isolated = severed
        torch.manual_seed(3)
        loop.slots.shadow_pass(loop.loss)
        found.append(loop.gradients(first))
        assert all(gradient is None for gradient in loop.gradients(second).values())
    name = next(iter(found[0]))
    assert not torch.allclose(found[0][name], found[1][name])


def test_its_dropout_goes_on_from_pass_to_pass(host: Any, test_blueprints: None) -> None:
    path = host.targets[0]
    loop = Loop(host, path, blueprint="with_dropout")
    with torch.no_grad():
        loop.slots[path].seed.output.weight.fill_(0.1)
    seen = []
    for _ in range(2):
        torch.manual_seed(3)
        loop.slots.shadow_pass(loop.loss)
        seen.append(loop.gradients(path)["seed.output.weight"].clone())
        loop.optimizer.zero_grad()
    assert not torch.equal(seen[0], seen[1])


def test_it_leaves_the_host_what_it_draws_from_other_streams_than_torchs(host: Any) -> None:
    loop = Loop(host, *host.targets)
    streams = (random.random, np.random.random)

    def drawn_after(*, passes: int) -> list[float]:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        seen: list[float] = []

        def loss() -> Tensor:
            seen.extend(stream() for stream in streams)
            return loop.loss()

        for _ in range(passes):
            loop.slots.shadow_pass(loss)
        loss()
        assert seen == seen[-2:] * (len(seen) // 2), "each pass draws what the step will draw"
        return seen[-2:]

    assert drawn_after(passes=2) == drawn_after(passes=0)


def test_a_forgotten_pass_is_an_error_and_no_training_step(host: Any) -> None:
    path = host.targets[0]
    loop = Loop(host, path)
    slot = loop.slots[path]
    loop.loss().backward()
    loop.slots.tick()  # the seed may have begun between the forward and this tick
    assert slot.measurements.training_steps == 0
    loop.loss().backward()
    with pytest.raises(RuntimeError, match=rf"{path!r} .*no shadow pass .*growth\.shadow_pass\("):
        loop.slots.tick()
    loop.step()
    loop.step()
    assert slot.measurements.training_steps == 2
    loop.model.eval()
    loop.slots.shadow_pass(loop.loss)
    with pytest.raises(RuntimeError, match="train mode"):
        loop.slots.tick()


def test_a_pass_for_one_seed_counts_for_no_other(host: Any) -> None:
    path = host.targets[0]
    loop = Loop(host, path)
    slot = loop.slots[path]
    loop.slots.shadow_pass(loop.loss)
    slot.prune()
    for _ in range(4):
        loop.slots.end_epoch()
    slot.germinate(host.blueprint)
    slot.advance(force=True)
    loop.loss().backward()
    loop.optimizer.step()
    loop.slots.tick()
    assert slot.measurements.training_steps == 0


def test_gradients_that_are_zeroed_before_the_step_are_an_error(host: Any) -> None:
    loop = Loop(host, host.targets[0])
    loop.slots.shadow_pass(loop.loss)
    loop.optimizer.zero_grad()
    loop.loss().backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) before growth\.shadow_pass"):
        loop.optimizer.step()
    loop.optimizer.zero_grad()
    loop.step()


def test_passes_of_several_batches_add_up(host: Any) -> None:
    path = host.targets[0]
    loop = Loop(host, path)
    name = "seed." + next(
        name for name, p in loop.slots[path].seed.named_parameters() if p.ndim > 1
    )
    single = []
    for batch in range(2):
        torch.manual_seed(3)
        loop.slots.shadow_pass(lambda batch=batch: loop.loss(batch))
        single.append(loop.gradients(path)[name].clone())
        loop.optimizer.zero_grad()
    for batch in range(2):
        torch.manual_seed(3)
        loop.slots.shadow_pass(lambda batch=batch: loop.loss(batch))
    torch.testing.assert_close(loop.gradients(path)[name], single[0] + single[1])


def test_no_pass_is_made_for_other_objectives_and_stages(host: Any) -> None:
    def never() -> Tensor:
        raise AssertionError("a pass was made")

    model = host.build()
    slots = esper.attach(
        model,
        host.targets,
        example=host.inputs(),
        config={
            host.targets[0]: SlotConfig(isolation="shadowing", objective="proximal"),
            host.targets[1]: SlotConfig(isolation="shadowing", objective="shadow"),
        },
    )
    slots[host.targets[0]].germinate(host.blueprint)
    slots[host.targets[0]].advance(force=True)
    shadowed = slots[host.targets[1]]
    slots.shadow_pass(never)
    shadowed.germinate(host.blueprint)
    slots.shadow_pass(never)
    shadowed.advance(force=True)
    shadowed.advance(force=True)
    assert shadowed.stage is SeedStage.BLENDING
    slots.shadow_pass(never)


def test_a_seed_that_raises_is_pruned_and_another_error_says_where_it_was_raised(
    host: Any, test_blueprints: None
) -> None:
    path = host.targets[0]
    loop = Loop(host, path, blueprint="raises")
    for _ in range(10):
        loop.step()
    assert loop.slots[path].stage is SeedStage.PRUNED

    loop = Loop(host, path)
    with pytest.raises(ZeroDivisionError) as caught:
        loop.slots.shadow_pass(lambda: torch.zeros(()) / (1 // 0))
    assert "shadow pass" in caught.value.__notes__[0]
    loop.step()


def test_broken_gradients_are_counted_and_kept_from_the_seed(
    host: Any, test_blueprints: None
) -> None:
    path = host.targets[0]
    loop = Loop(host, path, blueprint="nan_gradient")
    loop.step()
    assert int(loop.slots[path].nonfinite_steps) > 0
    assert all(torch.isfinite(p).all() for p in loop.slots[path].seed.parameters())


def test_the_isolation_monitor_has_nothing_to_check_until_the_seed_blends(host: Any) -> None:
    path = host.targets[0]
    loop = Loop(host, path)
    loop.step()
    monitor = IsolationMonitor(loop.slots, interval_steps=1)
    assert monitor.due(5) is None
    loop.slots[path].advance(force=True)
    loop.slots[path].set_alpha_target(1.0, 0)
    assert monitor.due(6) is loop.slots[path]


def test_in_eval_mode_a_seed_in_training_is_not_run(host: Any) -> None:
    path = host.targets[0]
    loop = Loop(host, path)
    loop.step()
    loop.model.eval()
    runs: list[Any] = []
    loop.slots[path].seed.register_forward_hook(lambda *_: runs.append(1))
    loop.slots[path].living.register_forward_hook(lambda *_: runs.append(1))
    loop.loss()
    assert not runs
    with loop.slots[path].force_alpha(1.0):
        loop.loss()
    assert runs

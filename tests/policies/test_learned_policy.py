"""The learned policy: its distribution against counting, its network on any host, its file.

Probabilities are compared to 1e-9 in double precision: sums of fewer than a thousand terms. Logits
of hosts in another order are compared to 1e-5 in single: the same sums in another order.
"""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.lifecycle import (
    Action,
    AlphaCurve,
    BlendOperator,
    BlueprintChoice,
    GrowthState,
    Operation,
    SeedStage,
    SlotState,
    check_action,
)
from esper.policies.learned import (
    NUM_RUN_FEATURES,
    NUM_SLOT_FEATURES,
    READ_HEADS,
    SLOT_HEADS,
    SLOT_OPERATIONS,
    ActionChoices,
    ActionCoder,
    GrowthNetwork,
    Head,
    HeadLogits,
    JointDistribution,
    LearnedPolicy,
    NetworkConfig,
    ObservationConfig,
    PolicyFileError,
    SeenHost,
    WatchedLoss,
    feature_names,
    features,
    head_sizes,
    load_policy,
    relative_size,
    save_policy,
    split_features,
)
from esper.training.policy import FrugalPolicy, StatefulPolicy
from esper.training.state_tree import read_tree, write_tree

CHOICES = ActionChoices(
    blend_operators=tuple(BlendOperator)[:2],
    alpha_targets=(0.5, 1.0),
    ramp_steps=(0, 10, 50),
    ramp_curves=tuple(AlphaCurve)[:2],
)
SMALL = NetworkConfig(width=8, num_attention_heads=2)
NUM_SAMPLES = 10_000


# The distribution


class Said:
    """Random logits and masks for one state."""

    def __init__(self, num_slots: int, num_blueprints: int, random_seed: int) -> None:
        stream = torch.Generator().manual_seed(random_seed)
        self.sizes = head_sizes(num_slots, num_blueprints, CHOICES)
        self.fits = torch.rand(1, num_slots, num_blueprints, generator=stream) < 0.6
        self.legal = torch.rand(1, self.sizes[Head.OPERATION], generator=stream) < 0.6
        self.legal[:, 0] = True
        self.legal[:, 1 :: len(SLOT_OPERATIONS)] &= self.fits.any(dim=2)

        def logits(*shape: int) -> Tensor:
            return 1.5 * torch.randn(1, *shape, generator=stream, dtype=torch.float64)

        self.operation = logits(self.sizes[Head.OPERATION])
        self.of_slots = {head: logits(num_slots, self.sizes[head]) for head in SLOT_HEADS}

    def joint(self, num_rows: int = 1) -> JointDistribution:
        """Return their distribution, the same in every row."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor.repeat(num_rows, *[1] * (tensor.dim() - 1))

        logits = HeadLogits(
            operation=rows(self.operation),
            of_slots={head: rows(tensor) for head, tensor in self.of_slots.items()},
        )
        return JointDistribution(logits, legal=rows(self.legal), fits=rows(self.fits))

    def counted(self) -> dict[tuple[int, ...], float]:
        """Return the probability of every legal action, from the definition."""
        operations = softmax(self.operation[0], self.legal[0])
        return {
            (number, *rest): operations[number] * likely
            for number in range(len(operations))
            if self.legal[0, number]
            for rest, likely in self._of_operation(number)
        }

    def _of_operation(self, number: int) -> Iterator[tuple[tuple[int, ...], float]]:
        slot, place = divmod(number - 1, len(SLOT_OPERATIONS))
        read = READ_HEADS[SLOT_OPERATIONS[place]] if number else ()
        options = []
        for head in SLOT_HEADS:
            if head not in read:
                options.append([(0, 1.0)])
                continue
            logits = self.of_slots[head][0, slot]
            fits = self.fits[0, slot] if head is Head.BLUEPRINT else torch.ones(len(logits)) > 0
            likely = softmax(logits, fits)
            options.append([(i, likely[i]) for i in range(len(likely)) if fits[i]])
        for chosen in itertools.product(*options):
            yield tuple(i for i, _ in chosen), math.prod(p for _, p in chosen)


def softmax(logits: Tensor, possible: Tensor) -> list[float]:
    weights = [
        math.exp(x) if p else 0.0 for x, p in zip(logits.tolist(), possible.tolist(), strict=True)
    ]
    return [weight / sum(weights) for weight in weights]


states_said = st.builds(Said, st.integers(1, 3), st.integers(1, 4), st.integers(0, 100_000))


@given(states_said)
def test_probabilities_and_entropy_are_those_of_counting_all_actions(said: Said):
    counted = said.counted()
    actions = torch.tensor(list(counted))
    logs = said.joint(len(actions)).log_prob(actions)
    assert float(logs.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    assert logs.tolist() == pytest.approx([math.log(p) for p in counted.values()], abs=1e-9)
    exact = -sum(p * math.log(p) for p in counted.values())
    assert float(said.joint().entropy()) == pytest.approx(exact, abs=1e-9)


@given(states_said)
def test_the_mode_is_the_likeliest_operation_with_the_likeliest_of_what_it_reads(said: Said):
    counted = said.counted()
    of_operation: dict[int, float] = {}
    for action, likely in counted.items():
        of_operation[action[0]] = of_operation.get(action[0], 0.0) + likely
    best = max(of_operation, key=of_operation.__getitem__)
    within = {action: likely for action, likely in counted.items() if action[0] == best}
    assert tuple(said.joint().mode()[0].tolist()) == max(within, key=within.__getitem__)


@pytest.mark.parametrize("random_seed", range(4))
def test_samples_are_legal_and_as_frequent_as_likely(random_seed: int):
    said = Said(2, 3, random_seed)
    counted = said.counted()
    stream = torch.Generator().manual_seed(random_seed)
    drawn = said.joint(NUM_SAMPLES).sample(stream).tolist()
    assert {tuple(action) for action in drawn} <= counted.keys()
    for action, likely in counted.items():
        deviation = math.sqrt(likely * (1.0 - likely) / NUM_SAMPLES)
        found = sum(tuple(each) == action for each in drawn) / NUM_SAMPLES
        assert found == pytest.approx(likely, abs=5.0 * deviation + 1e-9)


def test_a_generator_fixes_samples_and_torchs_own_stream_is_left_alone():
    joint = Said(2, 3, 0).joint(64)
    before = torch.get_rng_state()
    once, again = (joint.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    own = joint.sample()
    torch.manual_seed(3)
    assert torch.equal(own, joint.sample())


def test_what_an_operation_does_not_read_counts_nothing_and_learns_nothing():
    said = Said(2, 3, 0)
    said.legal[:] = True
    said.fits[:] = True
    for tensor in (said.operation, *said.of_slots.values()):
        tensor.requires_grad_()
    prune = 1 + SLOT_OPERATIONS.index(Operation.PRUNE)
    action = torch.tensor([[prune, 0, 0, 0, 2, 0]])
    other = torch.tensor([[prune, 2, 1, 1, 2, 1]], dtype=torch.float32)
    log_prob = said.joint().log_prob(action)
    assert torch.equal(log_prob, said.joint().log_prob(other))
    log_prob.sum().backward()
    taught = {
        (head, slot)
        for head, logits in said.of_slots.items()
        for slot in range(2)
        if logits.grad is not None and logits.grad[0, slot].any()
    }
    assert taught == {(Head.RAMP_STEPS, 0)}


def test_nothing_is_nan_where_logits_are_extreme_or_nothing_fits():
    said = Said(2, 3, 0)
    said.fits[:, 1] = False
    said.legal[:] = False
    said.legal[:, [0, 1, 7]] = True  # WAIT, GERMINATE in the first slot, ADVANCE in the second
    leaves = [said.operation, *said.of_slots.values()]
    for sign, tensor in zip(itertools.cycle((1.0, -1.0)), leaves, strict=False):
        tensor.mul_(sign * 1e4).requires_grad_()
    joint = said.joint()
    actions = torch.tensor([[1, 0, 1, 1, 1, 1]])
    (joint.entropy() + joint.log_prob(actions)).sum().backward()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in leaves)
    illegal = joint.log_prob(torch.tensor([[6, 0, 0, 0, 0, 0]])).detach()
    assert illegal.isfinite().all()
    assert float(illegal) < -1e8


def test_half_precision_masks_as_surely_as_single():
    said = Said(2, 3, 1)
    said.operation = said.operation.half()
    said.of_slots = {head: logits.half() for head, logits in said.of_slots.items()}
    joint = said.joint()
    assert joint.entropy().dtype == torch.float32
    assert joint.entropy().isfinite().all()


def _no_operation(said: Said) -> None:
    said.legal[:] = False


def _nothing_to_germinate(said: Said) -> None:
    said.fits[:, 1] = False
    said.legal[:, 6] = True


def _short_mask(said: Said) -> None:
    said.legal = said.legal[:, :-1]


def _other_blueprints(said: Said) -> None:
    said.of_slots[Head.BLUEPRINT] = said.of_slots[Head.BLUEPRINT][..., :-1]


@pytest.mark.parametrize(
    ("breaks", "told"),
    [
        (_no_operation, "no operation is legal in row 0"),
        (_nothing_to_germinate, "germinate in row 0 in a slot where no blueprint fits"),
        (_short_mask, "legal should have the shape"),
        (_other_blueprints, "logits of BLUEPRINT should have the shape"),
    ],
)
def test_masks_that_leave_nothing_or_have_another_shape_are_refused(
    breaks: Callable[[Said], None], told: str
):
    said = Said(2, 3, 0)
    breaks(said)
    with pytest.raises(ValueError, match=told):
        said.joint()


# The network


def lively(blueprints: Sequence[str], random_seed: int = 0) -> GrowthNetwork:
    """Return a network whose last layers say as much as any trained one's."""
    torch.manual_seed(random_seed)
    network = GrowthNetwork(blueprints, CHOICES, SMALL).eval()
    with torch.no_grad():
        for layer in (network.heads.wait, network.heads.operations, network.heads.query):
            layer.weight.mul_(300.0)
        for layer in network.heads.others.values():
            layer.weight.mul_(300.0)
    return network


def seen_host(num_slots: int, num_blueprints: int, random_seed: int = 0) -> SeenHost:
    stream = torch.Generator().manual_seed(random_seed)
    width = NUM_RUN_FEATURES + num_slots * (NUM_SLOT_FEATURES + 2 * num_blueprints)
    observation = 2.0 * torch.rand(3, width, generator=stream) - 1.0
    return split_features(observation, num_slots, num_blueprints)


def said_of(network: GrowthNetwork, seen: SeenHost, blueprints: Sequence[str]) -> HeadLogits:
    """Return what the network says after it has seen this twice."""
    names, memory = network.name_numbers(blueprints), network.nothing_remembered(len(seen.run))
    with torch.no_grad():
        _, memory = network(seen, names, memory)
        logits, _ = network(seen, names, memory)
    return logits


def test_slots_in_another_order_get_the_same_answers_in_that_order():
    network, seen, order = lively("abc"), seen_host(4, 3), torch.tensor([2, 0, 3, 1])
    said = said_of(network, seen, "abc")
    moved = SeenHost(seen.run, *(part[:, order] for part in seen[1:]))
    answered = said_of(network, moved, "abc")
    of_slots = said.operation[:, 1:].unflatten(1, (4, -1))
    assert not torch.allclose(of_slots[:, 0], of_slots[:, 1], atol=1e-2)
    expected = torch.cat([said.operation[:, :1], of_slots[:, order].flatten(1)], dim=1)
    torch.testing.assert_close(answered.operation, expected, atol=1e-5, rtol=1e-5)
    for head in SLOT_HEADS:
        torch.testing.assert_close(
            answered.of_slots[head], said.of_slots[head][:, order], atol=1e-5, rtol=1e-5
        )


def test_a_slot_is_judged_in_view_of_the_others():
    network, seen = lively("abc"), seen_host(2, 3)
    changed = seen.slots.clone()
    changed[:, 1] = -changed[:, 1]
    other = said_of(network, seen._replace(slots=changed), "abc").operation[:, 1:6]
    assert not torch.allclose(said_of(network, seen, "abc").operation[:, 1:6], other, atol=1e-2)


def test_a_network_made_for_three_blueprints_runs_on_five_slots_with_unknown_ones():
    network = lively("abc")
    said_of(network, seen_host(2, 3), "abc")
    seen, names = seen_host(5, 6), ("x", "a", "y", "b", "z", "c")
    said = said_of(network, seen, names)
    joint = JointDistribution(
        said, legal=torch.ones(3, 26, dtype=torch.bool), fits=torch.ones_like(seen.fits)
    )
    assert joint.log_prob(joint.sample(torch.Generator())).isfinite().all()


def test_of_an_unknown_blueprint_its_size_remains():
    network, seen = lively("abc"), seen_host(2, 4)
    seen.sizes[:] = torch.tensor([0.3, 0.3, 0.8, 0.3])
    unknown = network.heads.name_key(network.name_numbers(["x"]))
    assert torch.equal(unknown, torch.zeros_like(unknown))
    logits = said_of(network, seen, ("x", "y", "z", "a")).of_slots[Head.BLUEPRINT]
    assert torch.equal(logits[..., 0], logits[..., 1])
    assert not torch.allclose(logits[..., 0], logits[..., 2], atol=1e-3)
    assert not torch.allclose(logits[..., 0], logits[..., 3], atol=1e-3)


def test_the_first_policy_is_nearly_uniform_and_learns_in_every_part():
    torch.manual_seed(0)
    network, seen = GrowthNetwork("abc", CHOICES), seen_host(3, 3)
    names, memory = network.name_numbers("abc"), network.nothing_remembered(3)
    _, memory = network(seen, names, memory)
    logits, _ = network(seen, names, memory)
    spoken = [logits.operation, *logits.of_slots.values()]
    assert max(float(tensor.detach().abs().max()) for tensor in spoken) < 0.1
    sum(tensor.square().sum() for tensor in spoken).backward()
    idle = [name for name, w in network.named_parameters() if w.grad is None or not w.grad.any()]
    assert idle == []


def test_a_name_that_is_given_twice_is_refused():
    with pytest.raises(ValueError, match="named twice: a"):
        GrowthNetwork(["a", "b", "a"])


# States


def slot(path: str, stage: SeedStage = SeedStage.DORMANT, **changes: Any) -> SlotState:
    choices = tuple(
        BlueprintChoice(name=name, param_count=count)
        for name, count in (("noop", 0), ("norm", 16), ("conv", 600))
    )
    plain = {"path": path, "family": "cnn", "dim": 8, "stage": stage, "choices": choices}
    return SlotState(**{**plain, **changes})


def state(*slots: SlotState, epoch: int = 3, **changes: Any) -> GrowthState:
    plain: dict[str, Any] = {
        "epoch": epoch,
        "step": 10 * epoch,
        "max_epochs": 20,
        "losses": tuple(2.0 / (1 + index) for index in range(epoch)),
        "slots": slots,
        "param_count": 1000,
        "host_param_count": 1000,
    }
    return GrowthState(**{**plain, **changes})


def random_states(count: int, random_seed: int) -> list[GrowthState]:
    stream = random.Random(random_seed)
    return [
        state(
            slot("a", stream.choice(list(SeedStage)), alpha=stream.random()),
            slot("b", stream.choice(list(SeedStage)), choices=slot("b").choices[:2]),
            slot("c", stream.choice(list(SeedStage)), choices=slot("c").choices[:1]),
            epoch=1 + index,
        )
        for index in range(count)
    ]


def test_an_observation_is_taken_apart_as_it_was_put_together():
    host = state(slot("a"), slot("b", choices=slot("b").choices[:2]), slot("c", choices=()))
    coder = ActionCoder.of(host)
    assert coder.blueprints == ("conv", "norm")
    seen = split_features(torch.tensor([features(host, coder)]), 3, 2)
    assert seen.fits.tolist() == [list(coder.fits(host))]
    assert seen.slots[0, :, -1].tolist() == [0.0, 0.5, 1.0]
    conv, norm = relative_size(600, 1000), relative_size(16, 1000)
    expected = [[conv, norm], [0.0, norm], [0.0, 0.0]]
    torch.testing.assert_close(seen.sizes[0], torch.tensor(expected))
    assert seen.run[0, 0] == pytest.approx(features(host, coder)[0])
    with pytest.raises(ValueError, match=r"3 slots and 3 blueprints has \d+ features"):
        split_features(torch.tensor([features(host, coder)]), 3, 3)


# The file


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "policy.safetensors"
    save_policy(path, lively(["conv", "norm"]), trained_on={"task": "digits", "steps": 4000})
    return path


def test_a_policy_comes_back_bit_for_bit_with_all_that_it_needs(tmp_path: Path):
    network = lively(["conv", "norm"])
    path = tmp_path / "deep" / "policy.safetensors"
    sha256 = save_policy(path, network, trained_on={"task": "digits", "returns": [0.1, 0.2]})
    before = torch.get_rng_state()
    loaded = load_policy(path)
    assert torch.equal(torch.get_rng_state(), before)
    weights = network.state_dict()
    assert loaded.network.state_dict().keys() == weights.keys()
    assert all(torch.equal(loaded.network.state_dict()[name], w) for name, w in weights.items())
    assert loaded.network.blueprints == ("conv", "norm")
    assert loaded.network.choices == CHOICES
    assert loaded.network.config == SMALL
    assert not loaded.network.training
    assert loaded.trained_on == {"task": "digits", "returns": [0.1, 0.2]}
    assert loaded.sha256 == sha256
    seen = seen_host(3, 2)
    once, again = (said_of(each, seen, ["norm", "new"]) for each in (network, loaded.network))
    assert torch.equal(once.operation, again.operation)
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_the_old_one(saved: Path, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_policy(saved, lively(["mlp"]))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_what_is_no_policy_to_keep_is_not_written(tmp_path: Path):
    network = lively("ab")
    with pytest.raises(ValueError, match=r"NAME\.safetensors"):
        save_policy(tmp_path / "policy.pt", network)
    network.lstm.bias_ih_l0.data[3] = float("inf")
    with pytest.raises(ValueError, match=r"not finite, in lstm\.bias_ih_l0"):
        save_policy(tmp_path / "policy.safetensors", network)
    assert list(tmp_path.iterdir()) == []


Parts = tuple[dict[str, Any], dict[str, Tensor]]


def _other_version(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["format_version"] = 99


def _other_feature(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["slot_features"][2] = "is_sleepy"


def _moved_feature(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["run_features"].reverse()


def _other_head(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["heads"].append("LEARNING_RATE")


def _other_operations(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["operations"].reverse()


def _no_features(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    del document["run_features"]


def _unknown_operator(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["choices"]["blend_operators"][0] = "shuffle"


def _no_choices(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    del document["choices"]["ramp_steps"]


def _other_width(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["network"]["width"] = 8_000_000


def _immense_width(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["network"]["width"] = 10**30


def _twice(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["blueprints"] = ["conv", "conv"]


def _one_blueprint_more(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["blueprints"].append("mlp")


def _weight_lost(_: dict[str, Any], weights: dict[str, Tensor]) -> None:
    del weights["lstm.weight_hh_l0"]


def _weight_too_many(_: dict[str, Any], weights: dict[str, Tensor]) -> None:
    weights["value.weight"] = torch.zeros(1, 8)


def _double(_: dict[str, Any], weights: dict[str, Tensor]) -> None:
    weights["heads.wait.bias"] = weights["heads.wait.bias"].double()


def _not_a_number(_: dict[str, Any], weights: dict[str, Tensor]) -> None:
    weights["heads.wait.bias"][0] = float("nan")


@pytest.mark.parametrize(
    ("breaks", "told"),
    [
        (_other_version, "format version 99; this esper reads version 2"),
        (_other_feature, r"other slot features .* is_sleepy beyond, and lacks is_\w+; train"),
        (_moved_feature, "other run features .* they are in another order"),
        (_other_head, "other heads .* LEARNING_RATE beyond, and lacks nothing"),
        (_other_operations, "other operations .* another order"),
        (_no_features, "does not tell the run features"),
        (_unknown_operator, "describes no policy that esper knows"),
        (_no_choices, r"in part: PolicyDocument lacks choices\.ramp_steps"),
        (_other_width, r"is \(8,.*and should be \(8000000,"),
        (_immense_width, "describes no network: "),
        (_twice, "describes no network: blueprints are named twice"),
        (_one_blueprint_more, r"heads\.name_key\.weight .* is \(3, 8\) .* should be \(4, 8\)"),
        (_weight_lost, r"nothing beyond, lstm\.weight_hh_l0 lacking"),
        (_weight_too_many, r"value\.weight beyond, nothing lacking"),
        (_double, r"heads\.wait\.bias .* torch\.float64, and should be .* torch\.float32"),
        (_not_a_number, r"not finite, in heads\.wait\.bias"),
    ],
)
def test_a_file_of_something_else_is_refused_with_the_reason(
    breaks: Callable[[dict[str, Any], dict[str, Tensor]], None], told: str, saved: Path
):
    with safetensors.safe_open(str(saved), framework="pt") as stored:
        document = json.loads(stored.metadata()["esper_policy"])
    weights = safetensors.torch.load_file(saved)
    breaks(document, weights)
    safetensors.torch.save_file(weights, saved, {"esper_policy": json.dumps(document)})
    with pytest.raises(PolicyFileError, match=told):
        LearnedPolicy.load(saved)


def test_what_is_no_policy_file_at_all_is_refused(saved: Path, tmp_path: Path):
    data = saved.read_bytes()
    with pytest.raises(PolicyFileError, match="there is no policy file"):
        load_policy(tmp_path / "elsewhere.safetensors")
    with pytest.raises(PolicyFileError, match="cannot be read"):
        load_policy(tmp_path)
    for name, broken in {"cut": data[:-1], "text": b"weights", "empty": b""}.items():
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(PolicyFileError, match="no safetensors file, or damaged"):
            load_policy(tmp_path / name)
    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, plain)
    with pytest.raises(PolicyFileError, match="holds tensors, and no Esper policy"):
        load_policy(plain)
    for text in ("{", "[]", '{"name": "x"}', "[" * 100_000):
        safetensors.torch.save_file({"weight": torch.zeros(2)}, plain, {"esper_policy": text})
        with pytest.raises(PolicyFileError, match="nothing legible"):
            load_policy(plain)


# The policy


def decided(policy: LearnedPolicy, states: Sequence[GrowthState]) -> list[Action]:
    return [action for each in states for action in policy.decide(each)]


def test_it_is_a_policy_that_says_what_it_needs_and_what_it_remembers(saved: Path):
    policy = LearnedPolicy.load(saved)
    assert isinstance(policy, FrugalPolicy)
    assert isinstance(policy, StatefulPolicy)
    assert (policy.name, policy.reads_losses) == ("learned", True)
    assert policy.weighs(state(slot("a"), slot("b", SeedStage.BLENDING))) == ["a"]
    assert policy.trained_on == {"task": "digits", "steps": 4000}


def test_one_that_watches_the_training_loss_needs_no_evaluation_and_knows_none(tmp_path: Path):
    path = tmp_path / "policy.safetensors"
    watched = ObservationConfig(loss=WatchedLoss.TRAINING)
    save_policy(path, lively(["conv", "norm"]), observation=watched)
    assert load_policy(path).observation == watched
    assert not LearnedPolicy.load(path).reads_losses

    def decisions(**losses: tuple[float, ...]) -> list[Action]:
        host = state(slot("a"), slot("b", choices=slot("b").choices[:2]), **losses)
        return decided(LearnedPolicy.load(path, deterministic=False), [host] * 30)

    falling, flat, unknown = (2.0, 1.0, 0.5), (2.0, 2.0, 2.0), (math.nan,) * 3
    expected = decisions(train_losses=falling, losses=falling)
    assert decisions(train_losses=falling, losses=unknown) == expected
    assert decisions(train_losses=flat, losses=falling) != expected
    host = state(slot("a"), train_losses=falling, losses=unknown)
    names = dict(zip(feature_names(ActionCoder.of(host)), values_of(host, watched), strict=True))
    assert (names["loss_is_finite"], names["held_out_over_train"]) == (1.0, 0.0)
    assert names["loss_fall_1"] == math.tanh(20.0 / 3.0)
    with pytest.raises(ValueError, match="and the loop does not tell it; pass it"):
        decisions(train_losses=falling[:2])


def values_of(host: GrowthState, observation: ObservationConfig) -> list[float]:
    return features(host, ActionCoder.of(host), observation)


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_decision_is_one_legal_action(saved: Path, deterministic: bool):
    policy = LearnedPolicy.load(saved, deterministic=deterministic)
    states = random_states(200, random_seed=1)
    actions = [policy.decide(each) for each in states]
    assert {len(each) for each in actions} == {1}
    for each, (action,) in zip(states, actions, strict=True):
        check_action(each, action)
    assert len({action.operation for (action,) in actions}) >= 3


def test_a_random_seed_fixes_what_is_drawn_and_changes_nothing_where_nothing_is(saved: Path):
    states = random_states(30, random_seed=2)

    def decisions(deterministic: bool, random_seed: int) -> list[Action]:
        policy = LearnedPolicy.load(saved, deterministic=deterministic, random_seed=random_seed)
        return decided(policy, states)

    assert decisions(True, 0) == decisions(True, 1)
    assert decisions(False, 0) == decisions(False, 0)
    assert decisions(False, 0) != decisions(False, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_file_and_what_it_decides_are_the_same_whatever_torchs_default_dtype(
    saved: Path, tmp_path: Path, dtype: torch.dtype
):
    states = random_states(30, random_seed=2)
    expected = decided(LearnedPolicy.load(saved, deterministic=False), states)
    double = tmp_path / "double.safetensors"
    save_policy(double, lively(["conv", "norm"]).double())
    torch.set_default_dtype(dtype)
    try:
        for path in (saved, double):
            assert decided(LearnedPolicy.load(path, deterministic=False), states) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_host_may_grow_more_slots_or_have_other_blueprints_than_in_training(saved: Path):
    policy = LearnedPolicy.load(saved, deterministic=False)
    other = (BlueprintChoice(name="bottleneck", param_count=50),)
    for count in (1, 7):
        host = state(*(slot(f"layer{index}", choices=other) for index in range(count)))
        for action in decided(policy, [host] * 20):
            check_action(host, action)


def test_it_goes_on_from_its_state_as_if_it_had_never_stopped(saved: Path, tmp_path: Path):
    states = random_states(30, random_seed=2)
    unbroken = LearnedPolicy.load(saved, deterministic=False, random_seed=7)
    first = LearnedPolicy.load(saved, deterministic=False, random_seed=7)
    expected = decided(unbroken, states)
    assert decided(first, states[:12]) == expected[:12]
    write_tree(first.state_dict(), tmp_path, "state")
    kept = first.state_dict()
    decided(first, states[12:])
    resumed = LearnedPolicy.load(saved, deterministic=False)
    resumed.load_state_dict(read_tree(tmp_path, "state"))
    assert decided(resumed, states[12:]) == expected[12:]
    assert torch.equal(resumed.state_dict()["hidden"], unbroken.state_dict()["hidden"])
    assert torch.equal(kept["hidden"], read_tree(tmp_path, "state")["hidden"])


def test_what_it_saw_before_changes_what_it_decides(saved: Path):
    states = random_states(30, random_seed=2)
    whole = decided(LearnedPolicy.load(saved), states)
    forgetful = [decided(LearnedPolicy.load(saved), [each])[0] for each in states]
    assert whole[0] == forgetful[0]
    assert whole != forgetful
    assert decided(LearnedPolicy.load(saved), states) == whole


def test_the_state_of_another_file_is_refused(saved: Path, tmp_path: Path):
    save_policy(tmp_path / "other.safetensors", lively(["conv", "norm"], random_seed=1))
    policy = LearnedPolicy.load(saved)
    before = policy.state_dict()
    with pytest.raises(ValueError, match="go on with the file that the run began with"):
        policy.load_state_dict(LearnedPolicy.load(tmp_path / "other.safetensors").state_dict())
    assert torch.equal(policy.state_dict()["hidden"], before["hidden"])


def test_deciding_leaves_the_random_streams_of_training_alone(saved: Path):
    before = torch.get_rng_state(), random.getstate()
    policy = LearnedPolicy.load(saved, deterministic=False)
    decided(policy, random_states(5, random_seed=3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(
    ("host", "told"),
    [
        (state(), "there is no slot to decide about"),
        (state(slot("a", choices=slot("a").choices[:1])), "no blueprint with parameters fits"),
        (state(slot("a"), host_param_count=0), "must tell host_param_count"),
    ],
)
def test_a_host_that_nothing_can_be_decided_about_is_refused(
    host: GrowthState, told: str, saved: Path
):
    with pytest.raises(ValueError, match=told):
        LearnedPolicy.load(saved).decide(host)


def test_deploying_one_needs_no_library_of_reinforcement_learning():
    code = (
        "import sys, esper.policies.learned as learned; learned.LearnedPolicy\n"
        "print(sorted({'gymnasium', 'stable_baselines3', 'sb3_contrib', 'ray'} & {*sys.modules}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert ran.stdout.strip() == "[]"

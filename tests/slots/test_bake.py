"""Baking: a plain module with the same output to the bit, and nothing of a slot in it."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import esper
from esper import SeedStage
from esper.lifecycle.alpha import BlendOperator
from esper.seeds import Family
from esper.slots import GrownModule
from esper.training.carried_state import CarriedState

INPUTS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fixed_random_stream() -> Iterator[None]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


class Pair(NamedTuple):
    features: Tensor
    extra: Tensor


class Layer(nn.Module):
    """Returns one of the kinds of output that layers have."""

    kind = "layer"

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.returns = returns

    def forward(self, features: Tensor, *, scale: float = 1.0) -> Any:
        output = torch.tanh(self.linear(features)) * scale
        if self.returns == "tensor":
            return output
        if self.returns == "list":
            return [output, features]
        return Pair(output, features) if self.returns == "named" else (output, features)


class Host(nn.Module):
    """Asks its layers what they are, as hosts do, and takes what they return."""

    def __init__(self, returns: Sequence[str] = ("tensor", "tuple", "named", "list")) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind) for kind in returns)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            assert layer.kind == "layer"
            output = layer(features, scale=0.9)
            features = output if isinstance(output, Tensor) else output[0]
        return features


@pytest.fixture
def grown(grow: Any, randomise: Callable[..., None]) -> Callable[..., tuple[nn.Module, Any]]:
    """`grown(model, blueprints_by_path)`: committed seeds with random weights."""

    def make(model: nn.Module, seeds: dict[str, list[Any]]) -> tuple[nn.Module, esper.SlotSet]:
        slots = esper.attach(model, list(seeds), example=INPUTS)
        for path, wanted in seeds.items():
            for number, order in enumerate(wanted):
                name, options = order if isinstance(order, tuple) else (order, {})
                grow(slots[path], name, SeedStage.FOSSILIZED, **options)
                randomise(slots[path].branches[number], seed=number + len(path))
        return model, slots

    return make


@pytest.mark.parametrize("training", [True, False])
def test_a_baked_model_equals_the_grown_one_bitwise_and_has_no_slot(grown: Any, training: bool):
    seeds = {f"layers.{index}": ["mlp", "lora"] for index in range(4)}
    model, _ = grown(Host(), seeds)
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    plain = esper.bake(model)
    assert all(module.training is training for module in plain.modules())
    assert torch.equal(plain(INPUTS), model(INPUTS))
    gradients = []
    for which in (plain, model):
        which(INPUTS).square().sum().backward()
        gradients.append([parameter.grad for parameter in which.parameters()])
    assert all(map(torch.equal, *gradients))
    for module in plain.modules():
        assert not isinstance(module, esper.SeedSlot)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any("esper_slot" in name for name, _ in plain.named_modules())
    # The grown model is as it was, shares nothing, and can go on.
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in plain.parameters())
    esper.bake(model)


def test_modules_without_committed_seeds_keep_their_class_and_keys(grown: Any):
    model, slots = grown(Host(), {"layers.0": [], "layers.2": ["lora"]})
    slots["layers.0"].germinate("mlp")
    slots["layers.0"].advance(force=True)
    plain = esper.bake(model)
    kinds = [type(layer) for layer in plain.layers]
    assert kinds == [Layer, Layer, GrownModule, Layer]
    untouched = {name for name in Host().state_dict() if not name.startswith("layers.2")}
    assert untouched <= set(plain.state_dict())
    assert not any(name.startswith("layers.0.esper") for name in plain.state_dict())


@pytest.mark.parametrize("operator", list(BlendOperator))
def test_every_operator_is_baked(grown: Any, operator: BlendOperator):
    model, _ = grown(Host(), {"layers.1": [("mlp", {"blend_operator": operator})]})
    assert torch.equal(esper.bake(model)(INPUTS), model(INPUTS))


def test_a_slot_in_a_grown_module_and_one_behind_it(grown: Any):
    model, _ = grown(Host(), {"layers.0": ["lora"], "layers.0.linear": ["mlp"]})
    plain = esper.bake(model)
    assert torch.equal(plain(INPUTS), model(INPUTS))
    assert isinstance(plain.layers[0], GrownModule)
    assert isinstance(plain.layers[0].module.linear, GrownModule)


def test_a_chain_is_baked_at_its_last_child(grown: Any):
    chain = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    model, _ = grown(nn.Sequential(chain, nn.Tanh()), {"0": ["mlp"]})
    plain = esper.bake(model)
    assert torch.equal(plain(INPUTS), model(INPUTS))
    assert isinstance(plain.get_submodule("0.1.1"), GrownModule)


def test_a_baked_model_survives_copying_pickling_and_compiling(grown: Any):
    model, _ = grown(Host(), {"layers.1": ["mlp"]})
    plain = esper.bake(model)
    expected = plain(INPUTS)
    assert torch.equal(copy.deepcopy(plain)(INPUTS), expected)
    assert torch.equal(pickle.loads(pickle.dumps(plain))(INPUTS), expected)  # noqa: S301
    torch.compiler.reset()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(INPUTS), expected)
    again = esper.attach(plain, "layers.1", example=INPUTS)  # a plain module like any other
    assert again["layers.1"].stage is SeedStage.DORMANT
    assert torch.equal(plain(INPUTS), expected)


@pytest.mark.parametrize(
    "normalise", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_seeds_behind_a_module_that_tells_how_it_is_copied_are_copied_too(
    grown: Any, normalise: Callable[[nn.Module], nn.Module]
):
    model = nn.Sequential(normalise(nn.Linear(8, 8)), nn.Tanh()).eval()
    grown(model, {"0": ["mlp"]})
    copied = copy.deepcopy(esper.bake(model))
    assert isinstance(copied[0], GrownModule)
    assert torch.equal(copied(INPUTS), model(INPUTS))


def test_a_baked_model_has_nothing_of_what_carried_the_grown_ones_growth(grown: Any):
    """A framework's callback lets checkpoints carry it, and wrappers leave the seeds out."""
    model, slots = grown(Host(), {"layers.1": ["mlp"]})
    model._ddp_params_and_buffers_to_ignore = {"layers.0.linear.bias", "layers.1.linear.bias"}
    CarriedState(model, state=lambda: {"grown": 1}, load=lambda _: None)
    slots.keep_out_of_wrappers()
    plain = esper.bake(model)
    own = {"layers.0.linear.bias", "layers.1.module.linear.bias"}
    assert plain._ddp_params_and_buffers_to_ignore == own
    assert own < {name for name, _ in plain.named_parameters()}
    assert "esper_growth" in model.state_dict()
    pickle.dumps(plain)
    grown_model = weakref.ref(model)
    del model, slots
    gc.collect()
    assert grown_model() is None


def test_whoever_reads_weights_around_a_grown_module_is_stopped(grown: Any):
    """A transformer layer's fast path reads its attention's weights itself: no seed would run."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model, _ = grown(layer, {"self_attn": ["mlp"]})
    plain = esper.bake(model).eval()
    with (
        torch.no_grad(),
        pytest.raises(AttributeError, match=r"is a tensor .* read .module.in_proj_"),
    ):
        plain(INPUTS)
    assert hasattr(plain.self_attn, "num_heads")
    assert not hasattr(plain.self_attn, "no_such_thing")


@pytest.mark.parametrize(
    "child", ["dropout", "dropout1", "dropout2", "activation", "linear2", "norm2"]
)
def test_seeds_inside_a_transformer_layer_run_where_its_fast_path_would_pass_them_by(
    grown: Any, child: str
):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, batch_first=True, dropout=0.0, activation=nn.ReLU()
    )
    model, _ = grown(layer, {child: ["mlp"]})
    model.eval()
    plain = esper.bake(model)
    with torch.no_grad():
        assert torch.equal(plain(INPUTS), model(INPUTS))
    assert model.activation_relu_or_gelu == 1, "of the copy alone"


@pytest.mark.parametrize(
    ("target", "seeds"), [("layers.0", ["mlp"]), ("layers.0", []), ("layers.0.self_attn", [])]
)
def test_a_transformer_layer_rounds_as_it_did_with_a_slot_in_it(
    grown: Any, target: str, seeds: list[str]
):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model, _ = grown(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {target: seeds})
    model.eval()
    plain = esper.bake(model)
    mask = nn.Transformer.generate_square_subsequent_mask(INPUTS.shape[1])
    with torch.no_grad():
        assert torch.equal(plain(INPUTS, mask=mask), model(INPUTS, mask=mask))
    assert plain.layers[1].activation_relu_or_gelu == 1, "of the layer alone"


@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY])
def test_an_undecided_seed_in_the_forward_path_is_refused(grown: Any, grow: Any, stage: SeedStage):
    model, slots = grown(Host(), {"layers.0": []})
    grow(slots["layers.0"], "mlp", stage)
    told = rf"'layers.0' \({stage.name}\) hold living seeds.*advance\(force=True\) until it is FOS"
    with pytest.raises(ValueError, match=told):
        esper.bake(model)
    while slots["layers.0"].stage is not SeedStage.FOSSILIZED:
        slots["layers.0"].advance(force=True)
    esper.bake(model)


def test_what_cannot_be_baked_is_refused(grown: Any):
    with pytest.raises(ValueError, match="Linear has no slots"):
        esper.bake(nn.Linear(2, 2))
    model, _ = grown(Host(), {"layers.0": ["lora"]})
    with pytest.raises(RuntimeError, match="compiled"):
        esper.bake(torch.compile(model, backend="eager"))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, features: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(features)))


@pytest.mark.parametrize("bias", [True, False])
def test_lora_is_folded_into_the_linear_layer_in_front(grown: Any, bias: bool):
    model = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.Tanh(), nn.Linear(8, 4))
    keys = set(model.state_dict())
    model, _ = grown(model, {"0": ["lora", "lora_large"]})
    folded = esper.bake(model, fold=True)
    assert type(folded[0]) is nn.Linear
    assert set(folded.state_dict()) == keys
    torch.testing.assert_close(folded(INPUTS), model(INPUTS), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(folded[0].weight, model[0].weight)


def test_only_what_is_linear_and_alone_is_folded(grown: Any):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    gate = ("lora", {"blend_operator": "gate"})
    model, _ = grown(model, {"0": ["lora", "mlp", "lora"], "1": ["lora"], "2": [gate]})
    folded = esper.bake(model, fold=True)
    assert [len(module.branches) for module in folded] == [2, 1, 1]
    torch.testing.assert_close(folded(INPUTS), model(INPUTS), rtol=1e-5, atol=1e-5)
    tied, _ = grown(Tied(), {"first": ["lora"]})
    folded = esper.bake(tied, fold=True)
    assert isinstance(folded.first, GrownModule)
    assert folded.second.weight is folded.first.module.weight
    assert torch.equal(folded(INPUTS), tied(INPUTS))


def test_a_source_is_copied_without_slots_and_seeds(grown: Any, grow: Any):
    model, slots = grown(Host(), {"layers.0": ["mlp"], "layers.1": []})
    for source in ("layers.0", "layers.1"):
        before = model(INPUTS)
        grow(slots["layers.1"], "block", SeedStage.PROBATIONARY, source=source)
        copied = slots["layers.1"].seed.block
        assert set(copied.state_dict()) == {"linear.weight", "linear.bias"}
        assert torch.equal(copied.linear.weight, model.get_submodule(source).linear.weight)
        assert copied.linear.weight is not model.get_submodule(source).linear.weight
        assert torch.equal(model(INPUTS), before)
        nn.init.ones_(slots["layers.1"].seed.output_layers[0].weight)
        plain = Layer("tensor")
        plain.load_state_dict(copied.state_dict())
        features = slots["layers.1"].seed(INPUTS)
        assert torch.equal(features, INPUTS + (plain(INPUTS) - INPUTS))
        slots["layers.1"].commit()
    assert torch.equal(esper.bake(model)(INPUTS), model(INPUTS))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own exporter
@pytest.mark.parametrize("family", list(Family))
def test_a_baked_model_runs_in_onnx(family: Family, grow: Any, randomise: Any, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    if family is Family.CNN:
        model: nn.Module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        inputs, names = torch.randn(2, 3, 8, 8), ["norm", "attention", "conv_light", "block"]
    else:
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        inputs, names = INPUTS, ["lora", "attention", "mlp", "block"]
    slot = esper.attach(model, "0", example=inputs)["0"]
    for number, name in enumerate(names):
        grow(slot, name, SeedStage.FOSSILIZED)
        randomise(slot.branches[number], seed=number)
    plain = esper.bake(model).eval()
    file = tmp_path / "model.onnx"
    torch.onnx.export(plain, (inputs,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    expected = plain(inputs).detach()
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-3)


def test_hooks_of_the_user_keep_their_place_and_a_copy_has_none(grown: Any, grow: Any):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    calls: list[str] = []

    def first(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append("first")
        return output.tanh()

    def last(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        calls.append("last")
        return output.sigmoid()

    model[0].register_forward_hook(first)
    model, slots = grown(model, {"0": ["lora"], "1": []})
    model[0].register_forward_hook(last, with_kwargs=True, always_call=True)
    model[0].register_full_backward_hook(lambda *_: None)
    model[0].register_full_backward_pre_hook(lambda *_: None)
    grow(slots["1"], "block", SeedStage.FOSSILIZED, source="0")
    calls.clear()
    expected = model(INPUTS)
    assert calls == ["first", "last"]
    for fold in (False, True):
        plain = esper.bake(model, fold=fold)
        assert torch.equal(plain(INPUTS), expected)
        assert isinstance(plain[0], GrownModule)
        (always,) = plain[0]._forward_hooks_always_called
        assert plain[0]._forward_hooks[always] is last
    for part in slots["1"].branches.modules():
        assert not part._backward_hooks
        assert not part._backward_pre_hooks


def test_a_copy_follows_the_hosts_config_and_learns_though_the_host_is_frozen(grow: Any):
    class Configured(Layer):
        def __init__(self, config: Any) -> None:
            super().__init__("tensor")
            self.config = config

    config = {"attention": "eager"}
    model = nn.Sequential(Configured(config), Configured(config)).requires_grad_(False)
    slots = esper.attach(model, "1", example=INPUTS)
    slots["1"].germinate("block", source="0")
    assert slots["1"].seed.block.config is config
    assert all(parameter.requires_grad for parameter in slots["1"].seed.parameters())


@pytest.mark.parametrize("source", [nn.Linear(8, 1), nn.AdaptiveAvgPool1d(1)])
def test_a_source_that_only_broadcasts_is_refused(source: nn.Module):
    model = nn.Sequential(nn.Linear(8, 8), source)
    slots = esper.attach(model, "0", example=INPUTS)
    with pytest.raises(ValueError, match="it must keep the shape"):
        slots["0"].germinate("block", source="1")
    with pytest.raises(ValueError, match=f"must be the path of a module .*{type(source).__name__}"):
        slots["0"].germinate("block", source=source)


def test_a_slot_inside_a_grown_module_is_baked_and_detached(grown: Any):
    model, _ = grown(Host(), {"layers.0": ["lora"]})
    plain = esper.bake(model)
    again, _ = grown(plain, {"layers.0.module": ["mlp"]})
    assert torch.equal(esper.bake(again)(INPUTS), again(INPUTS))
    fresh = esper.bake(model)
    esper.attach(fresh, "layers.0.module", example=INPUTS)
    esper.detach(fresh)
    assert torch.equal(fresh(INPUTS), model(INPUTS))


class Part(nn.Sequential):
    """Runs its children itself."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.tanh(self[0](features))


def test_a_part_with_seeds_behind_itself_and_inside_is_baked(grown: Any):
    model, _ = grown(
        nn.Sequential(Part(nn.Linear(8, 8)), nn.Linear(8, 8)), {"0": ["mlp"], "0.0": ["lora"]}
    )
    model[0].register_forward_hook(lambda _module, _inputs, output: output * 2)
    model[0]._ddp_params_and_buffers_to_ignore = ["0.weight"]  # the user's
    plain = esper.bake(model[0])
    assert torch.equal(plain(INPUTS), model[0](INPUTS))
    assert plain._ddp_params_and_buffers_to_ignore == ["module.0.module.weight"]
    assert isinstance(plain, GrownModule)
    assert isinstance(plain.module[0], GrownModule)


def test_what_is_baked_in_inference_mode_can_learn(grown: Any):
    model, _ = grown(Host(), {"layers.0": ["mlp"]})
    with torch.inference_mode():
        plain = esper.bake(model)
    plain(INPUTS).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_a_pruned_linear_layer_is_not_folded(grown: Any):
    model = nn.Sequential(nn.Linear(8, 8))
    prune.random_unstructured(model[0], "weight", 0.5)
    model, _ = grown(model, {"0": ["lora"]})
    model(INPUTS)  # the weight that the hook computes is in a graph now
    assert isinstance(esper.bake(model, fold=True)[0], GrownModule)


class Keeping(nn.Module):
    """Keeps what it has computed, in a container."""

    def __init__(self, inner: nn.Module, kept: Any) -> None:
        super().__init__()
        self.inner, self.kept = inner, kept

    def forward(self, features: Tensor) -> Tensor:
        features = self.inner(features)
        self.kept["losses" if isinstance(self.kept, dict) else slice(None)] = [features.mean()]
        return features


@pytest.mark.parametrize("kept", [[], {}], ids=["list", "dict"])
def test_losses_that_a_host_has_collected_are_no_bar_to_baking(grown: Any, kept: Any):
    model, _ = grown(Keeping(nn.Linear(8, 8), kept), {"inner": ["lora"]})
    expected = model(INPUTS)
    plain = esper.bake(model)
    (loss,) = plain.kept["losses"] if isinstance(kept, dict) else plain.kept
    assert torch.equal(loss, expected.mean())
    assert loss.grad_fn is None
    assert torch.equal(plain(INPUTS), expected)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_an_input_that_a_host_keeps_is_no_bar_to_baking_with_a_graph_on_it(grown: Any):
    model, _ = grown(Keeping(nn.Linear(8, 8), []), {"inner": ["lora"]})
    model.input = INPUTS.clone().requires_grad_()
    model.input.output = model(model.input)
    model.input.output.square().sum().backward(create_graph=True)
    kept = esper.bake(model).input
    assert torch.equal(kept, model.input)
    assert torch.equal(kept.grad, model.input.grad)
    assert torch.equal(kept.output, model.input.output)
    assert kept.requires_grad
    assert kept.grad.grad_fn is kept.output.grad_fn is None


class Norm(nn.GroupNorm):
    """A GroupNorm of a library's own."""


class PreNorm(nn.Module):
    """A residual block that begins with its norm."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm, self.convolution = norm, nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.convolution(torch.relu(self.norm(maps)))


@pytest.mark.parametrize(("norm", "hooks"), [(nn.GroupNorm, 0), (Norm, 1)])
def test_a_baked_copy_of_a_block_with_group_norms_is_as_safe_as_the_grown_one_was(
    norm: type[nn.GroupNorm], hooks: int, grow: Any, monkeypatch: pytest.MonkeyPatch
):
    """torch's own would end the process here, on what a frozen stem gives in channels-last."""
    stem = nn.Conv2d(3, 8, 1).requires_grad_(requires_grad=False)
    model = nn.Sequential(stem, nn.Conv2d(8, 8, 1), PreNorm(norm(2, 8)))
    model.to(memory_format=torch.channels_last)
    maps = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    slots = esper.attach(model, "0", example=maps)
    grow(slots["0"], "block", SeedStage.FOSSILIZED, source="2")
    grown, plain = model(maps), esper.bake(model)
    assert sum(len(module._forward_pre_hooks) for module in plain.modules()) == hooks
    assert torch.equal(torch.export.export(plain, (maps,)).module()(maps), grown)
    safe, normalise = [], F.group_norm

    def watched(features: Tensor, *args: Any) -> Tensor:
        safe.append(features.is_contiguous() or features.requires_grad)
        return normalise(features, *args)

    monkeypatch.setattr(F, "group_norm", watched)
    for baked in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):  # noqa: S301
        output = baked(maps)
        assert safe.pop(0)
        assert safe.pop(0)
        assert torch.equal(output, grown)
        output.sum().backward()


def test_a_copy_grows_behind_a_grown_module_that_is_called_by_keyword(grown: Any):
    class Called(Host):
        def forward(self, features: Tensor) -> Tensor:
            for layer in self.layers:
                features = layer(features=features, scale=0.9)
            return features

    copied = ("block", {"source": "layers.0"})
    model, _ = grown(Called(["tensor"] * 2), {"layers.1": [copied]})
    again, _ = grown(esper.bake(model), {"layers.1": [copied]})
    assert torch.equal(esper.bake(again)(INPUTS), again(INPUTS))

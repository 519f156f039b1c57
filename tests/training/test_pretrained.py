"""Grown models on disk: whole or not at all, the same in a fresh process, refused if damaged."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import esper
from esper import SeedStage, SlotConfig
from esper.seeds import BlueprintError, Family, blueprints
from esper.seeds.transformer import MLPSeed
from esper.training import DamagedFolderError
from esper.training.sealed_folder import check_sealed, sealed_folder

INPUTS = torch.linspace(-1.0, 1.0, 3 * 5 * 8).reshape(3, 5, 8)
FILES = ("config.json", "manifest.json", "model.safetensors")


class Host(nn.Module):
    """Two layers and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.second.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, tokens: Tensor) -> Tensor:
        features = torch.tanh(self.first(tokens))
        return self.head(torch.tanh(self.second(features) * self.scale))


def grow_to(slot: esper.SeedSlot, stage: SeedStage) -> None:
    while slot.stage is not stage:
        slot.advance(force=True)


def grown_host() -> esper.SlotSet:
    """Return two grown slots; the second has two seeds, one of them a copy of a host's module."""
    torch.manual_seed(0)
    config = {"second": SlotConfig(max_committed=2, ramp_steps=7)}
    slots = esper.attach(Host(), ["first", "second"], example=INPUTS, config=config)
    orders = [("first", "lora", {"rank": 3}), ("second", "mlp", {"blend_operator": "gate"})]
    for path, blueprint, options in [*orders, ("second", "block", {"source": "first"})]:
        slots[path].germinate(blueprint, **options)
        grow_to(slots[path], SeedStage.FOSSILIZED)
    for parameter in slots.model.parameters():
        nn.init.normal_(parameter, std=0.5)
    slots.model.scale.fill_(3.0)
    return slots


@pytest.fixture
def saved(tmp_path: Path) -> tuple[esper.SlotSet, Path]:
    slots, folder = grown_host(), tmp_path / "models" / "grown"
    esper.save_pretrained(slots, folder)
    return slots, folder


def test_a_fresh_host_becomes_the_grown_model(saved: tuple[esper.SlotSet, Path]):
    slots, folder = saved
    assert sorted(file.name for file in folder.iterdir()) == list(FILES)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    host = Host()
    drawn = torch.get_rng_state()
    again = esper.from_pretrained(host, folder, example=INPUTS)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(before, drawn)
    assert torch.equal(host(INPUTS), slots.model(INPUTS))
    for path, slot in slots.items():
        assert again[path].committed == slot.committed
        assert again[path].config == slot.config
        assert again[path].stage is SeedStage.FOSSILIZED
    assert host.head.weight is host.second.weight
    assert torch.equal(esper.bake(host)(INPUTS), slots.model(INPUTS))


def test_a_loaded_model_grows_on(saved: tuple[esper.SlotSet, Path]):
    _, folder = saved
    host = Host()
    again = esper.from_pretrained(host, folder, example=INPUTS)
    optimizer = torch.optim.AdamW(host.parameters(), lr=0.01)
    again.bind(optimizer)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in host.parameters()}
    again.end_epoch()
    assert again["second"].stage is SeedStage.TERMINATED
    again["first"].germinate("mlp")
    grow_to(again["first"], SeedStage.TRAINING)
    host(INPUTS).square().sum().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in again["first"].seed.parameters())


def test_the_same_topology_in_a_fresh_process(saved: tuple[esper.SlotSet, Path]):
    slots, folder = saved
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, esper
from test_pretrained import INPUTS, Host
host = Host()
slots = esper.from_pretrained(host, {str(folder)!r}, example=INPUTS)
print({{path: [seed.blueprint for seed in slot.committed] for path, slot in slots.items()}})
print(host(INPUTS).detach().numpy().tobytes().hex())
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    topology, output = result.stdout.splitlines()
    assert topology == "{'first': ['lora'], 'second': ['mlp', 'block']}"
    assert output == slots.model(INPUTS).detach().numpy().tobytes().hex()


@pytest.mark.parametrize("name", FILES)
def test_any_changed_byte_is_refused(saved: tuple[esper.SlotSet, Path], name: str):
    _, folder = saved
    file = folder / name
    content = file.read_bytes()
    for position in range(0, len(content), 1 + len(content) // 400):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        file.write_bytes(changed)
        with pytest.raises(DamagedFolderError):
            check_sealed(folder)
    for size in (0, 1, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(DamagedFolderError):
            check_sealed(folder)
    host = Host()
    state = {key: value.clone() for key, value in host.state_dict().items()}
    with pytest.raises(DamagedFolderError):
        esper.from_pretrained(host, folder, example=INPUTS)
    file.unlink()
    with pytest.raises(DamagedFolderError, match=f"{name} is missing"):
        esper.from_pretrained(host, folder, example=INPUTS)
    assert host.state_dict().keys() == state.keys()
    assert all(torch.equal(host.state_dict()[key], value) for key, value in state.items())
    file.write_bytes(content)
    (folder / "README.md").write_text("what people add does not matter")
    esper.from_pretrained(host, folder, example=INPUTS)


def edit_config(folder: Path, edit: Callable[[dict], None]) -> Path:
    """Return a folder like the given one, sealed anew with another config."""
    target = folder.with_name("edited")
    with sealed_folder(target, overwrite=True) as writing:
        for name in ("config.json", "model.safetensors"):
            (writing / name).write_bytes((folder / name).read_bytes())
        config = json.loads((writing / "config.json").read_text())
        edit(config)
        (writing / "config.json").write_text(json.dumps(config))
    return target


def test_another_version_or_host_is_refused_and_the_host_left_alone(
    saved: tuple[esper.SlotSet, Path],
):
    _, folder = saved

    def refuse(error: type[Exception], match: str, where: Path, host: nn.Module) -> None:
        before = {key: value.clone() for key, value in host.state_dict().items()}
        with pytest.raises(error, match=match):
            esper.from_pretrained(host, where, example=INPUTS)
        assert host.state_dict().keys() == before.keys()
        assert all(torch.equal(host.state_dict()[key], value) for key, value in before.items())
        assert not any(module._forward_hooks for module in host.modules())

    newer = edit_config(folder, lambda config: config.update(format_version=2))
    refuse(ValueError, r"has format version 2; this esper reads version 1", newer, Host())
    odd = edit_config(folder, lambda config: config.update(colour="red"))
    refuse(DamagedFolderError, "colour", odd, Host())
    unknown = edit_config(
        folder, lambda config: config["slots"]["first"]["committed"][0].update(blueprint="lara")
    )
    refuse(BlueprintError, r"no blueprint 'lara' .* did you mean .*'lora'", unknown, Host())
    refuse(FileNotFoundError, "is no folder", folder / "nowhere", Host())
    other = Host()
    other.extra = nn.Linear(2, 2)
    refuse(ValueError, r"it lacks extra.weight, extra.bias and has nothing beyond", folder, other)
    refuse(ValueError, r"has no module 'first'", folder, nn.Sequential(nn.Linear(8, 8)))
    narrow = nn.Sequential()
    narrow.first, narrow.second = nn.Linear(8, 4), nn.Linear(4, 8)
    refuse(ValueError, r"'first' had dim 8, and has 4", folder, narrow)
    refuse(ValueError, r"float32, in this Host .*float64", folder, half_double())


def half_double() -> nn.Module:
    """Return the host with a buffer of another dtype than was saved."""
    host = Host()
    host.scale = host.scale.double()
    return host


def test_a_blueprint_that_builds_something_else_now_is_refused(tmp_path: Path):
    with blueprints.temporarily() as registry:
        hidden = [16]

        @registry.register("mine", family=Family.TRANSFORMER)
        def _mine(dim: int) -> esper.Seed:
            return MLPSeed(dim, hidden[0], checkpointing=False)

        slots = esper.attach(Host(), ["first"], example=INPUTS)
        slots["first"].germinate("mine")
        grow_to(slots["first"], SeedStage.FOSSILIZED)
        esper.save_pretrained(slots, tmp_path / "grown")
        hidden[0] = 24
        with pytest.raises(ValueError, match=r"'mine' builds \d+ parameters now, \d+ when"):
            esper.from_pretrained(Host(), tmp_path / "grown", example=INPUTS)


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path: Path):
    slots = grown_host()
    slots["first"].germinate("lora")
    esper.save_pretrained(slots, tmp_path / "learning")  # not in the forward path: left out
    loaded = esper.from_pretrained(Host(), tmp_path / "learning", example=INPUTS)
    assert loaded["first"].seed is None
    grow_to(slots["first"], SeedStage.BLENDING)
    with pytest.raises(
        ValueError, match=r"'first' \(BLENDING\) hold living .*before saving,.*until it"
    ):
        esper.save_pretrained(slots, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["learning"]


def test_a_living_seed_is_left_out_where_its_weights_have_other_names_than_its_path(
    tmp_path: Path,
):
    """As torch's wrapper for recomputing has them, which takes its own name out."""

    def host() -> nn.Module:
        return nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(8, 8), nn.Tanh())))

    path = "0._checkpoint_wrapped_module.0"
    slots = esper.attach(host(), path, example=INPUTS)
    for stage in (SeedStage.FOSSILIZED, SeedStage.GERMINATED):
        slots[path].germinate("lora")
        grow_to(slots[path], stage)
    esper.save_pretrained(slots, tmp_path / "grown")
    fresh = host()
    again = esper.from_pretrained(fresh, tmp_path / "grown", example=INPUTS)
    assert len(again[path].branches) == 1
    assert torch.equal(fresh(INPUTS), slots.model(INPUTS))


def test_a_folder_is_replaced_only_if_asked_and_kept_if_writing_fails(
    saved: tuple[esper.SlotSet, Path],
):
    slots, folder = saved
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FileExistsError, match=r"overwrite=True"):
        esper.save_pretrained(slots, folder)

    class PlannedError(RuntimeError):
        pass

    def fail_halfway() -> None:
        with sealed_folder(folder, overwrite=True) as writing:
            (writing / "half").write_text("written")
            raise PlannedError

    with pytest.raises(PlannedError):
        fail_halfway()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == kept
    slots.model.scale.fill_(5.0)
    esper.save_pretrained(slots, folder, overwrite=True)
    host = Host()
    esper.from_pretrained(host, folder, example=INPUTS)
    assert host.scale == 5.0
    assert [path.name for path in folder.parent.iterdir()] == ["grown"]


def test_a_slot_of_another_family_than_its_features_suggest_comes_back(tmp_path: Path):
    """Maps with features in the last dimension, as Swin has them."""
    images = torch.randn(2, 4, 4, 8)
    host = nn.Sequential(nn.Linear(8, 8))
    slots = esper.attach(host, "0", example=images, family={"0": "transformer"})
    slots["0"].germinate("mlp")
    grow_to(slots["0"], SeedStage.FOSSILIZED)
    esper.save_pretrained(slots, tmp_path / "grown")
    fresh = nn.Sequential(nn.Linear(8, 8))
    again = esper.from_pretrained(fresh, tmp_path / "grown", example=images)
    assert (again["0"].family, again["0"].dim) == (Family.TRANSFORMER, 8)
    assert torch.equal(fresh(images), host(images))
    with pytest.raises(ValueError, match="family names '1', which are no slots"):
        esper.attach(nn.Sequential(nn.Linear(8, 8)), "0", example=images, family={"1": "cnn"})


def test_weights_that_were_two_are_not_loaded_into_one(tmp_path: Path):
    torch.manual_seed(0)
    untied = Host()
    untied.head.weight = nn.Parameter(torch.randn(8, 8))
    slots = esper.attach(untied, "first", example=INPUTS)
    esper.save_pretrained(slots, tmp_path / "untied")
    with pytest.raises(ValueError, match=r"'head.weight' and 'second.weight' are one tensor"):
        esper.from_pretrained(Host(), tmp_path / "untied", example=INPUTS)


def test_views_strides_empty_and_odd_state_on_disk(tmp_path: Path):
    def host() -> Host:
        made = Host()
        whole = torch.randn(4, 8, 8)
        made.first.weight = nn.Parameter(whole[1].t())  # a view, not contiguous
        made.register_buffer("nothing", torch.empty(0))
        made.register_buffer("neither", torch.empty(0))
        return made

    slots = esper.attach(host(), "first", example=INPUTS)
    esper.save_pretrained(slots, tmp_path / "odd")
    fresh = host()
    esper.from_pretrained(fresh, tmp_path / "odd", example=INPUTS)
    assert torch.equal(fresh(INPUTS), slots.model(INPUTS))

    class Remembering(Host):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    slots = esper.attach(Remembering(), "first", example=INPUTS)
    with pytest.raises(TypeError, match=r"'_extra_state' in the state dict is a dict"):
        esper.save_pretrained(slots, tmp_path / "extra")

    slots = esper.attach(host(), "first", example=INPUTS)
    slots.model.register_buffer("edges", torch.eye(8).to_sparse())
    with pytest.raises(TypeError, match=r"'edges' in the state dict has the layout torch.sparse"):
        esper.save_pretrained(slots, tmp_path / "sparse")


def test_a_dtype_that_no_file_can_hold_is_refused(tmp_path: Path):
    slots = esper.attach(Host(), "first", example=INPUTS)
    slots.model.register_buffer("scales", torch.ones(3, dtype=torch.complex128))
    with pytest.raises(TypeError, match=r"'scales' in the state dict is of torch.complex128, wh"):
        esper.save_pretrained(slots, tmp_path / "scaled")


def test_only_saved_folders_are_replaced(
    saved: tuple[esper.SlotSet, Path], monkeypatch: pytest.MonkeyPatch
):
    slots, folder = saved
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    other = folder.with_name("thesis")
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    file = folder.with_name("file")
    file.write_text("a file")
    (folder / "notes.txt").write_text("mine")
    refusals = [(other, "not saved by"), (file, "not saved by"), (folder, "notes.txt")]
    for target, match in refusals:
        with pytest.raises(FileExistsError, match=match):
            esper.save_pretrained(slots, target, overwrite=True)
    assert (other / "thesis.txt").read_text() == "years of work"
    (folder / "notes.txt").unlink()

    rename = Path.rename

    def fail_second(path: Path, target: Path) -> Path:
        if target == folder and path.name.startswith(".grown") and fail_second.armed:
            fail_second.armed = False
            raise OSError("disk trouble")
        return rename(path, target)

    fail_second.armed = True
    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OSError, match="disk trouble"):
        esper.save_pretrained(slots, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_parameters_that_are_views_of_one_another_are_saved(tmp_path: Path) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 1)
            self.linear = nn.Linear(8, 8)
            self.linear.weight = nn.Parameter(self.conv.weight.view(8, 8))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.linear(torch.tanh(self.conv(tokens.transpose(1, 2)).transpose(1, 2)))

    torch.manual_seed(0)
    slots = esper.attach(Viewed(), "linear", example=INPUTS)
    slots["linear"].germinate("lora")
    grow_to(slots["linear"], SeedStage.FOSSILIZED)
    esper.save_pretrained(slots, tmp_path / "viewed")
    fresh = Viewed()
    esper.from_pretrained(fresh, tmp_path / "viewed", example=INPUTS)
    assert torch.equal(fresh(INPUTS), slots.model(INPUTS))


def test_a_host_that_refuses_the_weights_is_left_without_slots(
    saved: tuple[esper.SlotSet, Path],
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not these")

    host = Host()
    host.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="not these"):
        esper.from_pretrained(host, saved[1], example=INPUTS)
    assert not any(module._forward_hooks for module in host.modules())

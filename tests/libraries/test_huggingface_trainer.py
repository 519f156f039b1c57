"""A transformers model that grows: trained, interrupted and resumed by the library's Trainer."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.actions import Germinate, Prune
from esper.lifecycle.events import SeedFailed
from growth_problem import LENIENT, Recorder
from processes import kill_after, torchrun

transformers = pytest.importorskip("transformers", reason="needs esper-lite[hf]")
accelerate = pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")
from esper.training.huggingface import GrowthCallback  # noqa: E402 – only where it can be

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

EPOCHS = 10
STEPS_PER_EPOCH = 8


def plan() -> esper.Policy:
    """Two slots that commit in the other order than they stand in the model, and one prune."""
    first, second = "bert.encoder.layer.0", "bert.encoder.layer.1"
    return esper.PlannedPolicy(
        {
            1: [Germinate(slot=second, blueprint="block")],
            2: [Germinate(slot=first, blueprint="mlp")],
            7: [Germinate(slot=second, blueprint="lora")],
            9: [Prune(slot=second, reason="test")],
        },
        tend_seeds=True,
        patience_epochs=20,
    )


class Watch(transformers.TrainerCallback):
    def __init__(self, slots: esper.SlotSet) -> None:
        self.slots = slots
        self.losses: list[float] = []
        self.stages: set[SeedStage] = set()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stages |= {slot.stage for slot in self.slots.values()}


class Run:
    """Everything as a fresh process would make it."""

    def __init__(
        self,
        folder: Path,
        *,
        slot: dict[str, Any] | None = None,
        clip: float | None = 1.0,
        bound: bool = True,
        frozen: bool = False,
        **arguments: Any,
    ) -> None:
        transformers.set_seed(0)
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=8, num_labels=3,
        )  # fmt: skip
        self.model = transformers.BertForSequenceClassification(config)
        if frozen:
            self.model.requires_grad_(requires_grad=False)
            self.model.enable_input_require_grads()
        self.ids = ids = torch.randint(0, 20, (128, 8))
        self.data = [{"input_ids": row, "labels": row.sum() % 3} for row in ids]
        self.slots = esper.attach(
            self.model,
            "bert.encoder.layer.*",
            example={"input_ids": ids[:2]},
            config=SlotConfig(
                thresholds=LENIENT, ramp_steps=6, embargo_epochs=1, max_committed=3, **(slot or {})
            ),
        )
        settings = {
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "warmup_steps": 5,
            "max_grad_norm": 0,
            "data_seed": 0,
            "save_strategy": "steps",
            "save_steps": 4,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
            "report_to": [],
            "use_cpu": True,
            **arguments,
        }
        self.trainer = transformers.Trainer(
            self.model,
            transformers.TrainingArguments(output_dir=str(folder), **settings),
            train_dataset=self.data,
            eval_dataset=self.data[:32],
        )
        held_out = esper.HeldOut(
            self.model,
            [({"input_ids": ids[:64]}, torch.nn.functional.one_hot(ids[:64].sum(1) % 3).float())],
            loss=lambda out, target: mse_loss(out.logits, target, reduction="none").mean(1),
        )
        optimizer = (
            self.trainer.create_optimizer()
            if bound
            else torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        )
        self.recorder = Recorder()
        self.growth = esper.Growth(self.slots, optimizer, policy=plan(), sinks=[self.recorder])
        self.ema = esper.EMA(self.slots, decay=0.9)
        self.callback = GrowthCallback(
            self.growth, evaluate=held_out, max_gradient_norm=clip, ema=self.ema
        )
        self.watch = Watch(self.slots)
        self.trainer.add_callback(self.callback)
        self.trainer.add_callback(self.watch)

    def fit(self, checkpoint: Path | None = None) -> dict[str, Tensor]:
        self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        averages = {f"average of {n}": value.clone() for n, value in self.ema.averages().items()}
        weights = self.model.state_dict()
        weights.pop("esper_growth")
        return {**weights, **averages}


@pytest.mark.parametrize(
    ("slot", "accumulation"),
    [({}, 1), ({"isolation": "shadowing"}, 2)],
    ids=["live", "behind the host, accumulated"],
)
def test_every_checkpoint_goes_on_as_if_nothing_had_happened(
    slot: dict[str, Any], accumulation: int, tmp_path: Path
) -> None:
    settings = {
        "slot": slot,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 16 // accumulation,
    }
    whole = Run(tmp_path, **settings)
    wanted = whole.fit()
    assert {SeedStage.PROBATIONARY, SeedStage.FOSSILIZED} <= whole.watch.stages
    assert [len(slot.committed) for slot in whole.slots.values()] == [1, 1]
    last = EPOCHS * STEPS_PER_EPOCH
    for step in range(12, last, 8 if accumulation == 1 else 12):  # ends and middles of epochs
        again = Run(tmp_path / "again", **settings)
        torch.manual_seed(99)
        found = again.fit(tmp_path / f"checkpoint-{step}")
        assert again.watch.losses == whole.watch.losses[step:], step
        assert again.growth.train_losses == whole.growth.train_losses
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), step


def test_seeds_are_trained_groups_stay_and_schedulers_go_on(tmp_path: Path) -> None:
    """What goes wrong where groups are added later: LambdaLR raises, or nothing is trained."""
    run = Run(tmp_path, num_train_epochs=3)
    run.fit()
    optimizer = run.trainer.optimizer
    assert isinstance(run.trainer.lr_scheduler, torch.optim.lr_scheduler.LambdaLR)
    assert len(optimizer.param_groups) == 2 + len(run.slots)
    seed = run.slots["bert.encoder.layer.1"].living
    assert seed is not None
    assert all(float(optimizer.state[p]["exp_avg"].abs().sum()) > 0.0 for p in seed.parameters())
    assert run.growth.max_epochs == 3
    assert len(run.growth.train_losses) == 3


def test_adapters_grow_on_a_frozen_model_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = Run(tmp_path, frozen=True)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    before.pop("esper_growth")
    wanted = whole.fit()
    assert all(torch.equal(wanted[name], value) for name, value in before.items())
    assert [len(slot.committed) for slot in whole.slots.values()] == [1, 1]
    for step in (4, 44):  # before anything learns, and in the middle of a life
        again = Run(tmp_path / "again", frozen=True)
        found = again.fit(tmp_path / f"checkpoint-{step}")
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), step


def test_data_without_a_length_ends_its_epochs_with_a_decision(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield from run.data

    run = Run(tmp_path, max_steps=3 * STEPS_PER_EPOCH)
    run.trainer.train_dataset = Stream()
    run.fit()
    assert (run.growth.step, run.growth.epoch) == (24, 3)
    assert run.growth.max_epochs is None


def test_only_the_model_in_training_carries_what_has_grown(tmp_path: Path) -> None:
    run = Run(tmp_path, num_train_epochs=2)
    run.fit()
    copied = copy.deepcopy(run.model)
    assert "esper_growth" in run.model.state_dict()
    assert "esper_growth" not in copied.state_dict()
    copied.load_state_dict(run.model.state_dict())
    for slot in run.slots.values():
        if slot.in_forward_path:
            slot.prune()
    esper.save_pretrained(run.slots, tmp_path / "grown")
    fresh = Run(tmp_path / "fresh").model
    esper.detach(fresh)
    esper.from_pretrained(fresh, tmp_path / "grown", example={"input_ids": run.ids[:2]})


def test_a_later_callback_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    run = Run(tmp_path, num_train_epochs=3)
    run.fit()
    checkpoint = tmp_path / "checkpoint-12"
    run.slots.unbind()
    optimizer = torch.optim.AdamW(
        [{"params": list(group["params"])} for group in run.trainer.optimizer.param_groups[:2]]
    )
    growth = esper.Growth(run.slots, optimizer, policy=plan())
    GrowthCallback(growth, evaluate=run.callback._driver._evaluate, ema=esper.EMA(run.slots))
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    run.model.load_state_dict(weights, strict=False)
    assert (growth.step, run.growth.step) == (12, 24)


def test_seeds_that_are_left_at_the_end_are_told_once_and_by_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="living seeds") as warned:
        Run(tmp_path, num_train_epochs=3, save_strategy="no").fit()
    (told,) = [str(w.message) for w in warned if "living seeds" in str(w.message)]
    assert "'block' in 'bert.encoder.layer.1' (BLENDING)" in told
    assert "call slots[path].commit() to keep one that is PROBATIONARY" in told
    with warnings.catch_warnings(record=True) as later:
        Run(tmp_path, save_strategy="no").fit()
    assert not any("living seeds" in str(warning.message) for warning in later)


def test_a_further_training_goes_on_growing(tmp_path: Path) -> None:
    run = Run(tmp_path, num_train_epochs=3)
    run.fit()
    run.fit()
    assert (run.growth.step, run.growth.epoch, run.growth.max_epochs) == (48, 6, 6)


def test_the_best_network_is_loaded_at_the_end_with_what_it_had_grown(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        num_train_epochs=6,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        greater_is_better=True,  # the worst, and so an early one
        metric_for_best_model="loss",
    )
    run.fit()
    best = Path(run.trainer.state.best_model_checkpoint)
    weights = safetensors.torch.load_file(best / "model.safetensors")
    step = int(best.name.removeprefix("checkpoint-"))
    assert step < 6 * STEPS_PER_EPOCH
    assert run.growth.step == step
    found = run.model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in found if "esper_g" not in name)


@pytest.mark.parametrize("unscales", [False, True], ids=["5.0", "later"])
def test_scaled_gradients_are_clipped_at_their_own_size(
    unscales: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU accelerate has no scaler; later releases unscale where it knows of float16."""

    def change(scale: float) -> float:
        run = Run(tmp_path, max_steps=1, optim="sgd", warmup_steps=0, weight_decay=0.0, clip=0.01)
        accelerator = run.trainer.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        accelerator.native_amp = True
        if unscales:
            monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
        before = run.model.classifier.weight.detach().clone()
        run.fit()
        return float((run.model.classifier.weight.detach() - before).norm())

    assert change(64.0) == pytest.approx(change(1.0), rel=0.02)


def test_a_seed_that_raises_in_the_trainers_evaluation_is_gone_before_it_saves(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch")
    slot = run.slots["bert.encoder.layer.1"]

    def fail(module: Any, inputs: Any) -> None:
        if not module.training and len(inputs[0]) == 8:  # a batch of the Trainer's evaluation
            raise RuntimeError("seed broke")

    def spoil(*_: Any, **__: Any) -> None:
        if slot.living is not None:
            slot.living.register_forward_pre_hook(fail)

    run.watch.on_epoch_end = spoil
    run.fit()
    assert "seed broke" in run.recorder.of(SeedFailed)[0].error
    assert (tmp_path / "checkpoint-24").exists()


def test_batches_that_accelerate_has_prepared_are_gone_on_with() -> None:
    def made() -> esper.Trainer:
        torch.manual_seed(0)
        features = torch.randn(24, 4)
        data = torch.utils.data.TensorDataset(features, features.sum(1, keepdim=True))
        loader = torch.utils.data.DataLoader(data, 4, shuffle=True)
        host = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        slots = esper.attach(host, ["0"], example=features[:2])
        growth = esper.Growth(
            slots, torch.optim.SGD(host.parameters(), lr=0.1), policy=esper.PlannedPolicy({})
        )
        return esper.Trainer(
            growth,
            accelerate.Accelerator(cpu=True).prepare(loader),
            loss=mse_loss,
            evaluate=lambda: 1.0,
            config=esper.TrainerConfig(epochs=3),
            keeper=Keep(),
        )

    class Keep:
        states: ClassVar[dict[int, Any]] = {}

        def after_step(self, trainer: esper.Trainer) -> None:
            self.states.setdefault(trainer.growth.step, trainer.state_dict())

        def after_epoch(self, trainer: esper.Trainer) -> None:
            pass

    whole = made()
    wanted = whole.fit()
    for step in (6, 9):
        again = made()
        torch.manual_seed(99)
        again.load_state_dict(Keep.states[step])
        assert again.fit()[-1].train_loss == wanted[-1].train_loss, step


def others() -> dict[str, tuple[Callable[[Path], Run], str]]:
    def another_model(folder: Path) -> Run:
        run = Run(folder)
        run.trainer.model = run.trainer.model_wrapped = Run(folder).model
        return run

    def sharded(folder: Path) -> Run:
        run = Run(folder)
        run.trainer.args.deepspeed = "settings.json"
        return run

    def adapted(folder: Path) -> Run:
        run = Run(folder)
        run.model.peft_config = {"default": object()}
        return run

    return {
        "adapted": (adapted, "hold PEFT's adapters alone"),
        "sharded": (sharded, "does not know deepspeed"),
        "another optimizer": (lambda f: Run(f, bound=False), "would never train a seed"),
        "another model": (another_model, "trains another model"),
        "joint clipping": (
            lambda f: Run(f, slot={"isolation": "shadowing"}, max_grad_norm=1.0),
            "clips by one norm",
        ),
        "in shadow": (
            lambda f: Run(f, slot={"isolation": "shadowing", "objective": "shadow"}),
            "learn in shadow",
        ),
    }


@pytest.mark.parametrize("case", others())
def test_what_cannot_work_is_refused(case: str, tmp_path: Path) -> None:
    make, message = others()[case]
    with pytest.raises(ValueError, match=message):
        make(tmp_path).fit()


def test_weights_of_seeds_without_what_has_grown_are_refused(tmp_path: Path) -> None:
    Run(tmp_path, num_train_epochs=2).fit()
    file = tmp_path / "checkpoint-16" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    del weights["esper_growth"]
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="of a seed that is not here"):
        Run(tmp_path / "fresh").fit(file.parent)


def test_the_example_killed_and_run_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "huggingface_trainer.py"
    arguments = [str(example), "--epochs", "8"]
    whole = kill_after(None, [*arguments, "--folder", str(tmp_path / "whole")])
    assert "grown: {'transformer.h.0': ['block']" in whole
    folder = ["--folder", str(tmp_path / "killed")]
    kill_after("epoch   6", [*arguments, *folder])
    assert not (tmp_path / "killed" / "grown").exists()
    again = kill_after(None, [*arguments, *folder])
    assert "epoch   1 " not in again
    weights = "grown/model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (
        tmp_path / "killed" / weights
    ).read_bytes()


REPLICA = """
import os
import sys
from pathlib import Path

import torch
from test_huggingface_trainer import Run

folder = Path(sys.argv[1])
run = Run(folder, ddp_backend="gloo", per_device_train_batch_size=8)
weights = run.fit(folder / sys.argv[2] if len(sys.argv) > 2 else None)
assert run.slots.replication is not None
assert [len(slot.committed) for slot in run.slots.values()] == [1, 1]
flat = torch.cat([weight.flatten().float() for weight in weights.values()])
gathered = [torch.empty_like(flat) for _ in range(2)]
torch.distributed.all_gather(gathered, flat)
assert torch.equal(gathered[0], gathered[1])
if run.trainer.is_world_process_zero():
    print(f"digest {float(flat.double().abs().sum()):.17g}")
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # threads of gloo now and then abort a process that ends in the usual way
"""


def test_two_processes_stay_one_model_and_go_on(tmp_path: Path) -> None:
    script = tmp_path / "replica.py"
    script.write_text(REPLICA)

    def digest(*arguments: str) -> str:
        done = torchrun(script, str(tmp_path), *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split("digest ")[1].split()[0]

    whole = digest()
    assert digest("checkpoint-44") == whole

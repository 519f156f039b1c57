"""A LightningModule that grows: trained, interrupted and resumed by Lightning itself."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper import SeedStage, SlotConfig
from esper.lifecycle.actions import Germinate, Prune
from esper.lifecycle.events import SeedFailed
from esper.training.carried_state import FORMAT_VERSION
from growth_problem import LENIENT, LinearHost, Recorder, quadratic
from processes import kill_after, torchrun

pl = pytest.importorskip("lightning.pytorch", reason="needs esper-lite[lightning]")
from esper.training.lightning import GrowthCallback  # noqa: E402 – only where Lightning is

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own

EPOCHS = 12


class Module(pl.LightningModule):
    def __init__(self, schedule: Callable[[Any], Any], interval: str, dropout: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))  # trained, and not of the host
        self.host = nn.Sequential(LinearHost(), nn.Identity())
        self.schedule, self.interval = schedule, interval
        self.dropout = nn.Dropout(dropout)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features, targets = batch
        return mse_loss(self.host(self.dropout(features)) * self.scale, targets)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("validation", mse_loss(self.host(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = self.schedule(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]


class FrozenModule(Module):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.requires_grad_(requires_grad=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).requires_grad_()


def plan() -> esper.Policy:
    """Two slots that commit in the other order than they stand in the model, and one prune."""
    return esper.PlannedPolicy(
        {
            1: [Germinate(slot="0.head", blueprint="lora")],
            2: [Germinate(slot="0.embed", blueprint="lora")],
            8: [Germinate(slot="0.head", blueprint="lora")],
            10: [Prune(slot="0.head", reason="test")],
        },
        tend_seeds=True,
        patience_epochs=20,
    )


class Watch(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.stages: set[SeedStage] = set()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if "loss" in outputs:
            self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        slots = next(c.slots for c in trainer.callbacks if isinstance(c, GrowthCallback))
        self.stages |= {slot.stage for slot in slots.values()}


class Run:
    """Everything as a fresh process would make it."""

    def __init__(
        self,
        folder: Path,
        *,
        slot: dict[str, Any] | None = None,
        interval: str = "epoch",
        averaged: bool = True,
        dropout: float = 0.1,
        clip: float | None = 1.0,
        interval_steps: int | None = None,
        module: type[Module] = Module,
        **settings: Any,
    ) -> None:
        pl.seed_everything(0, verbose=False)
        schedule = {
            "epoch": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
            "step": lambda o: lr_scheduler.OneCycleLR(o, 2e-2, total_steps=400),
        }
        self.module = module(schedule[interval], interval, dropout)
        features = torch.randn(256, 4)
        data = TensorDataset(features, quadratic(features))
        self.data = DataLoader(data, batch_size=16, shuffle=True)
        self.validation = DataLoader(TensorDataset(features[:32], quadratic(features[:32])), 32)
        config = SlotConfig(
            thresholds=LENIENT, ramp_steps=8, embargo_epochs=1, max_committed=3, **(slot or {})
        )
        self.slots = esper.attach(
            self.module.host, ["0.embed", "0.head"], example=features[:2], config=config
        )
        held_out = esper.HeldOut(
            self.module.host,
            [(features[:64], quadratic(features[:64]))],
            loss=lambda out, target: mse_loss(out, target, reduction="none"),
        )
        self.recorder, self.watch = Recorder(), Watch()
        self.growth = GrowthCallback(
            self.slots,
            policy=plan(),
            evaluate=held_out,
            decision_interval_steps=interval_steps,
            max_gradient_norm=clip,
            ema=esper.EMA(self.slots, decay=0.9) if averaged else None,
            sinks=[self.recorder],
        )
        self.keep = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        self.trainer = pl.Trainer(
            **{
                "max_epochs": EPOCHS,
                "callbacks": [self.growth, self.watch, self.keep],
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **settings,
            }
        )

    def fit(self, checkpoint: Path | None = None) -> dict[str, Tensor]:
        self.trainer.fit(self.module, self.data, self.validation, ckpt_path=checkpoint)
        averages = {} if self.growth._ema is None else self.growth._ema.averages()
        averages = {f"average of {name}": value.clone() for name, value in averages.items()}
        weights = self.module.state_dict()
        weights.pop("esper_growth")
        return {**weights, **averages}


@pytest.mark.parametrize(
    ("slot", "interval", "accumulation"),
    [({}, "epoch", 1), ({"isolation": "shadowing"}, "step", 3)],
    ids=["live, LambdaLR", "behind the host, OneCycleLR, accumulated"],
)
def test_every_checkpoint_goes_on_as_if_nothing_had_happened(
    slot: dict[str, Any], interval: str, accumulation: int, tmp_path: Path
) -> None:
    settings = {"slot": slot, "interval": interval, "accumulate_grad_batches": accumulation}
    whole = Run(tmp_path, **settings)
    wanted = whole.fit()
    assert {SeedStage.BLENDING, SeedStage.PROBATIONARY, SeedStage.FOSSILIZED} <= whole.watch.stages
    assert [len(slot.committed) for slot in whole.slots.values()] == [1, 1]
    for epoch in range(1, EPOCHS - 1):
        again = Run(tmp_path / "again", **settings)
        torch.manual_seed(99)
        found = again.fit(tmp_path / f"epoch={epoch}.ckpt")
        assert again.watch.losses == whole.watch.losses[16 * (epoch + 1) :], epoch
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), epoch


def test_checkpoints_hold_nothing_that_could_run(tmp_path: Path) -> None:
    Run(tmp_path, max_epochs=4).fit()
    loaded = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    assert any("esper_slot.branches.0" in name for name in loaded["state_dict"])


def test_seeds_are_trained_and_groups_stay(tmp_path: Path) -> None:
    run = Run(tmp_path, max_epochs=3)
    run.fit()
    (seed,) = [slot.living for slot in run.slots.values() if slot.path == "0.head"]
    groups = run.trainer.optimizers[0].param_groups
    assert len(groups) == 1 + len(run.slots)
    assert seed is not None
    assert all(any(p is held for held in groups[2]["params"]) for p in seed.parameters())
    assert all(bool(run.trainer.optimizers[0].state[p]) for p in seed.parameters())
    assert any(float(p.abs().sum()) > 0.0 for p in list(seed.parameters())[1:])


def test_adapters_grow_on_a_frozen_model_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    settings = {"module": FrozenModule, "dropout": 0.0}
    whole = Run(tmp_path, **settings)
    before = {name: value.clone() for name, value in whole.module.state_dict().items()}
    wanted = whole.fit()
    assert all(torch.equal(wanted[name], value) for name, value in before.items())
    assert [len(slot.committed) for slot in whole.slots.values()] == [1, 1]
    for epoch in (0, 5):  # before anything learns, and in the middle of a life
        again = Run(tmp_path / "again", **settings)
        found = again.fit(tmp_path / f"epoch={epoch}.ckpt")
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), epoch


@pytest.mark.parametrize("accumulation", [1, 3])
def test_metrics_of_decisions_are_logged_and_the_policy_knows_the_losses(
    accumulation: int, tmp_path: Path
) -> None:
    """Of 16 batches an epoch the last one is a step of its own where three make one."""
    run = Run(tmp_path, max_epochs=3, accumulate_grad_batches=accumulation)
    run.fit()
    assert run.growth.growth is not None
    assert float(run.trainer.callback_metrics["held_out/loss"]) == pytest.approx(
        run.growth.growth.losses[-1]
    )
    losses = [accumulation * loss for loss in run.watch.losses]  # Lightning divides them
    means = [sum(losses[start : start + 16]) / 16 for start in (0, 16, 32)]
    assert run.growth.growth.train_losses == pytest.approx(means)
    assert len(run.recorder.metrics) == 3


@pytest.mark.parametrize(
    ("settings", "decisions"),
    [
        ({"max_epochs": 3}, 3),
        ({"max_epochs": 2, "max_steps": 90}, 2),
        ({"max_epochs": 100, "max_steps": 40}, 3),
        ({"max_steps": 32}, 2),
        ({"max_steps": 12, "accumulate_grad_batches": 3}, 2),
        ({"max_steps": 10, "limit_train_batches": 4}, 3),
    ],
)
def test_the_policy_knows_how_many_decisions_come(
    settings: dict[str, Any], decisions: int, tmp_path: Path
) -> None:
    run = Run(tmp_path, **{"max_epochs": None, **settings})
    run.fit()
    assert run.growth.growth is not None
    assert run.growth.growth.max_epochs == run.growth.growth.epoch == decisions


@pytest.mark.parametrize(
    ("interval", "settings", "decisions"),
    [
        (None, {"max_steps": 40}, None),
        (None, {"max_epochs": 2, "max_steps": 40}, 2),
        (8, {"max_epochs": 2}, None),
        (8, {"max_steps": 40}, 5),
    ],
)
def test_data_without_a_length_has_as_many_decisions_as_can_be_known(
    interval: int | None, settings: dict[str, Any], decisions: int | None, tmp_path: Path
) -> None:
    run = Run(tmp_path, interval_steps=interval, **{"max_epochs": None, **settings})

    data = run.data.dataset

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield from data

    run.data = DataLoader(Stream(), batch_size=16)
    run.fit()
    assert run.growth.growth is not None
    assert run.growth.growth.max_epochs == decisions
    assert run.growth.growth.epoch > 0


def test_optimization_by_hand_with_several_steps_a_batch_and_none_at_the_end(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, max_epochs=3)

    def training_step(batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = run.module.optimizers()
        for _ in range(0 if batch_idx == 15 else 2):
            optimizer.zero_grad()
            loss = mse_loss(run.module.host(batch[0]), batch[1])
            run.module.manual_backward(loss)
            optimizer.step()
        return torch.zeros(())

    run.module.automatic_optimization = False
    run.module.training_step = training_step
    averages: dict[str, Tensor] = {}

    def average(*_: Any) -> None:
        for name, weight in run.module.host.named_parameters():
            known = averages.setdefault(name, weight.detach().clone())
            averages[name] = known.lerp(weight.detach(), 0.1)

    configure = run.module.configure_optimizers

    def configured() -> Any:
        optimizers, schedulers = configure()
        optimizers[0].register_step_post_hook(average)
        return optimizers, schedulers

    run.module.configure_optimizers = configured
    averages |= {name: w.detach().clone() for name, w in run.module.host.named_parameters()}
    run.growth.max_gradient_norm = None
    run.fit()
    assert run.growth.growth is not None
    assert (run.growth.growth.step, run.growth.growth.epoch) == (90, 3)
    assert run.growth._ema is not None
    for name, value in run.growth._ema.averages().items():
        torch.testing.assert_close(value, averages[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_further_fit_goes_on_growing_and_its_checkpoint_can_be_resumed(tmp_path: Path) -> None:
    run = Run(tmp_path, max_epochs=4)
    run.fit()
    assert run.growth.growth is not None
    run.trainer.fit_loop.max_epochs = 6
    run.fit()
    assert (run.growth.growth.epoch, run.growth.growth.max_epochs) == (6, 6)
    run.trainer.save_checkpoint(tmp_path / "by hand.ckpt")
    again = Run(tmp_path / "again", max_epochs=6)
    found = again.fit(tmp_path / "by hand.ckpt")
    kept = run.module.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in found.items() if name in kept)
    assert [len(slot.branches) for slot in again.slots.values()] == [1, 1]


def test_seeds_that_are_left_at_the_end_are_told_once_and_by_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="living seeds") as warned:
        Run(tmp_path, max_epochs=4).fit()
    (told,) = [str(w.message) for w in warned if "living seeds" in str(w.message)]
    assert "'lora' in '0.embed' (SHADOWING), 'lora' in '0.head' (PROBATIONARY)" in told
    assert "call slots[path].commit() to keep one that is PROBATIONARY" in told
    with warnings.catch_warnings(record=True) as later:
        Run(tmp_path).fit()
    assert not any("living seeds" in str(warning.message) for warning in later)


@pytest.mark.parametrize("let_go", ["detach", "unbind"])
def test_a_network_that_grows_no_more_is_saved_without_what_it_has_grown(
    let_go: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, max_epochs=1)
    run.fit()
    if let_go == "detach":
        esper.detach(run.module.host)
    else:
        run.slots.unbind()
    assert "esper_growth" not in run.module.state_dict()


def test_a_seed_that_raises_in_validation_is_gone_before_lightning_saves(tmp_path: Path) -> None:
    run = Run(tmp_path, max_epochs=4)
    slot = run.slots["0.head"]

    def fail(module: Any, inputs: Any) -> None:
        if not module.training and len(inputs[0]) == 32:  # a batch of Lightning's validation
            raise RuntimeError("seed broke")

    def spoil(*_: Any) -> None:
        if slot.living is not None:
            slot.living.register_forward_pre_hook(fail)

    run.watch.on_validation_start = spoil
    run.fit()
    (failed,) = run.recorder.of(SeedFailed)
    assert "seed broke" in failed.error
    assert (tmp_path / "epoch=3.ckpt").exists()


def test_clipping_takes_in_what_lies_outside_of_the_host(tmp_path: Path) -> None:
    run = Run(tmp_path, max_epochs=1, clip=1e-12)
    run.module.configure_optimizers = lambda: torch.optim.SGD(run.module.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in run.module.named_parameters()}
    run.fit()
    for name, value in before.items():
        now = run.module.get_parameter(name)
        torch.testing.assert_close(now, value, rtol=0.0, atol=1e-9, msg=name)


def test_a_fresh_process_tests_the_grown_network(tmp_path: Path) -> None:
    whole = Run(tmp_path, max_epochs=6)
    whole.fit()
    fresh = Run(tmp_path)
    whole_loss = whole.trainer.validate(whole.module, whole.validation, verbose=False)
    loss = fresh.trainer.validate(
        fresh.module, fresh.validation, ckpt_path=tmp_path / "epoch=5.ckpt", verbose=False
    )
    assert loss == whole_loss
    assert [len(slot.branches) for slot in fresh.slots.values()] == [
        len(slot.branches) for slot in whole.slots.values()
    ]


def refusals() -> dict[str, tuple[Callable[[Run], Any], str]]:
    def two_optimizers(run: Run) -> None:
        parameters = list(run.module.parameters())
        run.module.automatic_optimization = False
        run.module.configure_optimizers = lambda: [
            torch.optim.SGD(parameters[:1], 0.1),
            torch.optim.SGD(parameters[1:], 0.1),
        ]

    def averaged(run: Run) -> None:
        run.trainer.callbacks.append(pl.callbacks.StochasticWeightAveraging(1e-2))

    return {
        "two optimizers": (two_optimizers, "one optimizer and at most one"),
        "an average by position": (averaged, "StochasticWeightAveraging pairs weights"),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_cannot_work_is_refused(case: str, tmp_path: Path) -> None:
    change, message = refusals()[case]
    run = Run(tmp_path)
    change(run)
    with pytest.raises((ValueError, TypeError), match=message):
        run.fit()


@pytest.mark.parametrize(
    ("slot", "settings", "message"),
    [
        ({"isolation": "shadowing"}, {"gradient_clip_val": 1.0}, "clips by one norm"),
        ({"isolation": "shadowing", "objective": "shadow"}, {}, "learn in shadow"),
    ],
)
def test_loops_that_seeds_cannot_stand_are_refused(
    slot: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, slot=slot, **settings).fit()


def test_weights_that_cannot_be_built_are_refused(tmp_path: Path) -> None:
    Run(tmp_path, max_epochs=4).fit()
    checkpoint = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    carried = checkpoint["state_dict"].pop("esper_growth")

    def fit(kept: Tensor | None) -> None:
        weights = dict(checkpoint["state_dict"])
        if kept is not None:
            weights["esper_growth"] = kept
        torch.save({**checkpoint, "state_dict": weights}, tmp_path / "changed.ckpt")
        Run(tmp_path / "fresh").fit(tmp_path / "changed.ckpt")

    with pytest.raises(ValueError, match="of a seed that is not here"):
        fit(None)
    with pytest.raises(ValueError, match="holds no state"):
        fit(carried[:100])
    here, newer = FORMAT_VERSION, FORMAT_VERSION + 1
    told = carried.numpy().tobytes()
    changed = told.replace(b'version":%d' % here, b'version":%d' % newer)
    with pytest.raises(ValueError, match=f"version {newer}; this esper reads version {here}"):
        fit(torch.frombuffer(bytearray(changed), dtype=torch.uint8))


def test_the_example_killed_and_run_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "lightning_digits.py"
    arguments = [str(example), "--epochs", "9"]
    whole = kill_after(None, [*arguments, "--folder", str(tmp_path / "whole")])
    assert "grown: {'0': ['conv_heavy']" in whole
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
from test_lightning import Run

folder = Path(sys.argv[1])
run = Run(folder, strategy="ddp", devices=2, max_epochs=12, dropout=0.0, clip=None)
weights = run.fit(folder / sys.argv[2] if len(sys.argv) > 2 else None)
assert [len(slot.committed) for slot in run.slots.values()] == [1, 1]
flat = torch.cat([weight.flatten().float() for weight in weights.values()])
gathered = run.trainer.strategy.all_gather(flat)
assert torch.equal(gathered[0], gathered[1])
if run.trainer.is_global_zero:
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
    assert digest("epoch=8.ckpt") == whole

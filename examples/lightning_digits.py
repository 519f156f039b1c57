"""Grow a CNN on handwritten digits with Lightning's Trainer, and go on where it was interrupted.

    python examples/lightning_digits.py --folder /tmp/digits  # half a minute on a CPU

Kill it, even with `kill -9`, and run the same line again: it goes on from its last epoch, and ends
with the same weights as a run that was never interrupted. Nothing is downloaded: the digits come
with scikit-learn. Needs `pip install 'esper-lite[lightning,data]'`.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.training.lightning import GrowthCallback


class Digits(pl.LightningModule):
    """A small CNN, as anyone would write it."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.network = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(12, 10),
        )  # fmt: skip

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        right = (self.network(images).argmax(dim=1) == labels).float().mean()
        self.log("accuracy", right, batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.97**epoch)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Story(pl.Callback):
    """Prints a line per epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: f"{float(value):.4f}" for name, value in trainer.callback_metrics.items()}
        slots = next(c.slots for c in trainer.callbacks if isinstance(c, GrowthCallback))
        stages = " ".join(f"{path}:{slot.stage.name}" for path, slot in slots.items())
        print(f"epoch {trainer.current_epoch + 1:3}  {metrics}  {stages}", flush=True)


def main(folder: Path, epochs: int) -> None:
    pl.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.tensor(digits.target)
    train = DataLoader(TensorDataset(images[:1200], labels[:1200]), batch_size=32, shuffle=True)
    validation = DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=99)

    module = Digits(epochs)
    slots = esper.attach(module.network, ["0", "3"], example=images[:2])
    held_out = esper.HeldOut(
        module.network,
        [(images[1200:1500], labels[1200:1500])],
        loss=lambda output, target: cross_entropy(output, target, reduction="none"),
    )
    growth = GrowthCallback(
        slots,
        policy=esper.HeuristicPolicy(
            esper.HeuristicConfig(
                blueprints=("conv_heavy", "conv_light"), warmup_epochs=2, plateau_fraction=1.0
            )
        ),
        evaluate=held_out,
        max_gradient_norm=1.0,  # clips host and seeds each on their own
        ema=esper.EMA(slots, decay=0.99),
    )
    last = ModelCheckpoint(folder, filename="{epoch}", save_last=True, save_top_k=1)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[growth, Story(), last],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    checkpoint = folder / "last.ckpt"
    trainer.fit(module, train, validation, ckpt_path=checkpoint if checkpoint.exists() else None)

    for slot in slots.values():
        if slot.in_forward_path:  # still on trial when the run ended
            slot.prune()
    grown = {path: [seed.blueprint for seed in slot.committed] for path, slot in slots.items()}
    esper.save_pretrained(slots, folder / "grown", overwrite=True)
    print(f"grown: {grown}; held-out loss {held_out()['loss']:.6f}; saved to {folder / 'grown'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of checkpoints and the result")
    parser.add_argument("--epochs", type=int, default=16, help="of the whole run")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.epochs)

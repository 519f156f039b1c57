"""Grow a ViT of timm on handwritten digits, with copies of its own blocks.

    python examples/timm_vit.py               # a minute on a laptop's CPU
    python examples/timm_vit.py --epochs 2

Needs scikit-learn and timm, which needs a torchvision that works beside your torch.
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import esper
from esper.lifecycle.actions import Germinate


def main(epochs: int) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(labels)).split([1400, len(labels) - 1400])
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10,
        embed_dim=48, depth=2, num_heads=4,
    )  # fmt: skip
    slots = esper.attach(model, "blocks.*", example=images[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # One more block behind each, copied from the host's own, after two epochs.
    copies = [Germinate(slot=path, blueprint="block", options={"source": path}) for path in slots]
    growth = esper.Growth(slots, optimizer, policy=esper.PlannedPolicy({2: copies}))
    trainer = esper.Trainer(
        growth,
        batches=list(zip(images[train].split(50), labels[train].split(50), strict=True)),
        loss=cross_entropy,
        evaluate=esper.HeldOut(
            model,
            [(images[test], labels[test])],
            loss=lambda output, target: cross_entropy(output, target, reduction="none"),
            metrics={"accuracy": lambda output, target: (output.argmax(1) == target).float()},
        ),
        config=esper.TrainerConfig(epochs=epochs),
    )
    for report in trainer.run():
        stages = " ".join(f"{path}:{slot.stage.name}" for path, slot in slots.items())
        print(f"epoch {report.epoch:3}  accuracy {report.metrics['accuracy']:.3f}  {stages}")
    for slot in slots.values():
        if slot.in_forward_path:
            slot.prune()
    model.eval()
    plain = esper.bake(model)
    print("same output as a plain module:", torch.equal(plain(images[test]), model(images[test])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data")
    main(parser.parse_args().epochs)

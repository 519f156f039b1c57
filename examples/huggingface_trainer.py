"""Grow a GPT-2-style decoder with the Trainer of transformers, and go on where it was interrupted.

    python examples/huggingface_trainer.py --folder /tmp/gpt  # a minute on a CPU

Kill it, even with `kill -9`, and run the same line again: it goes on from its last epoch, and ends
with the same weights as a run that was never interrupted. Nothing is downloaded: the model comes
from a small random config, the text from the standard library. Needs
`pip install 'esper-lite[hf]'`.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import esper
from esper.lifecycle.gates import GateThresholds
from esper.training.huggingface import GrowthCallback

CONTEXT = 64


class Windows(Dataset):
    """Windows of text; the labels are the same tokens, which the model shifts by itself."""

    def __init__(self, data: torch.Tensor, number: int) -> None:
        starts = torch.randint(len(data) - CONTEXT, (number, 1))
        self.tokens = data[starts + torch.arange(CONTEXT)].long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Story(TrainerCallback):
    """Prints a line per epoch."""

    def __init__(self, growth: esper.Growth) -> None:
        self.growth = growth

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        stages = " ".join(f"{p}:{slot.stage.name}" for p, slot in self.growth.slots.items())
        print(f"epoch {state.epoch:3.0f}  loss {self.growth.losses[-1]:.4f}  {stages}", flush=True)


def text() -> torch.Tensor:
    """Return the sources of the standard library's top level as bytes."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)


def last_whole_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint, but for one that a killed process did not finish."""
    whole = folder.glob("checkpoint-*/trainer_state.json")  # the Trainer writes this file last
    newest = max(whole, key=lambda file: int(file.parent.name.split("-")[1]), default=None)
    return None if newest is None else str(newest.parent)


def main(folder: Path, epochs: int) -> None:
    set_seed(0)
    data = text()
    split = int(0.9 * len(data))
    train, held_out_windows = Windows(data[:split], 800), Windows(data[split:], 64)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4,
            bos_token_id=0, eos_token_id=None, pad_token_id=0, use_cache=False,
        )
    )  # fmt: skip
    example = {"input_ids": held_out_windows.tokens[:2]}
    thresholds = GateThresholds(
        min_contribution_fraction=0.001, min_over_linear_fraction=None, standard_errors=1.0
    )
    config = esper.SlotConfig(thresholds=thresholds)
    slots = esper.attach(model, "transformer.h.*", example=example, config=config)

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            weight_decay=0.01,
            save_strategy="epoch",
            save_total_limit=2,
            max_grad_norm=0,  # the callback clips host and seeds each on their own
            disable_tqdm=True,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=train,
    )
    growth = esper.Growth(
        slots,
        trainer.create_optimizer(),  # before its scheduler, which counts parameter groups
        policy=esper.HeuristicPolicy(
            esper.HeuristicConfig(blueprints=("block",), warmup_epochs=2, plateau_fraction=1.0)
        ),
    )
    held_out = esper.HeldOut(
        model,
        [({"input_ids": held_out_windows.tokens}, held_out_windows.tokens)],
        loss=lambda output, target: cross_entropy(
            output.logits[:, :-1].transpose(1, 2), target[:, 1:], reduction="none"
        ).mean(dim=1),
    )
    ema = esper.EMA(slots, decay=0.99)
    trainer.add_callback(GrowthCallback(growth, evaluate=held_out, max_gradient_norm=1.0, ema=ema))
    trainer.add_callback(Story(growth))
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))

    for slot in slots.values():
        if slot.in_forward_path:  # still on trial when the run ended
            slot.prune()
    grown = {path: [seed.blueprint for seed in slot.committed] for path, slot in slots.items()}
    esper.save_pretrained(slots, folder / "grown", overwrite=True)
    print(f"grown: {grown}; held-out loss {held_out()['loss']:.6f}; saved to {folder / 'grown'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of checkpoints and the result")
    parser.add_argument("--epochs", type=int, default=10, help="of the whole run")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.epochs)

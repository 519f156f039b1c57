"""Grow a GPT-2-style decoder of transformers on Python's own sources, from 2 blocks upward.

    python examples/huggingface_decoder.py            # a minute or two on a laptop's CPU
    python examples/huggingface_decoder.py --steps 60

Nothing is downloaded: the model comes from a small random config, the text from the standard
library. Needs `pip install 'esper-lite[hf]'`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

import esper
from esper.lifecycle.gates import GateThresholds

CONTEXT, BATCH, DECIDE_EVERY = 64, 16, 25


def text() -> torch.Tensor:
    """Return the sources of the standard library's top level as bytes."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)


def windows(data: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """Return random windows of the text, shape `number CONTEXT + 1`."""
    starts = torch.randint(len(data) - CONTEXT - 1, (number, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT + 1)].long()


def main(steps: int) -> None:
    torch.manual_seed(0)
    data, generator = text(), torch.Generator().manual_seed(0)
    split = int(0.9 * len(data))
    config = GPT2Config(
        vocab_size=256, n_positions=2 * CONTEXT, n_embd=64, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=None, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    held_out_windows = windows(data[split:], 64, generator)
    example = {"input_ids": held_out_windows[:2, :-1]}
    slots = esper.attach(
        model,
        "transformer.h.*",
        example=example,
        config=esper.SlotConfig(
            thresholds=GateThresholds(
                min_contribution_fraction=0.001, min_over_linear_fraction=None, standard_errors=1.0
            )
        ),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    policy = esper.HeuristicPolicy(
        esper.HeuristicConfig(blueprints=("block",), warmup_epochs=2, plateau_fraction=1.0)
    )
    growth = esper.Growth(slots, optimizer, policy=policy)
    held_out = esper.HeldOut(
        model,
        [({"input_ids": held_out_windows[:, :-1]}, held_out_windows[:, 1:])],
        loss=lambda output, target: cross_entropy(
            output.logits.transpose(1, 2), target, reduction="none"
        ).mean(dim=1),
    )
    for step in range(1, steps + 1):
        model.train()
        batch = windows(data[:split], BATCH, generator)
        logits = model(input_ids=batch[:, :-1]).logits
        cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        slots.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        growth.after_step()
        if step % DECIDE_EVERY == 0:
            loss = growth.after_epoch(held_out)["loss"]
            stages = " ".join(f"{path}:{slot.stage.name}" for path, slot in slots.items())
            print(f"step {step:5}  held-out loss {loss:.3f}  {stages}")

    for slot in slots.values():
        if slot.in_forward_path:  # still on trial when the run ended
            slot.prune()
    model.eval()
    plain = esper.bake(model)
    prompt = torch.frombuffer(bytearray(b"def main("), dtype=torch.uint8).long()[None]
    written = plain.generate(prompt, max_new_tokens=40, do_sample=False, use_cache=False)
    # What attends keeps no key-value cache, hence use_cache=False.
    print(f"\n{bytes(written[0].tolist()).decode(errors='replace')}\n")

    folder = Path(tempfile.mkdtemp()) / "grown"
    esper.save_pretrained(slots, folder)
    fresh = GPT2LMHeadModel(config).eval()
    esper.from_pretrained(fresh, folder, example=example)
    same = torch.equal(fresh(**example).logits, model(**example).logits)
    grown = {path: [seed.blueprint for seed in slot.committed] for path, slot in slots.items()}
    print(f"grown: {grown}; saved to {folder} and loaded again, same output: {same}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    main(parser.parse_args().steps)

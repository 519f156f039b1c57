"""A decoder that lacks attention, on sequences that need it.

Legend: B batch, T tokens, D width, V symbols.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.slots.modes import forked_random_state
from esper.tasks.task import TaskSetup
from esper.training.held_out import HeldOut

SYMBOLS = 8
TOKENS = 12
WIDTH = 16
TRAIN_SEQUENCES = 1024
HELD_OUT_SEQUENCES = 512
BATCH_SEQUENCES = 64


class TinyDecoder(nn.Module):
    """Embedding, one perceptron per token, head: the last symbol is all that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.positions = nn.Embedding(TOKENS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `B T V` for symbols `B T`."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        features = self.mix(self.embedding(tokens) + self.positions(places))
        return self.head(self.norm(features + self.perceptron(features)))


class Batches:
    """Sequences in a new order every epoch."""

    def __init__(self, sequences: Tensor, random_seed: int) -> None:
        self._sequences = sequences
        self._generator = torch.Generator().manual_seed(random_seed)

    def __len__(self) -> int:
        return len(self._sequences) // BATCH_SEQUENCES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._sequences), generator=self._generator)
        for indices in order.split(BATCH_SEQUENCES):
            yield self._sequences[indices, :-1], self._sequences[indices, 1:]


def decoder_setup(random_seed: int) -> TaskSetup:
    """Return a fresh decoder and a chain in which each symbol depends on the last two."""
    generator = torch.Generator().manual_seed(random_seed)
    table = F.softmax(3.0 * torch.randn(SYMBOLS, SYMBOLS, SYMBOLS, generator=generator), dim=-1)
    count = TRAIN_SEQUENCES + 2 * HELD_OUT_SEQUENCES
    sequences = torch.randint(0, SYMBOLS, (count, TOKENS + 1), generator=generator)
    for place in range(2, TOKENS + 1):
        chances = table[sequences[:, place - 2], sequences[:, place - 1]]
        sequences[:, place] = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    train, validation, test = sequences.split(
        [TRAIN_SEQUENCES, HELD_OUT_SEQUENCES, HELD_OUT_SEQUENCES]
    )
    with forked_random_state(torch.device("cpu")):
        torch.manual_seed(random_seed)
        model = TinyDecoder()

    def held_out(split: Tensor) -> HeldOut:
        return HeldOut(model, [(split[:, :-1], split[:, 1:])], loss=_sequence_losses)

    return TaskSetup(
        model=model,
        targets=("mix",),
        example=train[:2, :-1],
        batches=Batches(train, random_seed),
        loss=lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        validation=held_out(validation),
        test=held_out(test),
    )


def _sequence_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)

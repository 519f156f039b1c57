"""A decoder small enough to want more layers.

Legend: B batch, T tokens, D width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_BYTES = 256
_EMBEDDING_STD = 0.05
_LOGIT_STD = 0.16
"""Of a fresh host, whatever its width."""


class TextHost(nn.Module):
    """Pre-norm causal transformer over bytes, with learned positions.

    A fresh host gives every byte nearly the same probability, 8 bits per byte: the head is small,
    and each block is the identity, since what it writes into the residual stream is zero.

    Source: GPT-2 (Radford et al. 2019), without weight tying and dropout. Its initialisation, all
    weights of standard deviation 0.02, is made for widths around 1000: at 64 it ends 0.3 bits per
    byte higher after 800 steps of 16 windows.

    Args:
        context: Longest input in bytes.
    """

    def __init__(
        self, *, width: int = 64, depth: int = 2, num_heads: int = 4, context: int = 128
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_BYTES, bias=False)
        self._initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of each next byte, shape `B T 256`, for bytes of shape `B T`."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        features: Tensor = self.embedding(tokens) + self.positions(places)
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.head(self.norm(features))
        return logits

    def _initialise(self) -> None:
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=_EMBEDDING_STD)
        nn.init.normal_(self.head.weight, std=_LOGIT_STD * self.head.in_features**-0.5)


class DecoderBlock(nn.Module):
    """Causal self-attention and a GELU perceptron, each on normalised features, each added."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        for reader in (self.project, self.expand):
            nn.init.normal_(reader.weight, std=width**-0.5)
        for layer in (self.project, self.mix, self.expand, self.contract):
            nn.init.zeros_(layer.bias)
        for writer in (self.mix, self.contract):
            nn.init.zeros_(writer.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape `B T D`."""
        features = features + self._attend(self.attention_norm(features))
        hidden = F.gelu(self.expand(self.mlp_norm(features)))
        output: Tensor = features + self.contract(hidden)
        return output

    def _attend(self, features: Tensor) -> Tensor:
        batch, tokens, width = features.shape
        heads = (batch, tokens, self.num_heads, width // self.num_heads)
        query, key, value = (
            part.view(heads).transpose(1, 2) for part in self.project(features).chunk(3, dim=-1)
        )  # each B H T D/H
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.mix(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return output

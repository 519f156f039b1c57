"""The network that says what to do, for any number of slots and blueprints.

Legend: N batch, S slots, K blueprints, D width, R run features, E features of a slot and its place.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from esper.lifecycle.record import Record
from esper.policies.learned.action_coder import SLOT_OPERATIONS, ActionChoices, Head, head_sizes
from esper.policies.learned.features import RUN_FEATURES, SLOT_FEATURES
from esper.policies.learned.joint_distribution import SLOT_HEADS, HeadLogits

NUM_RUN_FEATURES = len(RUN_FEATURES)
NUM_SLOT_FEATURES = len(SLOT_FEATURES) + 1
"""Each slot's place follows its features."""

_UNKNOWN = 0
"""Number of every name that was not met in training."""
_LAST_GAIN = 0.01
"""Of the weights of a last layer, so that the first policy is nearly uniform over what is legal."""
_NUM_GATES, _FORGET_GATE = 4, 1
"""Of torch's LSTM: input, forget, cell, output."""

Memory = tuple[Tensor, Tensor]
"""Hidden and cell state of the LSTM, each of shape `1 N D`."""


class NetworkConfig(Record):
    """How large a network is."""

    width: Annotated[int, Field(ge=1)] = 64
    """Of every layer, and of the memory."""
    num_attention_heads: Annotated[int, Field(ge=1)] = 4

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.num_attention_heads:
            raise ValueError(
                f"width {self.width} is no multiple of {self.num_attention_heads} attention heads"
            )
        return self


class SeenHost(NamedTuple):
    """The parts of an observation."""

    run: Tensor
    """Shape `N R`."""
    slots: Tensor
    """Shape `N S E`."""
    sizes: Tensor
    """Of each pair of slot and blueprint; shape `N S K`."""
    fits: Tensor
    """Whether it fits; bool, shape `N S K`."""


def split_features(observation: Tensor, num_slots: int, num_blueprints: int) -> SeenHost:
    """Return the parts of what `features` returned.

    Args:
        observation: Shape `N R + S E + 2 S K`, as it was returned: whether a blueprint fits is read
            off it, so it is not to be normalised. It is within [-1, 1] anyway.
        num_slots: S.
        num_blueprints: K.

    Raises:
        ValueError: It has another width.
    """
    num_pairs = num_slots * num_blueprints
    parts = [NUM_RUN_FEATURES, num_slots * NUM_SLOT_FEATURES, num_pairs, num_pairs]
    if observation.shape[-1] != sum(parts):
        raise ValueError(
            f"an observation of {num_slots} slots and {num_blueprints} blueprints has "
            f"{sum(parts)} features, and this one has {observation.shape[-1]}"
        )
    run, slots, sizes, fits = observation.split(parts, dim=-1)
    pairs = (num_slots, num_blueprints)
    return SeenHost(
        run=run,
        slots=slots.unflatten(-1, (num_slots, NUM_SLOT_FEATURES)),
        sizes=sizes.unflatten(-1, pairs),
        fits=fits.unflatten(-1, pairs) > 0.5,
    )


class HostEncoder(nn.Module):
    """Turns what is seen into one token per slot, which knows of the others, and a summary."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.run = _two_layers(NUM_RUN_FEATURES, width)
        self.slot = _two_layers(NUM_SLOT_FEATURES, width)
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.summary = nn.Sequential(_hidden(2 * width, width), nn.Tanh())

    def forward(self, seen: SeenHost) -> tuple[Tensor, Tensor]:
        """Return the summary, `N D`, and the tokens, `N S D`."""
        alone = self.slot(seen.slots)
        of_others, _ = self.attention(alone, alone, alone, need_weights=False)
        tokens = self.norm(alone + of_others)
        summary = self.summary(torch.cat([self.run(seen.run), tokens.mean(dim=1)], dim=1))
        return summary, tokens


class ActionHeads(nn.Module):
    """Turns what is remembered and the slots' tokens into the logits of every head.

    A blueprint's logit is the dot product of a query, of the slot, and a key: what its size says
    plus what its name says. A name that was not met in training says nothing, so that its size is
    what remains.
    """

    def __init__(self, config: NetworkConfig, choices: ActionChoices, num_names: int) -> None:
        super().__init__()
        width = config.width
        sizes = head_sizes(1, 1, choices)
        self.wait = _last(width, 1)
        self.asked = _two_layers(2 * width, width)
        self.operations = _last(width, len(SLOT_OPERATIONS))
        self.query = _last(width, width)
        self.size_key = nn.Sequential(
            nn.Linear(1, width),
            nn.Tanh(),
            nn.Linear(width, width, bias=False),  # it would shift all logits of a slot alike
        )
        self.name_key = nn.Embedding(1 + num_names, width, padding_idx=_UNKNOWN)
        self.others = nn.ModuleDict(
            {
                head.name.lower(): _last(width, sizes[head])
                for head in SLOT_HEADS
                if head is not Head.BLUEPRINT
            }
        )

    def forward(self, latent: Tensor, tokens: Tensor, sizes: Tensor, names: Tensor) -> HeadLogits:
        """Return the logits.

        Args:
            latent: What is remembered, the present included; shape `N D`.
            tokens: Shape `N S D`.
            sizes: Of each pair of slot and blueprint; shape `N S K`.
            names: Numbers of the blueprints' names; long, shape `K`.
        """
        num_slots = tokens.shape[1]
        of_run = latent[:, None].expand(-1, num_slots, -1)
        asked = self.asked(torch.cat([of_run, tokens], dim=2))
        keys = self.size_key(sizes[..., None]) + self.name_key(names)  # N S K D
        query = self.query(asked) / keys.shape[-1] ** 0.5
        blueprints = (keys @ query[..., None]).squeeze(-1)
        others = {Head[name.upper()]: layer(asked) for name, layer in self.others.items()}
        return HeadLogits(
            operation=torch.cat([self.wait(latent), self.operations(asked).flatten(1)], dim=1),
            of_slots={Head.BLUEPRINT: blueprints, **others},
        )


class GrowthNetwork(nn.Module):
    """Sees a growing host, remembers what it saw, and says what to do.

    Nothing in it depends on how many slots or blueprints there are. Slots are a set, and are seen
    through attention among them. The alternative is one long vector with room for a largest number
    of slots, the rest padded: then a host with more cannot be grown, weights of places that
    training never filled are noise, and what is learned of one slot says nothing about the next.
    With attention the same weights serve every slot, and the order of the slots changes nothing but
    the order of the answers; where a slot lies in the host is a feature of it.

    Args:
        blueprints: Names met in training, in the order of their embeddings.
        choices: What the heads offer.
        config: How large it is.

    Raises:
        ValueError: A name is given twice.

    Source: attention over a set without positions (Vaswani et al. 2017; Lee et al. 2019, "Set
        Transformer"); scoring choices by the product of a query and their keys is that of pointer
        networks (Vinyals et al. 2015).
    """

    def __init__(
        self,
        blueprints: Sequence[str],
        choices: ActionChoices | None = None,
        config: NetworkConfig | None = None,
    ) -> None:
        super().__init__()
        twice = sorted({name for name in blueprints if list(blueprints).count(name) > 1})
        if twice:
            raise ValueError(f"blueprints are named twice: {', '.join(twice)}")
        self.blueprints = tuple(blueprints)
        self.choices = choices or ActionChoices()
        self.config = config or NetworkConfig()
        width = self.config.width
        self.encoder = HostEncoder(self.config)
        self.lstm = nn.LSTM(width, width)
        start_lstm(self.lstm)
        self.heads = ActionHeads(self.config, self.choices, len(self.blueprints))

    @classmethod
    def of_weights(
        cls,
        weights: Mapping[str, Tensor],
        blueprints: Sequence[str],
        choices: ActionChoices,
        config: NetworkConfig,
    ) -> Self:
        """Return a network to decide with, which uses these very tensors.

        Raises:
            RuntimeError: They are of another network; as `load_state_dict`.

        Effects:
            None on torch's random stream, unlike the constructor's.
        """
        with torch.device("meta"):
            network = cls(blueprints, choices, config)
        network.load_state_dict(weights, assign=True)
        return network.eval()

    def name_numbers(self, blueprints: Sequence[str]) -> Tensor:
        """Return the number of each name, the same one for all that are not known; long, `K`."""
        known = {name: 1 + index for index, name in enumerate(self.blueprints)}
        return torch.tensor(
            [known.get(name, _UNKNOWN) for name in blueprints],
            device=self.heads.name_key.weight.device,
        )

    def nothing_remembered(self, num_rows: int = 1) -> Memory:
        """Return the memory at the start of a run."""
        zeros = self.heads.name_key.weight.new_zeros(1, num_rows, self.config.width)
        return zeros, zeros

    def forward(self, seen: SeenHost, names: Tensor, memory: Memory) -> tuple[HeadLogits, Memory]:
        """Return what to do now, and what to remember.

        Args:
            seen: Of N runs on hosts of the same size.
            names: From `name_numbers`, in the order of the blueprints in `seen`.
            memory: After the decision before this one.
        """
        summary, tokens = self.encoder(seen)
        latent, memory = self.lstm(summary[None], memory)
        return self.heads(latent[0], tokens, seen.sizes, names), memory


def start_lstm(lstm: nn.LSTM) -> None:
    """Give an LSTM first weights with which it keeps what it has seen, in place.

    Each gate's weights are orthogonal, and the forget gates' biases 1.

    Source: Saxe et al. 2014 for orthogonal weights, of the other hidden layers too; Jozefowicz et
        al. 2015 for the bias. To keep a cue over six decisions was learned in 12,000 steps from 4
        random seeds of 4; with torch's usual weights in 24,000 from 2 of 4 (tests/cued_growth.py
        with longer episodes).
    """
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight"):
            for gate in parameter.detach().chunk(_NUM_GATES):
                nn.init.orthogonal_(gate)
        else:
            nn.init.zeros_(parameter)
            if name.startswith("bias_ih"):
                nn.init.ones_(parameter.detach().chunk(_NUM_GATES)[_FORGET_GATE])


def _two_layers(num_inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(_hidden(num_inputs, width), nn.Tanh(), _hidden(width, width), nn.Tanh())


def _hidden(num_inputs: int, num_outputs: int) -> nn.Linear:
    layer = nn.Linear(num_inputs, num_outputs)
    nn.init.orthogonal_(layer.weight, gain=2.0**0.5)
    nn.init.zeros_(layer.bias)
    return layer


def _last(num_inputs: int, num_outputs: int) -> nn.Linear:
    layer = nn.Linear(num_inputs, num_outputs)
    nn.init.orthogonal_(layer.weight, gain=_LAST_GAIN)
    nn.init.zeros_(layer.bias)
    return layer

"""The policy network as the library's recurrent PPO trains it.

Legend: N batch, S slots, K blueprints, C choices of the operation head, D width of the network.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from esper.policies.learned import (
    NUM_RUN_FEATURES,
    NUM_SLOT_FEATURES,
    SLOT_OPERATIONS,
    ActionChoices,
    ActionHeads,
    GrowthNetwork,
    Head,
    HostEncoder,
    JointDistribution,
    NetworkConfig,
    head_sizes,
    split_features,
    start_lstm,
)

OBSERVATION, ACTION_MASK = "obs", "action_mask"
"""Keys of the observation: what `features` returned, and `ActionCoder.masks`, joined."""


class HostSize(NamedTuple):
    """How many slots there are, and how many blueprints."""

    num_slots: int
    num_blueprints: int

    @property
    def num_operations(self) -> int:
        """C."""
        return 1 + len(SLOT_OPERATIONS) * self.num_slots

    @property
    def num_features(self) -> int:
        """Of one observation."""
        pairs = 2 * self.num_slots * self.num_blueprints
        return NUM_RUN_FEATURES + NUM_SLOT_FEATURES * self.num_slots + pairs


class LatentParts(MlpExtractor):
    """What the library has between LSTM and heads, without layers.

    Out of `_process_sequence` comes the LSTM's latent with the slots' part behind it. The actor's
    heads take both, the critic the latent only.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, [], nn.Identity)
        self.width = width

    def forward_critic(self, features: Tensor) -> Tensor:
        return features[:, : self.width]


class HostFeatures(BaseFeaturesExtractor):
    """The encoder, as the library calls it: one flat row per observation.

    Its first D numbers are the summary, which the LSTM takes (so `features_dim` is D); tokens,
    sizes, fits and the operations' mask follow, which go past the LSTM.
    """

    def __init__(
        self, observation_space: spaces.Dict, *, size: HostSize, config: NetworkConfig
    ) -> None:
        super().__init__(observation_space, features_dim=config.width)
        self.size = size
        self.encoder = HostEncoder(config)

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        observation = observations[OBSERVATION]
        seen = split_features(observation, *self.size)
        summary, tokens = self.encoder(seen)
        legal = observations[ACTION_MASK][:, : self.size.num_operations].clone()
        # The library pads sequences with rows of zeros, and leaves them out of every mean. WAIT is
        # made legal there, as a row without anything legal is refused.
        padding = ~(observation.any(dim=1) | observations[ACTION_MASK].any(dim=1))
        legal[:, 0] = torch.where(padding, 1.0, legal[:, 0])
        pairs = [seen.sizes.flatten(1), seen.fits.flatten(1).to(summary.dtype)]
        return torch.cat([summary, tokens.flatten(1), *pairs, legal], dim=1)


class ActionDistribution(Distribution):
    """A joint distribution, as the library calls it."""

    def __init__(self, joint: JointDistribution) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.joint = joint

    def log_prob(self, actions: Tensor) -> Tensor:
        return self.joint.log_prob(actions)

    def entropy(self) -> Tensor:
        return self.joint.entropy()

    def sample(self) -> Tensor:
        return self.joint.sample()

    def mode(self) -> Tensor:
        return self.joint.mode()

    # What the library's own policies make their distributions with; this one comes complete.

    def proba_distribution_net(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError(_COMPLETE)

    def proba_distribution(self, *args: Any, **kwargs: Any) -> Self:
        raise NotImplementedError(_COMPLETE)

    def actions_from_params(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError(_COMPLETE)

    def log_prob_from_params(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(_COMPLETE)


_COMPLETE = "MaskedRecurrentPolicy makes this distribution complete, from its ActionHeads"


class MaskedRecurrentPolicy(RecurrentActorCriticPolicy):
    """The growth network for `sb3_contrib.RecurrentPPO`, unchanged otherwise.

    The critic has an LSTM of its own, beside the shared encoder. If it shared the actor's, the
    library would keep the value's gradient from both, and what is worth remembering would have to
    be found by policy gradients alone: a cue was learned to be kept over six decisions from 1
    random seed of 4 then, and from all 4 with two LSTMs (12,000 steps, tests/cued_growth.py with
    longer episodes). It is of no use once training is over, and is not exported.

    Args:
        observation_space: A Dict of `obs`, a Box as wide as what `features` returns and not
            normalised by a wrapper, as `split_features` says; and `action_mask`, a Box or
            MultiBinary as long as all heads together.
        action_space: MultiDiscrete, of `ActionCoder.sizes`.
        lr_schedule: As in the library.
        blueprints: Names, in the order of the blueprint head.
        choices: What the heads offer.
        network: How large the network is.
        use_sde: Is passed by the library, and has to be False.
        optimizer_class: As in the library.
        optimizer_kwargs: As in the library.

    Raises:
        ValueError: The spaces are others than these blueprints and choices make, or a name is given
            twice.
        TypeError: The action space is no MultiDiscrete.
    """

    features_extractor: HostFeatures
    names: Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        blueprints: Sequence[str],
        choices: ActionChoices | None = None,
        network: NetworkConfig | None = None,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if use_sde:
            raise ValueError("use_sde explores continuous actions; here all are discrete")
        self.blueprints = tuple(blueprints)
        self.choices = choices or ActionChoices()
        self.network_config = network or NetworkConfig()
        self.size = _host_size(observation_space, action_space, self.blueprints, self.choices)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=HostFeatures,
            features_extractor_kwargs={"size": self.size, "config": self.network_config},
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            lstm_hidden_size=self.network_config.width,
        )
        assert self.lstm_critic is not None
        for lstm in (self.lstm_actor, self.lstm_critic):
            start_lstm(lstm)
        self.register_buffer("names", self.actor().name_numbers(self.blueprints), persistent=False)

    def actor(self) -> GrowthNetwork:
        """Return a copy of what decides, for `save_policy`; it is on the CPU.

        Effects:
            None on torch's random stream.
        """
        parts = {
            "encoder": self.features_extractor.encoder,
            "lstm": self.lstm_actor,
            "heads": self.action_net,
        }
        weights = {
            f"{part}.{name}": weight.detach().to("cpu", copy=True)
            for part, module in parts.items()
            for name, weight in module.state_dict().items()
        }
        return GrowthNetwork.of_weights(weights, self.blueprints, self.choices, self.network_config)

    def _build(self, lr_schedule: Schedule) -> None:
        """Make what follows the LSTM; the library's initial weights are not used."""
        width = self.network_config.width
        self.mlp_extractor = LatentParts(width)
        self.action_net = ActionHeads(self.network_config, self.choices, len(self.blueprints))
        self.value_net = nn.Linear(width, 1)

    @staticmethod
    def _process_sequence(
        features: Tensor,
        lstm_states: tuple[Tensor, Tensor],
        episode_starts: Tensor,
        lstm: nn.LSTM,
    ) -> tuple[Tensor, Tensor]:
        """Take the summary through the LSTM, and the slots' part past it."""
        latent, memory = RecurrentActorCriticPolicy._process_sequence(  # noqa: SLF001 - our base
            features[:, : lstm.input_size], lstm_states, episode_starts, lstm
        )
        return torch.cat([latent, features[:, lstm.input_size :]], dim=1), memory

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> ActionDistribution:
        width = self.network_config.width
        pairs = tuple(self.size)
        num_pairs = self.size.num_slots * self.size.num_blueprints
        parts = [width, width * pairs[0], num_pairs, num_pairs, self.size.num_operations]
        latent, tokens, sizes, fits, legal = latent_pi.split(parts, dim=1)
        logits = self.action_net(
            latent, tokens.unflatten(1, (-1, width)), sizes.unflatten(1, pairs), self.names
        )
        fits = fits.unflatten(1, pairs) > 0.5
        return ActionDistribution(JointDistribution(logits, legal=legal > 0.5, fits=fits))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "blueprints": self.blueprints,
            "choices": self.choices,
            "network": self.network_config,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


def _host_size(
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    blueprints: Sequence[str],
    choices: ActionChoices,
) -> HostSize:
    """Return the size of the host that the spaces are of.

    Raises:
        TypeError: The action space is no MultiDiscrete.
        ValueError: They are not what blueprints and choices make for any number of slots.
    """
    if not isinstance(action_space, spaces.MultiDiscrete):
        raise TypeError(f"the action space should be a MultiDiscrete, and is {action_space}")
    sizes = [int(size) for size in action_space.nvec]
    size = HostSize((sizes[Head.OPERATION] - 1) // len(SLOT_OPERATIONS), len(blueprints))
    expected = head_sizes(*size, choices)
    if size.num_slots < 1 or sizes != expected:
        raise ValueError(
            f"the action space has the sizes {sizes}; {len(blueprints)} blueprints and these "
            f"choices make {expected} for {size.num_slots} slots, in the order of Head"
        )
    shapes = {OBSERVATION: (size.num_features,), ACTION_MASK: (sum(sizes),)}
    found = (
        {key: space.shape for key, space in observation_space.spaces.items()}
        if isinstance(observation_space, spaces.Dict)
        else observation_space
    )
    if found != shapes:
        raise ValueError(
            f"the observation space should be a Dict of the shapes {shapes} for {size.num_slots} "
            f"slots and {size.num_blueprints} blueprints, and is of {found}"
        )
    return size

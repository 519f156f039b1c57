"""The policy that was learned from runs that others decided about."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from esper.lifecycle.actions import Action, GrowthState
from esper.policies.learned.action_coder import ActionCoder, Head
from esper.policies.learned.features import WatchedLoss, features
from esper.policies.learned.joint_distribution import JointDistribution
from esper.policies.learned.network import split_features
from esper.policies.learned.policy_file import SavedPolicy, load_policy
from esper.policies.tending import asked_to_be_weighed


class LearnedPolicy:
    """Takes one legal action per decision, as a network says that remembers the run.

    It decides on any host that has slots and blueprints, also of names and sizes that it has not
    met in training. It computes on the CPU, and leaves torch's own random stream alone.

    Args:
        saved: From `load_policy`.
        deterministic: Take the likeliest action, rather than draw one.
        random_seed: Fixes what is drawn.
    """

    name = "learned"

    def __init__(
        self, saved: SavedPolicy, *, deterministic: bool = True, random_seed: int = 0
    ) -> None:
        self.trained_on = saved.trained_on
        """What was written about its training, for people."""
        self._network = saved.network
        self._observation = saved.observation
        self._sha256 = saved.sha256
        self._deterministic = deterministic
        self._random = torch.Generator().manual_seed(random_seed)
        self._memory = saved.network.nothing_remembered()

    @classmethod
    def load(cls, path: str | Path, *, deterministic: bool = True, random_seed: int = 0) -> Self:
        """Return the policy in a file.

        Args:
            path: Written by `save_policy`.
            deterministic: Take the likeliest action, rather than draw one.
            random_seed: Fixes what is drawn.

        Raises:
            PolicyFileError: As `load_policy`.
        """
        return cls(load_policy(path), deterministic=deterministic, random_seed=random_seed)

    @property
    def reads_losses(self) -> bool:
        """Whether it decides by the held-out loss, whose evaluation is a cost of growing then."""
        return self._observation.loss is WatchedLoss.HELD_OUT

    def weighs(self, state: GrowthState) -> Sequence[str]:
        """Return every slot whose next gate may ask."""
        return asked_to_be_weighed(state)

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return one legal action.

        Raises:
            ValueError: There is no slot, no blueprint with parameters fits any, or the state does
                not tell the run's length, the host's size or the loss that it was trained to watch.
        """
        coder = ActionCoder.of(state, self._network.choices)
        numbers = self._numbers(state, coder)
        return [coder.decode(numbers, state)]

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers, where its random stream stands, and which file it is of."""
        hidden, cell = self._memory
        return {
            "sha256": self._sha256,
            "hidden": hidden.clone(),
            "cell": cell.clone(),
            "random": self._random.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: The state is of a policy from another file, whose memory means other things.
        """
        if state["sha256"] != self._sha256:
            raise ValueError(
                f"the state is of the learned policy with SHA-256 {state['sha256']}, and this one "
                f"has {self._sha256}; go on with the file that the run began with"
            )
        self._memory = _copied(state["hidden"]), _copied(state["cell"])
        self._random.set_state(state["random"].cpu())

    def _numbers(self, state: GrowthState, coder: ActionCoder) -> list[int]:
        num_slots, num_blueprints = len(coder.slots), len(coder.blueprints)
        values = features(state, coder, self._observation)
        observation = torch.tensor([values], dtype=torch.float32, device=_CPU)
        legal = torch.tensor([coder.masks(state)[Head.OPERATION]], device=_CPU)
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            seen = split_features(observation, num_slots, num_blueprints)
            names = self._network.name_numbers(coder.blueprints)
            logits, self._memory = self._network(seen, names, self._memory)
            likely = JointDistribution(logits, legal=legal, fits=seen.fits)
            chosen = likely.mode() if self._deterministic else likely.sample(self._random)
        return [int(number) for number in chosen[0].tolist()]


_CPU = torch.device("cpu")


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_CPU, copy=True)

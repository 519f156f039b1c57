"""A small environment of the shape of growing; other processes import this module."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from esper.lifecycle import Operation
from esper.policies.learned import (
    NUM_RUN_FEATURES,
    NUM_SLOT_FEATURES,
    SLOT_OPERATIONS,
    ActionChoices,
    Head,
    head_sizes,
)

NUM_SLOTS = 2
BLUEPRINTS = ("large", "medium", "small")
SIZES = head_sizes(NUM_SLOTS, len(BLUEPRINTS), ActionChoices())
NUM_PAIRS = NUM_SLOTS * len(BLUEPRINTS)
NUM_FEATURES = NUM_RUN_FEATURES + NUM_SLOTS * NUM_SLOT_FEATURES + 2 * NUM_PAIRS
EPISODE_STEPS = 3
BEST_RETURN, BEST_MEMORYLESS_RETURN = 3.0, 1.5


class CuedGrowth(gymnasium.Env):
    """A cue of one bit is seen at first; what is asked for twice afterwards has to agree with it.

    At first one can only wait. Then a seed may germinate: the slot that the cue says pays 1, and so
    does the blueprint; "medium" is right for none, and does not fit the first slot. Then that seed
    may advance, with as many ramp steps as the cue says for 1 more, or be pruned. Whoever does not
    remember the cue is right every other time, and gets half of the 3.
    """

    observation_space = spaces.Dict(
        {
            "obs": spaces.Box(-1.0, 1.0, (NUM_FEATURES,), np.float32),
            "action_mask": spaces.MultiBinary(sum(SIZES)),
        }
    )
    action_space = spaces.MultiDiscrete(SIZES)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.cue, self.time = int(self.np_random.integers(2)), 0
        self.grown: int | None = None
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        number, blueprint = int(action[Head.OPERATION]), int(action[Head.BLUEPRINT])
        assert number in self._legal()
        slot, place = divmod(number - 1, len(SLOT_OPERATIONS))
        operation = SLOT_OPERATIONS[place] if number else Operation.WAIT
        reward = 0
        if operation is Operation.GERMINATE:
            self.grown = slot
            assert (slot, BLUEPRINTS[blueprint]) != (0, "medium")
            reward = (slot == self.cue) + (blueprint == 2 * self.cue)
        else:
            assert blueprint == 0
        if operation is Operation.ADVANCE:
            reward = int(action[Head.RAMP_STEPS]) == self.cue
        self.time += 1
        return self._observation(), float(reward), self.time == EPISODE_STEPS, False, {}

    def _legal(self) -> list[int]:
        if self.time == 1:
            return [0, *(1 + slot * len(SLOT_OPERATIONS) for slot in range(NUM_SLOTS))]
        if self.time == 2 and self.grown is not None:
            first = 1 + self.grown * len(SLOT_OPERATIONS)
            asked = (Operation.ADVANCE, Operation.PRUNE)
            return [0, *(first + SLOT_OPERATIONS.index(operation) for operation in asked)]
        return [0]

    def _observation(self) -> dict[str, Any]:
        obs = np.zeros(NUM_FEATURES, np.float32)
        obs[0] = self.time / EPISODE_STEPS
        if self.time == 0:
            obs[1] = 2.0 * self.cue - 1.0
        slots = obs[NUM_RUN_FEATURES : -2 * NUM_PAIRS].reshape(NUM_SLOTS, NUM_SLOT_FEATURES)
        for slot in range(NUM_SLOTS):
            slots[slot, int(slot == self.grown)] = 1.0
            slots[slot, -1] = slot / (NUM_SLOTS - 1)
        obs[-2 * NUM_PAIRS : -NUM_PAIRS] = (0.9, 0.5, 0.1) * NUM_SLOTS
        obs[-NUM_PAIRS:] = (1.0, 0.0, 1.0, 1.0, 1.0, 1.0)
        mask = np.ones(sum(SIZES), np.int8)
        mask[: SIZES[0]] = 0
        mask[self._legal()] = 1
        return {"obs": obs, "action_mask": mask}

"""Teacher and student: the same network, but for one block that the student lacks.

Legend: B batch, S stages, P inputs per stage, R state, D width.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_STAGES = 4
STAGE_INPUTS = 4
STATE = 2
WIDTH = 16
_HIDDEN = 16
_STEEPNESS = 2.0
_STATE_GAIN = 1.2
_INPUT_GAIN = 0.8
_BLOCK_STD = 1.5


class StagedHost(nn.Module):
    """Reads its inputs part by part, and hands on a state of two numbers.

    state_i = tanh(squeeze_i(f_i + block_i(f_i))),  f_i = stage_i(state_{i-1}, part_i)

    where `block_i` is nothing in a student. The two numbers are all that later stages see of part
    i, and earlier ones see nothing of it: a function of part i that is not linear can be computed
    behind stage i and nowhere else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Linear(STATE + STAGE_INPUTS, WIDTH) for _ in range(NUM_STAGES)
        )
        self.squeezes = nn.ModuleList(nn.Linear(WIDTH, STATE) for _ in range(NUM_STAGES))
        self.head = nn.Linear(STATE, 1)
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(NUM_STAGES))
        self._initialise()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return predictions of shape `B` for inputs of shape `B S P`."""
        state = inputs.new_zeros(len(inputs), STATE)
        layers = zip(self.stages, self.blocks, self.squeezes, strict=True)
        for part, (stage, block, squeeze) in zip(inputs.unbind(1), layers, strict=True):
            features = block(stage(torch.cat([state, part], dim=1)))
            state = torch.tanh(squeeze(features))
        output: Tensor = self.head(state).squeeze(1)
        return output

    def _initialise(self) -> None:
        for stage, squeeze in zip(self.stages, self.squeezes, strict=True):
            assert isinstance(stage, nn.Linear)
            assert isinstance(squeeze, nn.Linear)
            nn.init.orthogonal_(stage.weight)
            nn.init.zeros_(stage.bias)
            nn.init.zeros_(squeeze.bias)
            with torch.no_grad():
                onto_state = nn.init.orthogonal_(torch.empty(STATE, STATE)) * _STATE_GAIN
                onto_part = nn.init.orthogonal_(torch.empty(STATE, STAGE_INPUTS)) * _INPUT_GAIN
                squeeze.weight.copy_(torch.cat([onto_state, onto_part], dim=1) @ stage.weight.T)
        with torch.no_grad():
            self.head.weight.copy_(nn.init.orthogonal_(torch.empty(1, STATE)))
        nn.init.zeros_(self.head.bias)


class Block(nn.Module):
    """A residual perceptron, as an `mlp` seed is one: normalise, expand, GELU, contract."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, _HIDDEN)
        self.contract = nn.Linear(_HIDDEN, WIDTH)
        nn.init.normal_(self.expand.weight, std=_STEEPNESS / WIDTH**0.5)
        nn.init.normal_(self.contract.weight, std=_BLOCK_STD / _HIDDEN**0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Return `features` with the block's own part added."""
        hidden = F.gelu(self.expand(self.norm(features)))
        output: Tensor = features + self.contract(hidden)
        return output


def make_teacher(missing: int) -> StagedHost:
    """Return a teacher with one block, behind stage `missing`.

    Effects: consumes the default random stream.
    """
    teacher = StagedHost()
    teacher.blocks[missing] = Block()
    return teacher.requires_grad_(requires_grad=False)


def student_of(teacher: StagedHost, missing: int) -> StagedHost:
    """Return the teacher without its block; every other layer starts as the teacher's."""
    student = copy.deepcopy(teacher).requires_grad_(requires_grad=True)
    student.blocks[missing] = nn.Identity()
    return student

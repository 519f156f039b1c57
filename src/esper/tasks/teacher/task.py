"""Finding the one place where a student lacks a block that its teacher has."""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from esper.policies.growth_schedule import GrowthScheduleConfig
from esper.policies.heuristic import HeuristicConfig
from esper.slots.config import SlotConfig
from esper.slots.modes import forked_random_state
from esper.tasks.task import Task, TaskSetup
from esper.tasks.teacher.data import ShuffledBatches, Split, make_splits
from esper.tasks.teacher.host import NUM_STAGES, StagedHost, make_teacher, student_of
from esper.training.held_out import HeldOut


def missing_slot(random_seed: int) -> str:
    """Return the slot behind which the student of this seed lacks a block."""
    return f"stages.{random_seed % NUM_STAGES}"


def _sample_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return mse_loss(outputs, targets, reduction="none")


def teacher_loss(random_seed: int) -> float:
    """Return the teacher's own loss on the test split, which is that of the noise alone."""
    teacher = _teacher(random_seed)
    _, _, test = make_splits(teacher, random_seed)
    with torch.no_grad():
        return float(mse_loss(teacher(test.inputs), test.targets))


def build(random_seed: int) -> TaskSetup:
    """Return a teacher's student and its data; the default random stream is left as it was."""
    teacher = _teacher(random_seed)
    model = student_of(teacher, random_seed % NUM_STAGES)
    train, validation, test = make_splits(teacher, random_seed)

    def held_out(split: Split) -> HeldOut:
        return HeldOut(model, [(split.inputs, split.targets)], loss=_sample_losses)

    return TaskSetup(
        model=model,
        targets=("stages.*",),
        example=train.inputs[:2],
        batches=ShuffledBatches(train, random_seed=random_seed),
        loss=mse_loss,
        validation=held_out(validation),
        test=held_out(test),
        notes=(
            f"the student lacks the teacher's block behind {missing_slot(random_seed)}; the "
            f"teacher's own test loss is {teacher_loss(random_seed):.4f}",
        ),
    )


def _teacher(random_seed: int) -> StagedHost:
    with forked_random_state(torch.device("cpu")):
        torch.manual_seed(random_seed)
        return make_teacher(random_seed % NUM_STAGES)


TEACHER = Task(
    name="teacher",
    summary="A student that lacks one block of its teacher, at one of four places",
    build=build,
    metric="loss",
    epochs=50,
    learning_rate=5e-3,
    slot=SlotConfig(),
    heuristic=HeuristicConfig(blueprints=("mlp",), max_living=4),
    growth_schedule=GrowthScheduleConfig(blueprint="mlp", factor=2),
    threads=1,  # the steps are too short to share between cores
)
"""Made while looking at seeds 0 to 8; see benchmarks/useless_seeds.py for others."""

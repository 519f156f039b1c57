"""The teacher task: what is missing is known, and nothing else is."""

import pytest
import torch

from esper.tasks import Task
from esper.tasks.named import named_task
from esper.tasks.task import TaskSetup
from esper.tasks.teacher.data import NOISE_STD, make_splits
from esper.tasks.teacher.host import NUM_STAGES, Block, StagedHost, make_teacher, student_of
from esper.tasks.teacher.task import missing_slot, teacher_loss

TEACHER: Task = named_task("teacher")


def batches_of(setup: TaskSetup) -> list[torch.Tensor]:
    return [inputs for inputs, _ in setup.batches]


def test_the_student_is_the_teacher_without_its_one_block() -> None:
    torch.manual_seed(0)
    for missing in range(NUM_STAGES):
        teacher = make_teacher(missing)
        student = student_of(teacher, missing)
        assert all(parameter.requires_grad for parameter in student.parameters())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        inputs = torch.randn(16, NUM_STAGES, 4)
        assert not torch.allclose(student(inputs), teacher(inputs), atol=0.05)
        student.blocks[missing] = teacher.blocks[missing]
        assert torch.equal(student(inputs), teacher(inputs))
        assert [isinstance(block, Block) for block in teacher.blocks] == [
            index == missing for index in range(NUM_STAGES)
        ]


def test_no_stage_before_the_missing_block_sees_what_it_reads() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, NUM_STAGES, 4, requires_grad=True)
    host = StagedHost()
    seen = []
    for stage in host.stages:
        stage.register_forward_hook(lambda module, args, output: seen.append(output))
    host(inputs)
    for index, features in enumerate(seen):
        (gradient,) = torch.autograd.grad(features.sum(), inputs, retain_graph=True)
        sees = gradient.abs().sum(dim=(0, 2)) > 0
        assert sees.tolist() == [part <= index for part in range(NUM_STAGES)]


def test_every_place_is_the_missing_one_for_some_seed_and_the_notes_say_which() -> None:
    slots = [missing_slot(seed) for seed in range(NUM_STAGES)]
    assert len(set(slots)) == NUM_STAGES
    for seed, slot in enumerate(slots):
        (note,) = TEACHER.build(seed).notes
        assert f"behind {slot};" in note
        assert f"{teacher_loss(seed):.4f}" in note


def test_a_seed_fixes_teacher_student_data_and_order_and_takes_no_random_numbers() -> None:
    before = torch.get_rng_state()
    first, second, other = (TEACHER.build(seed) for seed in (3, 3, 7))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.validation() == second.validation() != other.validation()
    assert first.test() == second.test()
    assert all(map(torch.equal, batches_of(first), batches_of(second)))
    again = batches_of(first)
    assert not torch.equal(again[0], batches_of(second)[-1])


def test_the_teacher_leaves_the_noise_and_the_student_much_more() -> None:
    for seed in range(NUM_STAGES):
        floor = teacher_loss(seed)
        assert floor == pytest.approx(NOISE_STD**2, rel=0.15)
        assert TEACHER.build(seed).test()["loss"] > 5 * floor


def test_splits_do_not_overlap() -> None:
    torch.manual_seed(0)
    splits = make_splits(make_teacher(0), 0)
    firsts = torch.cat([split.inputs[:, 0, 0] for split in splits])
    assert len(firsts.unique()) == len(firsts)

"""Fixtures of the growth engine's tests."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from growth_problem import Problem, make_problem


@pytest.fixture
def problem() -> Problem:
    return make_problem()


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

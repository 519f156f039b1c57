"""Fixtures of the growth engine's tests."""

import pytest

from growth_problem import Problem, make_problem


@pytest.fixture
def problem() -> Problem:
    return make_problem()

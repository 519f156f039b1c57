"""Compiled functions, and how many of them are kept."""

import logging

import pytest

from esper.compilation.compiled_functions import CompiledFunctions


def doubled(number: float) -> float:
    return 2.0 * number


def test_the_structure_unused_for_longest_is_dropped_and_the_log_tells(
    caplog: pytest.LogCaptureFixture,
) -> None:
    functions = CompiledFunctions(doubled, max_structures=2, options={"backend": "eager"})
    with caplog.at_level(logging.INFO, logger="esper"):
        first, second = functions.of("first"), functions.of("second")
        assert functions.of("first") is first
        assert not caplog.records
        functions.of("third")
    assert len(functions) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "doubled: of more than 2 structures the one unused for longest is dropped, and compiled "
        "anew should it return"
    ]
    assert functions.of("first") is first
    assert functions.of("second") is not second

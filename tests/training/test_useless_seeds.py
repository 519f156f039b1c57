"""Useless, lazy and harmful seeds never pass all gates; where a block is missing it is found.

A small part of benchmarks/useless_seeds.py, which counts over twenty runs each.
"""

from collections.abc import Iterator

import pytest

from esper.experiments import load_run_config, prepare
from esper.tasks.teacher.task import missing_slot, teacher_loss
from planted_seeds import USELESS, planted
from useless_seeds import Tally, run_planted

ADAPTED_TO = ("rescale", "random_output", "reversed_gradient")
"""A live host adapts to these until taking them away hurts."""


@pytest.fixture(autouse=True)
def _planted() -> Iterator[None]:
    with planted():
        yield


@pytest.mark.parametrize("kind", USELESS)
def test_no_useless_seed_is_committed_in_a_decoder(kind: str) -> None:
    row = run_planted("decoder", "none", kind, seed=0)
    assert row["committed"] == []
    assert sum(row["refused"].values()) >= 1


@pytest.mark.parametrize("kind", ADAPTED_TO)
def test_what_a_live_host_adapts_to_is_not_committed_for_that(kind: str) -> None:
    row = run_planted("digits", "none", kind, seed=1)
    assert row["committed"] == []
    assert sum(row["refused"].values()) >= 2


@pytest.mark.parametrize("kind", ["rescale", "memory"])
def test_no_useless_seed_is_committed_from_behind_a_student(kind: str) -> None:
    row = run_planted("teacher", "shadowing", kind, seed=1)
    assert row["committed"] == []
    assert set(row["refused"]) == {"G2"}


def test_it_is_the_linear_map_that_refuses_what_rescales() -> None:
    blind = [
        "slot.thresholds.min_over_linear_fraction=none",
        "slot.thresholds.max_linear_share=1.1",
    ]
    assert run_planted("digits", "none", "rescale", seed=1, settings=blind)["committed"]
    for seeing in blind:
        assert not run_planted("digits", "none", "rescale", seed=1, settings=[seeing])["committed"]


def test_where_only_a_contribution_is_asked_for_it_refuses_noise() -> None:
    asked = ["slot.thresholds.min_over_linear_fraction=none"]
    assert not run_planted("decoder", "none", "noise", seed=0, settings=asked)["committed"]
    blind = [*asked, "slot.thresholds.min_contribution_fraction=-9"]
    assert run_planted("decoder", "none", "noise", seed=0, settings=blind)["committed"]


def test_attention_that_a_decoder_lacks_is_committed() -> None:
    row = run_planted("decoder", "none", "useful", seed=0)
    assert [(slot, blueprint) for slot, blueprint, _ in row["committed"]] == [("mix", "block")]


def test_the_block_that_a_student_lacks_is_found_and_nothing_else_is_committed() -> None:
    seed, tally = 0, Tally()
    settings = ["trainer.epochs=24", "trainer.isolation_check_steps=none"]
    config = load_run_config("teacher", None, settings, {"random_seed": seed})
    run = prepare(config, sinks=[tally])
    for _ in run.reports:
        pass
    assert [(slot, blueprint) for slot, blueprint, _ in tally.committed] == [
        (missing_slot(seed), "mlp")
    ]
    assert run.setup.test()["loss"] < 3 * teacher_loss(seed)

"""The transition table against a list written by hand."""

import itertools

import pytest

from esper.lifecycle import (
    GROWTH_PATH,
    LIVING_STAGES,
    RECOVERY_PATH,
    IllegalTransition,
    SeedStage,
    check_transition,
    next_stage,
)

LEGAL = {
    "DORMANT": {"GERMINATED", "TERMINATED"},
    "GERMINATED": {"TRAINING", "PRUNED"},
    "TRAINING": {"BLENDING", "PRUNED"},
    "BLENDING": {"SHADOWING", "PRUNED"},
    "SHADOWING": {"PROBATIONARY", "PRUNED"},
    "PROBATIONARY": {"FOSSILIZED", "BLENDING", "PRUNED"},
    "FOSSILIZED": {"TERMINATED"},
    "PRUNED": {"EMBARGOED"},
    "EMBARGOED": {"RESETTING"},
    "RESETTING": {"DORMANT"},
    "TERMINATED": set(),
}

NEXT = {
    "DORMANT": "GERMINATED",
    "GERMINATED": "TRAINING",
    "TRAINING": "BLENDING",
    "BLENDING": "SHADOWING",
    "SHADOWING": "PROBATIONARY",
    "PROBATIONARY": "FOSSILIZED",
    "PRUNED": "EMBARGOED",
    "EMBARGOED": "RESETTING",
    "RESETTING": "DORMANT",
}


def test_there_are_eleven_stages_and_each_has_a_row():
    assert [stage.name for stage in SeedStage] == list(LEGAL)


@pytest.mark.parametrize(
    ("current", "requested"),
    list(itertools.product(SeedStage, SeedStage)),
    ids=lambda stage: stage.name,
)
def test_every_pair_of_stages_is_legal_or_refused_as_written(
    current: SeedStage, requested: SeedStage
):
    if requested.name in LEGAL[current.name]:
        check_transition(current, requested)
        return
    with pytest.raises(IllegalTransition) as refusal:
        check_transition(current, requested, subject="slot 'layer2'")
    allowed = ", ".join(sorted(LEGAL[current.name])) or "none: this stage is final"
    assert str(refusal.value) == (
        f"slot 'layer2' cannot go from {current.name} to {requested.name}; "
        f"legal from {current.name}: {allowed}"
    )
    assert (refusal.value.current, refusal.value.requested) == (current, requested)


@pytest.mark.parametrize("current", SeedStage, ids=lambda stage: stage.name)
def test_advancing_follows_the_growth_path_and_the_way_back(current: SeedStage):
    if current.name in NEXT:
        assert next_stage(current).name == NEXT[current.name]
        check_transition(current, next_stage(current))
    else:
        with pytest.raises(IllegalTransition, match=f"cannot go from {current.name}"):
            next_stage(current)


def test_paths_and_living_stages_partition_the_life_of_a_slot():
    assert {stage.name for stage in LIVING_STAGES} == {
        "GERMINATED",
        "TRAINING",
        "BLENDING",
        "SHADOWING",
        "PROBATIONARY",
    }
    assert {*GROWTH_PATH, *RECOVERY_PATH, SeedStage.TERMINATED} == set(SeedStage)
    assert set(GROWTH_PATH) & set(RECOVERY_PATH) == {SeedStage.DORMANT}

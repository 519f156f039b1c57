"""Counting seeds of a run that goes back."""

import esper
from esper.experiments.seed_counts import SeedCounts
from esper.lifecycle.actions import Action, Advance, Commit, Germinate, Prune
from esper.rl.growth_episode import GrowthEpisode
from esper.rl.rewards import RewardConfig
from growth_problem import LENIENT
from rl_runs import TinyRuns

SOON = {**LENIENT, "min_steps_at_target": 1, "trial_epochs": 1}
LIVES: list[Action] = [
    Germinate(slot="first", blueprint="mlp"),
    Advance(slot="first"),
    Advance(slot="first"),
    Germinate(slot="second", blueprint="lora"),
    Commit(slot="first"),
    Prune(slot="second"),
]


def test_what_a_way_back_has_undone_counts_for_nothing() -> None:
    """A decision comes every 4 steps; losses are bad in steps 25 to 27, after commit and prune."""
    config = esper.SlotConfig(ramp_steps=1, embargo_epochs=1, thresholds=SOON)
    run = TinyRuns(config=config, bad_losses=range(25, 28))(0)
    counts = SeedCounts()
    run.trainer.growth.sinks.append(counts)
    episode = GrowthEpisode(run, RewardConfig())

    def after(actions: list[Action]) -> tuple[int, int, int]:
        for action in actions:
            episode.play([action])
        return counts.num_germinated, counts.num_committed, counts.num_pruned

    assert after(LIVES[:5]) == (2, 1, 0)
    assert after(LIVES[5:]) == (0, 0, 0), "it is at its first decision again"
    assert after(LIVES) == (2, 1, 1)
    assert sum(slot.num_committed for slot in episode.growth.slots.values()) == 1

"""The environment: Gymnasium to the letter, and the same run as the trainer's to the bit."""

import math
import warnings
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from sb3_contrib import MaskablePPO
from stable_baselines3.common import env_checker
from stable_baselines3.common.vec_env import SubprocVecEnv

import esper
from drawing_task import ADDRESS
from esper.experiments import load_run_config
from esper.lifecycle.actions import Action, Advance, Commit, Germinate, Operation, Prune, Wait
from esper.lifecycle.events import RewardGiven
from esper.policies.learned import Head, ObservationConfig, WatchedLoss, features
from esper.rl import (
    DivergedAtOnceError,
    GrowthEnv,
    GrowthEpisode,
    HostRun,
    RewardConfig,
    TaskRuns,
)
from esper.rl.growth_episode import reference_of
from esper.rl.rewards import Potential
from esper.training.random_states import random_streams_apart
from growth_problem import Recorder
from rl_runs import SLOTS, TinyRuns, make_env

RUNS = TinyRuns()
LIFE: list[Action] = [
    Germinate(slot="first", blueprint="mlp", blend_operator="gate"),
    Germinate(slot="second", blueprint="lora"),
    Advance(slot="first"),
    Prune(slot="second", over_steps=20, reason="decided by the policy"),
    Advance(slot="first"),
    Commit(slot="first"),
    Wait(),
    Germinate(slot="first", blueprint="norm"),
]


def random_action(env: GrowthEnv, mask: Any, random: np.random.Generator) -> list[int]:
    heads = np.split(mask, np.cumsum(env.coder.sizes)[:-1])
    return [int(random.choice(np.flatnonzero(head))) for head in heads]


def test_it_is_an_environment_to_the_letter_of_gymnasium_and_of_stable_baselines() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("esper/Growth-v0", make_run=RUNS).unwrapped)
        env_checker.check_env(GrowthEnv(RUNS))


def test_its_run_is_the_trainers_with_the_same_actions_to_the_bit() -> None:
    env = GrowthEnv(RUNS)
    env.reset(seed=5)
    for action in LIFE:
        torch.manual_seed(99)  # what others draw meanwhile
        env.step(env.coder.encode(action))
    found = env._begun().growth

    torch.manual_seed(5)
    policy = esper.policies.PlannedPolicy(
        {epoch: [action] for epoch, action in enumerate(LIFE, start=1)}, tend_seeds=False
    )
    trainer = RUNS(5, policy).trainer
    recorder = Recorder()
    trainer.growth.sinks.append(recorder)
    trainer.fit()
    assert found.losses == trainer.growth.losses
    wanted = trainer.model.state_dict()
    assert any("branches" in name for name in wanted), "something has grown"
    for name, value in found.slots.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    assert [slot.stage for slot in found.slots.values()] == [
        slot.stage for slot in trainer.growth.slots.values()
    ]


def test_an_episode_depends_on_its_seed_and_its_actions_alone() -> None:
    env, random = GrowthEnv(RUNS), np.random.default_rng(0)
    torch.manual_seed(1)
    first, info = env.reset(seed=3)
    actions, rewards = [], []
    done = False
    while not done:
        actions.append(random_action(env, info["action_mask"], random))
        first, reward, done, _, info = env.step(actions[-1])
        rewards.append(reward)
    env.reset(seed=4)  # another episode between
    state = torch.get_rng_state()
    env.reset(seed=3)
    for action, reward in zip(actions, rewards, strict=True):
        again, same, *_ = env.step(action)
        assert same == reward
    assert np.array_equal(first["obs"], again["obs"])
    assert torch.equal(state, torch.get_rng_state()), "nothing outside is drawn from"
    env.reset(seed=8)
    env.reset()
    other = GrowthEnv(RUNS)
    other.reset(seed=8)
    other.reset()
    assert env.random_seed == other.random_seed not in (8, None)


def test_it_terminates_after_the_last_decision_and_never_truncates() -> None:
    env = GrowthEnv(RUNS)
    env.reset(seed=0)
    ends = [env.step([0] * len(Head))[2:4] for _ in range(RUNS.epochs)]
    assert ends == [(False, False)] * (RUNS.epochs - 1) + [(True, False)]
    with pytest.raises(RuntimeError, match="the episode is over; call reset"):
        env.step([0] * len(Head))


def test_an_episode_that_could_not_begin_leaves_none_behind() -> None:
    def make_run(random_seed: int) -> HostRun:
        if random_seed == 7:
            raise OSError("no data")
        return RUNS(random_seed)

    env = GrowthEnv(make_run)
    env.reset(seed=0)
    with pytest.raises(OSError, match="no data"):
        env.reset(seed=7)
    with pytest.raises(RuntimeError, match="there is no episode; call reset"):
        env.step([0] * len(Head))


def test_the_training_loss_can_be_seen_in_place_of_the_held_out_one() -> None:
    watched = ObservationConfig(loss=WatchedLoss.TRAINING)
    held_out, training = GrowthEnv(RUNS), GrowthEnv(RUNS, observation=watched)
    for env in (held_out, training):
        env.reset(seed=0)
    for _ in range(RUNS.epochs - 1):
        (seen, reward, *_), (other, same, *_) = (
            env.step([0] * len(Head)) for env in (held_out, training)
        )
        expected = np.array(features(training.state, training.coder, watched), np.float32)
        assert np.array_equal(other["obs"], expected)
        assert not np.array_equal(other["obs"], seen["obs"])
        assert reward == same, "rewards are of the held-out loss in any case"


def test_no_legal_choice_of_every_head_is_refused_as_illegal() -> None:
    """A gate may refuse, and a blueprint may stand for another: nothing else."""
    random = np.random.default_rng(0)
    seen: set[str] = set()
    env = GrowthEnv(RUNS)
    for episode in range(15):
        _, info = env.reset(seed=episode)
        done = False
        while not done:
            assert np.array_equal(info["action_mask"], env.action_masks())
            action = random_action(env, info["action_mask"], random)
            observation, _, done, _, info = env.step(action)
            assert np.array_equal(observation["action_mask"], info["action_mask"])
            assert env.observation_space.contains(observation)
            assert not any("not legal" in told or "fit" in told for told in info["refused"])
            seen.add(info["action"]["operation"])
    assert seen >= {"wait", "germinate", "prune", "advance"}


def test_an_illegal_operation_changes_nothing_and_is_told() -> None:
    env = GrowthEnv(RUNS)
    _, info = env.reset(seed=0)
    number = env.coder.operation_number(0, Operation.COMMIT)
    assert not info["action_mask"][number]
    _, _, _, _, info = env.step([number, 0, 0, 0, 0, 0])
    assert "commit is not legal for slot 'first' in DORMANT" in info["refused"][0]
    assert all(slot.stage is esper.SeedStage.DORMANT for slot in env.state.slots)


def test_a_blueprint_that_does_not_fit_stands_for_the_next_one_that_does() -> None:
    env = GrowthEnv(RUNS)
    env.reset(seed=0)
    names = env.coder.blueprints
    slot = env.state.slots[0]
    fits = names[1:2]
    narrow = slot.model_copy(
        update={"choices": tuple(choice for choice in slot.choices if choice.name in fits)}
    )
    state = env.state.model_copy(update={"slots": (narrow, *env.state.slots[1:])})
    germinate = env.coder.operation_number(0, Operation.GERMINATE)
    for number in (0, 1, 2):
        decoded = env.coder.decode([germinate, number, 0, 0, 0, 0], state)
        assert isinstance(decoded, Germinate)
        assert decoded.blueprint == names[1]


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ([0, 0], "an action has 6 numbers"),
        ([99, 0, 0, 0, 0, 0], "operation must be from 0 to 10, got 99"),
        ([1, -1, 0, 0, 0, 0], "blueprint must be from 0 to"),
        ([1.9, 0, 0, 0, 0, 0], "an action is whole numbers"),
    ],
)
def test_what_is_no_action_is_refused_and_the_episode_goes_on(
    action: list[Any], words: str
) -> None:
    env = GrowthEnv(RUNS)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=words):
        env.step(action)
    assert env.step([0] * len(Head))[4]["decision"] == 2


def test_a_run_without_slots_or_fitting_blueprints_is_refused_at_once() -> None:
    def none(_: int) -> Any:
        run = RUNS(0)
        state = run.trainer.growth.state().model_copy(update={"slots": ()})
        run.trainer.growth.state = lambda: state  # type: ignore[method-assign]
        return run

    with pytest.raises(ValueError, match="there is no slot to decide about; attach at least one"):
        GrowthEnv(none)


def run_with_looks(*looks: float | BaseException, epochs: int = 2) -> HostRun:
    """A run whose evaluations come to these losses, or raise these errors, one after another."""
    run, left = TinyRuns(epochs=epochs)(0), iter(looks)

    def evaluate() -> float:
        look = next(left)
        if isinstance(look, BaseException):
            raise look
        return look

    trainer = esper.Trainer(
        run.trainer.growth,
        [(torch.zeros(8, 4), torch.zeros(8))],
        loss=torch.nn.functional.mse_loss,
        evaluate=evaluate,
        config=esper.TrainerConfig(epochs=epochs),
    )
    return replace(run, trainer=trainer)


@pytest.mark.parametrize(
    ("loss", "told"),
    [(math.nan, "finite"), (math.inf, "finite"), (0.0, "above 0"), (-1.0, "above 0")],
)
def test_a_run_whose_first_loss_measures_nothing_is_refused_at_once(loss: float, told: str) -> None:
    with pytest.raises(ValueError, match=f"must be {told}, got {loss}") as caught:
        GrowthEpisode(run_with_looks(loss), RewardConfig(potential=Potential.NONE))
    assert isinstance(caught.value, DivergedAtOnceError) == (told == "finite")


@pytest.mark.parametrize("look", [KeyboardInterrupt(), OSError("disk"), 0.0])
def test_an_episode_is_over_whose_step_has_raised(look: float | BaseException) -> None:
    env = GrowthEnv(lambda _: run_with_looks(1.0, look, 1.0, epochs=3))
    env.reset(seed=0)
    with pytest.raises((KeyboardInterrupt, OSError, ValueError)):
        env.step([0] * len(Head))
    with pytest.raises(RuntimeError, match="the episode is over; call reset"):
        env.step([0] * len(Head))


@pytest.mark.parametrize("batch_size", [16, 11, 8])
def test_a_run_that_diverges_terminates_with_a_penalty(batch_size: int) -> None:
    """After its first decision, or where it has gone back to before that."""
    env = GrowthEnv(TinyRuns(epochs=6, batch_size=batch_size), render_mode="ansi")
    env.reset(seed=0)
    growth = env._begun().growth

    def spoil(*_: Any) -> None:
        with torch.no_grad():
            for parameter in growth.slots.model.parameters():
                parameter.fill_(torch.nan)

    assert growth.slots.binding is not None
    growth.slots.binding.optimizer.register_step_post_hook(spoil)
    terminated = truncated = False
    for _ in range(growth.max_epochs or 0):
        if not terminated:
            observation, reward, terminated, truncated, info = env.step([0] * len(Head))
    assert (terminated, truncated) == (True, False)
    assert info["diverged"]
    assert info["reward"]["diverged"] == -10.0 == pytest.approx(reward, abs=0.5)
    assert env.observation_space.contains(observation)
    assert (env.render() or "").startswith(f"decision {info['decision']} of 6, loss ")


def test_every_reward_is_among_the_runs_events_by_component() -> None:
    recorder = Recorder()

    def make_run(seed: int) -> Any:
        run = RUNS(seed)
        run.trainer.growth.sinks.append(recorder)
        return run

    env = GrowthEnv(make_run)
    env.reset(seed=0)
    rewards = [env.step(env.coder.encode(action))[1] for action in LIFE]
    told = recorder.of(RewardGiven)
    assert [event.total for event in told] == rewards
    assert all(sum(event.components.values()) == pytest.approx(event.total) for event in told)
    assert told[-1].components["terminal"] != 0.0


def test_the_return_is_what_the_end_is_worth_less_what_it_cost() -> None:
    """Shaping telescopes: what is measured in between has no part in it."""
    config = RewardConfig(gamma=1.0, parameter_rent=0.0, intervention=0.0)
    env = GrowthEnv(RUNS, rewards=config)
    env.reset(seed=0)
    first = env._begun().growth.losses[0]
    infos = [env.step(env.coder.encode(action))[4] for action in LIFE]
    final = infos[-1]["final"]
    assert final["return"] == pytest.approx(np.log(first) - np.log(final["loss"]))


def test_compute_rent_counts_what_steps_cost_beside_the_hosts() -> None:
    config = RewardConfig(compute_rent=1.0)
    env = GrowthEnv(TinyRuns(count_flops=True), rewards=config)
    env.reset(seed=0)
    assert env.step([0] * len(Head))[4]["reward"]["compute_rent"] == 0.0
    grown = env.step(env.coder.encode(Germinate(slot="first", blueprint="mlp")))
    assert grown[4]["reward"]["compute_rent"] < 0.0
    with pytest.raises(ValueError, match=r"compute_rent is 1\.0, and operations are not counted"):
        GrowthEnv(RUNS, rewards=config).reset(seed=0)


@pytest.mark.parametrize("bad_losses", [range(2, 5), range(9, 12), range(18, 21)])
def test_a_host_pays_no_compute_rent_wherever_its_run_goes_back(bad_losses: range) -> None:
    run = TinyRuns(count_flops=True, bad_losses=bad_losses)(0)
    episode = GrowthEpisode(run, RewardConfig(compute_rent=1.0))
    rents = []
    while not episode.over:
        rents.append(episode.play([]).compute_rent)
    assert rents == [0.0] * len(rents)


def test_seeds_that_live_at_the_end_are_left_out_of_the_final_loss() -> None:
    def final(actions: list[Action]) -> float:
        env = GrowthEnv(RUNS)
        env.reset(seed=0)
        *_, info = [env.step(env.coder.encode(action)) for action in actions][-1]
        growth = env._begun().growth
        assert growth.slots["first"].living is not None
        with growth.slots["first"].left_out():
            without = env._begun()._run.final()["loss"]
        assert info["final"]["loss"] == without != env._begun()._run.final()["loss"]
        return float(info["final"]["loss"])

    final([Germinate(slot="first", blueprint="mlp"), *[Wait()] * (RUNS.epochs - 1)])


def test_an_episode_takes_several_actions_at_once_as_policies_do() -> None:
    episode = GrowthEpisode(RUNS(0), RewardConfig())
    one = episode.play([Wait()])
    two = episode.play(
        [Germinate(slot="first", blueprint="norm"), Germinate(slot="second", blueprint="norm")]
    )
    assert one.intervention == 0.0
    assert two.intervention == pytest.approx(-0.002)


def test_it_runs_in_the_processes_of_stable_baselines_and_gymnasium() -> None:
    def play(reset: Callable[[], Any], step: Callable[[Any], Any]) -> np.ndarray:
        reset()
        return np.asarray([step(np.zeros((2, len(Head)), dtype=np.int64))[1] for _ in range(3)])

    stable = SubprocVecEnv([make_env, make_env], start_method="spawn")
    stable.seed(7)
    of_stable = play(stable.reset, stable.step)
    stable.close()
    several = gymnasium.vector.AsyncVectorEnv([make_env, make_env], context="spawn")
    of_gymnasium = play(lambda: several.reset(seed=7), several.step)
    several.close()
    alone = GrowthEnv(RUNS)
    alone.reset(seed=8)
    of_one = [alone.step([0] * len(Head))[1] for _ in range(3)]
    assert np.allclose(of_stable[:, 1], of_one, rtol=1e-6, atol=0.0)
    assert np.allclose(of_gymnasium[:, 1], of_one, rtol=1e-6, atol=0.0)


def test_its_features_are_named() -> None:
    env = GrowthEnv(RUNS)
    observation, _ = env.reset(seed=0)
    assert len(env.feature_names) == len(set(env.feature_names)) == len(observation["obs"])
    named = dict(zip(env.feature_names, observation["obs"], strict=True))
    assert named["elapsed_fraction"] == pytest.approx(1 / RUNS.epochs)
    assert named["first.is_dormant"] == 1.0
    assert named["first.fits mlp"] == 1.0
    assert 0.0 < named["first.size of lora"] < named["first.size of mlp"] < 1.0
    assert named["second.place"] == 1.0
    assert env.coder.slots == SLOTS


def test_a_library_that_asks_for_masks_learns_from_it() -> None:
    """One round of MaskablePPO, which takes the masks from `action_masks`."""
    env = GrowthEnv(TinyRuns(epochs=4))
    taken: list[Any] = []
    step = env.step

    def checked(action: Any) -> Any:
        masks = np.split(env.action_masks(), np.cumsum(env.coder.sizes)[:-1])
        taken.append(all(mask[number] for mask, number in zip(masks, action, strict=True)))
        return step(action)

    env.step = checked  # type: ignore[method-assign]
    learner = MaskablePPO("MultiInputPolicy", env, n_steps=16, batch_size=8, n_epochs=1, seed=0)
    learner.learn(16)
    assert len(taken) == 16
    assert all(taken)


def test_against_its_reference_a_run_that_does_not_grow_earns_nothing_at_any_decision() -> None:
    def make_run(seed: int) -> Any:
        with random_streams_apart():
            reference = reference_of(RUNS(seed))
        return replace(RUNS(seed), reference=reference)

    env = GrowthEnv(make_run)
    env.reset(seed=0)
    assert [env.step([0] * len(Head))[1] for _ in range(RUNS.epochs)] == [0.0] * RUNS.epochs
    env.reset(seed=0)
    rewards = [env.step(env.coder.encode(action))[4]["reward"] for action in LIFE]
    episode = env._begun()
    reference = episode._run.reference
    assert reference is not None
    gained = np.log(reference.final_loss) - np.log(episode.final_metrics["loss"])
    assert gained != 0.0
    assert rewards[-1]["terminal"] == pytest.approx(gained)
    assert sum(reward["progress"] for reward in rewards) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("bad_losses", "batch_size", "num_decisions"),
    [
        ({9, 10, 11, 21, 22, 23}, 16, 6),
        (range(12, 99), 16, 1),
        (range(12, 99), 8, 0),  # it went back to before its first decision
        (range(1, 99), 16, 0),
    ],
)
def test_a_run_that_lost_decisions_by_going_back_or_diverged_is_no_reference(
    bad_losses: Container[int], batch_size: int, num_decisions: int
) -> None:
    """The second time it goes back it does not see the same batches again."""
    run = TinyRuns(bad_losses=bad_losses, batch_size=batch_size)(0)
    assert reference_of(run) is None
    assert len(run.trainer.growth.losses) == num_decisions


def test_a_run_with_a_loss_of_nothing_is_no_reference() -> None:
    assert reference_of(run_with_looks(1.0, 0.0, 1.0, epochs=3)) is None
    assert reference_of(run_with_looks(1.0, 2.0, 1.0, epochs=3)) is not None


def test_a_run_of_a_task_that_does_not_grow_earns_nothing_whatever_streams_it_draws_from() -> None:
    """Seed 0 is first needed when the environment is made, and 5 is another one's run."""
    settings = {"trainer": {"epochs": 2}, "count_flops": False}
    config = load_run_config(ADDRESS, None, (), settings)
    torch.manual_seed(1234)
    env = GrowthEnv(TaskRuns(config, num_runs=2, referenced=True))
    for seed in (0, 1, 5):
        env.reset(seed=seed)
        assert [env.step([0] * len(Head))[1] for _ in range(2)] == [0.0, 0.0], seed

"""Which runs a comparison still needs: a pure function of those that are finished."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from esper.experiments.comparison.config import CompareConfig
from esper.experiments.comparison.curves import losses_at
from esper.experiments.comparison.intervals import REACH, mean_interval
from esper.experiments.comparison.runs import RunRequest, RunResult, Topology, structure
from esper.experiments.comparison.search import best_rate, next_rate
from esper.experiments.run import least_epochs
from esper.policies.named import NEVER, POLICY_FILE_SUFFIX, is_policy_file, policy_words

HOST = "host"
GROWN = "grown"
STATIC = "static"
RANDOM_TIMES = "random times"

_SHORTER = 0.8
_SHORTEST_FRACTION = 0.4
"""An arm that beats the static network in fewer steps is shortened down to this share of them."""


def intermediate(num_seeds: int | str) -> str:
    """Return the arm of the network with the first so many seeds from the start."""
    return f"static {num_seeds}"


def policy_arm(policy: str, among: Sequence[str] = ()) -> str:
    """Return the arm of a further policy: of a file, as much of its path as no other one has."""
    suffix = POLICY_FILE_SUFFIX if is_policy_file(policy) else ""
    return f"policy {policy_words(policy, among)}{suffix}"


class Comparison:
    """The finished runs, by what they are, and what is missing.

    Args:
        config: Of the comparison.
        results: Finished runs, in any order.
    """

    def __init__(self, config: CompareConfig, results: Iterable[RunResult]) -> None:
        self.config = config
        self.results = {result.request.key: result for result in results}

    # What there is

    @property
    def arms(self) -> list[str]:
        """Every arm known so far, cheapest networks first, in the order of a table."""
        config = self.config
        largest = max((len(topology) for topology in self.topologies.values()), default=0)
        sizes = [intermediate(k) for k in range(1, largest)] if config.intermediate_sizes else []
        static = [*sizes, STATIC] if largest else []
        random = [RANDOM_TIMES] if config.random_times and largest else []
        return [HOST, *static, GROWN, *random, *self._policies]

    @property
    def epochs(self) -> int:
        """What equal steps are, in epochs."""
        return self.config.run.trainer.epochs

    def rates(self, arm: str) -> dict[float, float]:
        """Return the mean validation loss on the search's seeds, by learning rate tried in full."""
        wanted = self._search_seeds(arm)
        losses: dict[float, dict[int, float]] = {}
        for result in self.results.values():
            request = result.request
            if request.arm == arm and request.epochs == self.epochs:
                by_seed = losses.setdefault(request.learning_rate, {})
                by_seed[request.random_seed] = result.validation["loss"]
        return {
            rate: statistics.mean(by_seed[seed] for seed in wanted)
            for rate, by_seed in losses.items()
            if wanted and by_seed.keys() >= set(wanted)
        }

    def chosen_rate(self, arm: str) -> float | None:
        """Return the arm's learning rate; None while the search goes on."""
        scores = self.rates(arm)
        if next_rate(scores, self.config.run.learning_rate, self.config.search_rates) is not None:
            return None
        return best_rate(scores)

    def runs(self, arm: str) -> dict[int, list[RunResult]]:
        """Return the arm's finished runs at its chosen rate: by random seed, shortest first."""
        rate = self.chosen_rate(arm)
        found: dict[int, list[RunResult]] = {}
        for seed in self.config.random_seeds:
            topology = self._topology(arm, seed)
            if topology is None or rate is None:
                continue
            runs = [
                result
                for result in self.results.values()
                if result.request.arm == arm
                and result.request.random_seed == seed
                and result.request.learning_rate == rate
                and result.request.topology == topology
            ]
            found[seed] = sorted(runs, key=lambda result: result.request.epochs)
        return found

    def at_equal_steps(self, arm: str) -> dict[int, RunResult]:
        """Return the arm's runs of the configured length, by random seed."""
        return {
            seed: result
            for seed, results in self.runs(arm).items()
            for result in results
            if result.request.epochs == self.epochs
        }

    # What is missing

    def missing(self) -> list[RunRequest]:
        """Return the runs that can be made now, those that others wait for first."""
        missing: list[RunRequest] = []
        for arm in sorted(self.arms, key=lambda arm: arm != GROWN):
            missing += self._missing_of(arm)
        return missing

    def _missing_of(self, arm: str) -> list[RunRequest]:
        rate = self.chosen_rate(arm)
        if rate is None:
            scores = self.rates(arm)
            wanted = next_rate(scores, self.config.run.learning_rate, self.config.search_rates)
            assert wanted is not None
            return self._absent(arm, wanted, dict.fromkeys(self._search_seeds(arm), self.epochs))
        at_full = dict.fromkeys(self.config.random_seeds, self.epochs)
        absent = self._absent(arm, rate, at_full)
        if absent or self._diverges(arm, STATIC, GROWN):
            return absent
        return self._absent(arm, rate, self._further_budgets(arm))

    def _diverges(self, *arms: str) -> bool:
        """Whether one does at its best rate: it tells not what an epoch costs, and no verdict."""
        runs = (found for arm in arms for found in self.runs(arm).values())
        return any(run.diverged for found in runs for run in found)

    def _absent(self, arm: str, rate: float, epochs: Mapping[int, int]) -> list[RunRequest]:
        requests = []
        for seed, length in epochs.items():
            topology = self._topology(arm, seed)
            if topology is None:
                continue
            request = RunRequest(
                arm=arm,
                random_seed=seed,
                learning_rate=rate,
                epochs=length,
                policy=self._policy(arm),
                topology=topology,
                at_random_times=arm == RANDOM_TIMES,
            )
            if request.key not in self.results:
                requests.append(request)
        return requests

    def _further_budgets(self, arm: str) -> dict[int, int]:
        """Return epochs by random seed of the next budget that the arm has to be run at."""
        if not self.config.equal_flops or not self._complete(STATIC):
            return {}
        runs, static, grown = self.runs(arm), *map(self.at_equal_steps, (STATIC, GROWN))
        if not (static.keys() >= runs.keys() and grown.keys() >= runs.keys()):
            return {}
        lengths = {seed: _by_length(results) for seed, results in runs.items()}
        least = self._least_epochs(arm)

        def epochs_for(flops: Callable[[int], float]) -> dict[int, int]:
            return {
                seed: max(least, self._epochs_for(found, flops(seed)))
                for seed, found in runs.items()
            }

        if arm == STATIC:
            return epochs_for(lambda seed: grown[seed].flops)
        equal = epochs_for(lambda seed: static[seed].flops)
        if not _all_there(lengths, equal):
            return equal
        as_grown = epochs_for(lambda seed: grown[seed].flops)
        if self.never_grows(arm) and not _all_there(lengths, as_grown):
            known = {
                seed: [found[self.epochs], found[equal[seed]]] for seed, found in lengths.items()
            }
            if not _surely_better(known, {seed: grown[seed] for seed in known}):
                return as_grown
        floor = max(_SHORTEST_FRACTION * self.epochs, least)
        shortest = {seed: min(self.epochs, length) for seed, length in equal.items()}
        while _all_there(lengths, shortest):  # all seeds at one budget before any at the next
            ahead = statistics.mean(
                lengths[seed][length].test["loss"] - static[seed].test["loss"]
                for seed, length in shortest.items()
            )
            shorter = {
                seed: min(length - 1, round(_SHORTER * length)) for seed, length in shortest.items()
            }
            if not math.isfinite(ahead) or ahead >= 0.0 or min(shorter.values()) < floor:
                return {}
            shortest = shorter
        return shortest

    def _epochs_for(self, results: Sequence[RunResult], flops: float) -> int:
        """Return how many epochs cost so much, from what the run of equal steps cost.

        The nearest whole number; where that falls short by more than a curve reaches, the next one,
        so that the run and that of equal steps enclose the operations.
        """
        (full,) = (result for result in results if result.request.epochs == self.epochs)
        exact = self.epochs * flops / full.flops
        nearest = round(exact)
        if nearest / REACH <= exact <= nearest * REACH:
            return nearest
        return math.floor(exact) if exact < self.epochs else math.ceil(exact)

    def _least_epochs(self, arm: str) -> int:
        """Return how many epochs an arm's run has at least: one, and a decision if it may grow."""
        if self.never_grows(arm):
            return 1
        steps = max(run.steps for run in self.at_equal_steps(STATIC).values())
        return least_epochs(self.config.run, steps)

    def ahead(self) -> list[str]:
        """Return the arm of every run that is still to come, as far as can be told by now."""
        config, arms = self.config, self.arms
        nothing_grew = bool(self.topologies) and STATIC not in arms
        if not self.topologies:  # a guess: two seeds are committed
            random = [RANDOM_TIMES] if config.random_times else []
            arms = [*arms, intermediate(1), STATIC, *random]
        budgets = 2 if config.equal_flops else 1
        usual = config.search_seeds * (config.search_rates - 1)
        usual += budgets * len(config.random_seeds)
        ahead: list[str] = []
        for arm in arms:
            known = len(self._missing_of(arm)) if arm in self.arms else usual
            settled = known == 0 and (nothing_grew or self._complete(STATIC))
            done = sum(result.request.arm == arm for result in self.results.values())
            ahead += [arm] * (0 if settled else max(known, usual - done))
        return ahead

    # What grew

    @staticmethod
    def never_grows(arm: str) -> bool:
        """Return whether an arm's network has its size from the start."""
        return arm == HOST or arm.startswith(STATIC)

    def _policy(self, arm: str) -> str:
        if arm == GROWN:
            return self.config.run.policy
        return self._policies.get(arm, NEVER)

    @cached_property
    def _policies(self) -> dict[str, str]:
        """The further policies, by arm."""
        policies = self.config.policies
        return {policy_arm(policy, policies): policy for policy in policies}

    @cached_property
    def topologies(self) -> dict[int, Topology]:
        """The structure that the default policy grew, by random seed; empty until all are known."""
        grown = self.at_equal_steps(GROWN)
        if len(grown) < len(self.config.random_seeds):
            return {}
        return {seed: structure(result.committed) for seed, result in grown.items()}

    def _topology(self, arm: str, seed: int) -> Topology | None:
        """Return what the arm's network has from the start; None if that is not known, or none."""
        if arm in (HOST, GROWN) or arm.startswith(policy_arm("")):
            return ()
        grown = self.topologies.get(seed)
        if grown is None or arm in (STATIC, RANDOM_TIMES):
            return grown
        size = int(arm.removeprefix(intermediate("")))
        return grown[:size] if size < len(grown) else None

    def _search_seeds(self, arm: str) -> list[int]:
        seeds = [s for s in self.config.random_seeds if self._topology(arm, s) is not None]
        return seeds[: self.config.search_seeds]

    def _complete(self, arm: str) -> bool:
        return self.at_equal_steps(arm).keys() >= set(self.config.random_seeds)


def _by_length(results: Sequence[RunResult]) -> dict[int, RunResult]:
    return {result.request.epochs: result for result in results}


def _all_there(lengths: Mapping[int, Mapping[int, RunResult]], epochs: Mapping[int, int]) -> bool:
    return all(length in lengths[seed] for seed, length in epochs.items())


def _surely_better(runs: Mapping[int, Sequence[RunResult]], grown: Mapping[int, RunResult]) -> bool:
    """Whether runs are told to be better than the grown ones at the operations that those took.

    It is asked of the line between two runs, which favours growth: no further run is needed.
    """
    losses = losses_at(runs, grown)
    if losses is None:
        return False
    return mean_interval(
        [run.test["loss"] - loss for run, loss in zip(grown.values(), losses, strict=True)]
    ).above_zero

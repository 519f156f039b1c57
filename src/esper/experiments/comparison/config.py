"""What a comparison is told."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from esper.experiments.config import RandomSeed, RunConfig, SharedRunConfig
from esper.lifecycle.record import Record
from esper.policies.named import NEVER, policy_of_anywhere

MIN_SEEDS_FOR_A_CLAIM = 5

AtLeastOne = Annotated[int, Field(ge=1)]


class CompareConfig(Record):
    """A comparison, fully specified; kept as compare.json in its folder."""

    run: SharedRunConfig
    """What all arms share. Its learning rate is where every arm's search begins, its number of
    epochs is what "equal steps" means, and its policy is the one that has to prove itself."""
    policies: tuple[Annotated[str, AfterValidator(policy_of_anywhere)], ...] = ()
    """Further policies, each an arm of its own."""
    random_seeds: tuple[RandomSeed, ...] = (0, 1, 2, 3, 4)
    """Each fixes weights, data order and decisions, the same for every arm."""
    search_rates: AtLeastOne = 3
    """Learning rates that every arm tries; 1 takes the configured one for all."""
    search_seeds: AtLeastOne = 1
    """How many of the random seeds, from the first, an arm's learning rate is chosen on."""
    equal_flops: bool = True
    """Also run every arm at the compute of the network that never grew."""
    intermediate_sizes: bool = True
    random_times: bool = True
    """An arm that grows what the default grew, at random times."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        seeds = self.random_seeds
        if len(set(seeds)) != len(seeds) or len(seeds) < 2:
            raise ValueError(
                f"random_seeds must be at least two different numbers, got {list(seeds)}; an "
                "interval needs two, a claim five"
            )
        if self.search_seeds > len(seeds):
            raise ValueError(
                f"search_seeds is {self.search_seeds}, but there are {len(seeds)} random seeds"
            )
        if self.search_rates == 2:
            raise ValueError(
                "search_rates must be 1, or at least 3: one below and one above the configured rate"
            )
        if NEVER in (self.run.policy, *self.policies):
            raise ValueError(
                f"a policy to compare is {NEVER!r}, which grows nothing; name one that does"
            )
        for policy in self.policies:  # refused where a run by itself would be
            RunConfig.model_validate({**self.run.model_dump(), "policy": policy})
        repeated = {self.run.policy} & set(self.policies)
        if repeated or len(set(self.policies)) != len(self.policies):
            raise ValueError(
                f"policies must differ from each other and from {self.run.policy!r}, which is "
                f"compared anyway; got {list(self.policies)}"
            )
        return self

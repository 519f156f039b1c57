"""A run's twin: its host, never grown, with as many operations in all."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from esper.experiments.config import RunConfig
from esper.experiments.parts import learning_rate_factor
from esper.experiments.run import GrowingRun, prepare
from esper.lifecycle.events import EventRecord, RunWentBack, SeedGerminated, TwinFinished
from esper.policies.named import NEVER
from esper.training.growth import Growth
from esper.training.run_cost import RunCost


class ForkPoint:
    """The first germination of a run, where its twin leaves it; a sink of the run.

    Args:
        growth: Of the run, with operations counted.

    Raises:
        ValueError: They are not.
    """

    def __init__(self, growth: Growth) -> None:
        if growth.meter.cost.training.flops is None:
            raise ValueError("a twin gets as many operations as the run; set count_flops=true")
        self.step: int | None = None
        """None while nothing has germinated."""
        self.steps_made = 0
        """Up to there, those included that the run has gone back behind."""
        self.flops = 0
        """Of these steps, all of them the host's alone."""
        self._growth = growth
        growth.sinks.append(self)

    def publish(self, record: EventRecord) -> None:
        """Note the first germination."""
        if self.step is not None:
            return
        if isinstance(record.event, RunWentBack):
            self.steps_made += record.event.from_step - record.event.to_step
        elif isinstance(record.event, SeedGerminated):
            flops = self._growth.meter.cost.training.flops
            assert flops is not None
            self.step, self.flops = record.step, flops
            self.steps_made += record.step

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics say nothing of a germination."""

    def flush(self) -> None:
        """Nothing is kept back."""


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A run's host that never grows, prepared: iterate `run.reports` to train it, then `finish`.

    It gets as many operations as the run has spent on training and on deciding, to the nearest
    epoch, and a learning-rate schedule that comes to its end with them. Up to the run's first
    germination both are the same run, to the bit; it is made anew.

    Attributes:
        run: The twin.
        shared_steps: For how many steps it is the same run. Less than up to the germination where
            the learning rate was falling by then, which it does later over more steps.
    """

    run: GrowingRun
    config: RunConfig
    shared_steps: int
    grown_flops: int

    def finish(self, cost: RunCost, grown: GrowingRun) -> TwinFinished:
        """Evaluate on the test split, and publish what came out among the events of the run.

        Args:
            cost: The twin's, as last reported.
            grown: The run that it is the twin of.
        """
        assert cost.training.flops is not None
        event = TwinFinished(
            metrics=self.run.finish(),
            param_count=self.run.param_count(),
            epochs=self.config.trainer.epochs,
            shared_steps=self.shared_steps,
            flops_fraction=cost.training.flops / self.grown_flops,
        )
        grown.growth.publish([event])
        return event


def prepare_twin(config: RunConfig, grown: GrowingRun, cost: RunCost, fork: ForkPoint) -> Twin:
    """Prepare the twin of a finished run.

    Args:
        config: Of the run.
        grown: The run, of which steps are taken.
        cost: What it cost, as last reported.
        fork: Watched it from its start.

    Raises:
        ValueError: Nothing germinated, so that there is nothing to compare, or no operation of the
            host's steps is one that is counted.

    Effects: as `prepare`.
    """
    if fork.step is None:
        raise ValueError("nothing germinated: the run is its own twin")
    if fork.flops == 0:
        raise ValueError(
            "the host's steps have no operations that are counted (matrix products, convolutions, "
            "attention), so that none can be matched"
        )
    spent = grown.spent(cost).flops
    assert spent is not None
    steps = grown.total_steps  # of which some are missing where it went on with other batches
    wanted_steps = spent * fork.steps_made / fork.flops
    epochs = max(1, round(config.trainer.epochs * wanted_steps / steps))
    twin = _never_growing(config, epochs)
    twin_steps = steps // config.trainer.epochs * epochs
    pairs = zip(
        map(learning_rate_factor(config, steps), range(fork.step)),
        map(learning_rate_factor(twin, twin_steps), range(fork.step)),
        strict=True,
    )
    return Twin(
        run=prepare(twin),
        config=twin,
        shared_steps=sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)),
        grown_flops=spent,
    )


def _never_growing(config: RunConfig, epochs: int) -> RunConfig:
    """Return the run's config for other epochs, with a warm-up of as many steps as it has."""
    warmup = config.warmup_fraction * config.trainer.epochs / epochs
    trainer = config.trainer.model_copy(update={"epochs": epochs})
    update = {"policy": NEVER, "warmup_fraction": warmup, "trainer": trainer}
    return config.model_copy(update=update)

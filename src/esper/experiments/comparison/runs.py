"""One run of one arm: what is asked, what came out, and doing it."""

import hashlib
import math
import random
import re
from collections.abc import Mapping

import torch

from esper.experiments.comparison.config import CompareConfig
from esper.experiments.config import RunConfig
from esper.experiments.run import GrowingRun, build_setup, num_decisions, num_steps, prepare
from esper.experiments.seed_counts import SeedCounts
from esper.lifecycle.actions import Germinate
from esper.lifecycle.events import EventRecord, SeedCommitted
from esper.lifecycle.record import Record
from esper.policies.growth_schedule import SLOPE, GrowthSchedulePolicy
from esper.policies.learned import LearnedPolicy
from esper.policies.named import NEVER
from esper.policies.replay import ReplayPolicy
from esper.policies.timing import FractionTiming
from esper.slots.committed_seed import CommittedSeed
from esper.slots.slot_set import SlotSet
from esper.training.policy import Policy
from esper.training.run_cost import RunCost
from esper.training.safeguard import TrainingDivergedError

SCHEDULED_POLICIES = (GrowthSchedulePolicy.name, SLOPE)
"""Those that grow by schedule, and decide by the number of steps or the training loss alone."""

_NAME_CHARACTERS = 60
"""Most that a file's name has of its arm, which a policy's file may have given a long one."""


class GrownSeed(Record):
    """A seed that a run committed, with its place."""

    slot: str
    seed: CommittedSeed


Topology = tuple[GrownSeed, ...]
"""What grew, in the order of the commits."""


def structure(topology: Topology) -> Topology:
    """Return what it takes to build the same network: nothing that was measured of its seeds."""
    return tuple(
        grown.model_copy(
            update={"seed": grown.seed.model_copy(update={"contribution_fraction": None})}
        )
        for grown in topology
    )


class RunRequest(Record):
    """One run to be made: an arm, a random seed, a learning rate, a budget."""

    arm: str
    random_seed: int
    learning_rate: float
    epochs: int
    policy: str = NEVER
    topology: Topology = ()
    """A `structure`, grown before the first step, a network of that size from the start; with
    `at_random_times` grown while it trains."""
    at_random_times: bool = False

    @property
    def grows(self) -> bool:
        """Whether anything is decided while it trains."""
        return self.at_random_times or self.policy != NEVER

    @property
    def key(self) -> str:
        """Name that no other request has, fit for a file."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]
        arm = re.sub(r"[^A-Za-z0-9._-]", "-", self.arm)[:_NAME_CHARACTERS]
        return f"{arm}-seed{self.random_seed}-{digest}"


class RunResult(Record):
    """What came out of a request."""

    request: RunRequest
    param_count: int
    steps: int
    flops: float
    """All that the run had to spend, as `GrowingRun.spent` has it."""
    seconds: float
    """As `flops`, in wall time."""
    training_flops: float
    validation: dict[str, float]
    """Of the task's `selection`, which learning rates are chosen by."""
    test: dict[str, float]
    committed: Topology
    num_germinated: int
    num_pruned: int
    policy_sha256: str | None = None
    """Of the file of the policy that decided, if it has one."""

    @property
    def diverged(self) -> bool:
        """Whether it came to no loss that is a number."""
        return not math.isfinite(self.test["loss"])


class GrowthRecord:
    """A sink that keeps what grew."""

    def __init__(self) -> None:
        self._commits: list[str] = []
        """By slot; of some the run may have gone back behind since."""
        self.counts = SeedCounts()

    def publish(self, record: EventRecord) -> None:
        """Count seeds, and note the order of commits."""
        self.counts.publish(record)
        if isinstance(record.event, SeedCommitted):
            self._commits.append(record.event.slot)

    def measure(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing of the run's course is kept."""

    def flush(self) -> None:
        """Nothing is kept back."""

    def topology(self, slots: SlotSet) -> Topology:
        """Return the committed seeds in the order of their commits."""
        left = {path: list(slot.committed) for path, slot in slots.items()}
        found = [
            GrownSeed(slot=path, seed=left[path].pop())
            for path in reversed(self._commits)
            if left[path]
        ]
        return tuple(reversed(found))


def check_runs(config: CompareConfig) -> None:
    """Prepare a run of every policy and make none, so that what cannot run is refused at once.

    Raises:
        SettingsError: A policy cannot be carried out on this host.
        TaskDataError: The data cannot be read or used.
        ModuleNotFoundError: The task needs an extra that is not installed.
    """
    for policy in (config.run.policy, *config.policies):
        prepare(config.run.model_copy(update={"policy": policy}))


def execute(request: RunRequest, config: RunConfig) -> RunResult:
    """Make one run.

    Args:
        request: What differs from run to run.
        config: What all runs share.

    Returns:
        What came out; of a run that diverged an infinite loss, and what it had spent by then.

    Effects: sets the process's number of threads and matmul precision, seeds its random streams.
    """
    torch.set_num_threads(config.threads or 1)
    record = GrowthRecord()
    configured = _configured(request, config)
    setup = build_setup(configured)
    if not request.grows:  # evaluated once at most, in the end: nothing hangs on it
        configured = _deciding_every(configured, num_steps(configured, setup))
    policy = None
    if request.at_random_times:
        policy = random_times_policy(request, config, num_decisions(configured, setup))
    run = prepare(configured, sinks=[record], setup=setup, policy=policy)
    if policy is None:
        for grown in request.topology:
            _grow_at_once(run.growth.slots, grown)
    cost = None
    diverged = False
    try:
        for report in run.reports:
            cost = report.cost
    except TrainingDivergedError:
        diverged, cost = True, run.growth.meter.cost
    assert cost is not None
    return result_of(request, run, record, cost, diverged=diverged)


def _configured(request: RunRequest, config: RunConfig) -> RunConfig:
    trainer = {"epochs": request.epochs}
    return config.model_copy(
        update={
            "random_seed": request.random_seed,
            "learning_rate": request.learning_rate,
            "policy": request.policy,
            "count_flops": True,
            "trainer": config.trainer.model_copy(update=trainer),
        }
    )


def _deciding_every(config: RunConfig, steps: int) -> RunConfig:
    trainer = config.trainer.model_copy(update={"decision_interval_steps": steps})
    return config.model_copy(update={"trainer": trainer})


def random_times_policy(request: RunRequest, config: RunConfig, decisions: int) -> Policy:
    """Return a policy that grows at random times what the compared one does.

    A growth schedule has its events while the learning rate is stable and before the verdict. For
    any other policy the request's seeds are tried in their order, until they are committed or it
    is too late to germinate.
    """
    draw = random.Random(request.random_seed)  # noqa: S311 – no secret
    if config.policy in SCHEDULED_POLICIES:
        schedule = config.growth_schedule
        latest = min(1.0 - config.decay_fraction, schedule.verdict_fraction)
        num_events = 1 if config.policy == SLOPE else len(schedule.fractions)
        events = [draw.uniform(config.warmup_fraction, latest) for _ in range(num_events)]
        return GrowthSchedulePolicy(schedule, timing=FractionTiming(sorted(events)))
    heuristic = config.heuristic
    last = max(1, int(heuristic.last_germination_fraction * decisions))
    epochs = sorted(draw.randint(1, last) for _ in request.topology)
    plan = [
        (
            epoch,
            Germinate(
                slot=grown.slot,
                blueprint=grown.seed.blueprint,
                options=grown.seed.options,
                blend_operator=grown.seed.blend_operator,
            ),
        )
        for epoch, grown in zip(epochs, request.topology, strict=True)
    ]
    return ReplayPolicy(
        plan,
        last_epoch=last,
        patience_epochs=heuristic.patience_epochs,
        fade_steps=heuristic.fade_steps,
    )


def _grow_at_once(slots: SlotSet, grown: GrownSeed) -> None:
    """Put a seed into the network for good, as born: zero in its last layers."""
    slot, seed = slots[grown.slot], grown.seed
    slot.germinate(seed.blueprint, blend_operator=seed.blend_operator, **seed.options)
    while slot.living is not None:
        slot.advance(force=True)


def result_of(
    request: RunRequest, run: GrowingRun, record: GrowthRecord, cost: RunCost, *, diverged: bool
) -> RunResult:
    """Return what came out of a run that has come to its end, or has diverged before."""
    spent = run.spent(cost) if request.grows else cost.training
    policy, selection = run.growth.policy, run.setup.selection or run.setup.validation
    assert spent.flops is not None
    assert cost.training.flops is not None
    return RunResult(
        request=request,
        param_count=run.param_count(),
        steps=run.growth.step,
        flops=spent.flops,
        seconds=spent.seconds,
        training_flops=cost.training.flops,
        validation=_told(run.judged(selection), diverged=diverged),
        test=_told(run.judged(run.setup.test), diverged=diverged),
        committed=record.topology(run.growth.slots),
        num_germinated=record.counts.num_germinated,
        num_pruned=record.counts.num_pruned,
        policy_sha256=policy.state_dict()["sha256"] if isinstance(policy, LearnedPolicy) else None,
    )


def _told(metrics: Mapping[str, float], *, diverged: bool) -> dict[str, float]:
    """Return metrics with an infinite loss where the run has diverged, or none can be told.

    Other metrics are NaN where it has diverged: they are of a network that nobody would keep.
    """
    if diverged:
        metrics = dict.fromkeys(metrics, math.nan)
    return {
        name: math.inf if name == "loss" and math.isnan(value) else value
        for name, value in metrics.items()
    }

"""The story of a run, read from its events: what grew where, and how it ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from esper.blending.schedule import curve_value
from esper.lifecycle.alpha import AlphaCurve
from esper.lifecycle.events import (
    AlphaTargetReached,
    AlphaTargetSet,
    CheckpointDamaged,
    ContributionMeasured,
    EventRecord,
    GateEvaluated,
    GradientHealthMeasured,
    RunFailed,
    RunFinished,
    RunResumed,
    RunStarted,
    RunWentBack,
    SeedCommitted,
    SeedCompiled,
    SeedFailed,
    SeedGerminated,
    SeedPruned,
    StageChanged,
    StepSkipped,
    TwinFinished,
)
from esper.lifecycle.gates import Gate
from esper.lifecycle.notable import in_words
from esper.lifecycle.stages import SeedStage
from esper.lifecycle.words import is_refusal, refusal
from esper.telemetry.progress import Unit, progress_of
from esper.telemetry.run_reader import RunReader

INTERVENTIONS = frozenset(
    {"step_skipped", "seed_blamed", "run_went_back", "seed_failed", "isolation_violated"}
)
"""Types of the events in which the run was protected from something."""

_AFTER_A_PAUSE = (CheckpointDamaged, RunResumed)
"""Events with which a run that was resumed begins."""
_RAMP_POINTS = 16


@dataclass(frozen=True, kw_only=True)
class StageVisit:
    """When a seed entered a stage."""

    stage: SeedStage
    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class GateVisit:
    """When a gate judged a seed."""

    epoch: int
    step: int
    event: GateEvaluated


@dataclass(frozen=True, kw_only=True)
class AlphaRamp:
    """Alpha's way to a target; without steps it arrives at once.

    Attributes:
        arrived_step: When it did; None while it is on its way.
    """

    step: int
    from_alpha: float
    target: float
    steps: int
    curve: AlphaCurve
    arrived_step: int | None = None

    def points(self, until: int) -> list[tuple[int, float]]:
        """Return some steps up to `until` with the alpha at each, for drawing.

        The curve is drawn with the steepness that a ramp has unless told otherwise.
        """
        end = self.step + self.steps if self.arrived_step is None else self.arrived_step
        span = max(1, self.steps)
        last = min(until, end)
        points = [(self.step, self.from_alpha)]
        for index in range(1, _RAMP_POINTS):
            step = self.step + round(index * self.steps / _RAMP_POINTS)
            if self.step < step < last:
                done = curve_value(self.curve, (step - self.step) / span)
                points.append((step, self.from_alpha + (self.target - self.from_alpha) * done))
        if until >= end:
            points.append((end, self.target))
        return points


@dataclass(frozen=True, kw_only=True)
class ContributionVisit:
    """When the held-out loss with and without a seed was measured."""

    epoch: int
    step: int
    event: ContributionMeasured


@dataclass(frozen=True, kw_only=True)
class GradientVisit:
    """When the gradient norms of a seed and its host were read, and their ratio."""

    epoch: int
    step: int
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """Something that the governor did, or that it or the run met, in words.

    Attributes:
        skipped_because: Why a step was skipped; None of anything else.
    """

    epoch: int
    step: int
    words: str
    skipped_because: str | None


@dataclass(kw_only=True)
class SeedStory:
    """One seed from germination to its end."""

    slot: str
    blueprint: str
    param_count: int
    epoch: int
    step: int
    stages: list[StageVisit] = field(default_factory=list)
    gates: list[GateVisit] = field(default_factory=list)
    ramps: list[AlphaRamp] = field(default_factory=list)
    contributions: list[ContributionVisit] = field(default_factory=list)
    gradient_ratios: list[GradientVisit] = field(default_factory=list)
    compiled: list[SeedCompiled] = field(default_factory=list)
    error: str | None = None
    pruned_because: str | None = None
    committed: bool = False
    end_epoch: int | None = None
    end_step: int | None = None

    @property
    def contribution_fraction(self) -> float | None:
        """Held-out loss saved by the seed as last measured, relative to the loss without it."""
        return self.contributions[-1].event.contribution_fraction if self.contributions else None

    def alpha_points(self, until: int) -> list[tuple[int, float]]:
        """Return some steps up to `until` with the alpha at each, for drawing."""
        points = [point for ramp in self.ramps for point in ramp.points(until)]
        return [*points, (until, points[-1][1])] if points else []

    @property
    def outcome(self) -> str:
        """One of committed, pruned and still growing."""
        if self.committed:
            return "committed"
        return "pruned" if self.pruned_because is not None else "still growing"

    @property
    def reason(self) -> str:
        """Why it ended so, or where it stands: failing checks, where a gate's refusals are why."""
        if self.error is not None:
            return f"its forward raised {self.error}"
        last = self.gates[-1].event if self.gates else None
        if self.committed:
            measured = [visit.event.result for visit in self.gates[-1:]]
            return "; ".join(f"passed {result.gate}" for result in measured if result.passed)
        if self.pruned_because is not None and not is_refusal(self.pruned_because):
            return self.pruned_because
        if last is not None and not last.result.passed:
            return refusal(last.result)
        return self.pruned_because or (self.stages[-1].stage.name if self.stages else "")

    @property
    def refused_as_linear(self) -> bool:
        """Whether it ended where nothing else was wrong with it than to be like a linear map."""
        if self.committed or self.pruned_because is None or not is_refusal(self.pruned_because):
            return False
        failures = self.gates[-1].event.result.failures if self.gates else ()
        return bool(failures) and all("linear" in check.name for check in failures)


@dataclass(kw_only=True)
class RunStory:
    """A run as a person would tell it."""

    unit: Unit = "epoch"
    """What the epochs of all that is told count."""
    slots: tuple[str, ...] = ()
    """In the order in which they are drawn; those that the run named come first."""
    host_param_count: int | None = None
    """None if the run did not tell it, as one in somebody's own loop."""
    seeds: list[SeedStory] = field(default_factory=list)
    """Without those that the run has gone back behind."""
    stages: dict[str, StageVisit] = field(default_factory=dict)
    """What each slot's stage has last become."""
    interventions: list[Intervention] = field(default_factory=list)
    last_step: int = 0
    first_seconds: float | None = None
    """Unix time of the first event."""
    seconds: float | None = None
    """That it went on, without the pauses before it was resumed, and without its twin; None before
    the first event."""
    finished: RunFinished | None = None
    failure: str | None = None
    """The error that has ended it, unless it has gone on since."""
    twin: TwinFinished | None = None

    @property
    def committed(self) -> list[SeedStory]:
        """Seeds that became part of the host."""
        return [seed for seed in self.seeds if seed.committed]

    @property
    def living_param_count(self) -> int:
        """Parameters of the seeds that were alive in the end."""
        return sum(seed.param_count for seed in self.seeds if seed.end_step is None)

    @property
    def param_counts(self) -> list[tuple[int, int]]:
        """Parameters of the network from a step on, seeds that were alive included.

        Empty if the host's are not known.
        """
        if self.host_param_count is None:
            return []
        changes: dict[int, int] = {}
        for seed in self.seeds:
            changes[seed.step] = changes.get(seed.step, 0) + seed.param_count
            if seed.end_step is not None and not seed.committed:
                changes[seed.end_step] = changes.get(seed.end_step, 0) - seed.param_count
        counts, count = [(0, self.host_param_count)], self.host_param_count
        for step in sorted(changes):
            count += changes[step]
            counts.append((step, count))
        return counts


class StoryTeller:
    """Tells the story as events come in, oldest first.

    Args:
        unit: What the epochs of the events count.
    """

    def __init__(self, unit: Unit = "epoch") -> None:
        self.story = RunStory(unit=unit)
        self._last_seconds = 0.0
        self._of_slots: list[EventRecord] = []
        """What is told of slots, as far as the run has not gone back behind it."""
        self._living: dict[str, SeedStory] = {}
        self._waiting: dict[str, list[GateVisit | StageVisit]] = {}

    def take(self, record: EventRecord) -> None:
        """Go on with one event."""
        story, event = self.story, record.event
        story.last_step = max(story.last_step, record.step)
        self._count_seconds(record)
        if event.type in INTERVENTIONS:
            story.interventions.append(
                Intervention(
                    epoch=record.epoch,
                    step=record.step,
                    words=in_words(record) or event.type,
                    skipped_because=event.reason if isinstance(event, StepSkipped) else None,
                )
            )
        if isinstance(event, RunStarted):
            others = (slot for slot in story.slots if slot not in event.slots)
            story.slots = (*event.slots, *others)
            story.host_param_count = event.host_param_count
        elif isinstance(event, RunFinished):
            story.finished = event
        elif isinstance(event, (RunFailed, RunResumed)):
            story.failure = event.error if isinstance(event, RunFailed) else None
        elif isinstance(event, TwinFinished):
            story.twin = event
        elif isinstance(event, RunWentBack):
            self._go_back(event.to_step)
        elif getattr(event, "slot", None) is not None:
            self._of_slots.append(record)
            self._follow(record)

    def _count_seconds(self, record: EventRecord) -> None:
        story = self.story
        if story.first_seconds is None or story.seconds is None:
            story.first_seconds, story.seconds = record.time_seconds, 0.0
        elif story.finished is None and not isinstance(record.event, _AFTER_A_PAUSE):
            story.seconds += record.time_seconds - self._last_seconds
        self._last_seconds = record.time_seconds

    def _go_back(self, to_step: int) -> None:
        """Tell of the slots anew, up to a step."""
        kept = [record for record in self._of_slots if record.step <= to_step]
        self._of_slots = kept
        for told in (self.story.seeds, self.story.stages, self._living, self._waiting):
            told.clear()
        for record in kept:
            self._follow(record)

    def _germinated(self, record: EventRecord, event: SeedGerminated) -> None:
        seed = SeedStory(
            slot=event.slot,
            blueprint=event.blueprint,
            param_count=event.param_count,
            epoch=record.epoch,
            step=record.step,
        )
        # What its slot told before the germination was complete: G0 and the stage.
        _take_over(seed, self._waiting.pop(event.slot, []))
        if event.slot not in self.story.slots:
            self.story.slots = (*self.story.slots, event.slot)
        self.story.seeds.append(seed)
        self._living[event.slot] = seed

    def _compiled(self, event: SeedCompiled) -> None:
        seeds = (seed for seed in reversed(self.story.seeds) if seed.slot == event.slot)
        newest = next(seeds, None)
        if newest is not None:
            newest.compiled.append(event)

    def _follow(self, record: EventRecord) -> None:
        event = record.event
        if isinstance(event, SeedGerminated):
            self._germinated(record, event)
        elif isinstance(event, SeedCompiled):
            self._compiled(event)
        else:
            self._go_on(record)

    def _go_on(self, record: EventRecord) -> None:
        event = record.event
        slot = getattr(event, "slot", None)
        seed = self._living.get(slot) if slot is not None else None
        if seed is not None and isinstance(event, GateEvaluated) and event.result.gate is Gate.G0:
            # The run has gone back to the step at which it germinated, and decides there anew.
            self.story.seeds.remove(self._living.pop(seed.slot))
            seed = None
        if isinstance(event, (GateEvaluated, StageChanged)):
            visit = _visit(record, event)
            if isinstance(visit, StageVisit):
                self.story.stages[event.slot] = visit
            if seed is not None:
                _take_over(seed, [visit])
            elif isinstance(visit, GateVisit):
                self._waiting[event.slot] = [visit]  # G0, with which a life begins
            elif visit.stage is SeedStage.GERMINATED:
                self._waiting.setdefault(event.slot, []).append(visit)
        if seed is not None:
            _note(seed, record)
            if seed.end_step is not None:
                self._living.pop(seed.slot)


def tell(records: Sequence[EventRecord], *, unit: Unit = "epoch") -> RunStory:
    """Return the story that events tell, oldest first.

    Args:
        records: Of the run.
        unit: What their epochs count.
    """
    teller = StoryTeller(unit)
    for record in records:
        teller.take(record)
    return teller.story


def tell_run(reader: RunReader) -> RunStory:
    """Return the story of a run's folder.

    Raises:
        EventSchemaError: An event was written by another version.
        RunFolderError: The folder is damaged.
    """
    return tell(reader.events(), unit=progress_of(reader.config()).unit)


def _take_over(seed: SeedStory, visits: list[GateVisit | StageVisit]) -> None:
    for visit in visits:
        if isinstance(visit, GateVisit):
            seed.gates.append(visit)
        else:
            seed.stages.append(visit)


def _note(seed: SeedStory, record: EventRecord) -> None:
    event = record.event
    if isinstance(event, ContributionMeasured):
        visit = ContributionVisit(epoch=record.epoch, step=record.step, event=event)
        seed.contributions.append(visit)
    elif isinstance(event, GradientHealthMeasured):
        if event.ratio is not None:
            read = GradientVisit(epoch=record.epoch, step=record.step, ratio=event.ratio)
            seed.gradient_ratios.append(read)
    elif isinstance(event, AlphaTargetSet):
        seed.ramps.append(
            AlphaRamp(
                step=record.step,
                from_alpha=event.from_alpha,
                target=event.target,
                steps=event.steps,
                curve=event.curve,
                arrived_step=record.step if event.steps == 0 else None,
            )
        )
    elif isinstance(event, AlphaTargetReached):
        if seed.ramps:
            seed.ramps[-1] = replace(seed.ramps[-1], arrived_step=record.step)
    elif isinstance(event, SeedFailed):
        seed.error = event.error
    elif isinstance(event, SeedPruned):
        seed.pruned_because = event.reason
        seed.end_epoch, seed.end_step = record.epoch, record.step
    elif isinstance(event, SeedCommitted):
        seed.committed = True
        seed.end_epoch, seed.end_step = record.epoch, record.step


def _visit(record: EventRecord, event: GateEvaluated | StageChanged) -> GateVisit | StageVisit:
    if isinstance(event, GateEvaluated):
        return GateVisit(epoch=record.epoch, step=record.step, event=event)
    return StageVisit(stage=event.to_stage, epoch=record.epoch, step=record.step)

"""The story of a run, read from its events: what grew where, and how it ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from esper.lifecycle.events import (
    AlphaTargetReached,
    AlphaTargetSet,
    ContributionMeasured,
    EventRecord,
    GateEvaluated,
    RunFinished,
    RunStarted,
    SeedCommitted,
    SeedCompiled,
    SeedFailed,
    SeedGerminated,
    SeedPruned,
    StageChanged,
    StepSkipped,
    TwinFinished,
)
from esper.lifecycle.stages import SeedStage


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
class AlphaPoint:
    """Alpha at a step."""

    step: int
    alpha: float


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
    alphas: list[AlphaPoint] = field(default_factory=list)
    contributions: list[tuple[int, ContributionMeasured]] = field(default_factory=list)
    error: str | None = None
    pruned_because: str | None = None
    committed: bool = False
    end_epoch: int | None = None
    end_step: int | None = None

    @property
    def contribution_fraction(self) -> float | None:
        """Held-out loss saved by the seed as last measured, relative to the loss without it."""
        return self.contributions[-1][1].contribution_fraction if self.contributions else None

    @property
    def outcome(self) -> str:
        """One of committed, pruned and still growing."""
        if self.committed:
            return "committed"
        return "pruned" if self.pruned_because is not None else "still growing"

    @property
    def reason(self) -> str:
        """Why it ended so: the last gate's failing checks, an error, or where it stands."""
        if self.error is not None:
            return f"its forward raised {self.error}"
        last = self.gates[-1].event if self.gates else None
        if self.committed:
            measured = [visit.event.result for visit in self.gates[-1:]]
            return "; ".join(f"passed {result.gate}" for result in measured if result.passed)
        if last is not None and not last.result.passed:
            failed = "; ".join(str(check) for check in last.result.failures)
            return f"{last.result.gate} refused: {failed.replace(' FAILS', '')}"
        return self.pruned_because or (self.stages[-1].stage.name if self.stages else "")


@dataclass(kw_only=True)
class RunStory:
    """A run as a person would tell it."""

    slots: tuple[str, ...] = ()
    host_param_count: int = 0
    seeds: list[SeedStory] = field(default_factory=list)
    skipped_steps: list[tuple[int, StepSkipped]] = field(default_factory=list)
    compiled: list[SeedCompiled] = field(default_factory=list)
    finished: RunFinished | None = None
    twin: TwinFinished | None = None

    @property
    def committed(self) -> list[SeedStory]:
        """Seeds that became part of the host."""
        return [seed for seed in self.seeds if seed.committed]


def tell(records: Sequence[EventRecord]) -> RunStory:
    """Return the story that events tell, oldest first."""
    story = RunStory()
    living: dict[str, SeedStory] = {}
    waiting: dict[str, list[GateVisit | StageVisit]] = {}
    for record in records:
        event = record.event
        if isinstance(event, RunStarted):
            story.slots, story.host_param_count = event.slots, event.host_param_count
        elif isinstance(event, RunFinished):
            story.finished = event
        elif isinstance(event, TwinFinished):
            story.twin = event
        elif isinstance(event, SeedCompiled):
            story.compiled.append(event)
        elif isinstance(event, StepSkipped):
            story.skipped_steps.append((record.step, event))
        elif isinstance(event, SeedGerminated):
            seed = SeedStory(
                slot=event.slot,
                blueprint=event.blueprint,
                param_count=event.param_count,
                epoch=record.epoch,
                step=record.step,
            )
            _take_over(seed, waiting.pop(event.slot, []))
            story.seeds.append(seed)
            living[event.slot] = seed
        else:
            _follow(record, living, waiting)
    return story


def _take_over(seed: SeedStory, visits: list[GateVisit | StageVisit]) -> None:
    """Give a seed what its slot told before the germination was complete: G0 and the stage."""
    for visit in visits:
        if isinstance(visit, GateVisit):
            seed.gates.append(visit)
        else:
            seed.stages.append(visit)


def _follow(
    record: EventRecord,
    living: dict[str, SeedStory],
    waiting: dict[str, list[GateVisit | StageVisit]],
) -> None:
    event = record.event
    slot = getattr(event, "slot", None)
    seed = living.get(slot) if slot is not None else None
    if isinstance(event, (GateEvaluated, StageChanged)):
        visit = _visit(record, event)
        if seed is not None:
            _take_over(seed, [visit])
        elif isinstance(visit, GateVisit):
            waiting[event.slot] = [visit]  # G0, with which a life begins
        elif event.to_stage is SeedStage.GERMINATED:
            waiting.setdefault(event.slot, []).append(visit)
    if seed is not None:
        _note(seed, record, living)


def _note(seed: SeedStory, record: EventRecord, living: dict[str, SeedStory]) -> None:
    event = record.event
    if isinstance(event, ContributionMeasured):
        seed.contributions.append((record.epoch, event))
    elif isinstance(event, AlphaTargetSet):
        seed.alphas.append(AlphaPoint(step=record.step, alpha=event.from_alpha))
    elif isinstance(event, AlphaTargetReached):
        seed.alphas.append(AlphaPoint(step=record.step, alpha=event.alpha))
    elif isinstance(event, SeedFailed):
        seed.error = event.error
    elif isinstance(event, SeedPruned):
        seed.pruned_because = event.reason
        _end(seed, record, living)
    elif isinstance(event, SeedCommitted):
        seed.committed = True
        _end(seed, record, living)


def _visit(record: EventRecord, event: GateEvaluated | StageChanged) -> GateVisit | StageVisit:
    if isinstance(event, GateEvaluated):
        return GateVisit(epoch=record.epoch, step=record.step, event=event)
    return StageVisit(stage=event.to_stage, epoch=record.epoch, step=record.step)


def _end(seed: SeedStory, record: EventRecord, living: dict[str, SeedStory]) -> None:
    seed.end_epoch, seed.end_step = record.epoch, record.step
    living.pop(seed.slot)

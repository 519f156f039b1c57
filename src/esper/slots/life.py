"""One seed's life: its stage, its alpha, what was measured of it and how long it has been there."""

import copy

from esper.blending.schedule import AlphaController
from esper.lifecycle.alpha import AlphaMode
from esper.lifecycle.events import Event, GateEvaluated, StageChanged
from esper.lifecycle.gates import GATE_INTO, GateThresholds, evaluate_gate
from esper.lifecycle.stages import SeedStage, check_transition
from esper.slots.measurements import SeedMeasurements
from esper.slots.slot_snapshot import LifeSnapshot


class SeedLife:
    """The state machine of a slot's current seed; pure bookkeeping, no tensors.

    A slot starts a new life, at DORMANT, for every seed after a commit.

    Args:
        path: The slot's path, for events and errors.
        number: How many seeds the slot has had before.
        thresholds: Of the gates.
        live: The seed enters the forward path without training behind the host.
    """

    def __init__(self, path: str, *, number: int, thresholds: GateThresholds, live: bool) -> None:
        self.path = path
        self.number = number
        self.thresholds = thresholds
        self.live = live
        self.stage = SeedStage.DORMANT
        self.blueprint: str | None = None
        self.alpha = AlphaController()
        self.measurements = SeedMeasurements()
        self.fading_because: str | None = None
        """Why a fade-out is under way; None when there is none."""
        self.epochs_in_stage = 0
        self.steps_in_stage = 0
        self.refusals_in_stage = 0

    def snapshot(self) -> LifeSnapshot:
        """Return where it stands."""
        return LifeSnapshot(
            number=self.number,
            stage=self.stage,
            blueprint=self.blueprint,
            alpha=self.alpha.state,
            measurements=copy.deepcopy(self.measurements),
            fading_because=self.fading_because,
            epochs_in_stage=self.epochs_in_stage,
            steps_in_stage=self.steps_in_stage,
            refusals_in_stage=self.refusals_in_stage,
        )

    def go_on_from(self, snapshot: LifeSnapshot) -> None:
        """Stand where the life stood that the snapshot is of, which has the same number."""
        self.stage = snapshot.stage
        self.blueprint = snapshot.blueprint
        self.alpha = AlphaController(snapshot.alpha)
        self.measurements = copy.deepcopy(snapshot.measurements)
        self.fading_because = snapshot.fading_because
        self.epochs_in_stage = snapshot.epochs_in_stage
        self.steps_in_stage = snapshot.steps_in_stage
        self.refusals_in_stage = snapshot.refusals_in_stage

    @property
    def subject(self) -> str:
        """The slot with its seed, as errors call it."""
        seed = f" (seed {self.blueprint!r})" if self.blueprint else ""
        return f"slot {self.path!r}{seed}"

    def enter(self, stage: SeedStage) -> Event:
        """Change stage and start counting anew.

        Raises:
            IllegalTransition: The table does not list the change; nothing has changed.
        """
        check_transition(self.stage, stage, subject=self.subject)
        event = StageChanged(
            slot=self.path, blueprint=self.blueprint, from_stage=self.stage, to_stage=stage
        )
        self.stage = stage
        self.epochs_in_stage = self.steps_in_stage = self.refusals_in_stage = 0
        return event

    def judge(self, stage: SeedStage, *, force: bool, breaker_closed: bool) -> GateEvaluated:
        """Let the gate into `stage` judge the measurements as they are now."""
        assert self.blueprint is not None
        alpha = self.alpha.state
        inputs = self.measurements.gate_inputs(
            live=self.live,
            alpha=alpha.alpha,
            steps_at_target=alpha.steps_held if alpha.mode is AlphaMode.HOLD else 0,
            breaker_closed=breaker_closed,
        )
        result = evaluate_gate(GATE_INTO[stage], inputs, self.thresholds)
        if not result.passed:
            if force:
                result = result.model_copy(update={"forced": True})
            else:
                self.refusals_in_stage += 1
        return GateEvaluated(
            slot=self.path, blueprint=self.blueprint, to_stage=stage, result=result
        )

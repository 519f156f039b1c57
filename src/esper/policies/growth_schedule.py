"""Growth by schedule: whole blocks, or what else is chosen, at given times of the run."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, JsonValue, model_validator

from esper.lifecycle.actions import (
    Action,
    Advance,
    Germinate,
    GrowthState,
    SlotState,
)
from esper.lifecycle.alpha import AlphaMode
from esper.lifecycle.record import Record
from esper.lifecycle.stages import LIVING_STAGES, SeedStage
from esper.policies.tending import tend
from esper.policies.timing import FractionTiming, GrowthTiming, SlopeTiming, elapsed_fraction
from esper.seeds.registry import blueprints

SLOPE = "slope"
"""Name of the policy that grows as the schedule does, when the slope of the loss says so."""

DEPTH_OPTION = "depth"
"""The option by which a blueprint takes how many blocks one seed is."""

_SOURCE_OPTION = "source"

ShareOfRun = Annotated[FiniteFloat, Field(gt=0.0, lt=1.0)]


class GrowthScheduleConfig(Record):
    """Settings of growth by schedule."""

    blueprint: str = "block"
    """What is inserted."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Of the blueprint: {"source": "own"} stacks copies of the module in front of each slot."""
    copy_optimizer_state: bool = False
    """Copies begin with the optimizer state of their source; needs options with a source."""
    factor: Annotated[int, Field(ge=2)] = 3
    """Depth after the last event over the depth before the first, where each slot stands behind one
    layer. The new blocks are shared evenly among events and slots."""
    fractions: Annotated[tuple[ShareOfRun, ...], Field(min_length=1)] = (0.25,)
    """Of the run, when it grows; one event each."""
    max_drop_fraction: Annotated[FiniteFloat, Field(gt=0.0)] = 0.35
    """By slope: it grows once the loss, falling on along its slope to the end of the run, would
    fall by no more than this share of itself; a larger share grows earlier."""
    earliest_fraction: ShareOfRun = 0.1
    """By slope: of the run, before which it does not grow."""
    latest_fraction: ShareOfRun = 0.5
    """By slope: of the run, when it grows in any case."""
    min_layers: Annotated[int, Field(ge=1)] = 2
    """Slots there must be at least: depth grown from a single layer was measured to pay less than
    a network of the same compute from the start."""
    slots: tuple[str, ...] | None = None
    """Paths of the slots in which it grows; None is all of them, so that new layers lie between the
    old ones."""
    verdict_fraction: ShareOfRun = 0.7
    """Of the run, when live seeds are judged that no later event has called before. They learn
    until then, since what a block saves shows late."""
    patience_epochs: Annotated[int, Field(ge=1)] = 6
    """Epochs in one stage after which a seed that its gate refuses is pruned."""
    fade_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which a seed in the forward path is faded out."""

    @model_validator(mode="after")
    def _check(self) -> "GrowthScheduleConfig":
        if any(later <= earlier for earlier, later in pairwise(self.fractions)):
            raise ValueError(f"fractions must rise, got {self.fractions}")
        if self.fractions[-1] >= self.verdict_fraction:
            raise ValueError(
                f"fractions must lie before verdict_fraction {self.verdict_fraction}, when seeds "
                f"are judged for the last time; got {self.fractions}"
            )
        if self.slots is not None and (not self.slots or len(set(self.slots)) < len(self.slots)):
            raise ValueError(
                f"slots must name each slot once and at least one, got {self.slots}; leave it out "
                "for all of them"
            )
        if DEPTH_OPTION in self.options:
            raise ValueError(
                f"options must leave out {DEPTH_OPTION!r}, which follows from factor, fractions "
                f"and slots; got {self.options}"
            )
        if self.copy_optimizer_state and self.options.get(_SOURCE_OPTION) is None:
            raise ValueError(
                "copy_optimizer_state needs copies, whose state it copies: options with a source, "
                f'as {{"source": "own"}}; got {self.options}'
            )
        return self


class GrowthSchedulePolicy:
    """Inserts the same number of blocks in every slot at each event, and judges them late.

    At an event a seed germinates in every slot of the plan that is free. Where a seed of an earlier
    event still lives, the event calls the verdict on it, and the slot grows as soon as that seed is
    committed. Where it is pruned, or not committed by the time of the last verdict, the slot is
    left out of the event: it is asked to germinate all the same, and its refusal tells so.

    A live seed learns at alpha 1 until its verdict is called, and then takes gates G3 and G4 at
    once: what it contributes has just been measured, with the weights that it has. Seeds that train
    behind the host are tended as the heuristic does.

    Args:
        config: Settings.
        timing: When events are due; None takes the fractions of the config.
    """

    name = "schedule"

    def __init__(
        self, config: GrowthScheduleConfig | None = None, *, timing: GrowthTiming | None = None
    ) -> None:
        self.config = config or GrowthScheduleConfig()
        self.timing = timing or FractionTiming(self.config.fractions)
        self._num_past = 0
        self._pending: list[str] = []

    @property
    def reads_losses(self) -> bool:
        """Whether it decides by the held-out loss itself: its timing may."""
        return self.timing.reads_losses

    def weighs(self, state: GrowthState) -> Sequence[str]:
        """Return the slots whose verdict is called, and those that a gate may ask about anyway."""
        called = self._last_call(state) or bool(self._pending) or self._due(state)
        return [slot.path for slot in state.slots if called or not slot.live]

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return what tends the living seeds, then the germinations of an event that is due.

        Raises:
            ValueError: The run's length is not known, there are too few layers, the new blocks
                cannot be shared evenly, or the blueprint does not fit or take its options.
        """
        seed = self._seed(state)
        last_call = self._last_call(state)
        if self._due(state):
            self._num_past += 1
            self._pending += [slot.path for slot in self._places(state)]
        actions: list[Action] = []
        for slot in state.slots:
            actions += self._tend(slot, judged=last_call or slot.path in self._pending)
        ready: list[str] = []
        waiting: list[str] = []
        for path in self._pending:
            on_trial = not last_call and _on_trial(state.slot(path))
            (waiting if on_trial or path in ready else ready).append(path)
        self._pending = waiting
        return [*actions, *(seed.model_copy(update={"slot": path}) for path in ready)]

    def upcoming(self, state: GrowthState) -> Sequence[Germinate]:
        """Return what germinates at the next event; none after the last."""
        if self._num_past >= self.timing.num_events:
            return []
        seed = self._seed(state)
        return [seed.model_copy(update={"slot": slot.path}) for slot in self._places(state)]

    def state_dict(self) -> dict[str, Any]:
        """Return how many events there have been, and what waits for a free slot."""
        return {"num_past": self._num_past, "pending": list(self._pending)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._num_past = state["num_past"]
        self._pending = list(state["pending"])

    def _last_call(self, state: GrowthState) -> bool:
        return elapsed_fraction(state) >= self.config.verdict_fraction

    def _due(self, state: GrowthState) -> bool:
        past = self._num_past
        return past < self.timing.num_events and self.timing.due(state, num_past=past)

    def _tend(self, slot: SlotState, *, judged: bool) -> Sequence[Action]:
        patience, fade = self.config.patience_epochs, self.config.fade_steps
        if not _learns_live(slot):
            return tend(slot, patience_epochs=patience, fade_steps=fade)
        if not judged:
            return []
        # Its patience begins with the verdict, not with its stage; it is asked twice per epoch.
        called = slot.model_copy(update={"epochs_in_stage": slot.refusals_in_stage // 2})
        tending = tend(called, patience_epochs=patience, fade_steps=fade)
        if any(isinstance(action, Advance) for action in tending):
            return [*tending, *tending]  # G3, then G4
        return tending

    def _places(self, state: GrowthState) -> Sequence[SlotState]:
        if self.config.slots is None:
            return state.slots
        return [state.slot(path) for path in self.config.slots]

    def check(self, state: GrowthState) -> None:
        """Raise if the plan cannot be carried out; `decide` does so too, after the first epoch.

        Raises:
            ValueError: As `decide`.
        """
        self._seed(state)
        elapsed_fraction(state)

    def _seed(self, state: GrowthState) -> Germinate:
        """Return what germinates at each place, after checking that it can; the slot is the first.

        Checked at every decision, so that a plan that cannot be carried out ends the run at its
        first one and not at the event.
        """
        config, layers = self.config, len(state.slots)
        if layers < config.min_layers:
            raise ValueError(
                f"the schedule policy grows from at least {config.min_layers} layers, one behind "
                f"each slot, and there are {layers} slots; attach behind more layers, or lower "
                "min_layers"
            )
        places = self._places(state)
        blocks, shares = (config.factor - 1) * layers, len(places) * self.timing.num_events
        if blocks % shares:
            raise ValueError(
                f"{layers} layers grown by a factor of {config.factor} are {blocks} new blocks, "
                f"which {len(places)} slots at {self.timing.num_events} events cannot share "
                "evenly; change factor, fractions or slots"
            )
        for slot in places:
            room = slot.max_committed - slot.committed
            if self._num_past == 0 and self.timing.num_events > room:
                raise ValueError(
                    f"{self.timing.num_events} events grow as many seeds in a slot, and slot "
                    f"{slot.path!r} has room for {room}; raise max_committed of its SlotConfig "
                    "(slot.max_committed), or grow at fewer events"
                )
        options: dict[str, Any] = dict(config.options)
        if blocks > shares:
            options[DEPTH_OPTION] = blocks // shares
        for slot in places:
            _check_fits(slot, config.blueprint, options)
        return Germinate(
            slot=places[0].path,
            blueprint=config.blueprint,
            options=options,
            copy_optimizer_state=config.copy_optimizer_state,
        )


def slope_policy(config: GrowthScheduleConfig) -> GrowthSchedulePolicy:
    """Return the policy called "slope": the same growth, at the time that the loss tells.

    Raises:
        ValueError: `earliest_fraction`, `latest_fraction` and `verdict_fraction` do not rise.
    """
    if config.latest_fraction >= config.verdict_fraction:
        raise ValueError(
            f"latest_fraction must lie before verdict_fraction {config.verdict_fraction}, when "
            f"seeds are judged for the last time; got {config.latest_fraction}"
        )
    timing = SlopeTiming(
        config.max_drop_fraction,
        earliest_fraction=config.earliest_fraction,
        latest_fraction=config.latest_fraction,
    )
    policy = GrowthSchedulePolicy(config, timing=timing)
    policy.name = SLOPE
    return policy


def _learns_live(slot: SlotState) -> bool:
    """Whether a live seed stands at alpha 1, where it learns with the host."""
    holds = slot.alpha == 1.0 and slot.alpha_mode is AlphaMode.HOLD
    return slot.live and slot.stage is SeedStage.BLENDING and holds and not slot.fading


def _on_trial(slot: SlotState) -> bool:
    """Whether a seed lives here that may still be committed, after which the slot is free."""
    return slot.stage in LIVING_STAGES and not slot.fading


def _check_fits(slot: SlotState, blueprint: str, options: dict[str, Any]) -> None:
    fitting = [choice.name for choice in slot.choices]
    if blueprint not in fitting and options.get(_SOURCE_OPTION) is None:
        raise ValueError(
            f"blueprint {blueprint!r} of the schedule does not fit slot {slot.path!r}; fitting: "
            f"{', '.join(fitting) or 'none'}"
        )
    known = blueprints.get(slot.family, blueprint).options
    if DEPTH_OPTION in options and DEPTH_OPTION not in known:
        raise ValueError(
            f"the schedule asks for {options[DEPTH_OPTION]} blocks in one seed, and blueprint "
            f"{blueprint!r} of family {slot.family} has no option {DEPTH_OPTION!r}; lower factor, "
            "grow at more events, or take 'block'"
        )
    if options.get(_SOURCE_OPTION) is None:  # a source is looked up in the host, by the slot
        blueprints.param_count(slot.family, blueprint, slot.dim, **options)

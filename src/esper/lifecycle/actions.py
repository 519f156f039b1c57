"""What a policy, a person or a remote controller may ask of a growing model."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, JsonValue, TypeAdapter

from esper.lifecycle.alpha import AlphaCurve, AlphaMode, BlendOperator
from esper.lifecycle.record import Record
from esper.lifecycle.stages import LIVING_STAGES, SeedStage


class Operation(StrEnum):
    """The kinds of action, in the order of the RL action head."""

    WAIT = "wait"
    GERMINATE = "germinate"
    ADVANCE = "advance"
    SET_ALPHA_TARGET = "set_alpha_target"
    PRUNE = "prune"
    COMMIT = "commit"


Fraction = Annotated[FiniteFloat, Field(ge=0.0, le=1.0)]
Steps = Annotated[int, Field(ge=0)]


class Wait(Record):
    """Do nothing until the next decision."""

    operation: Literal[Operation.WAIT] = Operation.WAIT


class Germinate(Record):
    """Build a seed in an empty slot."""

    operation: Literal[Operation.GERMINATE] = Operation.GERMINATE
    slot: str
    blueprint: str
    options: dict[str, JsonValue] = Field(default_factory=dict)
    blend_operator: BlendOperator | None = None
    """`None`: the slot's configured operator."""
    copy_optimizer_state: bool = False
    """A copy of a host's module begins with that module's optimizer state; refused without one."""


class Advance(Record):
    """Try the gate into the next stage.

    Entering BLENDING starts a ramp to alpha 1; `None` takes its length and curve from the slot.
    """

    operation: Literal[Operation.ADVANCE] = Operation.ADVANCE
    slot: str
    ramp_steps: Steps | None = None
    ramp_curve: AlphaCurve | None = None


class SetAlphaTarget(Record):
    """Start an alpha ramp from HOLD."""

    operation: Literal[Operation.SET_ALPHA_TARGET] = Operation.SET_ALPHA_TARGET
    slot: str
    target: Fraction
    steps: Steps
    curve: AlphaCurve = AlphaCurve.COSINE


class Prune(Record):
    """Remove the living seed: now, or after fading it out over `over_steps` steps."""

    operation: Literal[Operation.PRUNE] = Operation.PRUNE
    slot: str
    over_steps: Steps = 0
    reason: str = "asked"


class Commit(Record):
    """Hand the seed on trial to the host for good, through gate G5."""

    operation: Literal[Operation.COMMIT] = Operation.COMMIT
    slot: str


Action = Annotated[
    Wait | Germinate | Advance | SetAlphaTarget | Prune | Commit,
    Field(discriminator="operation"),
]
_ADAPTER: TypeAdapter[Action] = TypeAdapter(Action)


def parse_action(document: str | bytes) -> Action:
    """Read an action from JSON.

    Raises:
        pydantic.ValidationError: The document is no action, or has unknown or missing fields.
    """
    return _ADAPTER.validate_json(document)


def action_from_dump(dump: Any) -> Action:
    """Return the action that `model_dump(mode="json")` was taken of.

    Raises:
        pydantic.ValidationError: It is no action, or has unknown or missing fields.
    """
    return _ADAPTER.validate_python(dump)


class BlueprintChoice(Record):
    """A blueprint that fits a slot, with what it would cost there."""

    name: str
    param_count: Annotated[int, Field(ge=0)]
    linear: bool = False
    """Whether it computes a linear map of the features, or nearly."""


class SlotState(Record):
    """A slot as a policy sees it."""

    path: str
    family: str
    dim: int
    stage: SeedStage
    blueprint: str | None = None
    alpha: float = 0.0
    alpha_mode: AlphaMode = AlphaMode.HOLD
    live: bool = False
    fading: bool = False
    """A fade-out is under way; the seed is removed when alpha reaches 0."""
    epochs_in_stage: int = 0
    steps_in_stage: int = 0
    refusals_in_stage: int = 0
    """How often the gate out of the current stage has refused."""
    committed: int = 0
    max_committed: int = 1
    gradient_ratio: float | None = None
    line_search_gain_fraction: float | None = None
    contribution_fraction: float | None = None
    choices: tuple[BlueprintChoice, ...] = ()
    """Blueprints that fit, cheapest first."""


class GrowthState(Record):
    """What a policy decides on, after an epoch."""

    epoch: int
    step: int
    max_epochs: int | None = None
    losses: tuple[float, ...] = ()
    """Held-out loss after each epoch so far, oldest first."""
    train_losses: tuple[float, ...] = ()
    """Mean training loss of each epoch so far; empty where the loop does not tell it."""
    slots: tuple[SlotState, ...] = ()
    param_count: Annotated[int, Field(ge=0)] = 0
    """Of the network as it is now, living seeds included."""
    host_param_count: Annotated[int, Field(ge=0)] = 0
    """Of the network before anything grew."""

    def slot(self, path: str) -> SlotState:
        """Return the state of the slot at `path`.

        Raises:
            IllegalAction: There is no such slot.
        """
        for slot in self.slots:
            if slot.path == path:
                return slot
        known = ", ".join(repr(slot.path) for slot in self.slots) or "none"
        raise IllegalAction(f"there is no slot {path!r}; slots: {known}")


class LegalAction(Record):
    """An operation that may be applied now; `slot` is None for WAIT only."""

    operation: Operation
    slot: str | None = None


class IllegalAction(ValueError):  # noqa: N818 - says what was asked, not what broke
    """An action that the current state does not allow."""


def legal_operations(slot: SlotState) -> frozenset[Operation]:
    """Return what may be asked of one slot. Gates may still refuse an ADVANCE or a COMMIT."""
    stage = slot.stage
    legal = {Operation.WAIT}
    if slot.fading:
        return frozenset(legal | {Operation.PRUNE})
    can_regrow = stage is SeedStage.FOSSILIZED and slot.committed < slot.max_committed
    if (stage is SeedStage.DORMANT or can_regrow) and slot.choices:
        legal.add(Operation.GERMINATE)
    if stage in LIVING_STAGES:
        legal.add(Operation.PRUNE)
        legal.add(Operation.COMMIT if stage is SeedStage.PROBATIONARY else Operation.ADVANCE)
    if stage is SeedStage.BLENDING and slot.alpha_mode is AlphaMode.HOLD:
        legal.add(Operation.SET_ALPHA_TARGET)
    return frozenset(legal)


def legal_actions(state: GrowthState) -> tuple[LegalAction, ...]:
    """Return every legal pair of operation and slot, WAIT first, in a fixed order.

    The one source of legality for the trainer, every policy, the RL mask and remote commands.
    """
    actions = [LegalAction(operation=Operation.WAIT)]
    for slot in state.slots:
        legal = legal_operations(slot) - {Operation.WAIT}
        actions.extend(
            LegalAction(operation=operation, slot=slot.path)
            for operation in Operation
            if operation in legal
        )
    return tuple(actions)


def check_action(state: GrowthState, action: Action) -> None:
    """Raise unless `action` is legal in `state`.

    Raises:
        IllegalAction: The slot is unknown, its stage does not allow the operation, or the
            blueprint does not fit it; the message lists what is allowed. Whether one fits with
            options, the slot tells when it builds.
    """
    if isinstance(action, Wait):
        return
    slot = state.slot(action.slot)
    legal = legal_operations(slot)
    if action.operation not in legal:
        allowed = ", ".join(sorted(legal))
        fading = " and fading out" if slot.fading else ""
        raise IllegalAction(
            f"{action.operation} is not legal for slot {slot.path!r} in {slot.stage.name}{fading}; "
            f"legal: {allowed}"
        )
    if isinstance(action, Germinate):
        check_blueprint(slot, action)


def check_blueprint(slot: SlotState, action: Germinate) -> None:
    """Raise unless a blueprint may fit its slot; with options, the slot tells when it builds.

    Raises:
        IllegalAction: It does not; the message lists what does.
    """
    names = [choice.name for choice in slot.choices]
    if action.blueprint not in names and not action.options:
        raise IllegalAction(
            f"blueprint {action.blueprint!r} does not fit slot {slot.path!r}; "
            f"fitting: {', '.join(names)}"
        )

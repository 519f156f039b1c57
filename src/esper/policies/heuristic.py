"""The default policy: grow where the loss has stopped falling, one seed at a time."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from esper.lifecycle.actions import (
    Action,
    BlueprintChoice,
    Germinate,
    GrowthState,
    Operation,
    SlotState,
    legal_operations,
)
from esper.lifecycle.record import Record
from esper.lifecycle.stages import LIVING_STAGES
from esper.policies.chooser import Candidate, Chooser, EvenChooser, UCB1Chooser
from esper.policies.tending import asked_to_be_weighed, tend

UCB1_POLICY = "ucb1"
"""Name of the heuristic that learns which blueprints pay."""

Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[FiniteFloat, Field(ge=0.0, le=1.0)]


class HeuristicConfig(Record):
    """Settings of the heuristic."""

    blueprints: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Candidates in the order they are tried; None takes all that fit and have parameters, cheapest
    first, and linear maps last, which the default gates refuse behind a module that is trained."""
    warmup_epochs: Count = 5
    """Epochs before the first germination."""
    plateau_epochs: Annotated[int, Field(ge=1)] = 3
    """Window over which the held-out loss must have stopped falling."""
    plateau_fraction: FiniteFloat = 0.10
    """The loss counts as falling if its best in the window is this much below its best before."""
    max_living: Annotated[int, Field(ge=1)] = 1
    """Seeds that may grow at the same time."""
    patience_epochs: Annotated[int, Field(ge=1)] = 6
    """Epochs in one stage after which a seed that its gate refuses is pruned."""
    max_refusals: Annotated[int, Field(ge=1)] | None = 2
    """How often a blueprint may be refused in a slot before it is left alone there, until something
    is committed anywhere. None sets no limit. Each try is another chance to pass by luck."""
    fade_steps: Count = 20
    """Steps over which a seed in the forward path is faded out."""
    last_germination_fraction: Fraction = 0.7
    """Of `max_epochs`; later seeds would not have the time to commit."""


class HeuristicPolicy:
    """Germinates when the held-out loss stops falling, and tends what grows.

    Slots and blueprints are tried evenly: the pair tried least goes first, and what has been
    committed anywhere is preferred to what has not. A pair that was refused too often since the
    last commit is left alone.

    Args:
        config: Settings.
        chooser: Which of the pairs that may be tried goes first; None tries them evenly, as above.
    """

    name = "heuristic"
    reads_losses = True

    def __init__(
        self, config: HeuristicConfig | None = None, *, chooser: Chooser | None = None
    ) -> None:
        self.config = config or HeuristicConfig()
        self.chooser = chooser or EvenChooser()
        self._tried: Counter[tuple[str, str]] = Counter()
        self._refused: Counter[tuple[str, str]] = Counter()
        self._committed: Counter[str] = Counter()
        self._last_committed: dict[str, int] = {}
        self._living: dict[str, str] = {}
        self._contributions: dict[str, float | None] = {}
        """Of what lives, as last seen."""

    def weighs(self, state: GrowthState) -> Sequence[str]:
        """Return every slot whose next gate may ask."""
        return asked_to_be_weighed(state)

    def check(self, state: GrowthState) -> None:
        """Raise if a configured blueprint fits no slot, as each decision does.

        Raises:
            ValueError: One does not; what fits is listed.
        """
        known = {choice.name for slot in state.slots for choice in slot.choices}
        unknown = [name for name in self.config.blueprints or () if name not in known]
        if unknown:
            raise ValueError(
                f"blueprint {unknown[0]!r} of the heuristic fits no slot; fitting: "
                f"{', '.join(sorted(known)) or 'none'}"
            )

    def decide(self, state: GrowthState) -> Sequence[Action]:
        """Return advances, prunes and commits for what lives, then at most one germination.

        Raises:
            ValueError: A configured blueprint fits no slot, told at the first decision.
        """
        self.check(state)
        self._note_ends(state)
        config = self.config
        actions: list[Action] = []
        for slot in state.slots:
            actions += tend(
                slot, patience_epochs=config.patience_epochs, fade_steps=config.fade_steps
            )
        living = sum(slot.stage in LIVING_STAGES for slot in state.slots)
        if living < config.max_living and self._may_germinate(state):
            germination = self._germination(state)
            if germination is not None:
                actions.append(germination)
        return actions

    def upcoming(self, state: GrowthState) -> Sequence[Germinate]:
        """Return what it would try next, in that order."""
        return [
            Germinate(slot=candidate.slot.path, blueprint=candidate.blueprint)
            for candidate in self._ranked(state)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return what has been tried, refused and committed so far, and the chooser's part."""
        return {
            "tried": [[*pair, count] for pair, count in self._tried.items()],
            "refused": [[*pair, count] for pair, count in self._refused.items()],
            "committed": dict(self._committed),
            "last_committed": dict(self._last_committed),
            "living": dict(self._living),
            "contributions": dict(self._contributions),
            "chooser": {
                "kind": type(self.chooser).__name__,
                "state": dict(self.chooser.state_dict()),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: The chooser was of another kind; nothing has changed.
        """
        kind, here = state["chooser"]["kind"], type(self.chooser).__name__
        if kind != here:
            raise ValueError(
                f"policy {self.name!r} chose by {kind}, and chooses by {here} here; give it the "
                "chooser that the run began with"
            )
        self._tried = Counter({(slot, name): n for slot, name, n in state["tried"]})
        self._refused = Counter({(slot, name): n for slot, name, n in state["refused"]})
        self._committed = Counter(state["committed"])
        self._last_committed = dict(state["last_committed"])
        self._living = dict(state["living"])
        self._contributions = dict(state["contributions"])
        self.chooser.load_state_dict(state["chooser"]["state"])

    def _may_germinate(self, state: GrowthState) -> bool:
        config = self.config
        if state.epoch < max(config.warmup_epochs, config.plateau_epochs + 1):
            return False
        if len(state.losses) <= config.plateau_epochs:
            return False
        total = state.max_epochs
        if total is not None and state.epoch > config.last_germination_fraction * total:
            return False
        before = _lowest(state.losses[: -config.plateau_epochs])
        recent = _lowest(state.losses[-config.plateau_epochs :])
        if math.inf in (before, recent):
            return False
        return recent > before - config.plateau_fraction * abs(before)

    def _germination(self, state: GrowthState) -> Germinate | None:
        ranked = self._ranked(state)
        if not ranked:
            return None
        path, blueprint = ranked[0].slot.path, ranked[0].blueprint
        self._tried[path, blueprint] += 1
        self._living[path] = blueprint
        return Germinate(slot=path, blueprint=blueprint)

    def _ranked(self, state: GrowthState) -> Sequence[Candidate]:
        """Return the slots and blueprints that may be tried, the first choice first."""
        pairs = [
            (slot, choice)
            for slot in state.slots
            if Operation.GERMINATE in legal_operations(slot)
            for choice in self._choices(slot)
            if not self._given_up(slot.path, choice.name)
        ]
        if self.config.blueprints is None:
            pairs.sort(key=lambda pair: pair[1].linear)
        candidates = [self._candidate(slot, choice.name) for slot, choice in pairs]
        growing = [
            self._candidate(slot, self._living[slot.path])
            for slot in state.slots
            if slot.path in self._living
        ]
        return self.chooser.ranked(candidates, growing=growing)

    def _candidate(self, slot: SlotState, blueprint: str) -> Candidate:
        return Candidate(
            slot=slot,
            blueprint=blueprint,
            tried=self._tried[slot.path, blueprint],
            committed=self._committed[blueprint],
        )

    def _given_up(self, path: str, blueprint: str) -> bool:
        limit = self.config.max_refusals
        return limit is not None and self._refused[path, blueprint] >= limit

    def _choices(self, slot: SlotState) -> list[BlueprintChoice]:
        if self.config.blueprints is None:
            return [choice for choice in slot.choices if choice.param_count > 0]
        fitting = {choice.name: choice for choice in slot.choices}
        return [fitting[name] for name in self.config.blueprints if name in fitting]

    def _note_ends(self, state: GrowthState) -> None:
        """Count what became of the seeds that do not live any more, and tell the chooser."""
        commits = [
            slot for slot in state.slots if slot.committed > self._last_committed.get(slot.path, 0)
        ]
        for slot in commits:
            blueprint = self._living.pop(slot.path, None)
            if blueprint is not None:
                self._committed[blueprint] += 1
                contribution = self._contributions.pop(slot.path, None)
                self.chooser.note_commit(self._candidate(slot, blueprint), contribution)
        for slot in state.slots:
            self._last_committed[slot.path] = slot.committed
            if slot.path not in self._living:
                continue
            if slot.stage in LIVING_STAGES and slot.blueprint == self._living[slot.path]:
                self._contributions[slot.path] = slot.contribution_fraction
                continue
            blueprint = self._living.pop(slot.path)
            self._contributions.pop(slot.path, None)
            self._refused[slot.path, blueprint] += 1
            self.chooser.note_refusal(self._candidate(slot, blueprint))
        if commits:
            self._refused.clear()


def _lowest(losses: Sequence[float]) -> float:
    """Return the lowest loss, infinite where none is a number."""
    return min((loss for loss in losses if not math.isnan(loss)), default=math.inf)


def ucb1_policy(
    config: HeuristicConfig | None = None, *, chooser: UCB1Chooser | None = None
) -> HeuristicPolicy:
    """Return the policy called "ucb1": the heuristic, with UCB1 for what it tries first.

    All else is the heuristic's, `max_refusals` too: it is there since each try is another chance to
    pass by luck, and UCB1, which has no arm for growing nothing, goes on trying where nothing pays.
    With `max_refusals=None` UCB1 alone decides, and what is refused is tried ever more rarely.

    Args:
        config: Of the heuristic.
        chooser: With another exploration, or with books to go on from; None is a new one.
    """
    policy = HeuristicPolicy(config, chooser=chooser or UCB1Chooser())
    policy.name = UCB1_POLICY
    return policy

"""The slot: what a host's forward meets, and where one seed after another lives."""

from __future__ import annotations  # so that help() says Event, and not all its classes

from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import Any

import torch
from torch import nn

from esper.blending.schedule import DEFAULT_STEEPNESS, AlphaController, AlphaState
from esper.lifecycle.alpha import AlphaCurve, AlphaMode, BlendOperator
from esper.lifecycle.events import (
    AlphaTargetReached,
    AlphaTargetSet,
    Event,
    SeedCommitted,
    SeedFailed,
    SeedGerminated,
    SeedPruned,
    SeedRescaled,
    SlotReset,
)
from esper.lifecycle.learning import Isolation
from esper.lifecycle.stages import (
    LIVING_STAGES,
    RECOVERY_PATH,
    IllegalTransition,
    SeedStage,
    check_transition,
    next_stage,
)
from esper.seeds.graph_free_copy import graph_free_copy
from esper.slots.branch import SeedBranch
from esper.slots.committed_seed import CommittedSeed
from esper.slots.config import choose, choose_curve
from esper.slots.germination import (
    GerminationError,
    derive_random_seed,
    parameters_finite,
    sprout,
    sprout_guarded,
    state_source,
)
from esper.slots.gradient_guard import GradientGuard
from esper.slots.kept_slot import KeptSlot
from esper.slots.life import SeedLife
from esper.slots.measurements import SeedMeasurements
from esper.slots.modes import SeparateRandomStream
from esper.slots.slot_forward import ForwardMode


class SeedSlot(KeptSlot):
    """A place behind a host module where seeds grow, one living at a time.

    Made by `esper.attach`. The forward is the identity while no seed is in the path. Methods that
    change something return the events that happened, in order; the caller publishes them.

    A dormant slot adds no key to the state dict. Structure changes belong between an optimizer
    step and the next backward.
    """

    # Growing

    @torch.inference_mode(mode=False)
    def germinate(
        self,
        blueprint: str,
        *,
        blend_operator: BlendOperator | str | None = None,
        copy_optimizer_state: bool = False,
        **options: Any,
    ) -> list[Event]:
        """Build a seed, prove that it is the identity (G0), and register it.

        Args:
            blueprint: A name in the registry for this slot's family.
            blend_operator: None takes the slot's configured one.
            copy_optimizer_state: A copy begins with the optimizer state of what it is a copy of;
                by default it starts fresh, as every seed does.
            options: Passed to the blueprint; `source="own"` is the module in front of the slot.

        Raises:
            IllegalTransition: The slot holds a living seed, is cooling down or TERMINATED.
            BlueprintError: Unknown blueprint or option.
            ValueError: Unknown operator, the blueprint refuses an option's value or the width, an
                option is nothing that JSON can hold, or there is no optimizer state to copy.
            OwnershipError: The seed shares a parameter with another owner.
            RuntimeError: The module that the slot stood behind was replaced by another one.
            GerminationError: Building raised, the breaker is open, or G0 refused.
            In each case the model is as it was.

        Effects: random streams are left as they were. The compiled graph does not change yet.
        """
        owner = self._attached()
        life = self._life_for_next_seed()
        owner.check_in_place(self.path)
        wanted = self.config.blend_operator if blend_operator is None else blend_operator
        operator = choose(BlendOperator, wanted, "blend operator")
        order = self._order(blueprint, options, operator)
        state_of = state_source(order, subject=life.subject) if copy_optimizer_state else None
        random_seed = derive_random_seed(self.config.random_seed, self.path, life.number)
        breaker = owner.breaker(blueprint)
        new, events = sprout_guarded(
            order,
            breaker,
            path=self.path,
            subject=life.subject,
            random_seed=random_seed,
            check_unshared=lambda seed: owner.check_unshared(self.path, seed),
        )
        if new.branch.contextual and self.isolation is not Isolation.NONE:
            self.example_call.refuse_opaque(self.path)
        life.blueprint, life.measurements = blueprint, new.measurements
        gate = life.judge(SeedStage.GERMINATED, force=False, breaker_closed=breaker.allows)
        events.append(gate)
        if not gate.result.passed:
            raise GerminationError(f"{life.subject}: {gate.result}", events)
        germinated = SeedGerminated(  # refuses options that no event can hold, so it comes first
            slot=self.path,
            blueprint=blueprint,
            options=dict(order.options),
            param_count=new.branch.param_count,
            blend_operator=operator,
            isolation=self.isolation,
            objective=self.config.objective,
            prewarm_ms=new.measurements.prewarm_ms,
        )
        registered = self._register(life, new.branch, state_of)
        draws = new.draws_random_numbers
        self._stream = SeparateRandomStream(random_seed) if draws else None
        return [*events, registered, germinated]

    @torch.inference_mode(mode=False)
    def foreseen(
        self,
        blueprint: str,
        *,
        blend_operator: BlendOperator | str | None = None,
        **options: Any,
    ) -> SeedSlot:
        """Return a copy of the slot with a seed as `germinate` would build it now.

        The copy runs, but cannot grow. The slot itself is as it was, breakers included.

        Args:
            blueprint: As for `germinate`.
            blend_operator: The same.
            options: The same.

        Raises:
            IllegalTransition: The slot holds a living seed, is cooling down or TERMINATED.
            Exception: What building raises.

        Effects: random streams are left as they were.
        """
        life = self._life_for_next_seed()
        wanted = self.config.blend_operator if blend_operator is None else blend_operator
        operator = choose(BlendOperator, wanted, "blend operator")
        random_seed = derive_random_seed(self.config.random_seed, self.path, life.number)
        new = sprout(
            self._order(blueprint, options, operator),
            random_seed=random_seed,
            check_unshared=lambda _: None,
        )
        copied = graph_free_copy(self, {id(self.hook_handle): None})
        copied._begin(life, new.branch.train(self.training))  # noqa: SLF001 – its own copy
        if new.draws_random_numbers:
            copied._stream = SeparateRandomStream(random_seed)  # noqa: SLF001
        return copied

    def _begin(self, life: SeedLife, branch: SeedBranch) -> None:
        self.branches = nn.ModuleList([*self.branches, branch])
        self._life = life
        life.enter(SeedStage.GERMINATED)
        self._follow_stage()

    def _register(self, life: SeedLife, branch: SeedBranch, state_of: str | None) -> Event:
        branch.train(self.training)
        self._attached().shard(branch)
        before = self.branches
        self.branches = nn.ModuleList([*before, branch])
        try:
            self._attached().seed_added(self.path, branch, state_of=state_of)
        except BaseException:
            self.branches = before
            raise
        self._life = life
        self._forget_nonfinite_steps()
        self._guard = GradientGuard(branch, lambda: self._nonfinite_now)
        self._note_branches()
        return life.enter(SeedStage.GERMINATED)

    def advance(self, force: bool = False) -> list[Event]:
        """Take the next stage through its gate.

        A refusal changes nothing and is told by the returned GateEvaluated event. A seed whose
        forward has raised is pruned instead; of several processes, as soon as all of them know it,
        which they do after the next step. After a prune, each call takes one step of the way back
        to DORMANT.

        Args:
            force: Skip the gate's verdict, not its bookkeeping. A forced entry into SHADOWING sets
                alpha to 1, since the stages from there on are defined at full alpha.

        Raises:
            IllegalTransition: No stage follows, the embargo is not over, or the seed is fading out.
        """
        life = self._life
        if self.fading:
            raise IllegalTransition(
                life.stage,
                next_stage(life.stage),
                subject=life.subject,
                problem="is fading out and cannot advance",
            )
        if life.stage is SeedStage.DORMANT or self._may_grow_again:
            raise IllegalTransition(
                life.stage,
                SeedStage.GERMINATED,
                subject=life.subject,
                problem=f"is {life.stage.name} and needs germinate(blueprint), not advance()",
            )
        if life.stage in RECOVERY_PATH:
            return self._recover(force=force)
        owner, blueprint = self._attached(), life.blueprint
        if self._failure is not None and owner.all_know_failure(self.path):
            return self._remove_failed(self._failure)
        stage = next_stage(life.stage, subject=life.subject)
        assert blueprint is not None
        life.measurements.parameters_finite = parameters_finite(self._living_branch())
        gate = life.judge(stage, force=force, breaker_closed=owner.breaker(blueprint).allows)
        if not (gate.result.passed or force):
            return [gate]
        return [gate, *self._enter_growth_stage(stage)]

    def _enter_growth_stage(self, stage: SeedStage) -> list[Event]:
        life, events = self._life, []
        if stage is SeedStage.BLENDING:
            events += self._rescale()
        elif stage is SeedStage.SHADOWING and not self._holds_full_alpha():
            life.alpha = AlphaController(AlphaState(alpha=1.0, start=1.0, target=1.0))
            self.blend_alpha.fill_(1.0)
            events.append(AlphaTargetReached(slot=self.path, alpha=1.0))
        elif stage is SeedStage.FOSSILIZED:
            events.append(self._hand_over())
        events.append(life.enter(stage))
        self._follow_stage()
        return events

    def _holds_full_alpha(self) -> bool:
        return self._life.alpha.mode is AlphaMode.HOLD and self.alpha == 1.0

    @contextmanager
    def rescaled(self) -> Iterator[None]:
        """Run the block with the living seed scaled by its best amplitude, as blending will be."""
        branch = self._living_branch()
        layers, before = branch.seed.output_layers, branch.rescaled
        kept = [(p, p.detach().clone()) for layer in layers for p in layer.parameters()]
        self._rescale()
        try:
            yield
        finally:
            branch.rescaled = before
            with torch.no_grad():
                for parameter, values in kept:
                    parameter.copy_(values)

    def _rescale(self) -> list[Event]:
        branch, amplitude = self._living_branch(), self._life.measurements.best_amplitude
        if amplitude in (None, 0.0, 1.0) or not branch.seed.output_layers:
            return []
        assert amplitude is not None
        branch.rescale(amplitude)
        return [SeedRescaled(slot=self.path, factor=amplitude)]

    def set_alpha_target(
        self,
        target: float,
        steps: int,
        *,
        curve: AlphaCurve | str = AlphaCurve.COSINE,
        steepness: float = DEFAULT_STEEPNESS,
    ) -> list[Event]:
        """Start an alpha ramp; `tick` moves it, `steps` 0 arrives at once.

        Raises:
            IllegalTransition: The seed is not BLENDING.
            ValueError: A ramp is under way, or an argument is out of its range.

        Effects: alpha's buffer is written in place; no compiled graph changes.
        """
        life = self._life
        if life.stage is not SeedStage.BLENDING or self.fading:
            only = f"is {life.stage.name}; alpha can be set only in BLENDING"
            raise IllegalTransition(
                life.stage,
                SeedStage.BLENDING,
                subject=life.subject,
                problem="is fading out; its alpha cannot be set" if self.fading else only,
            )
        known_curve = choose_curve(curve)
        return self._start_ramp(target, steps, curve=known_curve, steepness=steepness)

    def _start_ramp(
        self,
        target: float,
        steps: int,
        *,
        curve: AlphaCurve = AlphaCurve.COSINE,
        steepness: float = DEFAULT_STEEPNESS,
    ) -> list[Event]:
        controller, before = self._life.alpha, self.alpha
        controller.retarget(target, steps, curve=curve, steepness=steepness)
        self.blend_alpha.fill_(controller.alpha)
        started: list[Event] = [
            AlphaTargetSet(
                slot=self.path, from_alpha=before, target=target, steps=steps, curve=curve
            )
        ]
        arrived = [AlphaTargetReached(slot=self.path, alpha=target)] if steps == 0 else []
        return started + arrived

    def commit(self) -> list[Event]:
        """Hand the seed on trial to the host, now.

        The caller decides: gate G5 is judged and recorded, but does not stop it. `advance` is the
        commit that G5 can refuse.

        Raises:
            IllegalTransition: The seed is not PROBATIONARY.

        Effects: neither the forward nor the compiled graph changes; the parameters become the
        host's and keep their optimizer state.
        """
        check_transition(self.stage, SeedStage.FOSSILIZED, subject=self._life.subject)
        return self.advance(force=True)

    def _hand_over(self) -> Event:
        branch = self._living_branch()
        self._attached().seed_committed(self.path, branch)
        self._drop_guard()
        self._failure = None  # one that this process alone knows of
        record = CommittedSeed(
            blueprint=branch.blueprint,
            options=branch.options,
            blend_operator=branch.blend_operator,
            param_count=branch.param_count,
            contribution_fraction=self.measurements.contribution_fraction,
        )
        self.committed.append(record)
        self.num_committed += 1
        return SeedCommitted(
            slot=self.path,
            blueprint=record.blueprint,
            param_count=record.param_count,
            contribution_fraction=record.contribution_fraction,
        )

    @property
    def _may_grow_again(self) -> bool:
        committed = self._life.stage is SeedStage.FOSSILIZED
        return committed and len(self.committed) < self.config.max_committed

    def _life_for_next_seed(self) -> SeedLife:
        current = self._life
        if self._may_grow_again:
            return self._new_life(current.number + 1)
        check_transition(current.stage, SeedStage.GERMINATED, subject=current.subject)
        return self._new_life(current.number)

    # Removing

    def prune(self, over_steps: int = 0, *, reason: str = "asked") -> list[Event]:
        """Remove the living seed, now or after fading it out.

        Args:
            over_steps: Steps in which alpha goes to 0 with the seed's parameters frozen; a seed
                that is not in the forward path has nothing to fade and goes at once.
            reason: For the event.

        Raises:
            IllegalTransition: There is no living seed.
            TypeError: `over_steps` is no whole number.
            ValueError: It is negative.
        """
        life = self._life
        check_transition(life.stage, SeedStage.PRUNED, subject=life.subject)
        self._attached()
        over_steps = index(over_steps)
        if over_steps < 0:
            raise ValueError(f"over_steps must not be negative, got {over_steps}")
        if over_steps == 0 or life.alpha.alpha == 0.0:
            return self._remove(reason)
        events: list[Event] = []
        if life.stage is SeedStage.PROBATIONARY:
            events.append(life.enter(SeedStage.BLENDING))
        life.alpha.hold()
        events += self._start_ramp(0.0, over_steps)
        life.fading_because = reason
        self._follow_stage()
        return events

    def _remove(self, reason: str) -> list[Event]:
        life, branch, owner = self._life, self._living_branch(), self._attached()
        self._drop_guard()
        self._stream = self._failure = None
        self.branches = nn.ModuleList(list(self.branches)[: self.num_committed])
        owner.seed_removed(self.path, branch)
        pruned = SeedPruned(
            slot=self.path, blueprint=branch.blueprint, from_stage=life.stage, reason=reason
        )
        changed = life.enter(SeedStage.PRUNED)
        life.alpha = AlphaController()
        life.measurements = SeedMeasurements()
        life.blueprint = life.fading_because = None
        self.blend_alpha.zero_()
        self._forget_nonfinite_steps()
        self._follow_stage()
        return [pruned, changed]

    def _remove_failed(self, error: str) -> list[Event]:
        blueprint = self._life.blueprint
        assert blueprint is not None
        failed = SeedFailed(slot=self.path, blueprint=blueprint, error=error)
        return [failed, *self._remove(f"its forward raised {error}")]

    def _recover(self, *, force: bool) -> list[Event]:
        life = self._life
        if life.stage is SeedStage.EMBARGOED:
            left = self.config.embargo_epochs - life.epochs_in_stage
            if left > 0 and not force:
                raise IllegalTransition(
                    life.stage,
                    SeedStage.RESETTING,
                    subject=life.subject,
                    problem=f"is EMBARGOED for {left} more epochs; advance(force=True) ends that",
                )
        if life.stage is not SeedStage.RESETTING:
            return [life.enter(next_stage(life.stage))]
        leftovers = self._attached().leftovers(self.path)
        reset = SlotReset(slot=self.path, leftovers=leftovers)
        if leftovers:
            return [reset]
        changed = life.enter(SeedStage.DORMANT)
        self._life = self._new_life(life.number + 1)
        return [reset, changed]

    # Time

    def tick(self, *, learned: bool = True) -> list[Event]:
        """Let one batch pass: count it, move alpha, finish a fade-out, prune a failed seed.

        Args:
            learned: Whether the optimizer has stepped; else a seed has learned nothing.

        Raises:
            RuntimeError: The seed learns in shadow, and no pass was made since the last tick.
        """
        life = self._life
        if life.stage not in LIVING_STAGES:
            return []
        if self._failure is not None:
            return self._remove_failed(self._failure)
        life.steps_in_stage += 1
        self._count_nonfinite_step(learned=learned)
        if life.stage is SeedStage.TRAINING:
            self._count_training_step(learned=learned)
        if self.mode is not ForwardMode.BLENDED:
            return []
        before = life.alpha.alpha
        arrived = life.alpha.tick()
        if life.alpha.alpha != before:
            self.blend_alpha.fill_(life.alpha.alpha)
        if not arrived:
            return []
        reached = AlphaTargetReached(slot=self.path, alpha=life.alpha.alpha)
        if life.fading_because is not None:
            return [reached, *self._remove(life.fading_because)]
        return [reached]

    def end_epoch(self) -> list[Event]:
        """Let one epoch pass: count it, and move on from stages that only wait."""
        life = self._life
        if life.stage is SeedStage.PRUNED:
            return [life.enter(SeedStage.EMBARGOED)]
        life.epochs_in_stage += 1
        if life.stage is SeedStage.FOSSILIZED and len(self.committed) >= self.config.max_committed:
            return [life.enter(SeedStage.TERMINATED)]
        if life.stage is SeedStage.EMBARGOED:
            if life.epochs_in_stage < self.config.embargo_epochs:
                return []
            return [*self._recover(force=False), *self._recover(force=False)]
        if life.stage is SeedStage.RESETTING:
            return self._recover(force=False)
        return []

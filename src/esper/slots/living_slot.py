"""A slot with a life in it: what it knows of its seed, and a forward that follows the stage."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.lifecycle.actions import SlotState
from esper.lifecycle.learning import Isolation, SeedObjective
from esper.lifecycle.stages import LIVING_STAGES, SeedStage
from esper.seeds.registry import Family
from esper.seeds.seed import Seed
from esper.slots.branch import SeedBranch
from esper.slots.call_arguments import NO_ARGUMENTS, CallArguments
from esper.slots.committed_seed import CommittedSeed
from esper.slots.config import SlotConfig
from esper.slots.germination import FeatureLayout, probe_samples
from esper.slots.gradient_guard import GradientGuard
from esper.slots.life import SeedLife
from esper.slots.measurements import SeedMeasurements
from esper.slots.slot_forward import ForwardKind, ForwardMode, SlotForward
from esper.slots.slot_owner import SlotOwner

_WITHOUT_A_SHADOW = (
    "{subject} learns in shadow, and no shadow pass was made in this step, so that it would never "
    "train; call growth.shadow_pass(lambda: criterion(model(x), y)) before each forward with the "
    "model in train mode (esper.Trainer does), or choose another SlotConfig(objective=…)"
)
_GRADIENT_GONE = (
    "{subject} learns in shadow, and the gradients that its shadow pass left in .grad are gone "
    "before the optimizer's step; call optimizer.zero_grad() before growth.shadow_pass(…), or "
    "right after optimizer.step()"
)

_STAGES_THAT_RUN = (
    SeedStage.TRAINING,
    SeedStage.BLENDING,
    SeedStage.SHADOWING,
    SeedStage.PROBATIONARY,
)
"""Stages in which a living seed's forward runs, from the first to the last."""

_FORCEABLE = LIVING_STAGES - {SeedStage.GERMINATED}


class LivingSlot(SlotForward):
    """Knows its seed's life, and keeps what the forward reads in step with it.

    The base of `KeptSlot`, whose state can be taken and given back, and so of `SeedSlot`, whose
    methods change that life.
    """

    def __init__(
        self,
        path: str,
        layout: FeatureLayout,
        config: SlotConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        call: CallArguments,
        first_parameter: str | None,
        owner: SlotOwner,
    ) -> None:
        super().__init__(layout, config, device=device, dtype=dtype)
        self.path = path
        self.example_samples = probe_samples(layout.shape)
        self.example_call = call.kept(layout.shape[0], self.example_samples)
        self.first_parameter = first_parameter
        self.hook_handle: RemovableHandle | None = None
        self.committed: list[CommittedSeed] = []
        self.nonfinite_steps: Tensor
        """Optimizer steps in which a gradient of the living, isolated seed was not finite."""
        count = torch.zeros((), device=device, dtype=torch.int32)
        self.register_buffer("nonfinite_steps", count, persistent=False)
        self._nonfinite_now: Tensor
        """Whether one was since the last tick."""
        now = torch.zeros((), device=device, dtype=torch.bool)
        self.register_buffer("_nonfinite_now", now, persistent=False)
        self._owner: SlotOwner | None = owner
        self._guard: GradientGuard | None = None
        self._shadow_passes = 0
        """Since the last tick."""
        self._shadow_gradient_came = False
        self._life = self._new_life(0)
        before_loading: Callable[..., Any] = self.register_load_state_dict_pre_hook
        before_loading(_tell_of_missing_growth)
        after_loading: Callable[..., Any] = self.register_load_state_dict_post_hook
        after_loading(_guard_what_was_loaded)

    @property
    def stage(self) -> SeedStage:
        """Where the current seed stands."""
        return self._life.stage

    @property
    def alpha(self) -> float:
        """Weight of the living seed's increment in the host's output, in [0, 1]."""
        return self._life.alpha.alpha

    @property
    def seed(self) -> Seed | None:
        """The living seed; None when the slot holds none."""
        branch = self.living
        return None if branch is None else branch.seed

    @property
    def family(self) -> Family:
        """How the features are laid out."""
        return self.layout.family

    @property
    def dim(self) -> int:
        """The feature width."""
        return self.layout.dim

    @property
    def isolation(self) -> Isolation:
        """Up to which stage seeds here are isolated."""
        return self.config.isolation

    @property
    def measurements(self) -> SeedMeasurements:
        """What has been measured of the current seed; the growth engine writes into it."""
        return self._life.measurements

    @property
    def draws_random_numbers(self) -> bool:
        """Whether the living seed's forward draws random numbers, as dropout does."""
        return self._stream is not None

    @property
    def fading(self) -> bool:
        """Whether a fade-out is under way."""
        return self._life.fading_because is not None

    @property
    def frozen(self) -> bool:
        """Whether the living seed's parameters are kept from moving."""
        life = self._life  # in each step: calls take 3 µs where a backward has emptied the caches
        return life.stage is SeedStage.SHADOWING or life.fading_because is not None

    @property
    def in_forward_path(self) -> bool:
        """Whether the living seed takes part in the host's output."""
        return self.mode in (ForwardMode.BLENDED, ForwardMode.INLINED)

    @property
    def learns_in_shadow(self) -> bool:
        """Whether the seed trains behind the host in passes beside the step."""
        return self.stage is SeedStage.TRAINING and self.config.objective is SeedObjective.SHADOW

    def note_shadow_pass(self) -> None:
        """Count a pass, and whether it gave the seed a gradient."""
        self._shadow_passes += 1
        self._shadow_gradient_came |= self._has_gradient()

    def check_shadow_gradient(self) -> None:
        """Raise if what a shadow pass gave the seed is gone before the optimizer can use it.

        Raises:
            RuntimeError: It is.
        """
        if self._shadow_gradient_came and self.learns_in_shadow and not self._has_gradient():
            raise RuntimeError(_GRADIENT_GONE.format(subject=self._life.subject))

    @property
    def guarded(self) -> bool:
        """Whether hooks stand on a seed's gradients."""
        return self._guard is not None

    def state(self) -> SlotState:
        """Return what a policy sees."""
        life, measured = self._life, self._life.measurements
        return SlotState(
            path=self.path,
            family=self.family,
            dim=self.dim,
            stage=life.stage,
            blueprint=life.blueprint,
            alpha=life.alpha.alpha,
            alpha_mode=life.alpha.mode,
            live=life.live,
            fading=self.fading,
            epochs_in_stage=life.epochs_in_stage,
            steps_in_stage=life.steps_in_stage,
            refusals_in_stage=life.refusals_in_stage,
            committed=len(self.committed),
            max_committed=self.config.max_committed,
            gradient_ratio=measured.gradient_ratio,
            line_search_gain_fraction=measured.line_search_gain_fraction,
            contribution_fraction=measured.contribution_fraction,
            choices=self._attached().choices(self.path),
        )

    @contextmanager
    def force_alpha(self, alpha: float | Tensor) -> Iterator[None]:
        """Run the living seed at another alpha inside the block, also one still TRAINING.

        Where alpha is 0 the seed does not run.

        Args:
            alpha: One value, or one per sample of the batch that will be run, shape `B`.

        Raises:
            RuntimeError: The slot is in train mode.
            ValueError: There is no seed that has begun to train.

        A forward inside raises ValueError if the features have not one row per sample, as where the
        host folds tokens or windows into the batch, and alphas are.
        """
        if self.training:
            raise RuntimeError(
                f"slot {self.path!r} is in train mode; forcing alpha is for measuring, call "
                "model.eval() first"
            )
        if self.stage not in _FORCEABLE:
            raise ValueError(
                f"slot {self.path!r} is {self.stage.name}; there is no trained seed to weigh"
            )
        before = self.forced_alpha, self.forced_rows, self.active
        device, alphas = self.blend_alpha.device, torch.as_tensor(alpha)
        rows = alphas.reshape(-1).nonzero().flatten()
        self.forced_alpha = alphas.to(device)
        self.forced_rows = None if len(rows) == alphas.numel() else rows.to(device)
        self.active = True
        try:
            yield
        finally:
            self.forced_alpha, self.forced_rows, self.active = before

    @contextmanager
    def measure_as(self, increment: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Mix in something else than the seed's increment wherever alpha is forced in the block.

        Args:
            increment: From the features and the seed's increment, of the same shape.
        """
        before = self.measured_as
        self.measured_as = increment
        try:
            yield
        finally:
            self.measured_as = before

    @property
    def owner(self) -> SlotOwner | None:
        """The set this slot belongs to; None in a copy of the model."""
        return self._owner

    def release(self) -> None:
        """Let go of the slot set; the slot cannot grow any more. `detach` does this."""
        self._owner = None
        self.example_call = NO_ARGUMENTS

    def _new_life(self, number: int) -> SeedLife:
        return SeedLife(
            self.path,
            number=number,
            thresholds=self.config.thresholds,
            live=self.isolation is Isolation.NONE,
        )

    def kinds_to_come(self, *, from_birth: bool = False) -> list[ForwardKind]:
        """Return what the forward does now, or will do in the living seed's life, where it runs.

        Args:
            from_birth: Include what it did in the living seed's life before.
        """
        stages = [self.stage]
        if self.living is not None and (from_birth or not self.fading):
            live = self.isolation is Isolation.NONE
            first = _STAGES_THAT_RUN.index(SeedStage.BLENDING if live else SeedStage.TRAINING)
            if self.stage is not SeedStage.GERMINATED:
                now = _STAGES_THAT_RUN.index(self.stage)
                first = min(first, now) if from_birth else now
            stages = list(_STAGES_THAT_RUN[first:])
        kinds = [self._kind_in(stage) for stage in stages]
        runs = [k for k in kinds if k.num_inlined or k.mode is not ForwardMode.PASS_THROUGH]
        return list({kind.graph: kind for kind in runs}.values())

    def _kind_in(self, stage: SeedStage) -> ForwardKind:
        in_blend = stage in (SeedStage.BLENDING, SeedStage.SHADOWING)
        mode = ForwardMode.PASS_THROUGH
        if in_blend:
            mode = ForwardMode.BLENDED
        elif stage is SeedStage.PROBATIONARY:
            mode = ForwardMode.INLINED
        elif stage is SeedStage.TRAINING and self.config.objective is not SeedObjective.SHADOW:
            mode = ForwardMode.STRAIGHT_THROUGH
        return self.kind_of(
            mode,
            self.num_committed + (mode is ForwardMode.INLINED),
            isolated=not in_blend or self.isolation is Isolation.SHADOWING,
        )

    def _forward_changes(self) -> None:
        if self._owner is not None:
            self._owner.forward_changes()

    def withhold_failure(self) -> str | None:
        """Return what the living seed has raised, and run it as if nothing had happened."""
        failure = self.take_failure()
        if failure is not None:
            self._run_by_stage()
        return failure

    def _run_by_stage(self) -> None:
        kind = self._kind_in(self.stage)
        if kind != self.kind:
            self._forward_changes()
        self.mode, self.num_inlined, self.isolated = kind.mode, kind.num_inlined, kind.isolated

    def _follow_stage(self) -> None:
        stage = self.stage
        self._shadow_passes, self._shadow_gradient_came = 0, False
        self._run_by_stage()
        self.active = self.num_inlined > 0 or self.mode is not ForwardMode.PASS_THROUGH
        self._note_branches()
        if self._guard is not None:
            self._guard.frozen = self.frozen
            self._guard.sanitising = self.isolated and stage is not SeedStage.PROBATIONARY
        if self.frozen:
            # A step that does not run the seed must find no gradient of an earlier one.
            self._living_branch().zero_grad(set_to_none=True)

    def _count_training_step(self, *, learned: bool) -> None:
        life, in_shadow = self._life, self.config.objective is SeedObjective.SHADOW
        if in_shadow and self._shadow_passes == 0:
            if life.steps_in_stage > 1:  # a seed may have begun after this step's forward
                raise RuntimeError(_WITHOUT_A_SHADOW.format(subject=life.subject))
            return
        if self.training or in_shadow:  # else the seed has not run
            life.measurements.training_steps += learned
        if self._shadow_passes:
            self._shadow_passes, self._shadow_gradient_came = 0, False

    def _count_nonfinite_step(self, *, learned: bool) -> None:
        guard = self._guard
        if guard is not None and guard.sanitising and guard.may_be_broken:
            now = self._nonfinite_now
            if learned:
                self.nonfinite_steps.add_(now)
            now.zero_()
            guard.may_be_broken = not now.is_cpu

    def _forget_nonfinite_steps(self) -> None:
        self.nonfinite_steps.zero_()
        self._nonfinite_now.zero_()

    def _has_gradient(self) -> bool:
        return any(p.grad is not None for p in self._living_branch().parameters())

    def _note_branches(self) -> None:
        branches = [branch for branch in self.branches if isinstance(branch, SeedBranch)]
        self.contextual = any(branch.contextual for branch in branches)
        in_path = branches if self.in_forward_path else branches[: self.num_committed]
        self.mixes_tokens = any(branch.mixes_tokens for branch in in_path)

    def guard_again(self) -> None:
        """Guard the living seed's parameters as they are now: loading may have replaced them."""
        if self._guard is not None:
            self._guard.watch(self._living_branch())

    def _drop_guard(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    def _living_branch(self) -> SeedBranch:
        branch = self.living
        assert branch is not None
        return branch

    def _attached(self) -> SlotOwner:
        if self._owner is None:
            raise RuntimeError(
                f"slot {self.path!r} was detached, or belongs to a copy of the model, which can "
                "run but not grow; grow the original, or detach the copy and attach to it anew"
            )
        return self._owner

    def __getstate__(self) -> dict[str, Any]:
        """Leave the slot set behind: a copied or pickled model runs, but does not grow."""
        state = {**self.__dict__, "_owner": None, "_guard": None, "example_call": NO_ARGUMENTS}
        state.pop("forward", None)  # that stands in for the slot's own, as a compiled one
        return state

    def extra_repr(self) -> str:
        return f"{self.path!r}, {self.stage.name}, alpha={self.alpha:g}"


def _guard_what_was_loaded(slot: nn.Module, _: Any) -> None:
    """Load-state-dict post hook: `assign=True` puts other parameters in place of the old ones."""
    assert isinstance(slot, LivingSlot)
    slot.guard_again()


def _tell_of_missing_growth(
    slot: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Load-state-dict pre hook: torch names keys, or nothing at all where it is not strict."""
    assert isinstance(slot, LivingSlot)
    given = _numbers_of_seeds(state, f"{prefix}branches.")
    here = _numbers_of_seeds(slot.state_dict(), "branches.")
    if given - here:
        warnings.warn(
            f"seeds in slot {slot.path!r}, with the committed ones: {len(here)} here, {len(given)} "
            "in the weights that are loaded, which are lost; before loading them let the slot "
            "become what it was then, by growth.load_state_dict(…) or slots.load_state_dict(…) "
            "with what was kept beside the weights; esper.from_pretrained(…) brings both",
            stacklevel=2,
        )


def _numbers_of_seeds(names: Iterable[str], start: str) -> set[str]:
    return {name.removeprefix(start).split(".", 1)[0] for name in names if name.startswith(start)}

"""The forward half of a slot: what the host's features meet on their way."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper.blending.operators import blend
from esper.blending.straight_through import straight_through
from esper.slots.branch import SeedBranch
from esper.slots.call_arguments import NO_ARGUMENTS, CallArguments
from esper.slots.config import SlotConfig
from esper.slots.germination import FeatureLayout
from esper.slots.modes import SeparateRandomStream


class ForwardMode(Enum):
    """What a compiled graph sees of a living seed; a change costs one new graph at most."""

    PASS_THROUGH = 0
    STRAIGHT_THROUGH = 1
    BLENDED = 2
    INLINED = 3
    """`h + u`, just as committed seeds run, so that a commit changes no graph."""
    SHADOWED = 4
    """`h + u` with h detached, beside the step only; see `cast_shadow`."""


class ForwardKind(NamedTuple):
    """What a slot's forward does, apart from values."""

    mode: ForwardMode
    num_inlined: int
    isolated: bool
    graph: Hashable
    """Equal kinds of graphs have equal ones: a commit changes no graph."""


class SlotForward(nn.Module):
    """Applies a slot's branches to features; which, and how, is set by the slot's life.

    Only what the forward reads is here: a compiled graph guards on these attributes and on nothing
    else of a slot. The base of `LivingSlot`, which sets them.
    """

    def __init__(
        self,
        layout: FeatureLayout,
        config: SlotConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.config = config
        self.branches = nn.ModuleList()
        """Committed seeds in the order of their commits, then the living one."""
        self.mode = ForwardMode.PASS_THROUGH
        self.isolated = True
        self.active = False
        """Whether the forward does anything; else the hook calls it only where it is watched."""
        self.watched = False
        """Whether somebody who stands in for the forward wants to see a call."""
        self.severed = False
        """No gradient path leads through the blended seed; see `sever`."""
        self.num_committed = 0
        self.contextual = False
        """Whether a seed here reads the call's further arguments."""
        self.mixes_tokens = False
        """Whether a seed here mixes tokens."""
        self.num_inlined = 0
        """Branches, from the first, that run as `h + u`: the committed and one on probation."""
        self.forced_alpha: Tensor | None = None
        self.forced_rows: Tensor | None = None
        """With `forced_alpha` per sample: those of another alpha than 0; None for all."""
        self.measured_as: Callable[[Tensor, Tensor], Tensor] | None = None
        """With `forced_alpha`: from features and the living seed's increment, what is mixed in."""
        self.blend_alpha: Tensor
        alpha = torch.zeros((), device=device, dtype=dtype)
        self.register_buffer("blend_alpha", alpha, persistent=False)
        self._stream: SeparateRandomStream | None = None
        self._failure: str | None = None

    def branch(self, index: int) -> SeedBranch:
        """Return one of the branches."""
        branch = self.branches[index]
        assert isinstance(branch, SeedBranch)
        return branch

    @property
    def living(self) -> SeedBranch | None:
        """The living seed with its operator; None when the slot holds none."""
        if len(self.branches) == self.num_committed:
            return None
        return self.branch(self.num_committed)

    @property
    def kind(self) -> ForwardKind:
        """What the forward does now."""
        return self.kind_of(self.mode, self.num_inlined, isolated=self.isolated)

    def kind_of(self, mode: ForwardMode, num_inlined: int, *, isolated: bool) -> ForwardKind:
        """Return what the forward does in a mode."""
        if num_inlined == len(self.branches):
            graph: Hashable = num_inlined
        else:
            blended = mode is ForwardMode.BLENDED
            graph = (mode, num_inlined, blended and isolated, blended and self.severed)
        return ForwardKind(mode, num_inlined, isolated, graph)

    @contextmanager
    def in_kind(self, kind: ForwardKind) -> Iterator[None]:
        """Run the forward as it will be then."""
        before = self.num_inlined, self.isolated
        self.num_inlined, self.isolated = kind.num_inlined, kind.isolated
        try:
            with self._in_mode(kind.mode, active=True):
                yield
        finally:
            self.num_inlined, self.isolated = before

    def prepare_seeds(self) -> None:
        """Let the seeds build what their increments look up."""
        for branch in self.branches:
            assert isinstance(branch, SeedBranch)
            branch.seed.prepare(self.layout.shape, self.blend_alpha.device)

    def forward(self, features: Tensor, call: CallArguments = NO_ARGUMENTS) -> Tensor:
        """Return the features with committed seeds applied and the living one mixed in by stage.

        Args:
            features: What came out of the host's module.
            call: What went into it, if a seed here reads that.
        """
        forced = self.forced_alpha
        for index, branch in enumerate(self.branches):
            if index < self.num_inlined and (forced is None or index < self.num_committed):
                increment = self._try(branch, features, features, call)
                if increment is not None:
                    features = features + increment
            elif forced is not None:
                features = self._weighed(branch, features, call, forced)
            else:
                features = self._meet_living(branch, features, call)
        return features

    def _weighed(
        self, branch: nn.Module, features: Tensor, call: CallArguments, forced: Tensor
    ) -> Tensor:
        """Return the features with the living seed at the forced alpha; at 0 it does not run."""
        if forced.numel() != 1 and forced.numel() != features.shape[0]:
            raise ValueError(
                f"features of shape {tuple(features.shape)} have not one row for each of "
                f"{forced.numel()} samples; force one alpha for all of them"
            )
        rows = self.forced_rows
        if rows is None:
            increment = self._try(branch, features, features, call)
            return features if increment is None else self._mixed(features, increment, forced)
        if rows.shape[0] == 0:
            return features
        chosen = features.index_select(0, rows)
        if call.has_tensors:  # nobody tells which of them have a row per sample
            increment = self._try(branch, features, features, call)
            increment = None if increment is None else increment.index_select(0, rows)
        else:
            increment = self._try(branch, chosen, chosen, call)
        if increment is None:
            return features
        return features.index_copy(0, rows, self._mixed(chosen, increment, forced[rows]))

    def _mixed(self, features: Tensor, increment: Tensor, alpha: Tensor) -> Tensor:
        if self.measured_as is not None:
            increment = self.measured_as(features, increment)
        alpha = alpha.to(features.dtype).reshape(-1, *(1,) * (features.ndim - 1))
        return blend(features, increment, alpha)

    def _meet_living(self, branch: nn.Module, features: Tensor, call: CallArguments) -> Tensor:
        if self.mode is ForwardMode.BLENDED:
            source = features.detach() if self.isolated else features
            read = call.detached() if self.isolated else call
            increment = self._try(branch, features, source, read, severed=self.severed)
            if increment is not None:
                features = blend(features, increment, self.blend_alpha)
        elif self.mode is ForwardMode.STRAIGHT_THROUGH and self.training:
            increment = self._increment_behind(branch, features.detach(), call.detached())
            if increment is not None:
                features = straight_through(
                    features,
                    increment,
                    objective=self.config.objective,
                    trust_fraction=self.config.trust_fraction,
                    overwritten=self.layout.overwritten,
                )
        elif self.mode is ForwardMode.SHADOWED:
            features = features.detach()
            increment = self._increment_behind(branch, features, call.detached())
            if increment is not None:
                features = features + increment
        return features

    @contextmanager
    def sever(self) -> Iterator[None]:
        """Run the forward with no gradient path through the living seed, values as ever.

        Effects: a seed behind the host does not run, as before it began to train, so a compiled
        host has the graph already; for a blended one it compiles one more.
        """
        self.severed = True
        try:
            with self.sit_out():
                yield
        finally:
            self.severed = False

    @contextmanager
    def sit_out(self) -> Iterator[None]:
        """Run the forward without a seed that trains behind the host; no value changes."""
        if self.mode is ForwardMode.STRAIGHT_THROUGH:
            with self._in_mode(ForwardMode.PASS_THROUGH, active=self.num_inlined > 0):
                yield
        else:
            yield

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Run the forward as it would be had the living seed never been there."""
        inlined, self.num_inlined = self.num_inlined, self.num_committed
        try:
            with self._in_mode(ForwardMode.PASS_THROUGH, active=self.num_committed > 0):
                yield
        finally:
            self.num_inlined = inlined

    @contextmanager
    def cast_shadow(self) -> Iterator[None]:
        """Run the forward as it would be at full alpha, with no gradient to what is upstream."""
        with self._in_mode(ForwardMode.SHADOWED, active=True):
            yield

    @contextmanager
    def _in_mode(self, mode: ForwardMode, *, active: bool) -> Iterator[None]:
        before = self.mode, self.active
        self.mode, self.active = mode, active
        try:
            yield
        finally:
            self.mode, self.active = before

    @contextmanager
    def unchanged_stream(self) -> Iterator[None]:
        """Give the living seed's own random stream back its place afterwards."""
        if self._stream is None:
            yield
        else:
            with self._stream.unchanged():
                yield

    def note_failure(self, error: str) -> None:
        """Run without the living seed, which has raised something; `tick` prunes it."""
        self._failure = error
        self._forward_changes()
        self.mode = ForwardMode.PASS_THROUGH
        self.num_inlined = self.num_committed

    @property
    def failed(self) -> bool:
        """Whether the living seed has raised something that is not acted on yet."""
        return self._failure is not None

    def take_failure(self) -> str | None:
        """Return what the living seed has raised, and forget it, so that `tick` does not prune."""
        failure, self._failure = self._failure, None
        return failure

    def _forward_changes(self) -> None:
        """What the forward does is about to change for good."""

    def _increment_behind(
        self, branch: nn.Module, detached: Tensor, call: CallArguments
    ) -> Tensor | None:
        if self._stream is None or torch.compiler.is_compiling():
            return self._try(branch, detached, detached, call)
        with self._stream.active(detached.device):
            return self._try(branch, detached, detached, call)

    def _try(
        self,
        branch: nn.Module,
        features: Tensor,
        seed_input: Tensor,
        call: CallArguments,
        *,
        severed: bool = False,
    ) -> Tensor | None:
        """Run a seed; if a living one raises, the host goes on without it and `tick` prunes it."""
        if torch.compiler.is_compiling():
            increment: Tensor = branch(features, seed_input, call, severed=severed)
            return increment
        try:
            increment = branch(features, seed_input, call, severed=severed)
        except Exception as error:  # whatever a living seed raises, the host must go on
            if branch is not self.living or stops_recomputation(error):
                raise
            self.note_failure(f"{type(error).__name__}: {error}")
            return None
        return increment


def stops_recomputation(error: Exception) -> bool:
    """Return whether an error is no error: torch ends the recomputation of activations with it."""
    return type(error).__module__ == "torch.utils.checkpoint"

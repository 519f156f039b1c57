"""A slot whose state can be taken and given back, with seeds built again where they are gone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from esper.lifecycle.alpha import BlendOperator
from esper.lifecycle.learning import Isolation, SeedObjective
from esper.slots.branch import SeedBranch
from esper.slots.germination import SeedOrder, build_again, with_own_source
from esper.slots.gradient_guard import GradientGuard
from esper.slots.living_slot import LivingSlot
from esper.slots.modes import SeparateRandomStream
from esper.slots.slot_snapshot import SeedRecipe, SlotSnapshot


class KeptSlot(LivingSlot):
    """Says what of the slot no state dict holds, and becomes what another such state says.

    The base of `SeedSlot`.
    """

    def snapshot(self) -> SlotSnapshot:
        """Return all of the slot that is neither in the state dict nor a tensor."""
        living = self.living
        return SlotSnapshot(
            family=self.family,
            dim=self.dim,
            config=self.config,
            committed=tuple(self.committed),
            living=None if living is None else SeedRecipe.of(living),
            life=self._life.snapshot(),
        )

    def growth_state(self) -> dict[str, Any]:
        """Return what of the slot is not in the model's state dict; tensors are copies.

        Raises:
            RuntimeError: A seed's forward has raised, and `tick` has not pruned it yet.
        """
        if self._failure is not None:
            raise RuntimeError(
                f"{self._life.subject} has raised {self._failure} and is about to be pruned; call "
                "tick(), then take the state"
            )
        return {
            "slot": self.snapshot().model_dump(mode="json"),
            "nonfinite_steps": self.nonfinite_steps.clone(),
            "random_stream": None if self._stream is None else self._stream.state_dict(),
        }

    @torch.inference_mode(mode=False)
    def branches_of(self, snapshot: SlotSnapshot) -> list[SeedBranch]:
        """Return the branches that a slot had, in their order; nothing is changed.

        A branch that is here in the same place, built the same way, is taken as it is; others are
        built anew, and their weights are yet to be loaded.

        Raises:
            BlueprintError: Unknown blueprint or option.
            ValueError: The slot is another one, or a blueprint refuses an option's value or the
                width, or builds another number of parameters than it did.

        Effects: random streams are left as they were.
        """
        snapshot.check_fits(self.path, family=self.family, dim=self.dim, config=self.config)
        branches: list[SeedBranch] = []
        for index, recipe in enumerate(snapshot.recipes):
            standing = self.branches[index] if index < len(self.branches) else None
            if isinstance(standing, SeedBranch) and SeedRecipe.of(standing) == recipe:
                branches.append(standing)
            else:
                order = self._order(recipe.blueprint, recipe.options, recipe.blend_operator)
                branch = build_again(order, param_count=recipe.param_count, path=self.path)
                self._attached().shard(branch)
                branches.append(branch.train(self.training))
        return branches

    def load_growth_state(
        self, snapshot: SlotSnapshot, state: Mapping[str, Any], branches: Sequence[SeedBranch]
    ) -> list[SeedBranch]:
        """Become what the slot was; `SlotSet.load_state_dict` does this.

        Args:
            snapshot: Of the slot.
            state: As `growth_state` returned it.
            branches: From `branches_of` of the snapshot.

        Returns:
            The branches that were here and are not any more.
        """
        self._drop_guard()
        removed = [b for b in self.branches if isinstance(b, SeedBranch) and b not in branches]
        if list(self.branches) != list(branches):
            self.branches = nn.ModuleList(branches)
        self.committed = list(snapshot.committed)
        self.num_committed = len(self.committed)
        self._life = self._new_life(snapshot.life.number)
        self._life.go_on_from(snapshot.life)
        self._failure = None
        self._stream = None
        if state["random_stream"] is not None:
            self._stream = SeparateRandomStream(0)
            self._stream.load_state_dict(state["random_stream"])
        self._forget_nonfinite_steps()
        self.nonfinite_steps.copy_(state["nonfinite_steps"])
        self.blend_alpha.fill_(self.alpha)
        if self.living is not None:
            self._guard = GradientGuard(self.living, lambda: self._nonfinite_now)
        self._follow_stage()
        return removed

    def _order(
        self, blueprint: str, options: Mapping[str, Any], blend_operator: BlendOperator
    ) -> SeedOrder:
        behind = self.isolation is not Isolation.NONE
        in_step = behind and self.config.objective is not SeedObjective.SHADOW
        return SeedOrder(
            blueprint=blueprint,
            options=with_own_source(self.family, blueprint, options, own_path=self.path),
            blend_operator=blend_operator,
            layout=self.layout,
            device=self.blend_alpha.device,
            dtype=self.blend_alpha.dtype,
            find_source=self._attached().copy_of_host_module,
            call=self.example_call,
            samples=self.example_samples,
            objective=self.config.objective if in_step else None,
        )

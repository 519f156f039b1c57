"""Gradient norms of host and seeds, measured without waiting for the device."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.slots.sharded import is_sharded, whole

VANISHING_RATIO = 1e-4
EXPLODING_RATIO = 1e3

NONFINITE_FRACTION = 0.5
LEAST_NONFINITE_STEPS = 3
"""A seed is lost whose gradients were not finite in so many of its steps, and in such a part."""

_SOON_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class GradientReading:
    """Means over the sampled steps since the last reading."""

    host_norm: float
    seed_norm: float
    ratio: float | None
    """(seed norm / host norm) * sqrt(host params / seed params), of parameters that are not
    frozen; 0 for a seed without any, None where the host's norm is 0 or a norm is not finite."""

    @property
    def vanishing(self) -> bool:
        """Whether the ratio lies below `VANISHING_RATIO`."""
        return self.ratio is not None and self.ratio < VANISHING_RATIO

    @property
    def exploding(self) -> bool:
        """Whether the ratio lies above `EXPLODING_RATIO`, or a norm is not finite."""
        finite = math.isfinite(self.seed_norm) and math.isfinite(self.host_norm)
        return not finite or (self.ratio is not None and self.ratio > EXPLODING_RATIO)


def is_lost(nonfinite_steps: int, *, steps: int) -> bool:
    """Return whether a seed's gradients were not finite too often for a few batches to be why."""
    many = nonfinite_steps >= LEAST_NONFINITE_STEPS
    return many and nonfinite_steps >= NONFINITE_FRACTION * steps


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together, 0-dim on their device, in O(1) launches."""
    gradients = [_dense(p.grad) for p in parameters if p.grad is not None]
    if not gradients or is_sharded(gradients[0]):
        return whole(torch.nn.utils.get_total_norm(gradients))
    # What get_total_norm does for tensors that foreach can take, in half of its time on a CPU.
    norms = torch._foreach_norm(gradients)  # noqa: SLF001
    device = norms[0].device
    here = [norm if norm.device == device else norm.to(device) for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(here))
    return total


def _dense(gradient: Tensor) -> Tensor:
    """Return the values of a sparse gradient, which have its norm, and any other as it is.

    Effects: to add up what a sparse one has twice waits for the device.
    """
    return gradient.coalesce().values() if gradient.is_sparse else gradient


class GradientHealth:
    """Collects norms on the device and reads them on demand.

    Measured is the first step after each decision, one soon after it, in which a seed that was just
    born has gradients in all of its layers, and from then on every `interval_steps`-th: reading all
    gradients once more takes 1 to 2 % of a step.

    Args:
        interval_steps: 1 measures every step.

    Raises:
        ValueError: `interval_steps` is below 1.
    """

    def __init__(self, interval_steps: int = 100) -> None:
        if interval_steps < 1:
            raise ValueError(f"interval_steps must be at least 1, got {interval_steps}")
        self.interval_steps = interval_steps
        self._steps = 0
        self._seed_norms: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._clipped: dict[str, Tensor] = {}

    def note_before_clipping(self, norms: Mapping[str, Tensor]) -> None:
        """Take over norms that clipping has computed for this step, by owner."""
        self._clipped = dict(norms)

    def step_is_due(self) -> bool:
        """Count an optimizer step that is about to be made, and return whether to measure it."""
        steps = self._steps
        self._steps = steps + 1
        if steps % self.interval_steps == 0 or steps == _SOON_STEPS:
            return True
        self._clipped = {}
        return False

    def decided(self) -> None:
        """Begin to count steps anew: what the network is may have changed."""
        self._steps = 0

    def measure(
        self,
        host: Sequence[nn.Parameter],
        seeds: Mapping[str, Iterable[nn.Parameter]],
        key: str,
        *,
        gradient_scale: Tensor | None = None,
    ) -> None:
        """Measure an optimizer step that is due. No host–device synchronisation.

        Args:
            host: The host's parameters.
            seeds: Parameters of the seeds that are learning, by owner.
            key: The owner name of the host.
            gradient_scale: 0-dim factor that is still in the gradients; None is 1.
        """
        clipped, self._clipped = self._clipped, {}
        if not seeds:
            return

        def norm_of(owner: str, parameters: Iterable[nn.Parameter]) -> Tensor:
            if owner in clipped:
                return clipped[owner]
            norm = gradient_norm(list(parameters))
            return norm if gradient_scale is None else norm / gradient_scale

        host_norm = norm_of(key, host)
        for owner, parameters in seeds.items():
            seed_norm = norm_of(owner, parameters)
            self._seed_norms.setdefault(owner, []).append((host_norm, seed_norm))

    def read(self, owner: str, *, host_params: int, seed_params: int) -> GradientReading | None:
        """Return the means for one owner and forget them; None if nothing was sampled.

        Effects: waits for the device.
        """
        pairs = self._seed_norms.pop(owner, None)
        if not pairs:
            return None
        hosts = _stacked([host for host, _ in pairs]).float()
        seeds = _stacked([seed for _, seed in pairs]).to(hosts.device).float()
        host_norm, seed_norm = torch.stack([hosts.mean(), seeds.mean()]).tolist()
        return GradientReading(
            host_norm=host_norm,
            seed_norm=seed_norm,
            ratio=_ratio(host_norm, seed_norm, host_params, seed_params),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was collected, between two steps; no host–device synchronisation."""
        return {
            "steps": self._steps,
            "norms": {
                owner: {
                    "host": _stacked([host for host, _ in pairs]),
                    "seed": _stacked([seed for _, seed in pairs]),
                }
                for owner, pairs in self._seed_norms.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], *, device: torch.device) -> None:
        """Go on from what was collected then, on the device of the steps to come."""
        self._steps = state["steps"]
        self._clipped = {}
        self._seed_norms = {
            owner: list(
                zip(
                    norms["host"].to(device).unbind(),
                    norms["seed"].to(device).unbind(),
                    strict=True,
                )
            )
            for owner, norms in state["norms"].items()
        }

    def forget(self, owner: str) -> None:
        """Drop what was collected of a removed seed."""
        self._seed_norms.pop(owner, None)
        self._clipped.pop(owner, None)

    def holds(self, owner: str) -> bool:
        """Whether anything of this owner is kept."""
        return owner in self._seed_norms or owner in self._clipped


def _stacked(norms: Sequence[Tensor]) -> Tensor:
    """Stack norms on the device of the last; that of a frozen host is on the CPU."""
    return torch.stack([norm.to(norms[-1].device) for norm in norms])


def _ratio(host_norm: float, seed_norm: float, host_params: int, seed_params: int) -> float | None:
    if seed_params == 0:
        return 0.0
    if host_norm == 0.0 or not (math.isfinite(host_norm) and math.isfinite(seed_norm)):
        return None
    return seed_norm / host_norm * math.sqrt(host_params / seed_params)

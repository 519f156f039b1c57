"""Weighing seeds on held-out data: which amplitude, which contribution."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn

from esper.lifecycle.events import AmplitudeSearched, ContributionMeasured, Event
from esper.lifecycle.stages import SeedStage
from esper.slots.counterfactual import Variant
from esper.slots.modes import evaluation_mode
from esper.slots.slot import SeedSlot
from esper.training.held_out import Evaluate, VariantEvaluator, metrics_of

AMPLITUDES = (0.0625, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
"""What the line search tries; 0, the host alone, is always among them. Wide, since an objective
knows the direction better than the size: benchmarks/seed_objective.py."""

_WEIGHABLE = frozenset({SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY})


@dataclass(frozen=True, kw_only=True)
class Saving:
    """How much lower a loss is than a reference, over the same samples."""

    fraction: float
    """Mean saving over the reference's mean."""
    standard_error_fraction: float | None
    """Of that mean; None where losses per sample are not known."""

    @property
    def lower_fraction(self) -> float:
        """One standard error below the mean; the mean itself where the error is not known."""
        return self.fraction - (self.standard_error_fraction or 0.0)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Held-out losses of one variant."""

    mean: float
    per_sample: Tensor | None

    def saving_over(self, reference: "Losses") -> Saving:
        """Return how much lower these losses are than the reference's."""
        scale = reference.mean if reference.mean != 0.0 else math.nan
        error = None
        if self.per_sample is not None and reference.per_sample is not None:
            differences = reference.per_sample - self.per_sample
            if differences.numel() > 1:
                spread = float(differences.std())
                error = spread / math.sqrt(differences.numel()) / scale
        saving = (reference.mean - self.mean) / scale
        return Saving(fraction=saving, standard_error_fraction=error)


def losses_of(
    model: nn.Module,
    slots: Mapping[str, SeedSlot],
    evaluate: Evaluate,
    variants: Sequence[Variant],
) -> list[Losses]:
    """Return the held-out losses of each variant, fused where the evaluation can."""
    if isinstance(evaluate, VariantEvaluator):
        samples = evaluate.variant_losses(slots, variants)
        means = [float(losses.mean()) for losses in samples]
        return [
            Losses(mean=mean, per_sample=losses)
            for mean, losses in zip(means, samples, strict=True)
        ]
    results = []
    for variant in variants:
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            for path, alpha in variant.items():
                stack.enter_context(slots[path].force_alpha(alpha))
            loss = metrics_of(evaluate())["loss"]
        results.append(Losses(mean=loss, per_sample=None))
    return results


def probe_seeds(model: nn.Module, slots: Mapping[str, SeedSlot], evaluate: Evaluate) -> list[Event]:
    """Measure every living seed that can be measured, and write it into its slot's measurements.

    A TRAINING seed that has trained long enough gets an amplitude line search; a seed at alpha 1
    gets its contribution, the loss without it against the loss with it.
    """
    trained = [path for path, slot in slots.items() if _searchable(slot)]
    weighable = [path for path, slot in slots.items() if _at_full_alpha(slot)]
    if not trained and not weighable:
        return []
    present = dict.fromkeys(trained, 0.0) | dict.fromkeys(weighable, 1.0)
    variants: list[dict[str, float]] = [present]
    variants += [{**present, path: 0.0} for path in weighable]
    variants += [{**present, path: a} for path in trained for a in AMPLITUDES]
    losses = losses_of(model, slots, evaluate, variants)
    base, rest = losses[0], iter(losses[1:])
    events = [_note_contribution(slots[path], base, next(rest)) for path in weighable]
    for path in trained:
        tried = [next(rest) for _ in AMPLITUDES]
        events.append(_note_amplitudes(slots[path], base, tried))
    return events


def _searchable(slot: SeedSlot) -> bool:
    enough = slot.config.thresholds.min_training_steps
    return slot.stage is SeedStage.TRAINING and slot.measurements.training_steps >= enough


def _at_full_alpha(slot: SeedSlot) -> bool:
    return slot.stage in _WEIGHABLE and slot.alpha == 1.0 and not slot.fading


def _note_contribution(slot: SeedSlot, with_seed: Losses, without: Losses) -> Event:
    saving = with_seed.saving_over(without)
    measured = slot.measurements
    measured.contribution_fraction = saving.lower_fraction
    if slot.stage is SeedStage.PROBATIONARY:
        measured.trial_contributions.append(saving.lower_fraction)
    return ContributionMeasured(
        slot=slot.path,
        stage=slot.stage,
        loss_with=with_seed.mean,
        loss_without=without.mean,
        contribution_fraction=saving.fraction,
        standard_error_fraction=saving.standard_error_fraction,
    )


def _note_amplitudes(slot: SeedSlot, host: Losses, tried: Sequence[Losses]) -> Event:
    finite = [index for index, losses in enumerate(tried) if math.isfinite(losses.mean)]
    best = min(finite, key=lambda index: tried[index].mean, default=0)
    saving = tried[best].saving_over(host)
    measured = slot.measurements
    measured.best_amplitude = AMPLITUDES[best]
    measured.line_search_gain_fraction = saving.lower_fraction
    return AmplitudeSearched(
        slot=slot.path,
        amplitudes=AMPLITUDES,
        losses=tuple(losses.mean for losses in tried),
        host_loss=host.mean,
        best_amplitude=AMPLITUDES[best],
        gain_fraction=saving.lower_fraction,
    )

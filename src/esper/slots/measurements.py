"""What has been measured of a living seed, collected for its gates."""

from dataclasses import dataclass, field

from esper.lifecycle.gates import GateInputs


@dataclass(kw_only=True)
class SeedMeasurements:
    """Measurements of one seed's life so far; `None` means not measured yet.

    Fractions are of held-out loss.
    """

    identity_error: float | None = None
    shape_matches: bool | None = None
    parameters_finite: bool | None = None
    parameters_unshared: bool | None = None
    prewarmed: bool | None = None
    prewarm_ms: float = 0.0
    isolation_leaks: int | None = None
    """As counted at germination, and one more for each violation that the monitor found since."""
    training_steps: int = 0
    host_learns: bool = True
    gradient_ratio: float | None = None
    line_search_gain_fraction: float | None = None
    best_amplitude: float | None = None
    reference_loss: float | None = None
    """Held-out loss before the seed entered the forward path, the last finite one; the first one
    after that where there was none."""
    loss_increase_fraction: float | None = None
    contribution_fraction: float | None = None
    linear_share: float | None = None
    over_linear_fraction: float | None = None
    step_time_ratio: float | None = None
    trial_contributions: list[float] = field(default_factory=list)
    trial_over_linear: list[float] = field(default_factory=list)

    def gate_inputs(
        self, *, live: bool, alpha: float, steps_at_target: int, breaker_closed: bool
    ) -> GateInputs:
        """Return the frozen record that gates judge."""
        return GateInputs(
            identity_error=self.identity_error,
            shape_matches=self.shape_matches,
            parameters_finite=self.parameters_finite,
            parameters_unshared=self.parameters_unshared,
            prewarmed=self.prewarmed,
            breaker_closed=breaker_closed,
            isolation_leaks=self.isolation_leaks,
            live=live,
            training_steps=self.training_steps,
            host_learns=self.host_learns,
            gradient_ratio=self.gradient_ratio,
            line_search_gain_fraction=self.line_search_gain_fraction,
            alpha=alpha,
            steps_at_target=steps_at_target,
            loss_increase_fraction=self.loss_increase_fraction,
            contribution_fraction=self.contribution_fraction,
            linear_share=self.linear_share,
            over_linear_fraction=self.over_linear_fraction,
            step_time_ratio=self.step_time_ratio,
            trial_contributions=tuple(self.trial_contributions),
            trial_over_linear=tuple(self.trial_over_linear),
        )

"""Settings of the training loop."""

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from esper.lifecycle.record import Record
from esper.slots.isolation_monitor import DEFAULT_INTERVAL_STEPS
from esper.training.governor import GovernorConfig
from esper.training.precision import MatmulPrecision, Precision

Positive = Annotated[FiniteFloat, Field(gt=0.0)]
AtLeastOne = Annotated[int, Field(ge=1)]


class TrainerConfig(Record):
    """Settings of the loop."""

    epochs: AtLeastOne
    precision: Precision = "float32"
    """Autocast dtype; float16 also scales gradients."""
    accumulation_steps: AtLeastOne = 1
    """Batches per optimizer step. A shorter last group still steps."""
    max_gradient_norm: Positive | None = None
    """Clips host and seeds each on their own; None does not clip."""
    decision_interval_steps: AtLeastOne | None = None
    """Optimizer steps between growth decisions; None decides after each epoch."""
    isolation_check_steps: AtLeastOne | None = DEFAULT_INTERVAL_STEPS
    """Optimizer steps between two checks that no gradient of an isolated seed reaches the host;
    None makes none."""
    governor: GovernorConfig = GovernorConfig()
    matmul_precision: MatmulPrecision = "highest"
    scheduler_interval: Literal["step", "epoch"] = "epoch"
    """When the learning-rate scheduler steps. ReduceLROnPlateau steps at neither: at each growth
    decision, by the held-out loss that was just evaluated."""
    cuda_graphs: bool = False
    """Whether forward and backward are replayed as CUDA graphs while nothing but values changes;
    see `esper.compilation.CapturedStep`."""

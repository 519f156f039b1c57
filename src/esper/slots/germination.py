"""Building a seed and proving, before it is registered, that it is what it must be."""

import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from esper.blending.straight_through import straight_through
from esper.lifecycle.alpha import BlendOperator
from esper.lifecycle.events import Event
from esper.lifecycle.learning import SeedObjective
from esper.seeds.registry import Family, blueprints
from esper.slots.branch import SeedBranch
from esper.slots.breaker import CircuitBreaker
from esper.slots.call_arguments import NO_ARGUMENTS, CallArguments
from esper.slots.gradient_guard import zero_if_broken
from esper.slots.gradient_health import gradient_norm
from esper.slots.measurements import SeedMeasurements
from esper.slots.modes import forked_random_state, seed_random_state
from esper.slots.nested import tensors_in

SOURCE_OPTION = "source"
"""The option for which a slot passes a copy of the host's module that it names."""

OWN_SOURCE = "own"
"""As a source: the module that the slot stands behind."""

_PROBE_SAMPLES = 2


class GerminationError(RuntimeError):
    """A seed could not be built or did not pass G0; the slot is as it was.

    Attributes:
        events: What happened up to the failure.
    """

    def __init__(self, message: str, events: list[Event]) -> None:
        super().__init__(message)
        self.events = events


@dataclass(frozen=True, kw_only=True)
class FeatureLayout:
    """What a slot saw of its features at attach.

    Attributes:
        family: `B C H W` is CNN; features in the last dimension are TRANSFORMER.
        shape: With the example's batch size first.
        dim: The feature width: C, or D.
        overwritten: The host changes the features in place later on, as an in-place ReLU does, or
            that cannot be excluded.
        cast: They arrive outside autocast, and in another dtype than seeds have.
    """

    family: Family
    shape: tuple[int, ...]
    dim: int
    overwritten: bool = False
    cast: bool = False


@dataclass(frozen=True, kw_only=True)
class SeedOrder:
    """What is to be built: a blueprint with its options for one slot."""

    blueprint: str
    options: Mapping[str, Any]
    blend_operator: BlendOperator
    layout: FeatureLayout
    device: torch.device
    dtype: torch.dtype
    find_source: Callable[[str], nn.Module] | None = None
    """Returns a copy, without slots, of the host's module at a path."""
    call: CallArguments = NO_ARGUMENTS
    """What the host's module was called with on the example."""
    samples: int = 1
    """How many samples that call was for."""
    objective: SeedObjective | None = None
    """What the seed will learn by behind the host; None where it does not, or in other passes."""

    @property
    def copies_host(self) -> bool:
        """Whether an option names a module of the host."""
        if self.options.get(SOURCE_OPTION) is None:
            return False
        return blueprints.get(self.layout.family, self.blueprint).copies_host

    def random_features(self) -> Tensor:
        """Return standard normal features, as many samples as the call is for."""
        shape = (self.samples, *self.layout.shape[1:])
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def probe_samples(shape: tuple[int, ...]) -> int:
    """Return how many samples of an example to keep for building seeds.

    Args:
        shape: Of the features, batch first. Where the batch is as large as another dimension, a
            mask `T T` cannot be told from a batched tensor, and all samples are kept.
    """
    batch, *others = shape
    return batch if batch in others else min(batch, _PROBE_SAMPLES)


def derive_random_seed(base: int, path: str, life: int) -> int:
    """Return a random seed that depends on its arguments only, in [0, 2**32)."""
    return zlib.crc32(f"{base}:{path}:{life}".encode())


def with_own_source(
    family: Family, blueprint: str, options: Mapping[str, Any], *, own_path: str
) -> Mapping[str, Any]:
    """Return the options with the path of a slot's own module where its source is "own".

    Raises:
        BlueprintError: Unknown blueprint.
    """
    own = options.get(SOURCE_OPTION) == OWN_SOURCE
    if own and blueprints.get(family, blueprint).copies_host:
        return {**options, SOURCE_OPTION: own_path}
    return options


def state_source(order: SeedOrder, *, subject: str) -> str:
    """Return the path of the host's module whose optimizer state a seed is to begin with.

    Raises:
        ValueError: The seed is no copy.
    """
    if not order.copies_host:
        raise ValueError(
            f"{subject}: copy_optimizer_state needs a source to copy from, and {order.blueprint!r} "
            f"with options {dict(order.options)} is no copy; name one, as in germinate('block', "
            "source='own', copy_optimizer_state=True), or leave it out: a fresh seed starts fresh"
        )
    path: str = order.options[SOURCE_OPTION]
    return path


def build_branch(order: SeedOrder) -> SeedBranch:
    """Build the seed and its operator where the default device and dtype are.

    Effects: consumes the default random stream; wrap in `forked_random_state`.

    Raises:
        BlueprintError: Unknown blueprint or option.
        ValueError: An option's value or the width is refused by the blueprint.
    """
    layout = order.layout
    options = dict(order.options)
    if order.copies_host and order.find_source is not None:
        options[SOURCE_OPTION] = order.find_source(options[SOURCE_OPTION])
    seed = blueprints.create(layout.family, order.blueprint, layout.dim, **options)
    return SeedBranch(
        seed,
        blueprint=order.blueprint,
        options=order.options,
        blend_operator=order.blend_operator,
        family=layout.family,
        dim=layout.dim,
        casts=layout.cast,
    )


def _move(branch: SeedBranch, order: SeedOrder) -> SeedBranch:
    """Move a branch where its slot is, in place, as `to` does; what was copied keeps its dtype.

    A block of mixed precision has several, and `to` would drop a complex one's imaginary part.
    """
    parts = [part for copy in branch.seed.copies for part in (copy.parameters(), copy.buffers())]
    copied = {id(tensor) for part in parts for tensor in part}

    def moved(tensor: Tensor) -> Tensor:
        kept = id(tensor) in copied or not tensor.is_floating_point()
        return tensor.to(order.device, tensor.dtype if kept else order.dtype)

    done: SeedBranch = branch._apply(moved)  # type: ignore[no-untyped-call]  # noqa: SLF001 – `to` would cast them
    return done


def build_again(order: SeedOrder, *, param_count: int, path: str) -> SeedBranch:
    """Build a seed that was there before, where its slot is; its weights are yet to be loaded.

    Args:
        order: As it was built then.
        param_count: That it had then.
        path: Of the slot, for errors.

    Raises:
        BlueprintError: Unknown blueprint or option.
        ValueError: The blueprint refuses an option's value or the width, or builds another number
            of parameters.

    Effects: random streams are left as they were.
    """
    with forked_random_state(order.device):
        branch = _move(build_branch(order), order)
    if branch.param_count != param_count:
        raise ValueError(
            f"slot {path!r}: blueprint {order.blueprint!r} builds {branch.param_count} parameters "
            f"now, {param_count} when it was saved: the blueprint or the host is another one than "
            "it was then"
        )
    return branch


@dataclass(frozen=True, kw_only=True)
class Sprout:
    """A built branch that is not in a slot yet, with what was measured of it."""

    branch: SeedBranch
    measurements: SeedMeasurements
    draws_random_numbers: bool
    """Its forward in training mode consumes the random stream (dropout)."""


def sprout(
    order: SeedOrder, *, random_seed: int, check_unshared: Callable[[nn.Module], None]
) -> Sprout:
    """Build a branch, run it forward and backward once, and measure what G0 and G1 ask for.

    A copy that fails on the samples that were kept of the call is tried on as many as there were:
    not every argument has them in its first dimension, or is a tensor that can be cut.

    Args:
        order: What to build.
        random_seed: Fixes its initial weights.
        check_unshared: Raises if a module shares a parameter with another owner.

    Effects: the random streams of CPU and device are left as they were; on a GPU the host waits
    for the device once.
    """
    batch = order.layout.shape[0]
    try:
        return _sprout(order, random_seed, check_unshared)
    except Exception:
        if not order.copies_host or order.samples == batch:
            raise
    whole = replace(order, call=order.call.with_samples(batch), samples=batch)
    return _sprout(whole, random_seed, check_unshared)


def _sprout(
    order: SeedOrder, random_seed: int, check_unshared: Callable[[nn.Module], None]
) -> Sprout:
    with forked_random_state(order.device):
        seed_random_state(order.device, random_seed)
        branch = build_branch(order)
        check_unshared(branch)  # before the move, which would change another owner's parameter
        _move(branch, order)
        given = order.call.to(order.device, order.dtype)
        call = given.copied()
        handed = tensors_in(call)
        features = order.random_features()
        untouched = features.clone()
        before = _random_state(order.device)
        started = time.perf_counter()
        branch.train()
        increment = branch(features, features, call)
        if not torch.equal(features, untouched):
            raise ValueError(
                f"blueprint {order.blueprint!r} changes its input in place, which is the host's; "
                "compute out of place"
            )
        if given.differs_from(handed):
            raise ValueError(
                f"blueprint {order.blueprint!r} changes in place what it is called with besides "
                "its input, as a mask, which is the host's; compute out of place"
            )
        if increment.requires_grad:
            _rehearse_step(order, branch, features, increment)
        if order.device.type == "cuda":
            torch.cuda.synchronize(order.device)
        prewarm_ms = 1e3 * (time.perf_counter() - started)
        draws = not torch.equal(before, _random_state(order.device))
        measurements = _measure(branch, features, given, increment.detach(), prewarm_ms)
    branch.zero_grad(set_to_none=True)
    return Sprout(branch=branch, measurements=measurements, draws_random_numbers=draws)


def sprout_guarded(
    order: SeedOrder,
    breaker: CircuitBreaker,
    *,
    path: str,
    subject: str,
    random_seed: int,
    check_unshared: Callable[[nn.Module], None],
) -> tuple[Sprout, list[Event]]:
    """Build what was ordered, if the breaker allows it, which counts successes and failures.

    Args:
        order: What to build.
        breaker: Around building this blueprint.
        path: Of the slot, for errors.
        subject: The slot with its seed, for errors.
        random_seed: As `sprout`.
        check_unshared: As `sprout`.

    Returns:
        What was built, and changes of the breaker.

    Raises:
        GerminationError: The breaker is open, or building raised.
        ValueError: An option's value is refused, or a copied module does not fit.
    """
    if not breaker.allows:
        raise GerminationError(
            f"{subject}: building {order.blueprint!r} failed {breaker.max_failures} times in a "
            f"row; it will be tried again {breaker.cooldown_seconds:g} s after the last time",
            [],
        )
    try:
        new = sprout(order, random_seed=random_seed, check_unshared=check_unshared)
    except ValueError:
        raise
    except Exception as error:
        if order.copies_host:  # the caller's choice, not the blueprint's failure
            raise ValueError(
                f"{subject}: source={order.options[SOURCE_OPTION]!r} does not map features of "
                f"shape {order.layout.shape} to such features, called as {path!r} is: "
                f"{type(error).__name__}: {error}"
            ) from error
        raise GerminationError(
            f"{subject}: building blueprint {order.blueprint!r} with options "
            f"{dict(order.options)} raised {type(error).__name__}: {error}",
            breaker.failed(),
        ) from error
    return new, breaker.succeeded()


def _rehearse_step(
    order: SeedOrder, branch: SeedBranch, features: Tensor, increment: Tensor
) -> None:
    """Run what a first step runs besides the forward: a GPU loads a kernel when it is first used.

    That is the backward by the seed's objective, the guard on its gradients, and their norms.
    """
    learned = increment
    if order.objective is not None and increment.shape == features.shape:
        learned = straight_through(features, increment, objective=order.objective)
    learned.float().square().sum().backward()
    broken = torch.zeros((), device=order.device, dtype=torch.bool)
    for parameter in branch.parameters():
        if parameter.grad is not None:
            zero_if_broken(parameter.grad, lambda: broken)
    gradient_norm(branch.parameters())
    torch.zeros((), device=order.device, dtype=torch.int32).add_(broken)  # as at a tick


def _measure(
    branch: SeedBranch,
    features: Tensor,
    call: CallArguments,
    increment: Tensor,
    prewarm_ms: float,
) -> SeedMeasurements:
    matches = increment.shape == features.shape and increment.dtype == features.dtype
    return SeedMeasurements(
        identity_error=float(increment.abs().max()) if matches else None,
        shape_matches=matches,
        parameters_finite=parameters_finite(branch),
        parameters_unshared=True,
        prewarmed=True,
        prewarm_ms=prewarm_ms,
        isolation_leaks=count_leaks(branch, features, call),
    )


def parameters_finite(module: nn.Module) -> bool:
    """Return whether every parameter is finite. Waits for the device."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


def count_leaks(branch: SeedBranch, features: Tensor, call: CallArguments) -> int:
    """Return how many tensors that learn, but are not the branch's own, its increment reaches.

    The branch reads detached features, so its gradient can leave it only through a tensor that its
    code holds on to without registering it: a parameter of the host, say.
    """
    with torch.enable_grad():
        increment = branch(features.detach(), features.detach(), call.detached())
    own = {id(parameter) for parameter in branch.parameters()}
    foreign, seen, waiting = set(), set(), [increment.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            foreign.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return len(foreign)


def fits(order: SeedOrder) -> int | None:
    """Return the parameters of a blueprint in this layout, or None if it does not fit.

    Built and run on the meta device: no memory is allocated and nothing is computed.

    Warns:
        RuntimeWarning: It raises what no blueprint raises that is asked for the wrong layout. It
            does not fit then either, so that it does not stop every decision.
    """
    try:
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            branch = _move(build_branch(order), order)
            features = order.random_features()
            increment = branch(features, features, order.call.to(features.device, order.dtype))
            same_shape = increment.shape == features.shape
    except (ValueError, RuntimeError):  # of a factory, or of torch
        return None
    except Exception as error:  # noqa: BLE001 - whatever a package's own blueprint raises
        warnings.warn(
            f"blueprint {order.blueprint!r} is offered to no slot like this one, as building and "
            f"running it on the meta device raises {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return branch.param_count if same_shape else None


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

"""The random streams that a run draws from."""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def random_states() -> dict[str, Any]:
    """Return where the streams of Python, NumPy (if it is in use), torch and each GPU stand."""
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": {"version": version, "numbers": list(numbers), "gauss": gauss},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": None,
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        states["numpy"] = {
            "kind": kind,
            "keys": keys.tolist(),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        }
    return states


@contextmanager
def random_streams_apart(inside: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Put the streams back as they were, whatever the block draws.

    Args:
        inside: Where they stand when the block begins; None leaves them.
    """
    outside = random_states()
    try:
        if inside is not None:
            set_random_states(inside)
        yield
    finally:
        set_random_states(outside)


def seed_random_streams(random_seed: int) -> None:
    """Begin the streams of Python, NumPy (if it is in use), torch and each GPU at a seed."""
    random.seed(random_seed)
    torch.manual_seed(random_seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(random_seed % 2**32)


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the streams where they stood.

    Raises:
        ValueError: They are of more GPUs than there are here.
    """
    cuda = states["cuda"]
    if cuda and len(cuda) > torch.cuda.device_count():
        raise ValueError(
            f"random streams of {len(cuda)} GPUs were kept, and {torch.cuda.device_count()} are "
            "here; go on on a machine with as many"
        )
    python, kept = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["numbers"]), python["gauss"]))
    torch.set_rng_state(states["torch"])
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    if kept is not None:
        import numpy as np  # noqa: PLC0415 – torch does without, and so can a run

        np.random.set_state(  # noqa: NPY002 – the stream that other code draws from
            (kept["kind"], kept["keys"], kept["position"], kept["has_gauss"], kept["cached"])
        )

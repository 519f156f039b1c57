"""What a slot's forward and backward run, against the same network written by hand: no more."""

import importlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = {
    "CHANNELS": 8,
    "IMAGES": 2,
    "SIDE": 8,
    "WIDTH": 16,
    "TOKENS": 8,
    "SEQUENCES": 2,
    "DEPTH": 3,
}

LOOK = {"aten::sum, of one number": 1, "aten::_local_scalar_dense": 1}
"""What a look at one gradient of a seed takes, on a CPU: its sum, and to read it."""

PROTECTED = {
    "aten::promote_types": 2,  # norms of half precision would overflow
    "aten::gt, of one number": 1,  # features can be all zero
    "aten::where, of one number": 1,
    "aten::scalar_tensor, of one number": 1,
}
FUSED = {"aten::addcmul": 1, "aten::mul, of one number": 1}
"""`h + alpha * u` in one kernel, and alpha's part of its backward."""

STAGES: Mapping[str, tuple[Mapping[str, int], Mapping[str, int]]] = {
    "dormant": ({}, {}),
    "live": ({**FUSED, "aten::mul": 1}, {"aten::add": 1}),  # by hand it is `h + u`, without alpha
    "training, plain": ({}, {}),
    "training, pulled": (PROTECTED, {}),
    "blended": (FUSED, {"aten::add": 1, "aten::mul": 1}),
    "committed": ({}, {}),
    "baked": ({}, {}),
}
"""By what there is more, and by what less, than by hand."""


class Operations(TorchDispatchMode):
    """Counts operations by name, those apart whose result is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        one = isinstance(result, Tensor) and result.ndim == 0
        self.counts[f"{func._schema.name}, of one number" if one else func._schema.name] += 1
        return result


@pytest.mark.parametrize("name", ["cnn", "decoder"])
@pytest.mark.parametrize("stage", STAGES)
def test_forward_and_backward_run_what_the_network_by_hand_runs(
    name: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts, overhead = map(importlib.import_module, ("speed_hosts", "slot_overhead"))
    for constant, value in SMALL.items():
        monkeypatch.setattr(hosts, constant, value)
    host = hosts.HOSTS[name]("cpu")
    ours = overhead.with_slots(host, overhead.STAGES[stage], "eager")
    counts = []
    for side in (ours, overhead.by_hand(host, overhead.STAGES[stage], "eager")):
        side.step()
        with Operations() as operations:
            side.host.loss(side._forward(host.inputs), host.labels).backward()
        counts.append(operations.counts)
    more, fewer = counts[0] - counts[1], counts[1] - counts[0]
    looks = 0
    if stage.startswith(("training", "blended")):  # of a seed that is kept from the host
        looks = len(list(ours.slots[host.target].living.parameters()))
    for operation, times in LOOK.items():
        assert more.pop(operation, 0) == times * looks
    assert (dict(more), dict(fewer)) == STAGES[stage]

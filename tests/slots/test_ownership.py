"""Every parameter has one owner; sharing is refused with the names of both."""

import pytest
import torch
from torch import nn

from esper.slots.ownership import HOST, OwnershipError, OwnershipLedger

SEED = "seed in slot 'body'"


class Slot(nn.Module):
    """Holds a seed inside the host, as a slot does."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = nn.Linear(4, 4)


class Host(nn.Module):
    """A host with tied parameters of its own and a slot."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.body.weight
        self.slot = Slot()


def ledger_of(host: Host, **others: nn.Module) -> OwnershipLedger:
    return OwnershipLedger(host, lambda: {SEED: host.slot.seed, **others})


def test_owners_are_derived_from_the_modules_as_they_are_now():
    host = Host()
    living: dict[str, nn.Module] = {SEED: host.slot.seed}
    ledger = OwnershipLedger(host, lambda: living)
    owners = ledger.owners()
    assert {name: owners[parameter] for name, parameter in host.named_parameters()} == {
        "scale": HOST,
        "body.weight": HOST,
        "body.bias": HOST,
        "head.bias": HOST,
        "slot.seed.weight": SEED,
        "slot.seed.bias": SEED,
    }
    names = {id(parameter): name for name, parameter in host.named_parameters()}
    listed = [names[id(parameter)] for parameter in ledger.host_parameters()]
    assert listed == ["scale", "body.weight", "body.bias", "head.bias"]

    living.clear()  # committed: the seed is the host's now
    assert set(ledger.owners().values()) == {HOST}
    assert len(ledger.host_parameters()) == 6


def test_a_seed_that_shares_with_the_host_a_seed_or_a_teacher_is_refused_by_name():
    host, teacher = Host(), nn.Linear(4, 4)
    ledger = ledger_of(host)
    ledger.add_teacher("big", teacher)
    ledger.check_seed("seed in slot 'head'", nn.Linear(4, 4))
    for shared, owner in (
        (host.body.weight, HOST),
        (host.slot.seed.weight, SEED),
        (teacher.weight, "teacher 'big'"),
    ):
        seed = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))
        seed[1].weight = shared
        with pytest.raises(OwnershipError) as refusal:
            ledger.check_seed("seed in slot 'head'", seed)
        assert str(refusal.value).startswith(
            f"seed in slot 'head' shares its parameter '1.weight' with {owner}; "
        )


def test_a_teacher_is_frozen_and_one_that_shares_is_refused_and_left_trainable():
    host = Host()
    ledger = ledger_of(host)
    for shared, owner in ((host.head.bias, HOST), (host.slot.seed.bias, SEED)):
        teacher = nn.Linear(4, 4)
        teacher.bias = shared
        with pytest.raises(OwnershipError) as refusal:
            ledger.add_teacher("big", teacher)
        assert str(refusal.value).startswith(
            f"teacher 'big' shares its parameter 'bias' with {owner}; "
        )
        assert all(parameter.requires_grad for parameter in teacher.parameters())
    ledger.add_teacher("big", teacher := nn.Linear(4, 4))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(ledger.owners()[parameter] == "teacher 'big'" for parameter in teacher.parameters())
    with pytest.raises(OwnershipError, match="teacher 'copy' shares its parameter 'weight' with"):
        ledger.add_teacher("copy", teacher)


@pytest.mark.parametrize("other", ["host", "seed", "teacher"])
def test_sharing_that_arises_later_is_found_with_both_owners(other: str):
    host, second, teacher = Host(), nn.Linear(4, 4), nn.Linear(4, 4)
    ledger = ledger_of(host, second=second)
    ledger.add_teacher("big", teacher)
    assert len(ledger.owners()) == 10
    if other == "host":
        second.bias, pair = host.body.bias, ("host", "second")
    elif other == "seed":
        second.bias, pair = host.slot.seed.bias, (SEED, "second")
    else:
        second.bias, pair = teacher.bias, ("second", "teacher 'big'")
    with pytest.raises(OwnershipError) as refusal:
        ledger.owners()
    assert str(refusal.value).startswith(
        f"parameter 'bias' belongs to {pair[0]} and to {pair[1]}; give {pair[1]} its own copy"
    )


def test_a_teachers_parameter_never_reaches_an_optimizer():
    host, teacher = Host(), nn.Linear(4, 4)
    ledger = ledger_of(host)
    ledger.add_teacher("big", teacher)
    foreign = nn.Linear(2, 2)
    ledger.check_optimizer(torch.optim.SGD([*host.parameters(), *foreign.parameters()], lr=0.1))
    groups = [{"params": list(host.parameters())}, {"params": [foreign.bias, teacher.bias]}]
    with pytest.raises(OwnershipError, match=r"group 1 of the AdamW holds a .* of teacher 'big'"):
        ledger.check_optimizer(torch.optim.AdamW(groups))

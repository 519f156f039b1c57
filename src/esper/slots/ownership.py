"""Who owns which parameter: the host, one seed, or a frozen teacher, never two of them."""

from collections.abc import Callable, Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

HOST = "host"


class OwnershipError(ValueError):
    """A parameter with two owners, or a teacher's parameter in an optimizer."""


class OwnershipLedger:
    """Answers who owns a parameter, derived from the modules as they are now.

    Nothing is stored but the teachers, so the ledger cannot drift from the model.

    Args:
        model: The host; everything in it that no living seed holds is the host's.
        living_seeds: Returns the modules of the living seeds by owner name.
    """

    def __init__(
        self, model: nn.Module, living_seeds: Callable[[], Mapping[str, nn.Module]]
    ) -> None:
        self._model = model
        self._living_seeds = living_seeds
        self._teachers: dict[str, nn.Module] = {}

    def add_teacher(self, name: str, teacher: nn.Module) -> None:
        """Register a frozen model whose parameters must never be trained.

        Effects: sets `requires_grad` of its parameters to False.

        Raises:
            OwnershipError: It shares a parameter with the host or a seed.
        """
        self._refuse_shared(f"teacher {name!r}", teacher)
        teacher.requires_grad_(requires_grad=False)
        self._teachers[name] = teacher

    def owners(self) -> dict[nn.Parameter, str]:
        """Return the owner of every parameter.

        Raises:
            OwnershipError: A parameter has two owners.
        """
        owners: dict[nn.Parameter, str] = {}
        for owner, parameters in self._claims():
            for name, parameter in parameters:
                other = owners.setdefault(parameter, owner)
                if other != owner:
                    raise OwnershipError(
                        f"parameter {name!r} belongs to {other} and to {owner}; give {owner} its "
                        "own copy (copy.deepcopy of the module)"
                    )
        return owners

    def check_seed(self, owner: str, seed: nn.Module) -> None:
        """Raise if a seed that is about to be registered shares a parameter with another owner.

        Raises:
            OwnershipError: It does; the parameter and both owners are named.
        """
        self._refuse_shared(owner, seed)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise if the optimizer would train a teacher.

        Raises:
            OwnershipError: A parameter group holds a teacher's parameter.
        """
        owners = self.owners()
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                owner = owners.get(parameter, HOST)
                if owner.startswith("teacher"):
                    raise OwnershipError(
                        f"parameter group {index} of the {type(optimizer).__name__} holds a "
                        f"parameter of {owner}; a teacher is frozen, build the optimizer from the "
                        "host's parameters only"
                    )

    def host_parameters(self) -> list[nn.Parameter]:
        """Return the host's parameters in the model's order, committed seeds included."""
        seeds = self._living_seeds().values()
        living = {parameter for seed in seeds for parameter in seed.parameters()}
        return [parameter for parameter in self._model.parameters() if parameter not in living]

    def _refuse_shared(self, owner: str, module: nn.Module) -> None:
        owners = self.owners()
        for name, parameter in module.named_parameters():
            other = owners.get(parameter)
            if other is not None:
                raise OwnershipError(
                    f"{owner} shares its parameter {name!r} with {other}; give it its own copy "
                    "(copy.deepcopy of the module)"
                )

    def _claims(self) -> Iterable[tuple[str, Iterable[tuple[str, nn.Parameter]]]]:
        seeds = self._living_seeds()
        seed_modules = {module for seed in seeds.values() for module in seed.modules()}
        host = (
            (f"{prefix}.{name}" if prefix else name, parameter)
            for prefix, module in self._model.named_modules()
            if module not in seed_modules
            for name, parameter in module.named_parameters(recurse=False)
        )
        yield HOST, host
        for owner, seed in seeds.items():
            yield owner, seed.named_parameters()
        for name, teacher in self._teachers.items():
            yield f"teacher {name!r}", teacher.named_parameters()

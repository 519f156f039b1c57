"""`esper blueprints`: what can grow."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from esper.cli.options import AsJson, Imports, import_modules
from esper.cli.printing import print_json_line
from esper.seeds.registry import Blueprint, Family
from esper.seeds.registry import blueprints as registry


def blueprints(
    family: Annotated[str | None, typer.Option(help="cnn or transformer.")] = None,
    dim: Annotated[int, typer.Option(min=1, help="Width to count parameters at.")] = 64,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """List every blueprint with its cost and options."""
    console = Console()
    import_modules(imports)
    try:
        families = [Family(family)] if family is not None else list(Family)
    except ValueError as error:
        known = ", ".join(member.value for member in Family)
        raise typer.BadParameter(f"no family {family!r}; families: {known}") from error
    found = [registry.get(kind, name) for kind in families for name in registry.names(kind)]
    if as_json:
        for blueprint in found:
            row = {
                "family": blueprint.family.value,
                "name": blueprint.name,
                "param_count": _param_count(blueprint, dim),
                "options": blueprint.options,
                "summary": blueprint.summary,
            }
            print_json_line(console, row)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("family", overflow="fold")
    table.add_column("blueprint", style="bold", overflow="fold")
    table.add_column(f"params at {dim}", justify="right", overflow="fold")
    table.add_column("options", overflow="fold")
    table.add_column("what it is", overflow="fold", ratio=1)
    for blueprint in found:
        count = _param_count(blueprint, dim)
        options = ", ".join(
            f"{name}={default}" if default else name for name, default in blueprint.options.items()
        )
        shown = "does not fit" if count is None else f"{count:,}"
        table.add_row(blueprint.family, blueprint.name, shown, options, blueprint.summary)
    console.print(table)


def _param_count(blueprint: Blueprint, dim: int) -> int | None:
    """Return the parameters at a width, or None if the blueprint refuses it."""
    try:
        return registry.param_count(blueprint.family, blueprint.name, dim)
    except ValueError:
        return None

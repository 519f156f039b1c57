"""`esper blueprints`: what can grow."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from esper.seeds.registry import BlueprintError, Family
from esper.seeds.registry import blueprints as registry


def blueprints(
    family: Annotated[str | None, typer.Option(help="cnn or transformer.")] = None,
    dim: Annotated[int, typer.Option(min=1, help="Width to count parameters at.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every blueprint with its cost and options."""
    console = Console()
    try:
        families = [Family(family)] if family is not None else list(Family)
    except ValueError as error:
        known = ", ".join(member.value for member in Family)
        raise typer.BadParameter(f"no family {family!r}; families: {known}") from error
    rows = [_row(kind, name, dim) for kind in families for name in registry.names(kind)]
    if as_json:
        console.out(json.dumps(rows), highlight=False)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("family")
    table.add_column("blueprint", style="bold")
    table.add_column(f"params at {dim}", justify="right")
    table.add_column("options", overflow="fold")
    table.add_column("what it is", overflow="fold", ratio=1)
    for row in rows:
        count = row["param_count"]
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        shown = "does not fit" if count is None else f"{count:,}"
        table.add_row(row["family"], row["name"], shown, options, row["summary"])
    console.print(table)


def _row(family: Family, name: str, dim: int) -> dict[str, object]:
    blueprint = registry.get(family, name)
    try:
        count: int | None = registry.param_count(family, name, dim)
    except (BlueprintError, ValueError):
        count = None
    return {
        "family": family.value,
        "name": name,
        "param_count": count,
        "options": blueprint.options,
        "summary": blueprint.summary,
    }

"""Pieces of a page, as HTML whose every text is escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Cell = str | float | int | None


def chip(words: str, kind: str = "") -> str:
    """Return words in a rounded frame; kind is good, bad, warn or nothing."""
    return f'<span class="chip {escape(kind)}">{escape(words)}</span>'


def figures(rows: Iterable[tuple[str, str, str]]) -> str:
    """Return key figures, each with its name and a remark."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in rows
    )
    return f'<dl class="figures">{items}</dl>'


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str,
    numbers: Sequence[int] = (),
) -> str:
    """Return a table.

    Args:
        columns: Their names.
        rows: Of cells, which are HTML: `text` or `chip`.
        caption: What the table shows, for who cannot see it.
        numbers: Columns of numbers, which stand at the right.
    """

    def cell(tag: str, index: int, content: str, scope: str = "") -> str:
        kind = ' class="number"' if index in numbers else ""
        return f"<{tag}{scope}{kind}>{content}</{tag}>"

    head = "".join(
        cell("th", index, escape(name), ' scope="col"') for index, name in enumerate(columns)
    )
    body = "".join(
        "<tr>" + "".join(cell("td", index, content) for index, content in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f'<caption class="unseen">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def text(value: Cell) -> str:
    """Return a value as escaped text; numbers with what matters of their digits."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return escape(f"{value:.4g}")
    return escape(f"{value:,}" if isinstance(value, int) else value)


def two_lines(words: str, mark: str) -> str:
    """Return words as escaped text that goes on in a second line at a mark, if it is in them."""
    first, found, rest = words.partition(mark)
    second = f"<small>{escape(found.lstrip() + rest)}</small>" if found else ""
    return escape(first) + second


def settings_table(settings: Mapping[str, Any], *, caption: str) -> str:
    """Return nested settings as a table of dotted keys and values."""
    rows = [(f"<code>{escape(key)}</code>", escape(value)) for key, value in _dotted(settings)]
    return table(("setting", "value"), rows, caption=caption)


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            yield name, ", ".join(map(str, value)) or "none"
        else:
            yield name, "none" if value is None else str(value)

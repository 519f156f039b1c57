"""What README and docs say runs, and is complete."""

import re
from pathlib import Path
from typing import get_args

import pytest

from esper.lifecycle.events import Event
from esper.lifecycle.gates import GATE_INTO

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_run_in_order(document: Path) -> None:
    namespace: dict[str, object] = {}
    for number, block in enumerate(BLOCK.findall(document.read_text(encoding="utf-8"))):
        exec(compile(block, f"{document.name}, block {number}", "exec"), namespace)


def test_readme_example_is_short_enough_to_read() -> None:
    first = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    code = [line for line in first.splitlines() if line.strip()]
    assert len(code) <= 30


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_loop_page_shows_every_event_and_gate() -> None:
    page = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")
    union = get_args(Event)[0]
    missing = [kind.__name__ for kind in get_args(union) if kind.__name__ not in page]
    assert not missing
    for stage, gate in GATE_INTO.items():
        assert f"| {stage.name} | {gate} |" in page

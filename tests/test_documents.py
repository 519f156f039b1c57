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
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RESULTS.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_run_in_order(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(BLOCK.findall(document.read_text(encoding="utf-8"))):
        exec(compile(block, f"{document.name}, block {number}", "exec"), namespace)


def test_readme_example_is_short_enough_to_read() -> None:
    first = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    code = [line for line in first.splitlines() if line.strip()]
    assert len(code) <= 30


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, section in LINK.findall(page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if section:
            assert section in sections(linked), f"{target}#{section}"


def sections(page: Path) -> list[str]:
    """What a page's headings are called in links, as GitHub has it."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_loop_page_shows_every_event_and_gate() -> None:
    page = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")
    union = get_args(Event)[0]
    missing = [kind.__name__ for kind in get_args(union) if kind.__name__ not in page]
    assert not missing
    for stage, gate in GATE_INTO.items():
        assert f"| {stage.name} | {gate} |" in page

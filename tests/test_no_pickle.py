"""Nothing in the project unpickles what it has read: what a file holds can never run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("src", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
)
MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("pd", "read_pickle")}
"""What reads pickles too."""
SAVERS = {("torch", "save")}
"""What writes a file that only those can read."""

PIPE = "src/esper/compilation/pipe.py"
"""To a process that this one has started, and back."""


def unpickles(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = (node.value.id, node.attr)
            found += [".".join(name)] if name in LOADERS | SAVERS else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle=")
    return found


def test_no_source_unpickles() -> None:
    assert len(SOURCES) > 150
    found = {
        str(path.relative_to(ROOT)): names
        for path in SOURCES
        if (names := unpickles(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == {PIPE: ["pickle"]}


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "torch.load(file)",
        "torch.load(file, weights_only=True)",
        "np.load(file, allow_pickle=True)",
    ],
)
def test_a_planted_one_is_found(planted: str) -> None:
    assert unpickles(ast.parse(planted))

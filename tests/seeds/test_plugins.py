"""Installed packages add blueprints through the entry-point group; a broken one only warns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import esper

PLUGIN = """
import torch
from esper.seeds import Seed, blueprints


class TinySeed(Seed):
    output_layers = ()

    def increment(self, features):
        return torch.zeros_like(features)


@blueprints.register("tiny_by_module", family="cnn")
def _tiny(dim: int) -> Seed:
    return TinySeed()


def register_all():
    blueprints.register("tiny_by_call", family="transformer")(lambda dim: TinySeed())
"""

ENTRY_POINTS = """
[esper.blueprints]
module = tiny_blueprints
call = tiny_blueprints:register_all
missing = no_such_module
raising = tiny_broken
"""

SCRIPT = """
import json, sys, warnings
from esper.seeds import blueprints

lazy = "tiny_blueprints" not in sys.modules
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    names = {family: blueprints.names(family) for family in ("cnn", "transformer")}
    blueprints.names("cnn")
    seed = blueprints.create("cnn", "tiny_by_module", 4)
print(json.dumps({
    "lazy": lazy,
    "names": names,
    "seed": type(seed).__name__,
    "warnings": [[w.category.__name__, str(w.message)] for w in caught],
}))
"""


def test_installed_plugins_are_loaded_on_first_use_and_broken_ones_warn_by_name(tmp_path: Path):
    (tmp_path / "tiny_blueprints.py").write_text(PLUGIN)
    (tmp_path / "tiny_broken.py").write_text("raise RuntimeError('half installed')\n")
    installed = tmp_path / "tiny_blueprints-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-blueprints\nVersion: 1\n"
    )
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    sources = Path(esper.__file__).parents[1]
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(sources)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["lazy"]
    assert found["seed"] == "TinySeed"
    assert "tiny_by_module" in found["names"]["cnn"]
    assert "tiny_by_call" in found["names"]["transformer"]
    assert {"noop", "conv_heavy"} < set(found["names"]["cnn"])
    assert found["warnings"] == [
        [
            "RuntimeWarning",
            "blueprint plug-in 'missing' (no_such_module) was not loaded: "
            "ModuleNotFoundError: No module named 'no_such_module'",
        ],
        [
            "RuntimeWarning",
            "blueprint plug-in 'raising' (tiny_broken) was not loaded: "
            "RuntimeError: half installed",
        ],
    ]


USE_SWIGLU = """
import torch, esper

host = torch.nn.Linear(4, 8)
slots = esper.attach(torch.nn.Sequential(host), "0", example=torch.zeros(2, 4))
slot = slots["0"]
assert "swiglu" in [choice.name for choice in slot.state().choices]
slot.germinate("swiglu", expansion=2)
while slot.stage.name != "FOSSILIZED":
    slot.advance(force=True)
print(type(slot.branches[0].seed).__module__, slot.committed[0].param_count)
"""


def test_the_example_package_is_installed_and_grows(tmp_path: Path):
    package = Path(__file__).parents[2] / "examples" / "esper-swiglu"
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(package, source)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    options = ["--no-build-isolation", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([*install, *options, str(source)], check=True, capture_output=True, text=True)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", USE_SWIGLU],
        env={**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{Path(esper.__file__).parents[1]}"},
        check=True,
        capture_output=True,
        text=True,
    )
    # norm 8, gate and up 8 × 16 each, down 16 × 8
    assert result.stdout.split() == ["esper_swiglu", str(8 + 3 * 128)]

"""`esper compile`, as it is run in a terminal."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from typer.testing import CliRunner

from esper import blueprints
from esper.cli.app import app
from esper.compilation.inductor_cache import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "as before, afterwards")
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "120")


def test_it_compiles_once_keeps_it_and_refuses_what_was_changed(tmp_path: Path) -> None:
    asked = ["compile", "--blueprint", "norm", "--width", "4", "--shape", "2,4,3,3"]
    runs = [CliRunner().invoke(app, [*asked, "--json"]) for _ in range(2)]
    assert [run.exit_code for run in runs] == [0, 0], runs[0].output
    first, second = (json.loads(run.stdout) for run in runs)
    assert (first["outcome"], second["outcome"]) == ("compiled", "was there")
    assert first["warm_ms"] < first["cold_ms"]
    listed = CliRunner().invoke(app, ["compile", "--list"])
    assert listed.exit_code == 0
    assert "norm" in listed.stdout
    assert "2×4×3×3 float32 cpu" in listed.stdout
    (file,) = (tmp_path / "cache" / "esper" / "compiled").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    listed = CliRunner().invoke(app, ["compile", "--list"])
    assert listed.exit_code == 1
    assert "not what was signed" in " ".join(listed.stdout.split())


def test_what_a_folder_is_called_is_shown_as_it_is(tmp_path: Path) -> None:
    store = tmp_path / "k[lr]:smile:"
    listing = ["compile", "--list", "--store", str(store)]
    listed = CliRunner(env={"COLUMNS": "1000"}).invoke(app, listing)
    assert listed.output == f"nothing is kept in {store}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--blueprint is missing"),
        (["--shape", "2,4,3,3"], "--blueprint is missing"),
        (["--blueprint", "norm"], "as 64,32,16,16; it is missing"),
        (["--blueprint", "norm", "--shape", "2,x"], "as 64,32,16,16; got '2,x'"),
        (["--blueprint", "norm", "--shape", "2,0"], "as 64,32,16,16; got '2,0'"),
        (["--blueprint", "norm", "--shape", "2,4", "--device", "tpu"], "on --device tpu: "),
        (["--blueprint", "norm", "--shape", "2,4,3,3", "--width", "8"], "--width is 8"),
        (["--blueprint", "nrm", "--shape", "2,4,3,3"], "did you mean 'norm'"),
        (["--blueprint", "own", "--shape", "2,4"], "if it is your own, --import the module"),
        (
            ["--blueprint", "conv_light", "--shape", "2,4"],
            "no blueprint 'conv_light' in family transformer",
        ),
        (["--blueprint", "norm", "--shape", "2,4,3,3", "--dtype", "int8"], "no floating-point"),
        (["--blueprint", "norm", "--shape", "2,4,3,3", "--isolation", "some"], "no isolation"),
        (["--blueprint", "norm", "--shape", "2,4,3,3", "--mode", "fast"], "mode: Input"),
        (["--list", "--limit-seconds", "-1"], "limit_seconds: Input should be greater than 0"),
        (["--blueprint", "norm", "--shape", "2,4", "--dtype", "float8_e4m3fn"], "float8_e4m3fn"),
        (["--blueprint", "norm", "--shape", "2,4", "--device", "meta"], "--device meta"),
        (["--list", "--store", "nowhere://x"], "nowhere"),
        (["--list", "--store", "ftp://127.0.0.1:1/x"], "ftp://127.0.0.1:1/x cannot be used: "),
        (["--list", "--key-file", "missing"], "cannot be read"),
    ],
)
def test_bad_input_says_what_to_do(arguments: list[str], told: str) -> None:
    run = CliRunner().invoke(app, ["compile", *arguments])
    assert run.exit_code == 2
    assert told in " ".join(run.output.replace("│", " ").split())
    assert "pydantic" not in run.output


class Unreachable(LocalFileSystem):
    """Is an object store that answers no more."""

    protocol = "unreachable"

    def exists(self, path: str, **_: object) -> bool:
        raise ConnectionResetError("nobody answers")


def test_a_store_that_cannot_be_read_is_told() -> None:
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    run = CliRunner().invoke(app, ["compile", "--list", "--store", "unreachable://x"])
    assert run.exit_code == 2
    told = " ".join(run.output.replace("│", " ").split())
    assert "--store unreachable://x cannot be read: nobody answers" in told


OWN = """
from torch import nn
from esper import Seed, blueprints
from esper.seeds import zero_initialise_


class Doubled(Seed):
    def __init__(self, dim):
        super().__init__()
        self.out = zero_initialise_(nn.Linear(dim, dim))

    @property
    def output_layers(self):
        return (self.out,)

    def increment(self, features):
        return self.out(features * 2.0)


@blueprints.register("doubled", family="transformer")
def doubled(dim: int, scale: float = 2.0):
    return Doubled(dim)
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the working directory, whose blueprint is called doubled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_blueprints.py").write_text(OWN)
    with blueprints.temporarily():
        yield "own_blueprints"
    sys.modules.pop("own_blueprints", None)


def test_a_blueprint_of_a_module_of_ones_own_is_listed_and_compiled(own_module: str) -> None:
    listed = CliRunner().invoke(app, ["blueprints", "--json", "--import", own_module])
    assert listed.exit_code == 0, listed.output
    rows = [json.loads(line) for line in listed.stdout.splitlines()]
    (row,) = [row for row in rows if row["name"] == "doubled"]
    assert row["options"] == {"scale": 2.0}
    asked = ["compile", "--blueprint", "doubled", "--shape", "2,5,4", "--json"]
    run = CliRunner().invoke(app, [*asked, "--import", own_module])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["blueprint"] == "doubled"


@pytest.mark.parametrize("command", ["blueprints", "compile"])
def test_a_module_that_does_not_import_says_why(command: str) -> None:
    run = CliRunner().invoke(app, [command, "--import", "no_such_module"])
    assert run.exit_code == 2
    told = " ".join(run.output.replace("│", " ").split())
    assert "--import: importing 'no_such_module' from" in told
    assert "raised ModuleNotFoundError" in told

"""`esper compile`, as it is run in a terminal."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

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
        (
            ["--blueprint", "conv_light", "--shape", "2,4"],
            "no blueprint 'conv_light' in family transformer",
        ),
        (["--blueprint", "norm", "--shape", "2,4,3,3", "--dtype", "int8"], "no floating-point"),
        (["--blueprint", "norm", "--shape", "2,4,3,3", "--isolation", "some"], "no isolation"),
        (["--blueprint", "norm", "--shape", "2,4,3,3", "--mode", "fast"], "mode: Input"),
        (["--list", "--limit-seconds", "-1"], "limit_seconds: Input should be greater than 0"),
        (["--list", "--store", "nowhere://x"], "nowhere"),
        (["--list", "--key-file", "missing"], "cannot be read"),
    ],
)
def test_bad_input_says_what_to_do(arguments: list[str], told: str) -> None:
    run = CliRunner().invoke(app, ["compile", *arguments])
    assert run.exit_code == 2
    assert told in " ".join(run.output.replace("│", " ").split())
    assert "pydantic" not in run.output

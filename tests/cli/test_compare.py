"""`esper compare`: what it is told, and what it refuses before a run is made."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.cli.app import app

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NINE_LAYERS = ("--set", "growth_schedule.min_layers=9")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")


def esper(*arguments: str, fails: bool = False) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == (2 if fails else 0), result.output
    return result.output


def settings(*arguments: str) -> dict[str, object]:
    """What a comparison would be made with."""
    told: dict[str, object] = json.loads(esper("compare", *arguments, "--dry-run"))
    return told


def test_without_options_every_arm_takes_part_at_equal_steps_and_equal_flops() -> None:
    told = settings("digits")
    assert told["random_seeds"] == [0, 1, 2, 3, 4]
    assert (told["search_rates"], told["search_seeds"]) == (3, 1)
    assert told["equal_flops"] is told["intermediate_sizes"] is told["random_times"] is True
    assert not any(Path().iterdir()), "a dry run leaves nothing"


def test_options_say_which_arms_take_part_and_on_what() -> None:
    arms = ("--no-equal-flops", "--no-sizes", "--no-random-times", "--policy", "schedule")
    tried = ("--policy", "slope", "--seeds", "2", "--first-seed", "7", "--search-seeds", "2")
    told = settings("text", *arms, *tried, "--rates", "1", "--epochs", "9", "--set", "threads=2")
    assert told["random_seeds"] == [7, 8]
    assert (told["search_rates"], told["search_seeds"]) == (1, 2)
    assert told["equal_flops"] is told["intermediate_sizes"] is told["random_times"] is False
    assert told["policies"] == ["slope"]
    run = told["run"]
    assert isinstance(run, dict)
    assert (run["policy"], run["threads"], run["trainer"]["epochs"]) == ("schedule", 2, 9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("digits", "--policy", "nonesuch"), "no policy 'nonesuch'; did you mean 'none'?"),
        (("digits", "--policy", "none"), "which grows nothing"),
        (("digits", "--policy", "random", "--policy", "random"), "compared anyway"),
        (("digits", "--rates", "2"), "Invalid value: search_rates must be 1, or at least 3"),
        (("digits", "--search-seeds", "6"), "there are 5 random seeds"),
        (("digits", "--set", "trainer.epoch=3"), "did you mean 'trainer.epochs'"),
        (("digits", "--quiet", "--json"), "exclude each other"),
        (("--out", "nowhere"), "name a task to begin one there"),
        (("nonesuch",), "nonesuch"),
        (("digits", "--policy", "heuristic", "--policy", "none"), "which grows nothing"),
        (
            ("text", "--policy", "heuristic", "--policy", "slope", "--set", "schedule=cosine"),
            "schedule=cosine falls from the first step",
        ),
    ],
)
def test_what_makes_no_comparison_is_refused(arguments: tuple[str, ...], words: str) -> None:
    assert words in " ".join(esper("compare", *arguments, "--dry-run", fails=True).split())
    assert not any(Path().iterdir())


def test_a_plan_that_no_run_could_carry_out_leaves_no_folder() -> None:
    told = esper("compare", "digits", "--policy", "schedule", *NINE_LAYERS, fails=True)
    assert "growth_schedule: the schedule policy grows from at least 9 layers" in told
    assert not any(Path().iterdir())


def test_a_comparison_leaves_a_report_unless_told_not_to() -> None:
    shutil.copytree(RESULTS / "compare-digits", "kept", ignore=shutil.ignore_patterns("*.html"))
    assert "report.html" not in esper("compare", "--out", "kept", "--no-report")
    assert not Path("kept/report.html").exists()
    assert "report      kept/report.html" in esper("compare", "--out", "kept").splitlines()
    assert "not decided" in Path("kept/report.html").read_text("utf-8")


def test_a_comparison_can_be_looked_at_where_its_task_is_not() -> None:
    """Another directory, machine, or environment than it was made in."""
    shutil.copytree(RESULTS / "compare-digits", "kept")
    there = esper("inspect", "kept")
    settings = Path("kept/compare.json")
    kept = json.loads(settings.read_text("utf-8"))
    kept["run"]["task"] = "python:gone:TASK"
    settings.write_text(json.dumps(kept), encoding="utf-8")
    assert "test accuracy" in there
    assert esper("inspect", "kept") == there


def test_ctrl_c_before_a_run_is_made_ends_it_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("esper.cli.compare.check_runs", interrupt)
    result = CliRunner().invoke(app, ["compare", "digits"])
    assert result.exit_code == 130
    assert isinstance(result.exception, SystemExit)
    assert not any(Path().iterdir())


@pytest.mark.parametrize("width", [80, 120, 190])
@pytest.mark.parametrize("kept", ["compare-digits", "compare-text"])
def test_no_figure_of_the_table_is_cut_off(
    kept: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    table, _, _ = esper("inspect", str(RESULTS / kept)).partition("mean ±")
    assert "…" not in table
    assert ("seconds" in table) == (width >= 120)
    grown = next(line for line in table.splitlines() if line.startswith("grown"))
    assert grown.split()[-1 if width < 190 else -2][0].isdigit()


def _inspected(kept: str, width: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], str]:
    """The table's rows, and what is told below them."""
    monkeypatch.setenv("COLUMNS", str(width))
    told = esper("inspect", str(RESULTS / kept)).strip()
    table, _, rest = told.partition("\nmean ±")
    return [line.rstrip() for line in table.splitlines()], " ".join(rest.split())


@pytest.mark.parametrize("width", [80, 120, 200])
def test_what_notes_are_on_is_in_the_table(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, notes = _inspected("compare-digits", width, monkeypatch)
    marked = [row for row in rows if "*" in row]
    assert "* the best learning rate is the only one tried" in notes
    assert [row.split("  ")[0].rstrip("*") for row in marked] == [
        *("static 2 (3 of 5 seeds)", "static"),
    ]
    assert all(("0.02*" in row) == (width == 200) for row in marked)
    assert "FLOPs: as a share of static's" in notes
    assert "static 1, 2 …: with the first so many" in notes


@pytest.mark.parametrize("width", [80, 200])
def test_without_a_static_network_nothing_is_measured_by_it(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, notes = _inspected("compare-text-long", width, monkeypatch)
    assert "5.26e+12" in rows[1]
    assert "FLOPs: of a whole run" in notes
    for word in ("static", "to match"):
        assert word not in rows[0]
        assert word not in notes

"""The training of a policy at the command line: what tells of it, and what refuses it."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.cli.app import app
from esper.experiments.config import load_run_config
from esper.lifecycle.events import EventRecord
from esper.rl.policy_run_config import PolicyRunConfig, policy_run_config
from esper.telemetry import RunReader, RunStore
from esper.telemetry.run_kind import POLICY_TRAINING
from told_training import no_episode, report, write_training

COMPARISON = Path(__file__).parents[2] / "benchmarks" / "results" / "compare-digits"
REASONS = {2: "worker 1 was ended by signal 9", 15: "worker 0 raised OSError"}


def invoke(*arguments: str, columns: int = 1000) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "my policy"
    write_training(folder, 23, restarts=REASONS)
    return folder


@pytest.mark.parametrize(("columns", "has_more"), [(80, False), (120, True)])
def test_inspect_tells_the_course_in_ten_rows_that_fit(
    folder: Path, columns: int, has_more: bool
) -> None:
    code, told = invoke("inspect", str(folder), columns=columns)
    assert code == 0, told
    lines = told.splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[0] == "digits · learning a policy · finished"
    words = " ".join(told.split())
    assert "runs of 40 epochs, 2 x 40 decisions a rollout, after imitating heuristic" in words
    assert "1,840 of 800 decisions, 23 rollouts, 46 episodes, 2 restarts" in words
    assert "return from +1.05 over the first 5 rollouts to +2.85 over the last ones" in words
    for nonsense in ("None", "host", "germinated", "parameters"):
        assert nonsense not in told
    head = next(index for index, line in enumerate(lines) if line.startswith("rollout "))
    assert ("committed" in lines[head]) is has_more
    rows = [line.split() for line in lines[head + 1 : head + 11]]
    # 23 rollouts in ten rows: 1–2, 3–4, 5–6, 7–9, … 21–23
    assert [row[:3] for row in (rows[0], rows[3], rows[-1])] == [
        ["1–2", "160", "+0.9000"],
        ["7–9", "720", "+1.5500"],
        ["21–23", "1,840", "+2.9500"],
    ]
    assert f"restarted by 1,200 decisions: {REASONS[15]}" in words


def test_inspect_of_few_columns_is_lines_with_the_same_numbers(folder: Path) -> None:
    code, told = invoke("inspect", str(folder), columns=60)
    assert code == 0, told
    assert max(map(len, told.splitlines())) <= 60
    assert "7–9, 720 decisions: return +1.5500, loss 0.0632," in " ".join(told.split())


def test_inspect_as_json_is_what_the_training_itself_told(tmp_path: Path) -> None:
    without = no_episode(2).model_copy(update={"problems": (REASONS[2],)})
    reports = [report(1), without, report(3)]
    write_training(tmp_path / "run", reports, restarts=REASONS)
    code, told = invoke("inspect", str(tmp_path / "run"), "--json")
    assert code == 0, told
    records = [json.loads(line) for line in told.splitlines()]
    assert [record.pop("kind") for record in records] == ["rollout", "rollout", "event", "rollout"]
    (event,) = (EventRecord.model_validate(record) for record in records if "event" in record)
    assert event == RunReader(tmp_path / "run").events()[0]
    rollouts = [record for record in records if "event" not in record]
    expected = [json.loads(each.model_dump_json()) for each in reports]
    assert expected[1]["explained_variance"] == "NaN"
    expected[1]["explained_variance"] = None
    assert [json.dumps(each, sort_keys=True) for each in rollouts] == [
        json.dumps(each, sort_keys=True) for each in expected
    ]


def test_report_of_a_training_is_its_own_page_with_its_own_pictures(
    folder: Path, tmp_path: Path
) -> None:
    png = tmp_path / "return.png"
    code, told = invoke("report", str(folder), "--png", str(png), "--only", "return")
    assert code == 0, told
    content = (folder / "report.html").read_text(encoding="utf-8")
    assert "digits, learning a policy" in content
    assert REASONS[2] in content
    assert png.read_bytes().startswith(b"\x89PNG")
    code, told = invoke("report", str(folder), "--png", str(png), "--only", "lanes")
    assert code == 2
    assert "no picture 'lanes' here; pictures: return, return-parts, final-loss" in told
    code, told = invoke("report", str(folder), "--beside", str(COMPARISON))
    assert code == 2
    assert "is the training of a policy" in told


def test_resume_names_the_command_that_goes_on_with_a_training(folder: Path) -> None:
    code, told = invoke("resume", str(folder))
    assert code == 2
    assert f"policy train --out {shlex.quote(str(folder))}" in told
    assert "validation error" not in told
    assert RunReader(folder).attempt == 1


def test_a_training_is_known_by_the_key_that_trainings_write(tmp_path: Path) -> None:
    config = PolicyRunConfig(run=load_run_config("digits", None, [], {}))
    settings = {POLICY_TRAINING: config.model_dump(mode="json")}
    RunStore(tmp_path / "run", config=settings, environment={}).close()
    assert policy_run_config(tmp_path / "run") == config

"""The command line as a person, a pipe and a script meet it."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from esper import from_pretrained
from esper.experiments.config import RunConfig
from esper.experiments.settings import known_keys
from esper.lifecycle.events import RunFinished, TwinFinished
from esper.tasks.named import named_task
from esper.telemetry import GROWN_FOLDER, RunFolderError, RunReader

SHORT = ("--epochs", "7", "--seed", "1")


def esper(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Run the real command in a process of its own, with its output in a pipe."""
    done = run_esper(*arguments, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_esper(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "esper", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def strict_json(line: str) -> Any:
    """Return what a line of JSON says; NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in {line}")

    return json.loads(line, parse_constant=refuse)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run whose seeds train behind the host, made through a pipe; and what it printed."""
    cwd = tmp_path_factory.mktemp("grown")
    behind = ("--set", "slot.isolation=shadowing")
    output = esper("grow", "digits", *SHORT, *behind, "--control", "--out", "run", cwd=cwd)
    return cwd / "run", output


def test_grow_in_a_pipe_prints_lines_and_ends_with_tables_and_the_folder(
    grown: tuple[Path, str],
) -> None:
    folder, output = grown
    lines = output.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2 * 7  # the grown run and its control
    assert "[stage1 TRAINING conv_heavy alpha 0.00]" in epochs[4]
    assert all(word in epochs[0] for word in ("train", "loss", "accuracy", "stage2 DORMANT"))
    assert any("germinated in stage1" in line for line in lines)
    assert any(line.split()[:3] == ["stage1", "conv_heavy", "304"] for line in lines)
    assert any(line.startswith("host alone") for line in lines)
    assert "run folder  run" in lines
    assert "\x1b" not in output
    assert folder.is_dir()


def test_an_audit_tells_whether_growth_paid_beside_a_twin_that_never_grew(tmp_path: Path) -> None:
    output = esper("grow", "digits", *SHORT, "--audit", "--out", "run", cwd=tmp_path)
    events = [record.event for record in RunReader(tmp_path / "run").events()]
    finished, twin = events[-2:]
    assert isinstance(finished, RunFinished)
    assert isinstance(twin, TwinFinished)
    loss, other = finished.metrics["loss"], twin.metrics["loss"]
    verdict = "growth paid" if loss < other else "growth did not pay"
    words = f"{verdict} in this run: test loss {loss:.4f}, its twin's {other:.4f}"
    assert words in output
    assert f"the same run up to step {twin.shared_steps}" in output
    assert words in esper("inspect", "run", cwd=tmp_path)


def test_run_folder_holds_config_environment_events_and_weights(grown: tuple[Path, str]) -> None:
    reader = RunReader(grown[0])
    assert reader.status == "finished"
    assert reader.config()["random_seed"] == 1
    assert reader.config()["trainer"]["epochs"] == 7
    environment = reader.environment()
    assert environment["packages"]["torch"]
    assert environment["random_seed"] == 1
    assert environment["torch_threads"] == 1
    assert environment["matmul"] == {
        "float32_matmul_precision": "highest",
        "cudnn_allow_tf32": False,
    }
    types = [record.event.type for record in reader.events()]
    assert types[0] == "run_started"
    assert types[-1] == "run_finished"
    names = {row.name for row in reader.metrics()}
    assert names == {"loss", "accuracy", "train_loss", "step_seconds", "flops"}


def test_the_network_of_a_run_comes_back_as_it_was_tested(grown: tuple[Path, str]) -> None:
    folder, _ = grown
    (finished,) = (
        record.event
        for record in RunReader(folder).events()
        if isinstance(record.event, RunFinished)
    )
    setup = named_task("digits").build(0)
    with pytest.raises(RunFolderError, match=r"is the folder of a run; its network is in .*grown"):
        from_pretrained(setup.model, folder, example=setup.example)
    from_pretrained(setup.model, folder / GROWN_FOLDER, example=setup.example)
    assert setup.test() == finished.metrics
    assert sum(p.numel() for p in setup.model.parameters()) == finished.param_count


def test_inspect_tells_every_gate_decision_with_measured_values(grown: tuple[Path, str]) -> None:
    folder, _ = grown
    output = esper("inspect", str(folder), cwd=folder.parent, env={"COLUMNS": "200"})
    assert "G0 passed: identity_error 0 == 0 ok" in output
    assert "G2 refused: training_steps 20 >= 40 FAILS" in output
    order = ["G0 passed", "  GERMINATED", "G1 passed", "  TRAINING", "G2 refused"]
    places = [output.index(words) for words in order]
    assert places == sorted(places)
    documents = esper("inspect", str(folder), "--json", cwd=folder.parent).splitlines()
    assert len(documents) == len(RunReader(folder).events())
    assert all(json.loads(line)["schema_version"] == 1 for line in documents)


def test_grow_leaves_a_report_and_says_where(grown: tuple[Path, str]) -> None:
    folder, output = grown
    assert "report.html" in output
    assert "Every seed and what became of it" in (folder / "report.html").read_text("utf-8")


def test_json_output_is_one_object_per_line(tmp_path: Path) -> None:
    output = esper("grow", "digits", "--epochs", "2", "--json", "--out", "run", cwd=tmp_path)
    documents = [json.loads(line) for line in output.splitlines()]
    assert [d["epoch"] for d in documents if d["kind"] == "epoch"] == [1, 2]
    assert documents[-1]["kind"] == "summary"
    assert documents[-1]["folder"] == "run"
    assert documents[-1]["networks"]["grown"]["params"] == 678


def test_json_output_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    without_band = ("--set", "trainer.governor.band_width=none", "--set", "learning_rate=1000")
    diverging = ("--epochs", "1", *without_band, "--json", "--out", "run")
    output = esper("grow", "digits", *diverging, cwd=tmp_path)
    documents = [strict_json(line) for line in output.splitlines()]
    skipped = [d["event"] for d in documents if d.get("event", {}).get("type") == "step_skipped"]
    assert skipped
    assert all(event["value"] is None for event in skipped)


@pytest.mark.parametrize("way", ["--json", "--quiet", "--report"])
def test_a_run_that_diverges_says_so_in_a_line_and_how_to_look_back(
    way: str, tmp_path: Path
) -> None:
    hopeless = ("--epochs", "2", "--set", "learning_rate=1e30", "--out", "a [run]:smile:")
    for command in (("grow", "digits", *hopeless), ("resume", "a [run]:smile:")):
        done = run_esper(*command, way, cwd=tmp_path, env={"PATH": "/nowhere"})
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert re.search(r"^training diverged at step \d+ again, .* or look at the data; ", line)
        assert line.endswith("; what came before: python -m esper inspect 'a [run]:smile:'")
        assert RunReader(tmp_path / "a [run]:smile:").status == "failed"
        if way == "--json":
            last = [strict_json(line) for line in done.stdout.splitlines()][-1]
            assert last["kind"] == "diverged"
            assert last["folder"] == "a [run]:smile:"
            assert line.startswith(f"{last['reason']}; ")
        elif way == "--quiet":
            assert done.stdout == "a [run]:smile:\n"
        told = esper("inspect", "a [run]:smile:", cwd=tmp_path)
        reason, _, _ = line.partition("; what came before")
        assert "the run ended" not in done.stdout, "it is told once"
        assert told.count(f"the run ended: TrainingDivergedError: {reason}\n") == 1


ONLY_ONCE = """
import itertools, math
from dataclasses import replace
from esper.tasks.digits import DIGITS

builds = itertools.count()

def build(random_seed):
    setup, steps, again = DIGITS.build(random_seed), itertools.count(), next(builds) > 0
    def loss(output, target):
        return setup.loss(output, target) * (math.nan if again and next(steps) > 3 else 1.0)
    return replace(setup, loss=loss)

TASK = replace(DIGITS, name="only once", build=build)
"""


def test_a_run_is_concluded_though_what_it_is_compared_with_diverges(tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text(ONLY_ONCE)
    beside = ("--audit", "--control", "--out", "run")
    done = run_esper("grow", "python:once:TASK", *SHORT, *beside, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    twin, alone = done.stderr.splitlines()
    assert twin.startswith("its twin is left out: training diverged at step ")
    assert alone.startswith("host alone is left out: training diverged at step ")
    assert "\ngrown " in done.stdout
    assert (tmp_path / "run" / "report.html").exists()


def test_quiet_output_is_the_folder(tmp_path: Path) -> None:
    output = esper("grow", "digits", "--epochs", "1", "--quiet", cwd=tmp_path)
    (line,) = output.splitlines()
    assert (tmp_path / line / "run.sqlite").is_file()
    assert line.startswith("runs/digits-")


def test_narrow_terminal_shows_everything_without_failing(tmp_path: Path) -> None:
    output = esper(
        "grow",
        "digits",
        "--epochs",
        "2",
        "--out",
        "run",
        cwd=tmp_path,
        env={"COLUMNS": "30", "FORCE_COLOR": "1", "TERM": "xterm-256color"},
    )
    assert "stage1" in output
    assert "run folder" in output


def test_dry_run_prints_a_config_that_can_be_read_back_and_trains_nothing(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        'policy = "random"\n[trainer]\nepochs = 9\n[slot]\nramp_steps = 7\n', encoding="utf-8"
    )
    output = esper(
        "grow",
        "digits",
        "--config",
        str(file),
        "--set",
        "slot.ramp_steps=8",
        "--set",
        "slot.isolation=none",
        "--set",
        "trainer.isolation_check_steps=none",
        "--seed",
        "5",
        "--dry-run",
        cwd=tmp_path,
    )
    config = json.loads(output)
    assert config["policy"] == "random"
    assert config["trainer"]["epochs"] == 9
    assert config["slot"]["ramp_steps"] == 8
    assert config["slot"]["isolation"] == "none"
    assert config["trainer"]["isolation_check_steps"] is None
    assert config["random_seed"] == 5
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digit",), "did you mean 'digits'"),
        (("digits", "--policy", "heuristics"), "policies: heuristic"),
        (("digits", "--set", "slot.ramp_step=3"), "did you mean 'slot.ramp_steps'"),
        (("digits", "--set", "slot.ramp_steps"), "key=value"),
        (("digits", "--set", "slot.random_seed=3"), "the run's own, got 3; set random_seed"),
        (("digits", "--set", "trainer.scheduler_interval=epoch"), "whose schedules count steps"),
        (("digits", "--set", "slot.ramp_steps=-1"), "slot.ramp_steps"),
        (("digits", "--set", "slot.thresholds.max_step_time_ratio=nan"), "finite"),
        (("digits", "--config", "missing.toml"), "cannot be read"),
        (("digits", "--config", sys.executable), "is not TOML"),
        (("digits", "--quiet", "--json"), "exclude each other"),
        (
            ("digits", "--set", "trainer.decision_interval_steps=99999"),
            "the run has 1600 steps: nothing would ever be decided",
        ),
        (
            ("digits", "--policy", "schedule", "--set", "growth_schedule.min_layers=9"),
            "growth_schedule: the schedule policy grows from at least 9 layers",
        ),
        (
            ("digits", "--set", 'heuristic.blueprints=["conv_lite"]'),
            "heuristic: blueprint 'conv_lite' of the heuristic fits no slot; fitting: attention",
        ),
        (
            ("digits", "--set", "heuristic.blueprints=conv_light"),
            """is a list; write --set 'heuristic.blueprints=["conv_light"]'""",
        ),
        (
            ("digits", "--set", "heuristic.blueprints=[conv_light, norm]"),  # as a shell leaves it
            """is a list; write --set 'heuristic.blueprints=["conv_light", "norm"]'""",
        ),
        (("digits", "--set", "heuristic.blueprints=[]"), "heuristic.blueprints: Tuple should have"),
        (("digits", "--policy", "none", "--audit"), "the policy never grows"),
        (("digits", "--device", "tpu"), "device: a device is cpu, cuda or cuda:N, got "),
        (("digits", "--device", "cuda:01"), "device: a device is cpu, cuda or cuda:N, got "),
        (("digits", "--device", "cuda:77"), "device 'cuda:77' cannot be used here"),
        (("digits", "--set", "count_flops=false", "--audit"), "leave out count_flops=false"),
    ],
)
def test_bad_input_is_named_with_a_remedy_and_leaves_no_folder(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run_esper("grow", *arguments, cwd=tmp_path, env={"COLUMNS": "300"})
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_folder_that_holds_a_run_is_refused(grown: tuple[Path, str]) -> None:
    folder, _ = grown
    done = run_esper("grow", "digits", "--epochs", "1", "--out", "run", cwd=folder.parent)
    assert done.returncode == 2
    assert "holds a run" in done.stderr
    assert RunReader(folder).status == "finished"


def test_inspect_of_something_else_is_refused(tmp_path: Path) -> None:
    done = run_esper("inspect", str(tmp_path), cwd=tmp_path, env={"COLUMNS": "300"})
    assert done.returncode == 2
    assert "no run folder" in done.stderr


@pytest.mark.parametrize(
    ("ended_by", "arguments", "until", "status", "way_on"),
    [
        (
            signal.SIGINT,
            ("--epochs", "1000"),
            ("epoch 2/",),
            "interrupted",
            "begin anew with: {} resume 'a run'",
        ),
        (
            signal.SIGINT,
            ("--epochs", "1000", "--set", "checkpoint.min_seconds=0"),
            ("epoch 3/",),
            "interrupted",
            "go on from the newest checkpoint with: {} resume 'a run'",
        ),
        *(
            (
                ended_by,
                (*SHORT, "--audit"),
                ("its twin", "epoch 1/"),
                "finished",
                "the run itself has come to its end: {} inspect 'a run'",
            )
            for ended_by in (signal.SIGINT, signal.SIGTERM)
        ),
    ],
)
def test_interrupted_run_says_so_and_keeps_its_epochs(
    ended_by: signal.Signals,
    arguments: tuple[str, ...],
    until: tuple[str, ...],
    status: str,
    way_on: str,
    tmp_path: Path,
) -> None:
    """A run that has come to its end is finished, whatever becomes of its twin."""
    process = subprocess.Popen(
        [sys.executable, "-m", "esper", "grow", "digits", *arguments, "--out", "a run"],
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": "/nowhere",  # where no esper is, so that it says python -m esper
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stdout as output, process.stderr as errors:
        for beginning in until:
            while not output.readline().startswith(beginning):
                assert process.poll() is None
        process.send_signal(ended_by)
        output.read()
        told = errors.read()
        assert process.wait(timeout=60) == 128 + ended_by
    assert told.startswith("stopped; ")
    assert told.endswith(f"{way_on.format('python -m esper')}\n")
    assert "Traceback" not in told
    reader = RunReader(tmp_path / "a run")
    assert reader.status == status
    assert max(row.epoch for row in reader.metrics()) >= 2
    assert (tmp_path / "a run" / GROWN_FOLDER).exists() is (status == "finished")


@pytest.mark.parametrize(
    ("where", "errors"),
    [
        ("a full disk", subprocess.PIPE),
        ("a full disk", subprocess.STDOUT),
        ("a pipe", subprocess.PIPE),
        ("a terminal", subprocess.PIPE),
    ],
)
def test_a_run_whose_output_nobody_takes_any_more_comes_to_its_end(
    where: str, errors: int, tmp_path: Path
) -> None:
    reading, writing = pty.openpty() if where == "a terminal" else os.pipe()
    if where == "a full disk":
        os.dup2(os.open("/dev/full", os.O_WRONLY), writing)
    process = subprocess.Popen(
        [sys.executable, "-m", "esper", "grow", "digits", *SHORT, "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=errors,
        text=True,
        start_new_session=True,  # else a terminal that goes away takes it along
    )
    os.close(writing)
    shown = b""
    while where != "a full disk" and b"epoch " not in shown:
        shown += os.read(reading, 1 << 16)
    os.close(reading)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    if errors == subprocess.PIPE:
        assert re.match(r"what is printed cannot be written any more: .*; all goes on\n$", told)
    assert RunReader(tmp_path / "run").status == "finished"
    assert (tmp_path / "run" / GROWN_FOLDER).exists()


def test_blueprints_lists_every_blueprint_with_cost_and_options(tmp_path: Path) -> None:
    lines = esper("blueprints", "--json", "--dim", "16", cwd=tmp_path).splitlines()
    rows = [strict_json(line) for line in lines]
    names = {(row["family"], row["name"]) for row in rows}
    assert {("cnn", "conv_heavy"), ("transformer", "lora"), ("cnn", "noop")} <= names
    lora = next(row for row in rows if row["name"] == "lora")
    assert lora["options"] == {"rank": 8}
    assert lora["param_count"] == 2 * 16 * 8
    table = esper("blueprints", "--family", "cnn", cwd=tmp_path)
    assert "conv_heavy" in table
    assert "lora" not in table


def test_doctor_finds_this_machine_ready(tmp_path: Path) -> None:
    output = esper("doctor", cwd=tmp_path, env={"COLUMNS": "200"})
    assert "a seed was built, pruned, and left no trace" in output
    assert "extra [data]" in output
    assert "one was written here, verified and read back" in output
    assert "gloo" in output


def test_doctor_tells_where_no_checkpoint_can_be_written(tmp_path: Path) -> None:
    environment = {"COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = run_esper("doctor", cwd=Path("/proc"), env=environment)
    assert done.returncode == 1
    assert "none can be written here" in done.stdout
    assert "Traceback" not in done.stderr


def test_known_keys_reach_into_nested_settings() -> None:
    assert {"task", "slot.thresholds.trial_epochs", "trainer.epochs"} <= set(known_keys(RunConfig))

"""Trackers chosen by settings: opened with the run, closed with it, and never in its way."""

import logging
import os
import random
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import esper.experiments.parts as parts_of_runs
from esper.experiments.comparison.config import CompareConfig
from esper.experiments.config import RunConfig, load_run_config
from esper.experiments.run import build_setup
from esper.experiments.settings import SettingsError
from esper.experiments.stored_run import resumed_run, stored_run
from esper.lifecycle.events import SeedGerminated, SinkFailed, SinkLossesCounted
from esper.lifecycle.notable import notable
from esper.rl.evaluation import EvaluationConfig
from esper.rl.policy_run_config import PolicyRunConfig
from esper.telemetry import (
    MlflowSink,
    PrometheusSink,
    RunReader,
    RunStore,
    TensorBoardSink,
    TrackerError,
    WandbSink,
    open_trackers,
)
from growth_problem import Recorder
from tracked_run import tell_run

ALL = [f"tracking.{tool}=true" for tool in ("tensorboard", "wandb", "mlflow", "prometheus")]
FREE_PORT = "tracking.prometheus_port=0"
EPOCHS = 8


def config(*settings: str, epochs: int = EPOCHS) -> RunConfig:
    options = {"trainer": {"epochs": epochs}}
    return load_run_config("digits", None, [*settings, "count_flops=false"], options)


def train(chosen: RunConfig, folder: Path, *sinks: Any) -> None:
    with stored_run(chosen, folder, build_setup(chosen), sinks) as run:
        for _ in run.reports:
            pass
        run.finish()


def train_until(epoch: int, chosen: RunConfig, folder: Path) -> None:
    """Train as long as it takes for someone to press Ctrl-C after an epoch."""
    with stored_run(chosen, folder, build_setup(chosen)) as run:
        for report in run.reports:
            if report.epoch == epoch:
                raise KeyboardInterrupt


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_tracked_run_is_bitwise_the_untracked_one_and_all_tools_have_it(tmp_path: Path) -> None:
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    train(config(), plain)
    chosen = config(*ALL, FREE_PORT)
    with stored_run(chosen, tracked, build_setup(chosen)) as run:
        for _ in run.reports:
            pass
        scraped = next(t for t in run.trackers if isinstance(t, PrometheusSink))
        with urllib.request.urlopen(scraped.place, timeout=10) as answer:  # noqa: S310 – our own
            served = answer.read().decode()
        run.finish()
    weights = [(folder / "grown/model.safetensors").read_bytes() for folder in (plain, tracked)]
    assert weights[0] == weights[1]
    reader = RunReader(tracked)
    assert any(isinstance(record.event, SeedGerminated) for record in reader.events())
    expected = [(row.step, row.value) for row in reader.metrics() if row.name == "loss"]
    assert scalars(tracked, "loss") == [(s, pytest.approx(v, rel=1e-6)) for s, v in expected]
    client = MlflowClient(tracking_uri=(tracked / "mlflow").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "esper"]
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.run_name == "tracked"
    assert logged.data.params["trainer.epochs"] == str(EPOCHS)
    history = client.get_metric_history(logged.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == expected
    assert len(list((tracked / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert f"\nesper_loss {expected[-1][1]}" in served
    assert 'esper_seeds_germinated_total{slot="' in served


def test_tools_leave_random_streams_as_they_are(tmp_path: Path) -> None:
    """A run that draws its dropout or its data from them would be another one when tracked."""
    chosen = config(*ALL, FREE_PORT)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    settings = chosen.model_dump(mode="json")
    for tracker in open_trackers(chosen.tracking, str(tmp_path), config=settings):
        tell_run(tracker)
        tracker.close()
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_resumed_run_goes_on_in_every_tool(tmp_path: Path) -> None:
    """Stopped after epoch 2, with its last checkpoint in the middle of it."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    tools = ("tracking.tensorboard=true", "tracking.wandb=true", "tracking.mlflow=true")
    steps = len(build_setup(config()).batches)
    chosen = config(*tools, f"checkpoint.interval_steps={steps + steps // 2}", epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train_until(2, chosen, folder)
    with resumed_run(folder) as resumed:
        assert resumed.resumed is not None
        for _ in resumed.reports:
            pass
        resumed.finish()
    train(config("tracking.tensorboard=true", epochs=3), whole)
    assert scalars(folder, "loss") == scalars(whole, "loss")
    assert scalars(folder, "train_loss") == scalars(whole, "train_loss")
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert files[0].name == files[1].name
    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "esper"]
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    told = client.get_metric_history(logged.info.run_id, "loss")
    assert [metric.step // steps for metric in told] == [1, 2, 2, 3]


def test_a_tracker_that_fails_is_told_once_and_counted_at_the_end(tmp_path: Path) -> None:
    chosen = config("tracking.tensorboard=true", epochs=3)
    with stored_run(chosen, tmp_path / "run", build_setup(chosen)) as run:
        for report in run.reports:
            if report.epoch == 1:
                run.trackers[0].close()
        run.finish()
    reader = RunReader(tmp_path / "run")
    assert reader.status == "finished"
    records = reader.events()
    events = [record.event for record in records]
    (failed,) = [event for event in events if isinstance(event, SinkFailed)]
    assert failed.sink == "TensorBoardSink"
    told = (notable(record, "epoch") for record in records)
    words = [line for line in told if line is not None]
    assert "epoch 2: TensorBoardSink failed, training goes on: ValueError: " in "\n".join(words)
    assert words[-1].startswith("epoch 3: TensorBoardSink failed ")
    (lost,) = [event for event in events if isinstance(event, SinkLossesCounted)]
    assert lost.lost_calls > 4
    assert events[-1] == lost


def fill_disk(store: RunStore) -> None:
    (pages,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count = {pages}")


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (fill_disk, "OperationalError: database or disk is full"),
        (lambda store: store._database.close(), "ProgrammingError: Cannot operate on a closed"),
    ],
    ids=["disk full", "database closed"],
)
def test_a_run_folder_that_takes_nothing_does_not_take_the_run_with_it(
    tmp_path: Path, harm: Callable[[RunStore], None], error: str
) -> None:
    chosen, recorder = config(), Recorder()
    with stored_run(chosen, tmp_path / "run", build_setup(chosen), [recorder]) as run:
        store = run.growth.sinks[0]
        assert isinstance(store, RunStore)
        harm(store)
        for _ in run.reports:
            pass
        assert "loss" in run.finish()
    (failed,) = recorder.of(SinkFailed)
    assert failed.error.startswith(error)
    assert (tmp_path / "run" / "grown" / "model.safetensors").is_file()


def occupied() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tracking.prometheus_port={server.getsockname()[1]}"


port_in_use = pytest.fixture(occupied)


def test_what_cannot_be_opened_is_refused_before_training_and_leaves_no_folder(
    tmp_path: Path, port_in_use: str
) -> None:
    chosen = config(*ALL, port_in_use)
    with pytest.raises(SettingsError, match=r"tracking\.prometheus: .*choose another port"):
        train(chosen, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_was_in_the_folder_before_stays(tmp_path: Path) -> None:
    """A file is where TensorBoard's folder would be: the first tool is open, the second fails."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tensorboard").write_text("a file")
    chosen = config(*ALL[:1], ALL[3], FREE_PORT)
    with pytest.raises(SettingsError, match=r"tracking\.tensorboard: "):
        train(chosen, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "tensorboard"}
    assert not any("serve_forever" in thread.name for thread in threading.enumerate())


def test_what_somebody_else_writes_meanwhile_stays_too(
    tmp_path: Path, port_in_use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = parts_of_runs.open_trackers

    def writes_meanwhile(*given: object, **others: object) -> object:
        (tmp_path / "precious.csv").write_text("1")
        return opens(*given, **others)

    monkeypatch.setattr(parts_of_runs, "open_trackers", writes_meanwhile)
    with pytest.raises(SettingsError, match=r"tracking\.prometheus"):
        train(config(*ALL, port_in_use), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.csv"]


def test_a_config_of_somebody_elses_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(ValueError, match=r"there is a config\.json"):
        train(config(epochs=1), tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_holds_a_run_is_refused_and_no_tool_writes_to_it(tmp_path: Path) -> None:
    train(config(epochs=1), tmp_path / "run")
    before = sorted((tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match="holds a run already"):
        train(config(*ALL, FREE_PORT), tmp_path / "run")
    assert sorted((tmp_path / "run").iterdir()) == before


def test_a_run_that_cannot_be_tracked_when_resumed_can_be_resumed_later(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    chosen = config("tracking.tensorboard=true", "checkpoint.min_seconds=0", epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train_until(1, chosen, folder)
    (folder / "tensorboard").rename(tmp_path / "away")
    (folder / "tensorboard").write_text("a file")
    with pytest.raises(SettingsError, match=r"tracking\.tensorboard"), resumed_run(folder):
        pass
    (folder / "tensorboard").unlink()
    with resumed_run(folder) as resumed:
        reports = list(resumed.reports)
        resumed.finish()
    assert reports[-1].epoch == 3


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (TensorBoardSink, "tensorboard.compat.proto", "tensorboard"),
        (WandbSink, "wandb", "wandb"),
        (MlflowSink, "mlflow", "mlflow"),
        (lambda _: PrometheusSink(port=0), "prometheus_client", "prometheus"),
    ],
)
def test_a_missing_extra_is_named(
    make: Callable[[Path], object],
    module: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'esper-lite\[{extra}\]'"):
        make(tmp_path)
    chosen = config(f"tracking.{extra}=true").tracking
    with pytest.raises(TrackerError, match=rf"tracking\.{extra}: .*pip install"):
        open_trackers(chosen, tmp_path, config={})


def test_a_wrong_key_is_an_error_that_names_the_right_one() -> None:
    with pytest.raises(SettingsError, match=r"did you mean 'tracking\.tensorboard'"):
        config("tracking.tensorbord=true")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("tracking.tensorboard=true", "tracking follows one run, and these are many"),
        ("bus.commands=redis://127.0.0.1", "bus connects one run, and these are many"),
    ],
)
def test_many_runs_are_followed_by_nothing(setting: str, words: str) -> None:
    for many in (CompareConfig, PolicyRunConfig, partial(EvaluationConfig, policies=("none",))):
        with pytest.raises(ValidationError, match=words):
            many(run=config(setting))


@contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """Be what programs would reach the network through, and note who tries."""
    tried: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    tried.append(connection.recv(100).decode(errors="replace"))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", tried
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_no_tool_uses_the_network_unless_asked(tmp_path: Path) -> None:
    """In a process of its own: tools are quieter where they find that they are under test."""
    with proxy() as (address, tried):
        under_test = ("PYTEST_CURRENT_TEST", "CI", "WANDB_ERROR_REPORTING", "DO_NOT_TRACK")
        kept = {key: value for key, value in os.environ.items() if key not in under_test}
        kept.pop("MLFLOW_DISABLE_TELEMETRY", None)
        through = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), address)
        upper = {key.upper(): value for key, value in through.items()}
        settings = [word for setting in (*ALL, FREE_PORT) for word in ("--set", setting)]
        done = subprocess.run(
            [sys.executable, "-m", "esper", "grow", "digits", "--epochs", "1", *settings],
            cwd=tmp_path,
            env={**kept, **through, **upper, "COLUMNS": "300"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "tracked: tensorboard --logdir " in done.stdout
    assert "tracked: http://127.0.0.1:" in done.stdout
    assert tried == []

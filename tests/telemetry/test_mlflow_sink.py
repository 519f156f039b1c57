"""What MLflow's client reads back of a run, from a store in a folder."""

import math
import os
import random
import resource
import shlex
import time
from concurrent.futures import wait
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from esper.telemetry import MlflowSink
from esper.telemetry.mlflow_sink import _in_background
from esper.telemetry.tracker import read_run_id, write_run_id
from tracked_run import COMMITTED, CONFIG, PRUNED, SLOT, tell_run

ALPHA = f"slots/{SLOT}/alpha"


def history(client: MlflowClient, run: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run, name)]


def test_run_is_read_back_from_the_local_store(tmp_path: Path) -> None:
    with MlflowSink(tmp_path, experiment="growth", name="first", config=CONFIG) as sink:
        tell_run(sink, PRUNED)
    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    experiment = client.get_experiment_by_name("growth")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == sink.run_id
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {"task": "quadratic", "threads": "none", "trainer.epochs": "3"}
    (_, first), (step, nan), (_, last) = history(client, sink.run_id, "loss")
    assert (first, step, last) == (1.0, 20, 0.5)
    assert math.isnan(nan)
    assert run.data.metrics["top-5 _"] == 0.5
    assert run.data.metrics["test/loss"] == 0.25
    assert history(client, sink.run_id, ALPHA) == [(10, 0.0), (14, 1.0), (20, 0.0)]
    assert client.get_metric_history(sink.run_id, ALPHA)[0].timestamp == 1_010_000
    assert run.data.tags[f"slots/{SLOT}/stage"] == "blending"
    told = (Path(run.info.artifact_uri.removeprefix("file://")) / "events.txt").read_text()
    assert "epoch 1, step 20: norm pruned from layer.0: no use" in told


def test_a_run_that_decides_every_so_many_steps_is_told_in_decisions(tmp_path: Path) -> None:
    config = {"trainer": {"epochs": 3, "decision_interval_steps": 5}}
    with MlflowSink(tmp_path, config=config) as sink:
        tell_run(sink, PRUNED)
    (file,) = tmp_path.rglob("events.txt")
    assert "decision 1, step 20: norm pruned from layer.0: no use" in file.read_text()


def test_what_was_flushed_is_in_the_store_while_the_run_goes_on(tmp_path: Path) -> None:
    sink = MlflowSink(tmp_path)
    sink.measure(1, 10, {"loss": 1.0})
    sink.flush()
    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    assert history(client, sink.run_id, "loss") == [(10, 1.0)]
    assert client.get_run(sink.run_id).info.status == "RUNNING"
    sink.close()


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (ZeroDivisionError, "FAILED")]
)
def test_status_says_how_the_run_ended(
    tmp_path: Path, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), MlflowSink(tmp_path) as sink:
        raise error
    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    assert client.get_run(sink.run_id).info.status == status


def test_a_resumed_run_goes_on_as_the_same_run(tmp_path: Path) -> None:
    first = MlflowSink(tmp_path, config=CONFIG)
    first.measure(1, 10, {"loss": 1.0})
    first.publish(PRUNED)
    first.close("interrupted")
    with MlflowSink(tmp_path, config=CONFIG, after_step=10) as resumed:
        resumed.measure(2, 20, {"loss": 0.5})
        resumed.publish(COMMITTED)
        resumed.flush()
        client = MlflowClient(tracking_uri=tmp_path.as_uri())
        assert client.get_run(first.run_id).info.status == "RUNNING"
    assert resumed.run_id == first.run_id
    assert history(client, first.run_id, "loss") == [(10, 1.0), (20, 0.5)]
    assert {file.path for file in client.list_artifacts(first.run_id)} == {
        "events.txt",
        "events_after_step_10.txt",
    }


def test_a_run_whose_id_is_not_known_any_more_goes_on_as_another_run(tmp_path: Path) -> None:
    first = MlflowSink(tmp_path, config=CONFIG)
    first.measure(1, 10, {"loss": 1.0})
    first.close("interrupted")
    (tmp_path / "esper_run_id.txt").write_text("")
    with MlflowSink(tmp_path, config=CONFIG, after_step=10) as resumed:
        resumed.measure(2, 20, {"loss": 0.5})
    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    assert history(client, first.run_id, "loss") == [(10, 1.0)]
    assert history(client, resumed.run_id, "loss") == [(20, 0.5)]
    assert read_run_id(tmp_path) == resumed.run_id


def test_an_id_that_cannot_be_written_leaves_the_one_there_was(tmp_path: Path) -> None:
    write_run_id(tmp_path, "first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_run_id(tmp_path, "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_run_id(tmp_path) == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["esper_run_id.txt"]


def test_more_metrics_than_one_call_takes_are_all_sent(tmp_path: Path) -> None:
    with MlflowSink(tmp_path) as sink:
        for step in range(1, 1003):
            sink.measure(step, step, {"loss": 1.0})
    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    assert len(history(client, sink.run_id, "loss")) == 1002


def test_a_store_that_refuses_is_an_error_of_the_flush_and_of_no_later_one(tmp_path: Path) -> None:
    sink = MlflowSink(tmp_path)
    (folder,) = tmp_path.glob(f"*/{sink.run_id}")
    away = folder.rename(tmp_path / "away")
    sink.measure(1, 10, {"loss": 1.0})
    with pytest.raises(Exception, match=sink.run_id):
        sink.flush()
    away.rename(folder)
    sink.measure(2, 20, {"loss": 0.5})
    sink.close()
    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    assert history(client, sink.run_id, "loss") == [(20, 0.5)]


def test_a_store_that_hangs_holds_a_run_up_for_its_limit_and_loses_nothing(
    tmp_path: Path,
) -> None:
    """Opening a pipe to append to it blocks until somebody reads from it."""
    sink = MlflowSink(tmp_path, limit_seconds=0.2)
    (metrics,) = tmp_path.glob(f"*/{sink.run_id}/metrics")
    pipe = metrics / "loss"
    os.mkfifo(pipe)
    began = time.monotonic()
    sink.measure(1, 10, {"loss": 1.0})
    sink.flush()
    first_waited = time.monotonic() - began
    for step in (20, 30, 40):
        sink.measure(step // 10, step, {"loss": 0.5})
        sink.flush()
    waited = time.monotonic() - began
    with pipe.open() as reader:
        pipe.unlink()
        assert reader.read().split()[1:] == ["1.0", "10"]
    sink.close()
    assert 0.2 <= first_waited < 2.0
    assert waited < first_waited + 0.2
    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    assert history(client, sink.run_id, "loss") == [(20, 0.5), (30, 0.5), (40, 0.5)]


def test_a_store_that_hangs_for_good_is_told_when_the_run_ends(tmp_path: Path) -> None:
    sink = MlflowSink(tmp_path, limit_seconds=0.02)
    (metrics,) = tmp_path.glob(f"*/{sink.run_id}/metrics")
    os.mkfifo(metrics / "loss")
    sink.measure(1, 10, {"loss": 1.0})
    sink.flush()
    with pytest.raises(TimeoutError, match=r"has not answered for 0\.2 s"):
        sink.close()
    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    assert client.get_run(sink.run_id).info.status == "FINISHED"


def test_what_comes_after_a_batch_that_was_refused_is_sent_all_the_same(tmp_path: Path) -> None:
    sink = MlflowSink(tmp_path)
    store = tmp_path / "mlflow_is_away"
    (experiment,) = [path for path in tmp_path.iterdir() if (path / sink.run_id).exists()]
    (experiment / sink.run_id).rename(store)
    sink.measure(1, 10, {"loss": 1.0})
    sink._sending = _in_background(lambda: sink._send(*sink._taken()))
    wait([sink._sending])
    store.rename(experiment / sink.run_id)
    sink.measure(2, 20, {"loss": 0.5})
    with pytest.raises(MlflowException):
        sink.close()
    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    assert history(client, sink.run_id, "loss") == [(20, 0.5)]
    assert client.get_run(sink.run_id).info.status == "FINISHED"


def test_the_command_that_shows_a_store_can_be_pasted(tmp_path: Path) -> None:
    shared = tmp_path / "shared store"
    sink = MlflowSink(tmp_path / "run", tracking_uri=shared.as_uri())
    assert shlex.split(sink.place)[-1] == shared.as_uri()
    sink.close()
    own = MlflowSink(tmp_path / "my run")
    assert shlex.split(own.place)[-1] == str(tmp_path / "my run")
    own.close()


def test_ids_are_not_drawn_from_the_random_stream_of_the_run(tmp_path: Path) -> None:
    """MLflow draws for an id that is too short, about one in ten."""
    random.seed(3)
    before = random.getstate()
    for number in range(40):
        MlflowSink(tmp_path, experiment=f"experiment {number}").close()
    assert random.getstate() == before

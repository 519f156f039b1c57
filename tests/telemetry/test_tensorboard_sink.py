"""What TensorBoard reads back of a run."""

import logging
import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from esper.lifecycle.events import RunWentBack
from esper.telemetry import TensorBoardSink
from tracked_run import CONFIG, PRUNED, SLOT, alpha_set, record, tell_run

ALPHA = f"slots/{SLOT}/alpha"


def tensorboard(folder: Path) -> EventAccumulator:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    return EventAccumulator(str(folder)).Reload()


def scalars(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def texts(events: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events.Tensors(f"{tag}/text_summary")
    ]


def test_metrics_and_slots_are_scalars_by_step(tmp_path: Path) -> None:
    with TensorBoardSink(tmp_path) as sink:
        tell_run(sink, PRUNED)
    events = tensorboard(tmp_path)
    (_, first), (step, nan), (_, last) = scalars(events, "loss")
    assert (first, step, last) == (1.0, 20, 0.5)
    assert math.isnan(nan)
    assert scalars(events, "top-5 %") == [(20, 0.5)]
    assert scalars(events, "epoch") == [(10, 1.0), (20, 2.0), (30, 3.0)]
    assert scalars(events, ALPHA) == [(10, 0.0), (14, 1.0), (20, 0.0)]
    assert scalars(events, f"slots/{SLOT}/alpha_target") == [(10, 1.0)]
    assert scalars(events, f"slots/{SLOT}/stage") == [(10, 3.0)]
    assert scalars(events, f"slots/{SLOT}/gradient_ratio") == [(20, 0.5)]
    assert scalars(events, "param_count") == [(0, 97.0), (30, 120.0)]
    assert scalars(events, "test/loss") == [(30, 0.25)]
    assert events.Scalars(ALPHA)[0].wall_time == 1010.0


def test_notable_events_are_text(tmp_path: Path) -> None:
    with TensorBoardSink(tmp_path) as sink:
        tell_run(sink, PRUNED)
    events = tensorboard(tmp_path)
    ((step, text),) = texts(events, "events/seed_pruned")
    assert step == 20
    assert "no use" in text
    assert SLOT in text
    assert texts(events, "events/step_skipped") == [(12, "step 12 skipped: bad loss")]


def test_settings_are_hyperparameters(tmp_path: Path) -> None:
    TensorBoardSink(tmp_path, config=CONFIG).close()
    events = tensorboard(tmp_path)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["trainer.epochs"].number_value == 3
    assert settings["task"].string_value == "quadratic"
    assert settings["threads"].string_value == "none"


def test_a_resumed_run_goes_on_in_the_folder_without_what_was_forgotten(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path, config=CONFIG)
    for step in (10, 20, 30):
        first.measure(step // 10, step, {"loss": 100.0 + step})
    first.publish(alpha_set(25))
    first.flush()  # and killed
    with TensorBoardSink(tmp_path, config=CONFIG, after_step=20) as resumed:
        resumed.measure(3, 30, {"loss": 3.0})
    first.close()
    events = tensorboard(tmp_path)
    assert scalars(events, "loss") == [(10, 110.0), (20, 120.0), (30, 3.0)]
    assert ALPHA not in events.Tags()["scalars"] or scalars(events, ALPHA) == []


def test_steps_that_a_run_went_back_over_are_forgotten(tmp_path: Path) -> None:
    with TensorBoardSink(tmp_path) as sink:
        sink.measure(1, 10, {"loss": 1.0})
        sink.measure(2, 20, {"loss": 50.0})
        back = RunWentBack(from_step=25, to_step=12, same_batches=True)
        sink.publish(record(25, back))
        sink.measure(2, 20, {"loss": 2.0})
    events = tensorboard(tmp_path)
    assert scalars(events, "loss") == [(10, 1.0), (20, 2.0)]
    assert [step for step, _ in texts(events, "events/run_went_back")] == [12]


def test_what_was_flushed_is_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.measure(1, 10, {"loss": 1.0})
    sink.flush()
    assert scalars(tensorboard(tmp_path), "loss") == [(10, 1.0)]
    sink.close()

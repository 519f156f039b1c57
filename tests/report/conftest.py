"""A run to look at."""

from pathlib import Path

import pytest

import esper
from esper.lifecycle.actions import Germinate
from esper.lifecycle.events import RunStarted
from esper.report import RunStory, tell
from esper.telemetry import RunReader, RunStore
from growth_problem import make_problem


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which one seed commits, one is refused, and one is still growing."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    problem = make_problem()
    store = RunStore(folder, config={"task": "quadratic"}, environment={})
    policy = esper.PlannedPolicy(
        {
            3: [Germinate(slot="embed", blueprint="mlp")],
            21: [Germinate(slot="embed", blueprint="noop")],
            32: [Germinate(slot="embed", blueprint="lora")],
        },
        patience_epochs=4,
    )
    trainer = problem.trainer(policy, epochs=33)
    trainer.growth.sinks.append(store)
    started = RunStarted(slots=("embed",), host_param_count=97)
    trainer.growth.publish([started])
    trainer.fit()
    store.close()
    return folder


@pytest.fixture(scope="session")
def story(run_folder: Path) -> RunStory:
    return tell(RunReader(run_folder).events())


@pytest.fixture(scope="session")
def run_reader(run_folder: Path) -> RunReader:
    return RunReader(run_folder)

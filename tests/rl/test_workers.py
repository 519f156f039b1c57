"""Workers that fail, for real, and go on."""

import itertools
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from esper.rl.fragment import Fragment
from esper.rl.fragment_worker import FragmentWorker
from esper.rl.growth_episode import DivergedAtOnceError
from esper.rl.process_workers import ProcessWorkers
from esper.rl.ray_workers import RayWorkers
from esper.rl.workers import InProcessWorkers, WorkersFailedError
from esper.training.random_states import random_states
from rl_toys import (
    DIES,
    EPISODE_STEPS,
    SETTINGS,
    BrokenEnv,
    CueEnv,
    DivergingEnv,
    Failing,
    order,
)


def assert_equal(one: Fragment, other: Fragment) -> None:
    """Compare everything but the LSTM's states where an episode begins, which count as zeros."""
    goes_on = 1 - one.steps["episode_starts"][:, :, None, None]
    for group, mask in (("observations", 1), ("steps", 1), ("lstm_states", goes_on)):
        arrays, others = getattr(one, group), getattr(other, group)
        assert arrays.keys() == others.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(mask * array, mask * others[name], err_msg=name)
    assert len(one.episodes) == len(other.episodes) > 0
    for episode, another in zip(one.episodes, other.episodes, strict=True):
        assert replace(episode, seconds=0.0) == replace(another, seconds=0.0)


def test_a_fragment_tells_what_its_episodes_came_to() -> None:
    fragment = FragmentWorker(CueEnv, SETTINGS, 0).collect(order(num_steps=EPISODE_STEPS + 2))
    (episode,) = fragment.episodes
    rewards = fragment.steps["rewards"][:EPISODE_STEPS, 0]
    assert episode.num_steps == EPISODE_STEPS
    assert episode.episode_return == pytest.approx(rewards.sum(), abs=1e-5)
    assert sum(episode.return_parts.values()) == pytest.approx(rewards.sum(), abs=1e-5)
    assert episode.final == {"cue": episode.final["cue"], "threads": 1, "task": "toy"}
    assert fragment.steps["episode_starts"][:, 0].tolist() == [1, 0, 0, 0, 1, 0]


def test_an_episode_that_began_in_the_fragment_before_is_told_whole() -> None:
    worker = FragmentWorker(CueEnv, SETTINGS, 0)
    first = worker.collect(order(0, num_steps=3))
    second = worker.collect(order(1, num_steps=2))
    assert first.episodes == ()
    (episode,) = second.episodes
    rewards = [*first.steps["rewards"][:, 0], second.steps["rewards"][0, 0]]
    assert sum(episode.return_parts.values()) == pytest.approx(sum(rewards), abs=1e-5)


def test_a_worker_made_anew_between_episodes_goes_on_to_the_bit() -> None:
    old = FragmentWorker(CueEnv, SETTINGS, 1)
    old.collect(order(0))
    assert_equal(old.collect(order(1)), FragmentWorker(CueEnv, SETTINGS, 1).collect(order(1)))


def test_no_two_fragments_have_the_same_episodes_or_draw_the_same_actions() -> None:
    places = list(itertools.product(range(2), repeat=3))
    fragments = [
        FragmentWorker(CueEnv, SETTINGS, index).collect(order(number, attempt=attempt))
        for index, number, attempt in places
    ]
    noises = {e.return_parts["noise"] for fragment in fragments for e in fragment.episodes}
    assert len(noises) == 2 * len(places)
    assert len({fragment.steps["actions"].tobytes() for fragment in fragments}) == len(places)


def test_an_episode_that_diverges_at_once_has_another_in_its_place_and_is_told() -> None:
    some = partial(DivergingEnv, {1, 4, 5})
    worker = FragmentWorker(some, SETTINGS, 0)
    fragment = worker.collect(order(num_steps=2 * EPISODE_STEPS + 1))
    assert len(fragment.episodes) == 2
    assert fragment.problems == ("a run was left out: no run of this",) * 3
    again = worker.collect(order(1))
    assert again.problems == ()
    assert_equal(fragment, FragmentWorker(some, SETTINGS, 0).collect(order(num_steps=9)))
    for_good = FragmentWorker(partial(DivergingEnv, range(99)), SETTINGS, 0)
    with pytest.raises(DivergedAtOnceError):
        for_good.collect(order())


def test_collecting_leaves_the_random_streams_of_the_process_alone() -> None:
    asked = order()
    before = random_states()
    FragmentWorker(CueEnv, SETTINGS, 0).collect(asked)
    after = random_states()
    assert torch.equal(after.pop("torch"), before.pop("torch"))
    assert after == before


@pytest.mark.slow
def test_processes_collect_what_this_process_does_on_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with (
        ProcessWorkers(CueEnv, SETTINGS, num_workers=2) as processes,
        InProcessWorkers(CueEnv, SETTINGS, num_workers=2) as here,
    ):
        for number in (0, 1):
            for one, other in zip(
                processes.collect_all(order(number)), here.collect_all(order(number)), strict=True
            ):
                assert_equal(one, other)
        assert list(processes.problems) == []


@pytest.mark.slow
def test_a_process_that_fails_within_an_episode_is_started_again(tmp_path: Path) -> None:
    failing = Failing(("kill", "raise", "nan"), tmp_path)
    with ProcessWorkers(failing, SETTINGS, num_workers=1) as workers:
        (fragment,) = workers.collect_all(order())
        assert workers.problems == [
            "worker 0: its process was killed by signal 9 (SIGKILL)",
            "worker 0: ValueError: reward component 'progress' is nan",
            "worker 0: ValueError: rewards must be finite, got nan at step 5 of 8",
        ]
        alone = FragmentWorker(CueEnv, SETTINGS, 0)
        assert_equal(fragment, alone.collect(order(attempt=3)))
        (following,) = workers.collect_all(order(1))
        assert_equal(following, alone.collect(order(1)))
        assert len(workers.problems) == 3


@pytest.mark.parametrize(("make", "restarts"), [(ProcessWorkers, 0), (InProcessWorkers, 2)])
def test_workers_that_always_fail_end_in_an_error_that_says_why(
    make: Callable, restarts: int
) -> None:
    workers = make(BrokenEnv, SETTINGS, num_workers=1, max_restarts=restarts)
    told = f"failed {restarts + 1} times in a row .* ValueError: the host cannot be trained"
    with pytest.raises(WorkersFailedError, match=told) as caught:
        workers.collect_all(order())
    assert "rl_toys.py" in caught.value.__notes__[0]
    assert len(workers.problems) == restarts
    with pytest.raises(RuntimeError, match="are closed"):
        workers.collect_all(order())


def test_an_environment_that_cannot_be_sent_is_refused() -> None:
    class Local(CueEnv):
        pass

    with pytest.raises(TypeError, match="top level of a module"):
        ProcessWorkers(Local, SETTINGS, num_workers=1)


STUCK = """
from rl_toys import SETTINGS, StuckEnv, order

from esper.rl.process_workers import ProcessWorkers

if __name__ == "__main__":
    ProcessWorkers(StuckEnv, SETTINGS, num_workers=2).collect_all(order())
"""


@pytest.mark.slow
def test_workers_end_in_the_midst_of_a_step_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK, encoding="utf-8")
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert parent.stdout is not None
    for _ in range(2):
        assert parent.stdout.readline().startswith(b"stuck")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    # The children have the pipe open for as long as they live.
    assert select.select([parent.stdout], [], [], 30.0)[0], "a worker has outlived its parent"
    assert parent.stdout.read() == b""
    parent.stdout.close()


@pytest.mark.slow
def test_ray_collects_the_same_and_replaces_an_actor_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with RayWorkers(Failing(("kill",), tmp_path), SETTINGS, num_workers=2) as workers:
        fragments = workers.collect_all(order())
        (problem,) = workers.problems
        assert re.match("worker [01]: ActorDiedError: ", problem)
        killed = int(problem.split()[1].rstrip(":"))
        for index, fragment in enumerate(fragments):
            alone = FragmentWorker(CueEnv, SETTINGS, index)
            assert_equal(fragment, alone.collect(order(attempt=int(index == killed))))


@contextmanager
def ray_machines(count: int, folder: Path) -> Iterator[str]:
    """Start a Ray cluster as its documentation says, a CPU on each machine; all but one may die."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    head = ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false"]
    head += ["--temp-dir", str(folder)]
    command = [Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=1", f"--object-store-memory={80 << 20}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with ExitStack() as stack:
        for machine in range(count):
            which = [f"--address={address}"] if machine else head
            started = subprocess.Popen(
                [*command, *which],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**environment, **({DIES: "1"} if machine else {})},
                start_new_session=True,
            )
            stack.callback(end_session, started)
            assert started.stdout is not None
            told: list[bytes] = []
            for line in started.stdout:
                told.append(line)
                if b"will now block" in line:
                    break
            else:
                pytest.fail("Ray has not started:\n" + b"".join(told).decode())
        yield address


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started."""
    own = os.getsid(process.pid)
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if os.getsid(int(folder.name)) == own:
                os.kill(int(folder.name), signal.SIGKILL)
    process.communicate()


COLLECT = """
import sys

from esper.rl.fragment_worker import FragmentWorker
from esper.rl.ray_workers import RayWorkers
from rl_toys import SETTINGS, CueEnv, MachineDyingEnv, order
from test_workers import assert_equal

with RayWorkers(MachineDyingEnv, SETTINGS, num_workers=2, address=sys.argv[1]) as workers:
    fragments = workers.collect_all(order())
problems = workers.problems
# While Ray does not know yet that the machine is gone, it may choose it once more.
assert 1 <= len(problems) <= 3, problems
assert len({problem.split(":")[0] for problem in problems}) == 1, problems
killed = int(problems[0].split()[1].rstrip(":"))
for index, fragment in enumerate(fragments):
    alone = FragmentWorker(CueEnv, SETTINGS, index)
    assert_equal(fragment, alone.collect(order(attempt=len(problems) * (index == killed))))
"""


@pytest.mark.slow
def test_a_worker_goes_on_where_there_is_no_room_when_its_machine_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen from a process of its own: one has one cluster and one token in its life."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    modules = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with (
        tempfile.TemporaryDirectory(prefix="ray") as short,
        ray_machines(2, Path(short)) as address,
    ):
        done = subprocess.run(
            [sys.executable, "-c", COLLECT, address],
            env={**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr

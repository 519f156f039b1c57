"""Checkpoints on disk: what stays, what is passed over, what is refused."""

import errno
import itertools
import json
import math
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

import esper
from esper.lifecycle.events import (
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointSaved,
    RunResumed,
    RunWentBack,
)
from esper.training import CheckpointError, Checkpoints, EpochReport
from esper.training.checkpoints import FORMAT_VERSION
from esper.training.governor import GovernorConfig
from esper.training.sealed_folder import sealed_folder
from growth_problem import Problem, make_problem


class Ever:
    """A policy that never grows."""

    name = "ever"

    def decide(self, state: Any) -> list[Any]:
        return []


def trained(
    folder: Path, epochs: int = 4, problem: Problem | None = None, **settings: Any
) -> tuple[esper.Trainer, Problem]:
    problem = problem or make_problem()
    trainer = problem.trainer(Ever(), epochs=epochs)
    trainer.keeper = Checkpoints(folder, **settings)
    trainer.fit()
    return trainer, problem


def fresh(folder: Path, epochs: int = 6) -> tuple[esper.Trainer, Problem, Checkpoints]:
    problem = make_problem()
    trainer = problem.trainer(Ever(), epochs=epochs)
    return trainer, problem, Checkpoints(folder)


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    problem = make_problem()
    trainer = problem.trainer(Ever(), epochs=5, evaluate=lambda: next(losses))
    trainer.keeper = Checkpoints(tmp_path, keep_last=2)
    trainer.fit()
    names = [f"step-{16 * epoch:010d}" for epoch in (2, 4, 5)]
    assert trainer.keeper.names() == names
    assert (tmp_path / "latest").resolve().name == names[-1]
    saved = [event.name for event in problem.recorder.of(CheckpointSaved)]
    assert saved == [f"step-{16 * epoch:010d}" for epoch in range(1, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *names]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, [16, 32]), ({"interval_steps": 12}, [12, 24]), ({"min_seconds": 1e6}, [])],
)
def test_it_is_made_when_it_was_asked_for(
    settings: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    trained(tmp_path, epochs=2, keep_last=9, **settings)
    assert Checkpoints(tmp_path).names() == [f"step-{step:010d}" for step in steps]


def test_a_run_goes_on_from_the_newest(tmp_path: Path) -> None:
    trained(tmp_path / "cut", epochs=4)
    whole, _ = trained(tmp_path / "whole", epochs=6)
    trainer, problem, checkpoints = fresh(tmp_path / "cut")
    info = checkpoints.resume(trainer)
    assert (info.step, info.epoch) == (64, 4)
    assert [event.name for event in problem.recorder.of(RunResumed)] == ["step-0000000064"]
    reports = trainer.fit()
    assert [report.epoch for report in reports] == [5, 6]
    state = whole.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in trainer.model.state_dict().items())


def offsets(size: int, count: int) -> Iterator[int]:
    yield from (size * index // count for index in range(count))


def every_file(folder: Path) -> list[Path]:
    (newest,) = [path for path in folder.iterdir() if path.name == "step-0000000064"]
    return sorted(newest.iterdir())


@pytest.mark.parametrize("name", range(4))
def test_a_file_that_was_cut_or_changed_is_always_found(name: int, tmp_path: Path) -> None:
    """Truncated at 20 offsets, and one bit turned at 20 places, of every file."""
    trained(tmp_path / "run", epochs=4)
    file = every_file(tmp_path / "run")[name]
    data = file.read_bytes()
    damages = [data[:at] for at in offsets(len(data), 20)]
    damages += [
        data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        for at in offsets(len(data), 20)
    ]
    checkpoints = Checkpoints(tmp_path / "run")
    for damaged in damages:
        file.write_bytes(damaged)
        found = checkpoints.newest()
        assert found.info.step == 48, file.name
        assert [event.name for event in found.damaged] == ["step-0000000064"]
    file.unlink()
    assert checkpoints.newest().info.step == 48
    file.write_bytes(data)
    assert checkpoints.newest().info.step == 64


class WatchedCheckpoints(Checkpoints):
    """Looks after each save whether what it wrote is what a run would go on from."""

    saved: list[str]

    def save(self, trainer: esper.Trainer) -> Path | None:
        target = super().save(trainer)
        assert target is not None
        assert self.names()[-1] == target.name
        assert (self.folder / "latest").resolve(strict=True) == target
        self.saved = [*getattr(self, "saved", []), target.name]
        return target


@pytest.mark.parametrize("keep_best", [False, True])
def test_after_a_way_back_those_of_the_way_that_was_left_go(
    keep_best: bool, tmp_path: Path
) -> None:
    """The best of all is among them: it knows the second evaluation, that of step 32."""
    calls = itertools.count(1)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return mse_loss(output, target) * (math.nan if next(calls) in (33, 34, 35) else 1.0)

    losses = iter([3.0, 1.0, 2.0, 2.5])
    problem = make_problem()
    trainer = problem.trainer(
        Ever(),
        epochs=3,
        loss=loss,
        evaluate=lambda: next(losses),
        governor=GovernorConfig(snapshot_steps=20),
    )
    keeper = WatchedCheckpoints(tmp_path, interval_steps=2, keep_best=keep_best)
    trainer.keeper = keeper
    trainer.fit()
    (back,) = problem.recorder.of(RunWentBack)
    assert (back.from_step, back.to_step) == (35, 20)
    assert keeper.saved[16:19] == [f"step-{step:010d}" for step in (34, 22, 24)]
    assert keeper.names() == [f"step-{step:010d}" for step in [34] * keep_best + [46, 48]]


def test_a_run_goes_on_to_the_milestones_of_its_scheduler(tmp_path: Path) -> None:
    def made(problem: Problem) -> esper.Trainer:
        lower, optimizer = torch.optim.lr_scheduler, problem.optimizer
        parts = [lower.LinearLR(optimizer), lower.MultiStepLR(optimizer, milestones=[2, 2, 3])]
        scheduler = lower.SequentialLR(optimizer, parts, milestones=[2])
        return problem.trainer(Ever(), epochs=6, scheduler=scheduler)

    whole, cut, problem = make_problem(), make_problem(), make_problem()
    made(whole).fit()
    trainer = made(cut)
    trainer.keeper = Checkpoints(tmp_path)
    for report in trainer.run():
        if report.epoch == 1:
            break
    again = made(problem)
    Checkpoints(tmp_path).resume(again)
    again.fit()
    assert problem.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert whole.optimizer.param_groups[0]["lr"] < 1e-4
    assert torch.equal(problem.model.embed.weight, whole.model.embed.weight)


def test_those_that_were_damaged_go_once_there_is_a_newer_one(tmp_path: Path) -> None:
    trained(tmp_path, epochs=4)
    (tmp_path / "step-0000000064" / "state.json").write_text("{}")
    trainer, _, _ = fresh(tmp_path)
    keeper = WatchedCheckpoints(tmp_path, interval_steps=6, keep_last=1, keep_best=False)
    trainer.keeper = keeper
    assert keeper.resume(trainer).step == 48
    trainer.fit()
    assert keeper.saved[0] == "step-0000000054"
    assert keeper.names() == ["step-0000000096"]


def test_a_run_begun_anew_beside_checkpoints_of_another_leaves_those(tmp_path: Path) -> None:
    trained(tmp_path, epochs=6, keep_last=2, keep_best=False)
    assert Checkpoints(tmp_path).names() == ["step-0000000080", "step-0000000096"]
    trained(tmp_path, epochs=3, keep_last=1, keep_best=False)
    own = "step-0000000048"
    assert Checkpoints(tmp_path).names() == [own, "step-0000000080", "step-0000000096"]
    assert (tmp_path / "latest").resolve().name == own


def test_the_one_before_is_taken_with_a_warning(tmp_path: Path) -> None:
    trained(tmp_path, epochs=4)
    shutil.rmtree(tmp_path / "step-0000000064")
    (tmp_path / "step-0000000064").mkdir()
    trainer, problem, checkpoints = fresh(tmp_path)
    assert checkpoints.resume(trainer).step == 48
    (event,) = problem.recorder.of(CheckpointDamaged)
    assert event.priority == "warning"
    assert "manifest.json is missing" in event.error


class Malicious:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("resealed", [False, True])
def test_a_pickle_under_any_name_is_never_executed(resealed: bool, tmp_path: Path) -> None:
    trained(tmp_path / "run", epochs=4)
    executed = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malicious(executed)))  # noqa: S301 – the plant must work
    assert executed.exists()
    executed.unlink()
    planted = pickle.dumps(Malicious(executed))
    for folder in (tmp_path / "run").glob("step-*"):
        names = [file.name for file in folder.iterdir()]
        if resealed:
            info = (folder / "checkpoint.json").read_bytes()
            with sealed_folder(folder, overwrite=True) as writing:
                for name in names:
                    (writing / name).write_bytes(planted)
                (writing / "manifest.json").unlink()
                (writing / "checkpoint.json").write_bytes(info)
        else:
            for name in (*names, "state.pt", "optimizer.pkl"):
                (folder / name).write_bytes(planted)
    trainer, _, checkpoints = fresh(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"no checkpoint to go on from: "):
        checkpoints.resume(trainer)
    assert not executed.exists()


@pytest.mark.parametrize(
    "version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1, str(FORMAT_VERSION), None]
)
def test_another_version_is_told_with_both(version: Any, tmp_path: Path) -> None:
    trained(tmp_path, epochs=1)
    folder = tmp_path / "step-0000000016"
    kept = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    info = json.loads(kept["checkpoint.json"])
    kept["checkpoint.json"] = json.dumps({**info, "format_version": version}).encode()
    with sealed_folder(folder, overwrite=True) as writing:
        for name, data in kept.items():
            (writing / name).write_bytes(data)
    trainer, _, checkpoints = fresh(tmp_path)
    words = f"has format version {version!r}; this esper reads version {FORMAT_VERSION}"
    with pytest.raises(CheckpointError, match=words):
        checkpoints.resume(trainer)


def test_where_there_is_none_it_says_so(tmp_path: Path) -> None:
    trainer, _, checkpoints = fresh(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no checkpoint to go on from: it is empty"):
        checkpoints.resume(trainer)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step() -> None:
    with pytest.raises(CheckpointError, match="cannot be written to /proc/esper"):
        Checkpoints("/proc/esper")


def test_what_people_keep_beside_checkpoints_stays_and_is_none(tmp_path: Path) -> None:
    trained(tmp_path, epochs=4)
    for name in ("step-0000000064 (copy)", "step-good", ".step-good"):
        shutil.copytree(tmp_path / "step-0000000048", tmp_path / name)
    (tmp_path / "step-0000000048" / "notes.txt").write_text("mine")
    (tmp_path / "step-0000000080").mkdir()
    (tmp_path / "step-0000000080" / "notes.txt").write_text("mine")
    sealed = {path for n in (48, 64) for path in (tmp_path / f"step-{n:010d}").glob("*.*")}
    before = set(tmp_path.rglob("*")) - sealed - {tmp_path / "step-0000000064"}
    before.add(tmp_path / "step-0000000048" / "notes.txt")
    trainer, problem, checkpoints = fresh(tmp_path)
    trainer.keeper = checkpoints
    assert checkpoints.resume(trainer).step == 64
    trainer.fit()
    assert before <= set(tmp_path.rglob("*"))
    (failed,) = problem.recorder.of(CheckpointFailed)
    assert failed.name == "step-0000000080"
    assert "was not saved by esper, and is not replaced" in failed.error
    assert checkpoints.names() == [f"step-{step:010d}" for step in (32, 64, 96)]
    assert checkpoints.newest().name == "step-0000000096"


@pytest.mark.parametrize("linked", [False, True])
def test_one_of_a_way_that_was_left_goes_though_people_have_written_into_it(
    linked: bool, tmp_path: Path
) -> None:
    trainer = make_problem().trainer(Ever(), epochs=2)
    trainer.keeper = keeper = Checkpoints(tmp_path / "run", keep_last=1, keep_best=False)
    reports = trainer.run()
    next(reports)
    state = trainer.state_dict()
    next(reports)
    left = keeper.folder / "step-0000000032"
    (left / "notes.txt").write_text("diverges here")
    kept = {left / "notes.txt"}
    if linked:
        left.rename(tmp_path / "elsewhere")
        left.symlink_to(tmp_path / "elsewhere")
        kept = set((tmp_path / "elsewhere").iterdir())
    trainer.load_state_dict(state)
    keeper.save(trainer)
    assert keeper.names() == ["step-0000000016"]
    assert keeper.newest().name == "step-0000000016"
    assert all(file.exists() for file in kept)
    assert left.exists() is not linked


def test_a_file_system_without_links_keeps_checkpoints_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(link: Path, target: str) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(link))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    _, problem = trained(tmp_path, epochs=4, keep_last=2, keep_best=False)
    assert len(problem.recorder.of(CheckpointSaved)) == 4
    assert not problem.recorder.of(CheckpointFailed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000000048", "step-0000000064"]


def test_one_that_cannot_be_removed_is_told_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, refused = Path.unlink, iter([True])

    def refuse_once(file: Path, **options: bool) -> None:
        if file.name == "state.json" and next(refused, False):
            raise OSError(errno.EACCES, "Permission denied", str(file))
        unlink(file, **options)

    monkeypatch.setattr(Path, "unlink", refuse_once)
    trainer, problem = trained(tmp_path, epochs=2, keep_last=1, keep_best=False)
    (failed,) = problem.recorder.of(CheckpointFailed)
    assert failed.name == "step-0000000016"
    assert "cannot be removed" in failed.error
    assert [event.name for event in problem.recorder.of(CheckpointSaved)][-1] == "step-0000000032"
    assert isinstance(trainer.keeper, Checkpoints)
    trainer.keeper.save(trainer)
    assert [path.name for path in tmp_path.glob("*step-*")] == ["step-0000000032"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    trained(tmp_path, epochs=2)
    left = tmp_path / ".step-0000000048-0123"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    assert Checkpoints(tmp_path).names() == ["step-0000000016", "step-0000000032"]
    assert left.exists(), "another process may be writing it"
    trained(tmp_path, epochs=3)
    assert not left.exists()


def test_training_goes_on_where_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full disk itself is filled in tests/faults."""
    trainer, problem = trained(tmp_path, epochs=2)
    monkeypatch.setattr(
        "esper.training.checkpoints.write_tree",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    assert isinstance(trainer.keeper, Checkpoints)
    before = trainer.keeper.names()
    assert trainer.keeper.save(trainer) is None
    (event,) = problem.recorder.of(CheckpointFailed)
    assert event.priority == "critical"
    assert "No space left" in event.error
    assert trainer.keeper.names() == before
    assert not list(tmp_path.glob(".step-*"))


def test_training_goes_on_where_the_folder_is_gone(tmp_path: Path) -> None:
    problem = make_problem()
    trainer = problem.trainer(Ever(), epochs=2)
    trainer.keeper = Checkpoints(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run")
    trainer.fit()
    assert trainer.keeper.names() == ["step-0000000016", "step-0000000032"]
    assert not problem.recorder.of(CheckpointFailed)


@pytest.mark.parametrize("listing", range(2))
def test_training_goes_on_where_the_disk_lists_nothing(
    listing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, problem = trained(tmp_path, epochs=1)
    trainer.keeper = keeper = Checkpoints(tmp_path)
    iterdir, numbers = Path.iterdir, itertools.count()

    def stale(folder: Path) -> Iterator[Path]:
        if folder == tmp_path and next(numbers) == listing:
            raise OSError(errno.ESTALE, "Stale file handle", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", stale)
    assert (keeper.save(trainer) is None) is (listing == 0)
    (event,) = problem.recorder.of(CheckpointFailed)
    assert "Stale file handle" in event.error
    assert keeper.newest().name == "step-0000000016"


def test_an_epoch_tells_the_same_with_a_keeper_and_without(tmp_path: Path) -> None:
    def losses(reports: list[EpochReport]) -> list[float]:
        return [report.train_loss for report in reports]

    kept = make_problem().trainer(Ever(), epochs=3)
    kept.keeper = Checkpoints(tmp_path, interval_steps=5)
    assert losses(kept.fit()) == losses(make_problem().trainer(Ever(), epochs=3).fit())

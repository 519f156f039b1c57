"""Which run folders are found, and that nothing outside the folder ever is."""

import os
from pathlib import Path

import pytest

from esper.dashboard.run_folders import Refusal, RunFolders
from esper.experiments.comparison import holds_comparison
from served_runs import write_run


def test_runs_are_found_in_the_folder_and_one_folder_deeper(tmp_path: Path) -> None:
    for name in ("one", "search/two", "search/three", "a/b/too-deep", ".hidden"):
        write_run(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no run")
    found = RunFolders(tmp_path).find()
    assert sorted(found.folders) == ["one", "search/three", "search/two"]
    assert found.folders["search/two"] == tmp_path / "search" / "two"
    assert found.refused == ()


def test_folder_of_one_run_holds_that_run(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    found = RunFolders(tmp_path / "one").find()
    assert found.folders == {"one": tmp_path / "one"}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("compare.json", "a comparison; see esper inspect, or its report.html"),
        ("evaluation.json", "an evaluation of policies; see esper inspect"),
    ],
)
def test_folder_that_esper_made_and_that_holds_no_run_says_where_to_look_at_it(
    file: str, reason: str, tmp_path: Path
) -> None:
    for folder in (tmp_path / "one", tmp_path / "search" / "two"):
        (folder / "runs").mkdir(parents=True)
        (folder / file).write_text("{}")
        assert holds_comparison(folder) == (file == "compare.json")
    found = RunFolders(tmp_path).find()
    assert found.folders == {}
    assert found.refused == (
        Refusal(id="one", reason=reason),
        Refusal(id="search/two", reason=reason),
    )
    assert RunFolders(tmp_path / "one").find().refused == (Refusal(id="one", reason=reason),)


def test_folder_that_does_not_exist_yet_holds_none(tmp_path: Path) -> None:
    folders = RunFolders(tmp_path / "runs")
    assert folders.find().folders == {}
    write_run(tmp_path / "runs" / "first")
    assert list(folders.find().folders) == ["first"]


def test_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    write_run(tmp_path / "disk" / "one")
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert list(RunFolders(tmp_path / "runs").find().folders) == ["one"]


def test_link_to_a_run_elsewhere_is_refused_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere" / "secret")
    root = tmp_path / "runs"
    write_run(root / "own")
    (root / "link").symlink_to(tmp_path / "elsewhere" / "secret")
    (root / "group").symlink_to(tmp_path / "elsewhere")
    (root / "nested").mkdir()
    (root / "nested" / "link").symlink_to(tmp_path / "elsewhere" / "secret")
    found = RunFolders(root).find()
    assert list(found.folders) == ["own"]
    assert sorted(refusal.id for refusal in found.refused) == ["group", "link", "nested/link"]
    assert {refusal.reason for refusal in found.refused} == {"a link"}


def test_link_that_leads_nowhere_or_in_a_circle_hides_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "search"):
        write_run(folder / "one")
        (folder / "circle").symlink_to("circle")
        (folder / "dangling").symlink_to("nowhere")
    (tmp_path / "one").rename(tmp_path / "two")
    assert RunFolders(tmp_path / "circle").find().folders == {}
    found = RunFolders(tmp_path).find()
    assert sorted(found.folders) == ["search/one", "two"]
    assert sorted(refusal.id for refusal in found.refused) == [
        "circle",
        "dangling",
        "search/circle",
        "search/dangling",
    ]


@pytest.mark.parametrize("name", ["run.sqlite", "config.json", "environment.json", ".lock"])
def test_run_with_a_file_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    root = tmp_path / "runs"
    write_run(root / "own")
    (root / "own" / name).rename(outside)
    (root / "own" / name).symlink_to(outside)
    found = RunFolders(root).find()
    assert found.folders == {}
    assert found.refused == (Refusal(id="own", reason="holds a link, a device or a pipe"),)


def test_run_with_a_pipe_that_would_never_end_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "own")
    (tmp_path / "own" / "config.json").unlink()
    os.mkfifo(tmp_path / "own" / "config.json")
    (refusal,) = RunFolders(tmp_path).find().refused
    assert refusal == Refusal(id="own", reason="holds a link, a device or a pipe")


def test_name_that_cannot_be_shown_is_refused_for_that(tmp_path: Path) -> None:
    write_run(tmp_path / "two\nlines")
    write_run(tmp_path / "family \U0001f468\u200d\U0001f469")
    write_run(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / os.fsdecode(b"run-\xff"))
    found = RunFolders(tmp_path).find()
    assert found.folders == {}
    assert sorted(refusal.id for refusal in found.refused) == [
        "family \U0001f468\u200d\U0001f469",
        "run-?",
        "two\nlines",
    ]
    assert {refusal.reason for refusal in found.refused} == {
        "its name has characters that cannot be shown"
    }

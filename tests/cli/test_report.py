"""`esper report` at the command line."""

import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.cli.app import app

COMPARISON = Path(__file__).parents[2] / "benchmarks" / "results" / "compare-digits"


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, ["report", *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    command = ["grow", "digits", "--epochs", "2", "--quiet", "--out", str(folder)]
    assert CliRunner().invoke(app, command).exit_code == 0
    return folder


def test_a_run_beside_a_comparison(run_folder: Path, tmp_path: Path) -> None:
    out, png = tmp_path / "story.html", tmp_path / "story.png"
    code, told = invoke(
        *(str(run_folder), "--beside", str(COMPARISON)), *("--out", str(out), "--png", str(png))
    )
    assert code == 0, told
    assert str(out) in told
    content = out.read_text(encoding="utf-8")
    assert "random times" in content
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_files_that_are_written_are_named_as_they_are(run_folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "z[" / "b]:smile:"
    odd.mkdir(parents=True)
    files = ("--out", str(odd / "story.html"), "--png", str(odd / "picture"))
    code, told = invoke(str(run_folder), *files)
    assert code == 0, told
    assert told == f"report {odd}/story.html picture {odd}/picture.png"
    assert sorted(odd.iterdir()) == [odd / "picture.png", odd / "story.html"]


@pytest.mark.parametrize("option", ["--out", "--png"])
def test_what_cannot_be_written_leaves_what_there_was(
    option: str, run_folder: Path, tmp_path: Path
) -> None:
    """As on a full disk."""
    target = tmp_path / f"there{'.html' if option == '--out' else '.png'}"
    target.write_text("of last time", encoding="utf-8")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        code, told = invoke(str(run_folder), option, str(target))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2, told
    assert f"File too large: '{target}'" in told
    assert target.read_text(encoding="utf-8") == "of last time"
    assert [*tmp_path.iterdir()] == [target]


def test_a_report_goes_where_a_link_leads_and_into_a_pipe(run_folder: Path, tmp_path: Path) -> None:
    link, linked, pipe = (tmp_path / name for name in ("link.html", "linked.html", "pipe"))
    link.symlink_to(linked)
    os.mkfifo(pipe)
    assert invoke(str(run_folder), "--out", str(link))[0] == 0
    assert link.is_symlink()
    with ThreadPoolExecutor() as readers:
        reading = readers.submit(pipe.read_bytes)
        assert invoke(str(run_folder), "--out", str(pipe))[0] == 0
    assert pipe.is_fifo()
    assert reading.result() == linked.read_bytes()


def test_a_folder_whose_name_is_no_text_has_a_report_too(run_folder: Path, tmp_path: Path) -> None:
    odd, out = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "story.html"
    shutil.copytree(run_folder, odd)
    code, told = invoke(str(odd), "--out", str(out))
    assert code == 0, told
    assert "<title>digits: caf?</title>" in out.read_text(encoding="utf-8")


def test_a_comparison_says_whether_growth_pays(tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    shutil.copytree(COMPARISON, folder)
    code, told = invoke(str(folder))
    assert code == 0, told
    content = (folder / "report.html").read_text(encoding="utf-8")
    assert "not decided" in content
    assert "in as many steps the grown network" in content
    assert "random times" in content


def test_what_cannot_be_shown_is_said(run_folder: Path, tmp_path: Path) -> None:
    for arguments, expected in (
        ([str(tmp_path)], "is no run folder"),
        ([str(run_folder), "--beside", str(tmp_path)], "compare.json"),
        ([str(COMPARISON), "--beside", str(COMPARISON)], "is a comparison itself"),
        (
            [str(run_folder), "--beside", str(COMPARISON.with_name("compare-teacher"))],
            "is of the task digits",
        ),
        ([str(run_folder), "--out", str(tmp_path / "missing" / "x.html")], "No such file"),
        ([str(run_folder), "--png", str(tmp_path / "x.xyz")], "Format 'xyz' is not supported"),
        ([str(run_folder), "--only", "loss"], "name one with --png"),
        (
            [str(run_folder), "--png", str(tmp_path / "x.png"), "--only", "lose"],
            "no picture 'lose' here; pictures: loss, quality-accuracy",
        ),
    ):
        code, told = invoke(*arguments)
        assert code == 2, (arguments, told)
        assert expected in told

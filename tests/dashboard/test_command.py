"""`esper dashboard` as a command: what it refuses, and how it says so."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import sys
{before}
sys.argv = ["esper", "dashboard", *{arguments!r}]
from esper.cli.app import main
main()
"""


def refusal(*arguments: str, before: str = "") -> str:
    script = RUN.format(before=before, arguments=list(arguments))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("package", ["starlette", "plotly"])
def test_missing_extra_is_named(package: str, tmp_path: Path) -> None:
    said = refusal(str(tmp_path), before=f"sys.modules[{package!r}] = None")
    assert "pip install 'esper-lite[dashboard]'" in said
    assert f"needs {package}" in said


@pytest.mark.parametrize("there", [True, False])
def test_folder_that_does_not_exist_yet_is_served_and_said_so(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    if there:
        folder.mkdir()
    script = RUN.format(before="", arguments=[str(folder), "--port", "0"])
    command = [sys.executable, "-u", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        said = serving.stdout.readline()
        serving.terminate()
    assert said.startswith(f"runs in {folder}")
    assert ("there is no such folder yet" in said) == (not there)


def test_wrong_folder_host_token_and_bus_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("short")
    file.chmod(0o600)
    assert "is no folder" in refusal(str(file))
    assert "at least 16" in refusal(str(tmp_path), "--port", "0", "--token-file", str(file))
    elsewhere = (str(tmp_path), "--host", "192.0.2.1")
    assert "cannot be served here" in refusal(*elsewhere)
    assert "--bus holds a password" in refusal(*elsewhere, "--bus", "redis://:hidden@h")

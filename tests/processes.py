"""Real processes: killed for real, or several that train one model."""

import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def kill_after(line: str | None, arguments: list[str]) -> str:
    """Run a script, kill it with SIGKILL once it prints a line that begins so; return its output.

    Args:
        line: None lets it end by itself, which must succeed.
        arguments: The script and its arguments.
    """
    process = subprocess.Popen(
        [sys.executable, "-u", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    output = ""
    for printed in process.stdout:
        output += printed
        if line is not None and printed.startswith(line):
            process.send_signal(signal.SIGKILL)
    process.stdout.close()
    code = process.wait(timeout=120)
    assert code == (0 if line is None else -signal.SIGKILL), output[-3000:]
    return output


def torchrun(
    script: Path, *arguments: str, processes: int = 2, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes that find each other, with the tests' modules at hand."""
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    return run_python(*launcher, str(script), *arguments)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on one core, with the tests' modules at hand."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # tells where a process was that gloo has aborted
            "GLOO_SOCKET_IFNAME": "lo",
            # Started again by torchrun, processes else read addresses of those that died
            # (pytorch/pytorch#135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "libraries")]),
        },
    )

"""When a supervisor takes a program to be ready, and what it makes of the end of a job."""

import errno
import socket
from pathlib import Path

import anyio
import pytest

from esper.supervision import service as service_module
from esper.supervision.changes import Changes
from esper.supervision.child import Ending
from esper.supervision.config import RestartConfig
from esper.supervision.program import Place, Program, Run
from esper.supervision.service import Service
from esper.supervision.status import ServiceStatus
from esper.telemetry import RunStore


def service_of(program: Program) -> Service:
    return Service(
        program,
        folder=program.folder,
        restart=RestartConfig(),
        drain_seconds=1.0,
        blocker=lambda: None,
        changes=Changes(lambda _: None),
    )


def job_service(folder: Path, *, resume_stopped: bool = True) -> Service:
    return service_of(
        Program(
            name="job",
            kind="job",
            command=("grow",),
            folder=folder,
            ready_seconds=1.0,
            run=Run(folder=folder / "run", resume=("resume",), resume_stopped=resume_stopped),
        )
    )


def ended_right(folder: Path, *, resume_stopped: bool = True) -> tuple[float | None, ServiceStatus]:
    """Let a job end with exit code 0; return when it is started again, and how it stands."""

    async def end() -> tuple[float | None, ServiceStatus]:
        service = job_service(folder, resume_stopped=resume_stopped)
        return await service._ended(Ending(code=0)), service.status()

    return anyio.run(end)


@pytest.mark.parametrize(
    "beat",
    [
        {"state": "loading", "details": {"file": "a\udcff"}},
        {"state": "a\udcff"},
        "a\udcff",
    ],
    ids=range(3),
)
def test_what_could_not_be_written_into_the_status_is_no_heartbeat(
    beat: object, tmp_path: Path
) -> None:
    async def note() -> ServiceStatus:
        service = job_service(tmp_path)
        service._note([beat])
        return service.status()

    status = anyio.run(note)
    assert "what it sent is no heartbeat: " in (status.reason or "")
    assert ServiceStatus.model_validate_json(status.model_dump_json()) == status


def test_a_service_is_looked_for_by_a_name_that_anyio_takes_for_none(tmp_path: Path) -> None:
    """Else that would end the supervisor; whoever else looks a name up leaves a joiner out."""

    async def answered(port: int) -> None:
        program = Program(
            name="service",
            kind="service",
            command=("serve",),
            folder=tmp_path,
            ready_seconds=1.0,
            ready_place=Place(host="local\u200chost", port=port),
        )
        with anyio.fail_after(10.0):
            await service_of(program)._until_answered()

    with socket.create_server(("localhost", 0)) as server:
        anyio.run(answered, server.getsockname()[1])


@pytest.mark.parametrize("resume_stopped", [False, True])
def test_a_job_that_is_stopped_by_command_stays_so_until_the_supervisor_starts_anew(
    resume_stopped: bool, tmp_path: Path
) -> None:
    store = RunStore(tmp_path / "run", config={}, environment={})
    store.set_status("stopped")
    store.close()
    wait, status = ended_right(tmp_path, resume_stopped=resume_stopped)
    assert (wait, status.state) == (None, "stopped")
    assert "when esper serve starts the next time" in (status.reason or "")


def test_a_job_whose_folder_cannot_be_read_is_started_again_and_the_supervisor_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Run) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(service_module, "state_of", failing)
    wait, status = ended_right(tmp_path)
    assert wait == 1.0
    assert "Input/output error" in (status.reason or "")

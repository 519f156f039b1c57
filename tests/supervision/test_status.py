"""The status file: whole, of one version, private, and clear about what needs a person."""

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest

from esper.supervision.finding import Finding
from esper.supervision.health_reader import Health
from esper.supervision.status import (
    STATUS_FILE,
    BeatStatus,
    ReloadStatus,
    ServeStatus,
    ServiceState,
    ServiceStatus,
    StatusError,
    needs_a_person,
    read_status,
    write_status,
)

NOW_SECONDS = 1000.0


def service(
    state: ServiceState, *, age: float | None = None, since_seconds: float = 1.0
) -> ServiceStatus:
    beat = None if age is None else BeatStatus(age_seconds=age, state="running")
    return ServiceStatus(
        name="a",
        kind="job",
        state=state,
        since_seconds=since_seconds,
        beat=beat,
        silent_seconds=30.0,
        log="log",
    )


@pytest.mark.parametrize(
    ("state", "age", "needs"),
    [
        (ServiceState.READY, None, False),
        (ServiceState.READY, 29.0, False),
        (ServiceState.READY, 31.0, True),
        (ServiceState.STARTING, 31.0, False),
        (ServiceState.BACKING_OFF, None, False),
        (ServiceState.GIVEN_UP, None, True),
        (ServiceState.STOPPED, None, False),
    ],
)
def test_what_is_given_up_or_silent_needs_a_person(
    state: ServiceState, age: float | None, needs: bool
) -> None:
    assert needs_a_person(service(state, age=age), now_seconds=NOW_SECONDS) is needs


@pytest.mark.parametrize(("ready", "needs"), [(29.0, False), (31.0, True)])
def test_what_gave_its_last_sign_of_life_while_it_started_is_silent_from_when_it_was_ready(
    ready: float, needs: bool
) -> None:
    """As its supervisor counts: it may beat while it loads, and be busy when it is ready."""
    loaded = service(ServiceState.READY, age=300.0, since_seconds=NOW_SECONDS - ready)
    assert needs_a_person(loaded, now_seconds=NOW_SECONDS) is needs


def status(*services: ServiceStatus) -> ServeStatus:
    return ServeStatus(
        time_seconds=1.0,
        pid=1,
        host="here",
        config="esper.toml",
        ending=False,
        services=services,
        preflight=(),
    )


def test_what_is_written_is_read_and_nobody_else_may(tmp_path: Path) -> None:
    beat = BeatStatus(age_seconds=1.0, state="running", details={"loss": math.nan, "word": "ä"})
    write_status(status(service(ServiceState.READY)), tmp_path)
    written = status(service(ServiceState.READY).model_copy(update={"beat": beat}))
    write_status(written, tmp_path)
    read = read_status(tmp_path).services[0].beat
    assert read is not None
    assert read.details["word"] == "ä"
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]
    assert (tmp_path / STATUS_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "{", '{"version": 2}'])
def test_a_file_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / STATUS_FILE).write_text(text)
    with pytest.raises(StatusError, match="cannot be read"):
        read_status(tmp_path)


def test_every_field_of_the_status_is_documented() -> None:
    page = Path(__file__).parents[2] / "docs" / "operate.md"
    section = page.read_text(encoding="utf-8").partition("## Metrics")[2]
    parts = {
        "of all": {"served", "problem", "age_seconds", *ServeStatus.model_fields}
        | {*Finding.model_fields, *ReloadStatus.model_fields},
        "of a program": {*ServiceStatus.model_fields, *BeatStatus.model_fields},
        "over the bus": {field.name for field in fields(Health)} | {"last_lines", "log"},
    }
    for head, names in parts.items():
        table = section.partition(f"| {head} |")[2].partition("\n\n")[0]
        assert set(re.findall(r"`(\w+)`", table)) == names, head

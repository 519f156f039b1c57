"""Runs in processes of their own, each kept as a line of JSON as soon as it is finished."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from rich.progress import Progress


class KeptResult(Protocol):
    """What a run leaves: a dataclass of plain values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> tuple[Any, ...]:
        """The arguments of the run."""


ResultT = TypeVar("ResultT", bound=KeptResult)


def load(kind: type[ResultT], cache: Path) -> dict[tuple[Any, ...], ResultT]:
    """Return the finished runs of an earlier start, by their arguments."""
    if not cache.exists():
        return {}
    lines = cache.read_text(encoding="utf-8").splitlines()
    return {result.key: result for result in (kind(**json.loads(line)) for line in lines)}


def make_missing(
    make: Callable[..., ResultT],
    kind: type[ResultT],
    jobs: Sequence[tuple[Any, ...]],
    *,
    cache: Path,
    processes: int,
) -> list[ResultT]:
    """Return the result of each job; those that `cache` does not have are made, and added to it.

    Args:
        make: Makes one run in a process of its own, from a job's values.
        kind: What it returns.
        jobs: Arguments of `make`.
        cache: JSON lines.
        processes: At once.
    """
    known = load(kind, cache)
    missing = [job for job in jobs if job not in known]
    context = multiprocessing.get_context("spawn")
    with (
        Progress() as progress,
        cache.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        bar = progress.add_task("runs", total=len(missing))
        for future in as_completed([pool.submit(make, *job) for job in missing]):
            result = future.result()
            known[result.key] = result
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            progress.advance(bar)
    return [known[job] for job in jobs]

"""`esper doctor` knows every extra, and tells what one lacks."""

import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from esper.cli import doctor

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
OFFERED = PROJECT["optional-dependencies"]


def plain(name: str) -> str:
    """Return a distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def brought_by(extra: str) -> set[str]:
    """Return the distributions that an extra names, itself or by another one."""
    found = set()
    for requirement in OFFERED[extra]:
        name, _, rest = requirement.partition("[")
        if name == PROJECT["name"]:
            for included in rest.rstrip("]").split(","):
                found |= brought_by(included)
        else:
            found.add(plain(re.split(r"[<>=]", requirement)[0]))
    return found


def test_every_extra_is_looked_at_for_all_that_it_brings() -> None:
    assert set(doctor.EXTRAS) == set(OFFERED) - {"dev"}
    homes = packages_distributions()
    for extra, modules in doctor.EXTRAS.items():
        distributions = {plain(name) for module in modules for name in homes[module]}
        assert brought_by(extra) <= distributions, extra
        assert len(modules) == len(brought_by(extra)), extra


def test_what_an_extra_lacks_is_told_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"stable_baselines3", "plotly"}
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in lacking else name)
    told = {finding.name: finding for finding in doctor._extras()}
    assert told["extra [rl]"].detail == "lacks stable_baselines3: pip install 'esper-lite[rl]'"
    assert told["extra [data]"].detail == "sklearn, datasets, PIL"
    failed = {name for name, finding in told.items() if not finding.ok}
    assert failed == {f"extra [{name}]" for name in ("rl", "ray", "report", "dashboard")}
    assert not any(finding.needed for finding in told.values() if not finding.ok)

"""The committed records keep their keys: whatever moves in the code, nothing that is recorded is computed again."""

import hashlib
import json
from pathlib import Path

import pytest

from fslib import questions  # noqa: F401 - all units, and the plan of every notebook
from fslib.study.store import Unit
from fslib.study.study import Study

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [f"{i:02d}" for i in range(10)]
PROFILES = {"mini": NOTEBOOKS, "evidence": NOTEBOOKS}
RECORDS = {p: sorted((ROOT / "results" / p / "runs").glob("*.json")) for p in PROFILES}
EVERY = pytest.mark.parametrize(
    "path", [p for paths in RECORDS.values() for p in paths], ids=lambda p: p.stem
)


def kinds(unit: type[Unit]) -> dict[str, type[Unit]]:
    """All units by kind; fails where two have one kind."""
    own = {unit.kind: unit} if "compute" in vars(unit) and unit is not Unit else {}
    for below in unit.__subclasses__():
        more = kinds(below)
        assert not own.keys() & more.keys()
        own |= more
    return own


KINDS = {k: u for k, u in kinds(Unit).items() if u.__module__.startswith("fslib.")}


def test_every_record_is_here():
    assert {profile: len(paths) for profile, paths in RECORDS.items()} == {
        "mini": 48,
        "evidence": 399,
    }


@EVERY
def test_a_record_is_named_by_its_kind_config_and_data(path):
    record = json.loads(path.read_text())
    whole = json.dumps([record["kind"], record["config"], record["data"]], sort_keys=True)
    assert path.stem == f"{record['kind']}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"


@EVERY
def test_the_config_of_a_record_is_read_back_as_it_was_written(path):
    record = json.loads(path.read_text())
    assert KINDS[record["kind"]](**record["config"]).model_dump(mode="json") == record["config"]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_notebooks_ask_for_the_records_that_are_there(profile):
    study = Study(
        profile, results=ROOT / "results"
    )  # without FSLIB_DATA, data.json tells the fingerprints
    wanted = {
        f"{unit.kind}-{unit.key}" for notebook in PROFILES[profile] for unit in study.plan(notebook)
    }
    assert wanted == {path.stem for path in RECORDS[profile]}

"""The committed records keep their keys: whatever moves, nothing recorded is computed again."""

import json
from pathlib import Path

import pytest

from fslib.study import units
from fslib.study.store import Store, Unit, content_checksum, key_of
from fslib.study.study import Study

ROOT = Path(__file__).resolve().parent.parent
PROFILES = {"mini": 48, "evidence": 399}  # how many records there are
KINDS = {
    unit.kind: unit
    for unit in vars(units).values()
    if isinstance(unit, type) and issubclass(unit, Unit) and "kind" in vars(unit)
}


def test_no_two_units_are_of_one_kind():
    assert len(KINDS) == 9 and all(unit.kind == kind for kind, unit in KINDS.items())
    for unit in vars(units).values():
        if isinstance(unit, type) and issubclass(unit, Unit) and "compute" in vars(unit):
            assert unit is Unit or "kind" in vars(unit), "what computes is a kind of its own"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_record_is_whole_and_its_config_is_read_back_as_it_was_written(profile):
    paths = sorted((ROOT / "results" / profile / "runs").glob("*.json"))
    assert len(paths) == PROFILES[profile]
    for path in paths:
        record = json.loads(path.read_text())
        key = key_of(record["kind"], record["config"], record["data"])
        assert record["key"] == key and path.stem == f"{record['kind']}-{key}"
        assert record["content_sha256"] == content_checksum(record), path
        unit = KINDS[record["kind"]](**record["config"])
        assert unit.model_dump(mode="json") == record["config"], path


@pytest.mark.parametrize("profile", PROFILES)
def test_the_notebooks_ask_for_the_records_that_are_there(profile):
    # without FSLIB_DATA, data.json tells the fingerprints
    study = Study(profile, results=ROOT / "results")
    wanted = {f"{unit.kind}-{unit.key}" for n in range(10) for unit in study.plan(f"{n:02d}")}
    assert wanted == {path.stem for path in (study.folder / "runs").glob("*.json")}
    kinds = {stem.split("-")[0] for stem in wanted}
    for kind in sorted(kinds):  # one of each is read with its arrays
        stem = min(stem for stem in wanted if stem.startswith(f"{kind}-"))
        assert Store(study.folder).load(*stem.rsplit("-", 1)).arrays

"""What becomes of the claims with records of another machine in the place of the stored ones."""

from dataclasses import replace

import numpy as np
import pytest

import fslib
from fslib.claims import SESOI
from fslib.cli import main
from fslib.questions.q08_claims import decide
from fslib.study.verify import Comparison, compare_claims


@pytest.fixture(scope="module")
def study():
    return fslib.Study("mini")


def all_right(study, seed):
    """A seed's pruning record in which no lesion hurts any task: nothing dissociates."""
    record = study.store.get(study.units(seed).prune)
    right = {}
    for task in record.result["tasks"]:
        labels = record.arrays[f"labels/{task}"]
        for part in ("unpruned", "lesioned"):
            old = record.arrays[f"{part}/{task}"]
            right[f"{part}/{task}"] = np.broadcast_to(labels, old.shape).astype(old.dtype)
    return replace(record, arrays=record.arrays | right)


def test_the_same_records_move_nothing_and_every_number_has_its_smallest_effect(study):
    lines, changed = compare_claims(study, [study.store.get(study.units(0).prune)], decide)
    assert changed == []
    for line in lines:
        before, after = line.split(": ")[1].split(", ")[0].split(" became ")
        assert before == after
    claims = [line.split(",")[0] for line in lines]
    assert claims == [claim for claim in SESOI for _ in range(2)]
    assert lines[0].endswith("smallest effect of interest 2 points of D")


def test_a_verdict_that_would_change_is_said_and_the_disk_stays_as_it_is(study):
    before = decide(study)["C1"].parts[0].interval.value
    other = [all_right(study, seed) for seed in study.seeds]
    lines, changed = compare_claims(study, other, decide)
    assert lines[0].startswith("C1, own lesion against others': +")
    assert "became +0.00" in lines[0] and "became +0.00" in lines[1]
    (change,) = changed
    assert change.endswith("on C1: 'inconclusive' became 'no effect of 2 points of D or more'")
    assert decide(study)["C1"].parts[0].interval.value == before


def test_without_all_records_claims_are_not_compared(study, tmp_path):
    other = fslib.Study("mini", results=tmp_path)
    assert compare_claims(other, [study.store.get(study.units(0).prune)], decide) == ([], [])


@pytest.mark.parametrize("exact", [True, False])
def test_verify_compares_claims_where_records_need_not_be_equal(study, exact, monkeypatch, capsys):
    def verified(study, unit):
        again = all_right(study, 0) if unit.kind == "prune" else study.store.get(unit)
        return Comparison(exact, [], again)

    monkeypatch.setattr("fslib.study.verify.verify_unit", verified)
    code = main(["verify", "03", "--sample", "0"])
    said = capsys.readouterr().out
    assert ("bit-equal" in said) == exact and ("within tolerance" in said) == (not exact)
    assert ("smallest effect of interest" in said) == (not exact)
    assert code == int("the verdict on C1" in said)

"""Units that compare within one record: what they keep, that they repeat, what they refuse."""

import itertools
import shutil

import numpy as np
import pytest
from refusal import refused

import fslib
from fslib.study.store import Store, Unit
from fslib.study.units import (
    MEASURES,
    EndingsUnit,
    SelectionUnit,
    SimilarityUnit,
    Targets,
    TrainUnit,
    recorded_iap,
)

pytestmark = pytest.mark.usefixtures("small_tasks")

TRAINING = {"steps": 10, "batch_size": 3, "lr": 1e-3}
SETTINGS = TRAINING | {"encoder": "tiny-random", "max_length": 16, "curve_points": 1}
IAT = {"kind": "IAT", "delta": 0.3}
ENDINGS = {
    "trunk": {"kind": "Stop", "delta": 0.3},
    "IAT": IAT,
    "plain": None,
    "leaky": IAT | {"strict": False},
    "PCGrad": {"kind": "PCGrad", "delta": 0.3},
}
TWO = {name: ENDINGS[name] for name in ("IAT", "plain")}


@pytest.fixture(scope="module")
def data(data):
    shutil.copytree(data / "right", data / "new")
    return data


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def unit(kind: str, **changes) -> Unit:
    shared = SETTINGS | {"tasks": ("left", "right")}
    if kind == "selection":
        selections = {"gradient": {}, "norm": {"estimator": "norm"}}
        options = {"selections": selections, "examples": 4, "fraction": 0.25, "randoms": 2}
        return SelectionUnit(model=TrainUnit(**shared), **options)
    if kind == "endings":
        options = {"endings": ENDINGS, "pruned": ("trunk", "IAT"), "fractions": (0.3,)}
        return EndingsUnit(**shared | options | {"examples": 4} | changes)
    if kind == "transfer":
        options = {"tasks": ("new",), "sources": ("plain", "IAT"), "sizes": (4, None), "passes": 1}
        targets = Targets(**options | {"min_steps": 2, "max_steps": 3} | changes)
        return EndingsUnit(**shared, endings=TWO, examples=4, targets=targets)
    return SimilarityUnit(**shared, examples=6)


def trained(tasks, **options):
    """A model of those tasks, as the units train theirs."""
    model = fslib.MultiTaskModel.from_pretrained("tiny-random", tasks, max_length=16)
    return model, fslib.train(model, tasks, **TRAINING, **options)


@pytest.mark.parametrize("kind", ["selection", "transfer", "similarity"])
def test_a_unit_repeats_bit_by_bit(kind, store, tmp_path):
    first, again = store.get(unit(kind)), Store(tmp_path / "again").get(unit(kind))
    assert first.result == again.result and first.arrays.keys() == again.arrays.keys()
    assert all(np.array_equal(first.arrays[k], again.arrays[k]) for k in first.arrays)


def test_selection_prunes_by_every_estimator_and_at_random(store):
    record = store.get(unit("selection"))
    usual = recorded_iap(record, "gradient")
    assert usual.controls == 2 and usual.heads[0, 0, :, 0].sum((1, 2)).tolist() == [6, 6]
    for name in ("norm", "unmatched 0", "unmatched 1"):
        assert recorded_iap(record, name).heads.shape == (1, 1, 2, 1, 2, 12)
    draws = [recorded_iap(record, f"unmatched {i}").heads for i in range(2)]
    assert not np.array_equal(*draws), "each draw has heads of its own"
    model, tasks = unit("selection").model.trained(store), fslib.load_tasks(["left", "right"])
    expected = fslib.head_importance(model, tasks["left"], estimator="norm", examples=4)
    np.testing.assert_allclose(record.arrays["importance/norm/left"], expected, rtol=1e-6)
    with refused("no pruning of 'ablation'"):
        recorded_iap(record, "ablation")


def test_endings_are_those_of_train(store):
    """What a unit records of an ending is what a training with that ending gives."""
    record = store.get(unit("endings"))
    assert record.result["branched"] == dict.fromkeys(ENDINGS, 7)
    tasks = fslib.load_tasks(["left", "right"])
    for name, options in {"plain": {}, "IAT": {"iat": fslib.IAT(delta=0.3)}}.items():
        model, history = trained(tasks, **options)
        for task, score in fslib.evaluate(model, tasks).items():
            assert np.array_equal(record.arrays[f"predictions/{name}/{task}"], score.predictions)
        for task, heads in history.heads.items():
            assert np.array_equal(record.arrays[f"heads/{name}/{task}"], heads)
        assert record.result["parameters"][name] == model.n_parameters()
    moved = record.result["moved"]
    assert moved["IAT"]["in no set"] == 0 < moved["IAT"]["in a set"]
    assert 0 < moved["leaky"]["in no set"] <= moved["plain"]["in no set"] * 2
    assert recorded_iap(record, "trunk").tasks == ("left", "right")


def test_a_target_is_learned_as_by_transfer_from_a_training_with_that_ending(store):
    record, tasks = store.get(unit("transfer")), fslib.load_tasks(["left", "right", "new"])
    parts = itertools.product(("pre-trained", *TWO), ("full", "classifier"), (4, "all"))
    expected = {"transfer/new/{}/{}/{}".format(*part) for part in parts}
    assert {k for k in record.arrays if k.startswith("transfer/")} == expected
    assert set(record.data) == {"left", "right", "new"}, "the record knows its target's data"
    assert [unit("transfer").targets.steps(n, 3) for n in (4, 7, 10)] == [2, 2, 3]
    without = store.get(unit("endings", endings=TWO, pruned=())).arrays
    assert without and all(np.array_equal(record.arrays[k], v) for k, v in without.items())
    new = tasks.pop("new")
    model, _ = trained(tasks, iat=fslib.IAT(delta=0.3))
    options = {"size": 4, "steps": 2, "batch_size": 3, "lr": 1e-3}
    for part in ("full", "classifier"):
        expected = fslib.transfer(model, new, part=part, **options).score.predictions
        assert np.array_equal(record.arrays[f"transfer/new/IAT/{part}/4"], expected)


def test_similarity_is_one_matrix_a_measure(store):
    record = store.get(unit("similarity"))
    for measure in MEASURES:
        matrix = np.array(record.result["similarity"][measure])
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-6)

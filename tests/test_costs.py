"""What is still to be computed: counts of tokens by hand, and seconds at the rate of what is recorded."""

import pytest
from fslib.study.plan import seconds_left
from small_units import training

from fslib import Study
from fslib.study.store import Record
from fslib.study.units import ImportanceUnit, PruneUnit, endings_unit, mean_tokens

pytestmark = pytest.mark.usefixtures("small_tasks")


def record(seconds: float) -> Record:
    return Record("", "", {}, {}, {}, {}, seconds, {}, "", {})


def test_tokens_by_hand():
    # "train number 3", and of pairs "pair" or "other" besides: 3 and 4 words, 1.3 tokens each and 3 more; cut at 16
    left, right = 1.3 * 4 + 3, 1.3 * 3 + 3
    assert [mean_tokens("left"), mean_tokens("right")] == pytest.approx([left, right])
    mean, model = (left + right) / 2, training()
    curve = 2 * 4 * 2  # points, examples, tasks
    trained = 2 * (
        (3 * 2 * 16 + curve) * mean + 10 * (left + right)
    )  # layers; steps of 16, each three times
    assert model.token_layers() == pytest.approx(trained)
    importance = ImportanceUnit(model=model, examples=4)
    assert importance.token_layers() == pytest.approx(2 * (2 * 4 * 2) * mean)
    prune = {
        on: PruneUnit(importance=importance, fractions=(0.1, 0.3), controls=2, on=on)
        for on in ("all", "scored")
    }
    assert prune["all"].token_layers() == pytest.approx(2 * (1 + 12) * 10 * (left + right))
    assert prune["scored"].token_layers() == pytest.approx(2 * (1 + 6) * 10 * (left + right))


def test_seconds_are_taken_from_records_of_the_kind_or_else_of_all():
    known, unknown = training(0), training(1)
    rate = 6.0 / known.token_layers()
    importance = ImportanceUnit(model=known, examples=4)
    found = seconds_left([unknown, importance], [(known, record(6.0))])
    assert found == pytest.approx(
        {unknown.key: 6.0, importance.key: importance.token_layers() * rate}
    )
    both = seconds_left([unknown, importance], [(known, record(6.0)), (importance, record(100.0))])
    assert both == pytest.approx({unknown.key: 6.0, importance.key: 100.0})
    assert seconds_left([unknown], []) == {}


def test_every_unit_of_a_profile_counts_its_tokens_but_the_bag_of_words():
    study = Study(
        "smoke", overrides={"tasks": ["left", "right"], "transfer_targets": ["bbc"], "doses": [0.5]}
    )
    for notebook in range(1, 8):
        for unit in study.plan(f"{notebook:02d}"):
            assert unit.token_layers() > 0 or unit.kind == "words"
    with_targets = endings_unit(study, 0)
    assert with_targets.targets is not None
    assert (
        with_targets.token_layers()
        > with_targets.model_copy(update={"targets": None}).token_layers()
        > 0
    )

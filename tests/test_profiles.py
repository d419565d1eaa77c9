"""Profiles: each is whole, and every notebook's plan can be made from it."""

import inspect
import shutil

import pytest
from papermill.translators import papermill_translators
from refusal import refused
from small_units import write_tasks

import fslib
from fslib import Study
from fslib.model.encoders import ENCODERS, PRETRAINED
from fslib.study.profiles import PROFILES, make_profile
from fslib.study.units import SELECTIONS

NOTEBOOKS = [f"{i:02d}" for i in range(10)]


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_whole(name):
    profile = make_profile(name, {})
    known = {*ENCODERS, *PRETRAINED}
    assert {profile.encoder, profile.small_encoder, *profile.encoders} <= known
    ending_tasks = set(profile.ending_tasks or profile.tasks)
    assert len(ending_tasks - set(profile.transfer_targets)) >= 2, "IAT needs two source tasks"


def test_what_is_said_of_profiles_is_so():
    assert list(PROFILES) == ["smoke", "mini", "evidence", "paper"]
    assert {*make_profile("paper", {}).encoders} == {*PRETRAINED} and len(PRETRAINED) == 7
    mini, evidence = make_profile("mini", {}), make_profile("evidence", {})
    assert (mini.lr, evidence.encoder_lrs["minilm-l4"]) == (1e-4, 1.5e-4), "numbers, not texts"
    assert next(iter(SELECTIONS.items())) == ("gradient", {}), "the default is the paper's"
    estimators = {options.get("estimator", "gradient") for options in SELECTIONS.values()}
    assert estimators | {"random"} == set(fslib.importance.ESTIMATORS)


@pytest.mark.parametrize("name", ["smoke", "mini"])
def test_every_notebook_has_a_plan_without_repeats(name):
    study = Study(name)
    plans = {number: [unit.key for unit in study.plan(number)] for number in NOTEBOOKS}
    for number, keys in plans.items():
        assert len(keys) == len(set(keys)) and (number == "00") == (not keys)
    assert set(plans["08"]) == {key for number in NOTEBOOKS[:8] for key in plans[number]}
    assert study.plan("03_important_attention_pruning") == study.plan("03")
    assert study.plan("xx") == []


def test_every_task_gets_as_many_steps_whatever_it_is_trained_with():
    study = Study("mini")
    p = study.profile
    each = p.small_steps / len(p.tasks)
    assert study.training(0, small=True).steps == p.small_steps
    chains = [chain for pair in study.pair_units().values() for chain in pair]
    assert {chain.train.steps for chain in chains} == {2 * each}
    assert study.similarity().steps == each
    assert study.endings_unit(0).steps == each * len(study.ending_tasks)
    alone = [study.single_unit(0, t).steps for t in study.ending_tasks]
    assert sum(alone) == each * len(study.ending_tasks), "as many as the task gets there"
    changes = {"transfer_targets": ["bbc-shift"], "ending_tasks": list(p.tasks)}
    other = Study("mini", overrides=changes).source_unit(0)
    assert other.steps == each * (len(p.tasks) - 1) and "bbc-shift" not in other.tasks


def test_seeds_are_counted_from_the_first():
    changes = {"first_seed": 7, "alone_seeds": 2, "lesion_seeds": 0, "dose_seeds": 3}
    study = Study("mini", seed=100, overrides=changes)
    assert study.seeds == [107, 108, 109, 110] == study.ending_seeds
    assert (study.alone_seeds, study.lesion_seeds) == ([107, 108], [])
    assert (study.dose_seeds, study.transfer_seeds) == ([107, 108, 109], [107, 108, 109])
    last, first = study.endings_unit(110), study.endings_unit(107)
    assert last.targets is None and first.targets is not None
    assert set(last.endings) == {"trunk", "plain", "IAT", "IAT, random heads"} < set(first.endings)
    assert "trunk" in first.pruned and "IAT, delta 0.3" in first.pruned
    assert last.pruned == ("plain", "IAT", "IAT, random heads")


def test_an_encoder_has_seeds_and_a_rate_of_its_own_and_the_main_models_serve_twice():
    changes = {"encoders": ["minilm-l3", "minilm-l4", "minilm-l6"], "encoder_seeds": 2}
    changes |= {"first_seed": 7, "steps": 600, "encoder_seeds_of": {"minilm-l4": 1}}
    study = Study("mini", overrides=changes | {"encoder_lrs": {"minilm-l4": 0.5}})
    chains = {name: study.encoder_units(name) for name in study.profile.encoders}
    seeds = {name: [c.train.seed for c in each] for name, each in chains.items()}
    assert seeds == {"minilm-l3": [7, 8], "minilm-l4": [7], "minilm-l6": [7, 8]}
    lrs = [chains[name][0].train.lr for name in ("minilm-l3", "minilm-l4")]
    assert lrs == [study.profile.small_lr, 0.5]
    assert chains["minilm-l6"][0].train.steps == study.profile.small_steps != 600
    alike = {"encoders": ["minilm-l6"], "steps": 500, "small_steps": 500}
    alike |= {"small_sampling": study.profile.sampling}
    as_long = Study("mini", overrides=alike)
    assert as_long.encoder_units("minilm-l6") == [as_long.units(s) for s in as_long.seeds]
    for change in (
        {"small_sampling": "sqrt"},
        {"encoder_lrs": {"minilm-l6": 0.1}},
        {"encoder_seeds_of": {"minilm-l6": 1}},
    ):
        other = Study("mini", overrides=alike | change)
        own = other.small_units(0, encoder="minilm-l6")
        assert other.encoder_units("minilm-l6")[0] == own, "as the setting says"


def test_endings_are_those_that_the_profile_names():
    study = Study("smoke")
    mixed = {"PCGrad", "mixed batches"}
    assert mixed < set(study.endings()) and study.left_out() == ""
    few = Study("smoke", overrides={"batch_size": 3})
    assert not mixed & set(few.endings()) and "a batch of 3" in few.left_out()
    doses = Study("smoke", overrides={"doses": [0.5], "other_endings": [], "other_alphas": []})
    added = {"IAT, delta 0.3", "IAT, delta 0.5", "IAT, random heads, delta 0.5"}
    deciding = {"trunk", "plain", "IAT", "IAT, random heads"}
    assert set(doses.endings()) == deciding | added and set(doses.endings(whole=False)) == deciding
    floor = doses.floor_unit(3, 0.2)
    assert (floor.lr_floor, floor.endings["IAT"]["delta"]) == (0.2, doses.profile.floor_delta)
    assert floor.pruned == ("plain", "IAT", "IAT, random heads") and floor.targets is None


def test_every_task_of_a_profile_is_shown_once():
    changes = {
        "tasks": ["bbc", "bbc-pair"],
        "pair_tasks": ["bbc", "bbc-somo"],
        "ending_tasks": ["bbc-next", "bbc-somo"],
        "transfer_targets": ["bbc-shift"],
    }
    limits = {"eval_examples": 10, "small_eval_examples": 12, "ending_examples": 14}
    found = Study("mini", overrides=changes | limits).every_task
    sizes = {"bbc": 10, "bbc-pair": 10, "bbc-somo": 12, "bbc-next": 14, "bbc-shift": 14}
    assert {name: len(task.eval) for name, task in found.items()} == sizes


def cells(*sources: str) -> dict[str, object]:
    """What a notebook's names are after these cells."""
    names: dict[str, object] = {"In": ["", *sources]}
    for source in sources:
        exec(source, names)
    return names


OWN = 'profile = "mini"\nseed = 0\noverrides = {}'


def test_a_notebook_takes_the_parameters_that_it_knows():
    assert Study.from_parameters(cells(OWN)).name == "mini"
    injected = '# Parameters\nprofile = "smoke"\noverrides = {"steps": 7}\n'
    study = Study.from_parameters(cells(OWN, injected, "table = [1]"))
    assert (study.name, study.seed, study.overrides) == ("smoke", 0, {"steps": 7})
    given = {"profil": "smoke", "overrides": {"encoder": "a\nseed = 3"}}
    written = papermill_translators.find_translator("python3", "python").codify(given)
    with refused("unknown parameter 'profil'", "did you mean 'profile'"):
        Study.from_parameters(cells(OWN, written))
    for injected in ("seed = True", "seed = -1", "seed = 2**31"):
        with refused("seed", "whole number"):
            Study.from_parameters(cells(OWN, f"# Parameters\n{injected}\n"))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tasks": ["bbc", "bbc-pears"]}, ("task 'bbc-pears'", "did you mean 'bbc-pair'")),
        ({"small_fractions": [0.1, 1.2]}, ("small_fractions.1=1.2",)),
        ({"pair_tasks": ["bbc"]}, ("pair_tasks", "at least 2 items")),
        ({"ending_tasks": ["bbc", "bbcs"]}, ("ending_tasks", "bbc")),
        ({"doses": [0.5, 0.5]}, ("doses", "twice")),
        ({"doses": [1.5]}, ("doses.0=1.5",)),
        ({"other_endings": ["IAT, leeky"]}, ("other_endings", "IAT, leaky")),
        ({"lesioned_on": "half"}, ("lesioned_on",)),
        ({"encoder_lrs": {"minilm-l33": 0.1}}, ("encoder in encoder_lrs", "'minilm-l3'")),
        ({"encoder_seeds_of": {"minilm-l33": 1}}, ("or encoder_seeds_of", "minilm-l3")),
        ({"encoder_seeds_of": {"minilm-l3": True}}, ("encoder_seeds_of", "integer")),
        ({"doses": [0.9]}, ("doses", "the dose that decides")),
        ({"lr_floor": 0.2, "dose_floors": [0.2]}, ("dose_floors", "the dose that decides")),
        ({"small_sampling": "even"}, ("small_sampling='even'", "uniform")),
    ],
)
def test_a_profile_is_refused_by_the_first_thing_wrong(changes, parts):
    with refused(*parts):
        make_profile("mini", changes)


def test_an_unknown_profile_and_what_is_none_are_refused():
    make, start = inspect.unwrap(make_profile), inspect.unwrap(Study.__init__)  # no types checked
    for name in ("mimi", 3):
        with refused("unknown profile", "valid: smoke, mini"):
            make(name, {})
    with refused("settings [1]", "{field: value}"):
        make("mini", [1])
    with refused("seed 'one'", "whole number"):
        start(Study.__new__(Study), seed="one")


def test_transfer_needs_two_source_tasks():
    two = Study("mini", overrides={"tasks": ["bbc", "bbc-pair"], "transfer_targets": ["bbc"]})
    assert two.plan("06"), "two tasks are enough for all but transfer"
    assert Study("mini", overrides={"transfer_sizes": [10**6]}).targets().sizes == (None,)
    assert two.plan("07") == [] and "fewer than two tasks" in two.no_transfer()


def test_two_folders_of_one_name_are_refused_in_a_study(tmp_path, monkeypatch):
    write_tasks(tmp_path)
    shutil.copytree(tmp_path / "left", tmp_path / "Left")
    monkeypatch.setenv("FSLIB_DATA", str(tmp_path))
    for name in ("left", "Left"):
        with refused(name, "differ in case alone"):
            Study("smoke", overrides={"tasks": [name, "right"]})
    assert Study("smoke", overrides={"tasks": ["RIGHT", "bbc"]}).profile.tasks == ("right", "bbc")

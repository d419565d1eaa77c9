"""Profiles: each is whole, and every notebook's plan can be made from it."""

import shutil

import nbformat
import papermill
import pytest
from refusal import refused
from small_units import write_tasks

import fslib
from fslib import Study
from fslib.model.encoders import ENCODERS, PRETRAINED
from fslib.questions import q06_iat, q07_transfer
from fslib.questions.q04_models import SELECTIONS, encoder_units
from fslib.questions.q05_similarity import similarity_unit, task_pairs
from fslib.study.profiles import PROFILES, make_profile
from fslib.study.units import source_unit

NOTEBOOKS = [f"{i:02d}" for i in range(10)]


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_whole(name):
    profile = make_profile(name, {})
    known = {*ENCODERS, *PRETRAINED}
    assert {profile.encoder, profile.small_encoder, *profile.encoders} <= known
    assert profile.ending_seeds >= 2 and profile.transfer_seeds >= 2
    ending_tasks = set(profile.ending_tasks or profile.tasks)
    assert len(ending_tasks - set(profile.transfer_targets)) >= 2, "IAT needs two source tasks"


def test_the_paper_has_seven_encoders_and_mini_the_seeds_that_an_interval_needs():
    assert make_profile("paper", {}).encoders == tuple(PRETRAINED) and len(PRETRAINED) == 7
    mini = make_profile("mini", {})
    assert min(mini.seeds, mini.ending_seeds, mini.transfer_seeds) >= 3
    assert not set(mini.transfer_targets) & set(mini.ending_tasks), (
        "its own endings are the sources"
    )


@pytest.mark.parametrize("name", ["smoke", "mini"])
def test_every_notebook_has_a_plan_without_repeats(name):
    study = Study(name)
    for notebook in NOTEBOOKS:
        keys = [unit.key for unit in study.plan(notebook)]
        assert len(keys) == len(set(keys))
        assert (notebook == "00") == (not keys)
    everything = {unit.key for unit in study.plan("08")}
    assert everything == {unit.key for notebook in NOTEBOOKS[:8] for unit in study.plan(notebook)}


def test_every_task_gets_as_many_steps_whatever_it_is_trained_with():
    study = Study("mini")
    p = study.profile
    each = p.small_steps / len(p.tasks)
    assert study.training(0, small=True).steps == p.small_steps
    assert all(study.small_units(tasks=pair).train.steps == 2 * each for pair in task_pairs(study))
    assert similarity_unit(study).steps == each
    assert q06_iat.deciding(study).units[0].steps == each * len(study.ending_tasks)
    alone = [q06_iat.single_unit(study, 0, t).steps for t in study.ending_tasks]
    assert sum(alone) == each * len(study.ending_tasks), "as many as the task gets there"
    other = Study("mini", overrides={"transfer_targets": ["bbc-shift"], "ending_tasks": p.tasks})
    assert source_unit(other, 0).steps == each * (len(p.tasks) - 1)


def test_an_encoder_has_seeds_and_a_learning_rate_of_its_own_and_the_main_models_serve_twice():
    changes = {
        "encoders": ["minilm-l3", "minilm-l4", "minilm-l6"],
        "encoder_seeds": 2,
        "first_seed": 7,
        "steps": 600,
    }
    study = Study(
        "mini",
        overrides=changes
        | {"encoder_seeds_of": {"minilm-l4": 1}, "encoder_lrs": {"minilm-l4": 0.5}},
    )
    chains = {name: encoder_units(study, name) for name in study.profile.encoders}
    assert {name: [c.train.seed for c in each] for name, each in chains.items()} == {
        "minilm-l3": [7, 8],
        "minilm-l4": [7],
        "minilm-l6": [7, 8],
    }
    assert [chains[name][0].train.lr for name in ("minilm-l3", "minilm-l4")] == [
        study.profile.small_lr,
        0.5,
    ]
    assert chains["minilm-l6"][0].train.steps == study.profile.small_steps != study.profile.steps
    alike = {
        "steps": study.profile.steps,
        "small_steps": study.profile.steps,
        "encoders": ["minilm-l6"],
        "small_sampling": study.profile.sampling,
    }
    as_long = Study("mini", overrides=alike)
    assert encoder_units(as_long, "minilm-l6") == [as_long.units(seed) for seed in as_long.seeds]
    for change in (
        {"small_sampling": "sqrt"},
        {"encoder_lrs": {"minilm-l6": 0.1}},
        {"encoder_seeds_of": {"minilm-l6": 1}},
    ):
        other = Study("mini", overrides=alike | change)
        assert encoder_units(other, "minilm-l6")[0] == other.small_units("minilm-l6", seed=0), (
            "as the setting says"
        )


def test_every_task_of_a_profile_is_shown_once():
    changes = {
        "tasks": ["bbc", "bbc-pair"],
        "pair_tasks": ["bbc", "bbc-somo"],
        "ending_tasks": ["bbc-next", "bbc-somo"],
    }
    changes |= {"transfer_targets": ["bbc-shift"]}
    limits = {"eval_examples": 10, "small_eval_examples": 12, "ending_examples": 14}
    study = Study("mini", overrides=changes | limits)
    assert list(study.every_task) == ["bbc", "bbc-pair", "bbc-somo", "bbc-next", "bbc-shift"]
    assert [len(task.eval) for task in study.every_task.values()] == [10, 10, 12, 14, 14]


def test_the_default_selection_is_the_papers():
    assert next(iter(SELECTIONS.items())) == ("gradient", {})
    estimators = {options.get("estimator", "gradient") for options in SELECTIONS.values()}
    assert estimators | {"random"} == set(fslib.importance.ESTIMATORS)


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
    with refused("parameter 'profil'", "did you mean 'profile'"):
        Study.from_parameters(cells(OWN, '# Parameters\nprofil = "smoke"\n'))
    for injected in ("seed = True", "seed = -1", "seed = 2**31"):
        with refused("seed", "whole number"):
            Study.from_parameters(cells(OWN, f"# Parameters\n{injected}\n"))


def test_papermill_is_refused_a_parameter_that_the_notebook_does_not_know(tmp_path):
    parameters = nbformat.v4.new_code_cell(OWN)
    parameters.metadata["tags"] = ["parameters"]
    asks = nbformat.v4.new_code_cell(
        "import fslib\nstudy = fslib.Study.from_parameters(globals())\nprint(study.name)"
    )
    made = nbformat.v4.new_notebook(cells=[parameters, asks])
    made.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(made, tmp_path / "one.ipynb")
    paths = str(tmp_path / "one.ipynb"), str(tmp_path / "two.ipynb")
    done = papermill.execute_notebook(*paths, {"profile": "smoke"}, progress_bar=False)
    assert done.cells[-1].outputs[0].text == "smoke\n"
    # of wrong types, which checked signatures would refuse in this process: one after the other in one kernel
    made.cells[1].source = """import fslib
for given in ({"overrides": [1]}, {"seed": "one"}, {"profile": ["mini"]}):
    try:
        fslib.Study.from_parameters({"profile": "mini", "seed": 0, "overrides": {}} | given)
    except fslib.FslibError as error:
        print(error)
fslib.Study.from_parameters(globals())"""
    nbformat.write(made, tmp_path / "one.ipynb")
    with pytest.raises(
        papermill.PapermillExecutionError,
        match="unknown parameter 'profil': did you mean 'profile'",
    ):
        papermill.execute_notebook(*paths, {"profil": "smoke"}, progress_bar=False)
    said = nbformat.read(tmp_path / "two.ipynb", 4).cells[-1].outputs[0].text.splitlines()
    for line, beginning in zip(
        said, ("settings [1]: give", "seed 'one': give a whole", "unknown profile"), strict=True
    ):
        assert beginning in line


def test_a_profile_is_refused_by_the_first_thing_wrong():
    for changes, parts in (
        ({"tasks": ["bbc"]}, ("at least two tasks",)),
        ({"small_fractions": [0.1, 1.2]}, ("1.2", "(0, 1]")),
        ({"alpha": 0}, ("alpha",)),
        ({"delta": 1.0}, ("delta",)),
        ({"other_alphas": [1.5]}, ("alpha",)),
        ({"ending_seeds": 1}, ("ending_seeds",)),
        ({"transfer_targets": ["bbcs"]}, ("transfer_targets", "bbc")),
        ({"pair_tasks": ["bbc"]}, ("pair_tasks", "at least two tasks")),
        ({"ending_tasks": ["bbc", "bbcs"]}, ("ending_tasks", "bbc")),
        ({"doses": [0.5, 0.5]}, ("doses", "twice")),
        ({"doses": [1.5]}, ("delta",)),
        ({"dose_floors": [1.0]}, ("dose_floors",)),
        ({"other_endings": ["IAT, leeky"]}, ("other_endings", "IAT, leaky")),
        ({"lesioned_on": "half"}, ("lesioned_on",)),
        (
            {"encoder_lrs": {"minilm-l33": 0.1}},
            ("encoder in encoder_lrs", "did you mean 'minilm-l3'"),
        ),
        ({"encoder_seeds_of": {"minilm-l33": 1}}, ("encoder in encoder_seeds_of", "minilm-l3")),
        (
            {"encoder_seeds_of": {"minilm-l3": True}},
            ("encoder_seeds_of", "neither numbers nor names"),
        ),
        ({"doses": [0.9]}, ("doses", "the dose that decides")),
        ({"lr_floor": 0.2, "dose_floors": [0.2]}, ("dose_floors", "the dose that decides")),
        ({"encoder_lrs": {"minilm-l3": 2.0}}, ("encoder_lrs",)),
        ({"small_sampling": "even"}, ("sampling 'even'", "uniform")),
    ):
        with refused(*parts):
            Study("mini", overrides=changes)
    two = Study("mini", overrides={"tasks": ["bbc", "bbc-pair"], "transfer_targets": ["bbc"]})
    assert two.plan("06"), "two tasks are enough for all but transfer"
    assert two.plan("07") == [] and "fewer than two tasks" in q07_transfer.not_testable(two)


def test_two_folders_of_one_name_are_refused_in_a_study(tmp_path, monkeypatch):
    write_tasks(tmp_path)
    shutil.copytree(tmp_path / "left", tmp_path / "Left")
    monkeypatch.setenv("FSLIB_DATA", str(tmp_path))
    for name in ("left", "Left"):
        with refused(name, "differ in case alone"):
            Study("smoke", overrides={"tasks": [name, "right"]})
    assert Study("smoke", overrides={"tasks": ["RIGHT", "bbc"]}).profile.tasks == ("right", "bbc")

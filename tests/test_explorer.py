"""The explorer without a browser: what a page is told, what a kernel answers, what stands where no page can run."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from refusal import refused
from small_units import SMALL
from views import EVIL, made_up

import fslib
from fslib import Study, evaluate, head_importance, pruned
from fslib.cli import main
from fslib.explorer.view import Whole, effect_json, pruned_sets, single_heads
from fslib.explorer.widget import Explorer, Kernel, page
from fslib.intervals import score_measure
from fslib.study import fingerprints
from fslib.study.units import lesion_unit

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def explorer(zoo):
    """The explorer of a model; what it sends to its page is kept in `sent`."""
    made = fslib.explore(zoo.model("bert"), zoo.tasks, examples=4)
    made.sent = []
    made.send = lambda content, buffers=None: made.sent.append(content)
    return made


def asked(explorer, **message):
    explorer._heard(explorer, message, None)
    return explorer.sent[-1]


# --- a model and tasks --------------------------------------------------------------------------------------------


def test_a_model_is_shown_with_its_importance(zoo, explorer):
    model, view = zoo.model("bert"), explorer.view
    assert [task["name"] for task in view["tasks"]] == list(zoo.tasks)
    assert (view["layers"], view["heads"]) == (model.n_layers, model.n_heads)
    for task in view["tasks"]:
        expected = head_importance(model, zoo.tasks[task["name"]], examples=4)
        np.testing.assert_allclose(task["importance"], expected.ravel(), rtol=1e-5)
    assert view["sets"] == view["wholes"] == [] and view["patterns"] == {}


def test_scores_are_those_of_evaluate_under_pruned(zoo, explorer):
    model = zoo.model("bert")
    tasks = {name: task.limited(eval=4) for name, task in zoo.tasks.items()}
    off = np.zeros((model.n_layers, model.n_heads), dtype=bool)
    off[0, 1] = off[2, 3] = True
    answer = asked(explorer, type="scores", id=7, off=np.flatnonzero(off).tolist())
    assert answer["type"] == "scores" and answer["id"] == 7, answer
    whole = evaluate(model, tasks)
    with pruned(model, off):
        without = evaluate(model, tasks)
    for i, name in enumerate(tasks):
        assert answer["scores"][i]["value"] == pytest.approx(100 * without[name].value, abs=1e-3)
        assert answer["whole"][i]["value"] == pytest.approx(100 * whole[name].value, abs=1e-3)
        assert answer["whole"][i]["examples"] == 4
        before, after = (
            score_measure(name, s[name].metric, s[name].predictions[None], s[name].labels)
            for s in (whole, without)
        )
        lost = (before - after).interval().scaled(100.0)
        found = [answer["scores"][i][k] for k in ("lost", "lostLow", "lostHigh")]
        np.testing.assert_allclose(found, [lost.value, lost.low, lost.high], atol=1e-3)
    assert answer["off"] == np.flatnonzero(off).tolist(), (
        "all views hear it: it says what it is about"
    )
    told = [message for message in explorer.sent if message["type"] == "progress"]
    assert [m["done"] for m in told] == list(range(len(told))) and told[-1]["done"] == told[-1][
        "total"
    ]
    assert model.control.gate is None


def test_a_pattern_is_answered_and_refused_in_a_sentence(explorer, zoo):
    answer = asked(explorer, type="pattern", task=1, number=0)
    n = len(answer["pattern"]["tokens"])
    assert (
        len(answer["pattern"]["importance"]) == 12 and len(answer["pattern"]["importance"][0]) == n
    )
    hooked = fslib.explore(zoo.model("mpnet"), zoo.tasks, examples=4)
    assert hooked.view["texts"] == [0, 0, 0], "none is offered"
    for message, told in [
        ({"type": "scores", "id": 3, "off": [12]}, "head 12 is outside 0..11"),
        ({"type": "scores", "id": 3, "off": [-1]}, "head -1 is outside 0..11"),
        ({"type": "scores", "id": 3}, "KeyError"),
        ({"type": "pattern", "task": 9, "number": 0}, "IndexError"),
    ]:
        answer = asked(explorer, **message)
        assert answer["type"] == "problem" and told in answer["text"]


def test_a_model_that_was_trained_on_is_scored_as_it_is(zoo, explorer):
    first = asked(explorer, type="scores", id=1, off=[0])
    for classifier in explorer._kernel.model.classifiers.values():
        with torch.no_grad():
            classifier.weight.neg_()
    second = asked(explorer, type="scores", id=2, off=[0])
    expected = evaluate(explorer._kernel.model, explorer._kernel.scored)
    found = [whole["value"] for whole in second["whole"]]
    assert found == pytest.approx([100 * score.value for score in expected.values()], abs=1e-3)
    assert first["whole"] != second["whole"]


def test_an_interrupt_is_told_to_the_page(explorer, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(Kernel, "scores", interrupted)
    monkeypatch.setattr(Kernel, "pattern", interrupted)
    told = {"type": "problem", "text": "interrupted"}
    assert asked(explorer, type="scores", id="a-1", off=[0]) == told | {"id": "a-1"}
    assert asked(explorer, type="pattern", task=1, number=0) == told | {"task": 1, "number": 0}


def test_heads_are_read_and_set_from_python(explorer):
    heads = np.zeros((3, 4), dtype=bool)
    heads[1, 2] = heads[0, 0] = True
    explorer.heads = heads
    assert explorer.off == [0, 6] and np.array_equal(explorer.heads, heads)
    explorer.off = [6, 0, 6]
    assert explorer.off == [0, 6], "sorted, each once"
    with refused("head 12 is outside 0..11"):
        explorer.off = [12]
    with refused("a bool array (3, 4) (layers, heads)"):
        explorer.heads = heads.astype(int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t, s: fslib.explore(m), "a model is explored with tasks"),
        (lambda m, t, s: fslib.explore(m, t, seed=1), "without a seed"),
        (lambda m, t, s: fslib.explore(m, t, examples=1), "examples 1"),
        (lambda m, t, s: fslib.explore("bert-base", t), "'bert-base' cannot be explored"),
        (
            lambda m, t, s: fslib.explore(m, t["pair"].limited(eval=1)),
            "1 evaluation example of task pair is scored",
        ),
        (lambda m, t, s: fslib.explore(s, t), "a study has its own tasks"),
        (lambda m, t, s: fslib.explore(s, seed=99), "unknown seed of this study '99'"),
    ],
)
def test_bad_input_is_refused(zoo, tmp_path, call, message):
    with refused(message):
        call(zoo.model("bert"), zoo.tasks, Study("smoke", results=tmp_path))


# --- a study ------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(small_tasks, tmp_path):
    return Study("smoke", overrides=SMALL | {"controls": 2, "lesion_seeds": 1}, results=tmp_path)


def test_a_study_shows_its_records_and_a_kernel_finds_the_same(study):
    explorer = fslib.explore(study)
    seed = study.seeds[0]
    iap = study.units(seed).prune.iap(study.store)
    sets = explorer.view["sets"]
    layers, heads = iap.heads.shape[-2:]
    assert [s["heads"] for s in sets if len(s["heads"]) == 1] == [
        [at] for at in range(layers * heads)
    ]
    several = [s for s in sets if len(s["heads"]) > 1]
    assert len(several) == len(iap.fractions) * len(iap.tasks) * 3
    assert several[0]["name"] == f"top 25 % of {iap.tasks[0]}" and "random 1" in several[1]["name"]
    scores, base = iap.scores(), iap.baseline()
    found = explorer.view["wholes"][several[0]["whole"]]
    for task, u, whole in zip(found, iap.tasks, base[0], strict=True):
        assert task["value"] == pytest.approx(100 * whole, abs=1e-3) and task["examples"] == len(
            iap.labels[u]
        )
    for one in several:
        place = np.zeros(layers * heads, dtype=bool)
        place[one["heads"]] = True
        f, t, c = np.argwhere((iap.heads[0].reshape(*iap.heads.shape[1:4], -1) == place).all(-1))[0]
        np.testing.assert_allclose(
            [s["value"] for s in one["scores"]], 100 * scores[0, f, t, c], atol=1e-3
        )
    sent = []
    explorer.send = lambda content, buffers=None: sent.append(content)
    explorer._heard(explorer, {"type": "scores", "id": 1, "off": several[0]["heads"]}, None)
    assert sent[-1]["scores"] == several[0]["scores"] and sent[-1]["whole"] == found, (
        "a kernel finds what was recorded"
    )
    assert sent[-1]["note"] == ""
    assert sent[0]["text"].startswith("Getting the model")


def test_a_study_without_its_data_is_shown_from_records_and_scores_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv("FSLIB_DATA", raising=False)
    monkeypatch.setattr(fingerprints, "_consulted", [])
    fingerprints.cached_task.cache_clear()
    ignored = shutil.ignore_patterns("checkpoints", ".locks", "figures")
    shutil.copytree(ROOT / "results" / "glue-mini", tmp_path / "glue-mini", ignore=ignored)
    explorer = fslib.explore(Study("glue-mini", results=tmp_path))
    assert [task["name"] for task in explorer.view["tasks"]] == ["sst-2", "qnli", "ag-pair"]
    assert (
        sum(len(one["heads"]) == 1 for one in explorer.view["sets"]) == 72
        and explorer.view["patterns"] == {}
    )
    sent = []
    explorer.send = lambda content, buffers=None: sent.append(content)
    for message in (
        {"type": "scores", "id": 1, "off": [0]},
        {"type": "pattern", "task": 0, "number": 0},
    ):
        explorer._heard(explorer, message, None)
        assert (
            sent[-1]["type"] == "problem"
            and "the data of sst-2 are not at hand" in sent[-1]["text"]
        )


def test_names_of_sets_and_numbers_are_those_of_the_record(study):
    lesions = lesion_unit(study, study.seeds[0]).lesions(study.store)
    for one in single_heads(lesions):
        layer, head = divmod(one.heads[0], lesions.shape[1])
        assert one.name == f"layer {layer + 1}, head {head + 1} alone"
        for task, found in zip(lesions.tasks, one.effects, strict=True):
            assert found.lost.value == pytest.approx(lesions.cost(task)[layer, head])
            expected = lesions.measure(task, layer, head).interval()
            np.testing.assert_allclose(
                [found.lost.low, found.lost.high], [expected.low, expected.high]
            )
    iap = study.units(study.seeds[0]).prune.iap(study.store)
    names = [one.name for one in pruned_sets(iap)]
    assert len(set(names)) == len(names) == len(iap.fractions) * len(iap.tasks) * (1 + iap.controls)


def test_a_model_that_is_not_the_recorded_one_is_said_to_be_another(study):
    explorer = fslib.explore(study)
    sent = []
    explorer.send = lambda content, buffers=None: sent.append(content)
    model, kernel = explorer._kernel.model, explorer._kernel
    with torch.no_grad():
        for classifier in model.classifiers.values():
            classifier.weight.neg_()
    explorer._heard(explorer, {"type": "scores", "id": 1, "off": [0]}, None)
    now = evaluate(model, kernel.scored)
    others = sum(int((now[u].predictions != kernel.recorded[u]).sum()) for u in now)
    count = sum(len(task.eval) for task in kernel.scored.values())
    assert (
        others
        and f"answers {others} of {count} examples otherwise than the recorded one"
        in sent[-1]["note"]
    )


def test_lesions_of_fewer_examples_have_a_whole_model_of_their_own(small_tasks, tmp_path):
    own = SMALL | {"controls": 1, "lesion_seeds": 1, "lesion_examples": 3}
    study = Study("smoke", overrides=own, results=tmp_path)
    explorer = fslib.explore(study)
    several, alone = explorer.view["wholes"]
    assert [u["examples"] for u in alone] == [3] * len(alone) and several[0]["examples"] > 3
    for one in explorer.view["sets"]:
        assert one["whole"] == (len(one["heads"]) == 1)
    lesions = lesion_unit(study, study.seeds[0]).lesions(study.store)
    for task, found in zip(lesions.tasks, alone, strict=True):
        expected = score_measure(
            task, "accuracy", lesions.predictions[task][:1], lesions.labels[task]
        ).interval()
        assert found["value"] == pytest.approx(100 * expected.value, abs=1e-3)


def test_texts_of_a_kernel_are_those_that_are_recorded(study):
    """Of all evaluation examples, though scores are from one half of them."""
    explorer = fslib.explore(study)
    recorded = explorer.view["patterns"]
    sent = []
    explorer.send = lambda content, buffers=None: sent.append(content)
    for at, pattern in recorded.items():
        task, number = map(int, at.split("/"))
        explorer._heard(explorer, {"type": "pattern", "task": task, "number": number}, None)
        assert (
            sent[-1]["pattern"]["tokens"] == pattern["tokens"]
            and sent[-1]["texts"] == explorer.view["texts"][task]
        )
    explorer._heard(explorer, {"type": "pattern", "task": 0, "number": 7}, None)
    assert (sent[-1]["number"], sent[-1]["texts"]) == (
        explorer.view["texts"][0] - 1,
        explorer.view["texts"][0],
    )
    assert sent[-1]["asked"] == 7


# --- the file -----------------------------------------------------------------------------------------------------


def none() -> Kernel:
    return Kernel(lambda: pytest.fail("a file has no kernel"), {}, {})


def test_a_file_holds_all_and_loads_nothing(tmp_path):
    view = made_up()
    path = Explorer(view, none()).to_html(tmp_path / "deep" / "page.html")
    text = path.read_text(encoding="utf-8")
    state = json.loads(
        re.search(r'<script type="application/json" id="state">(.*?)</script>', text, re.S)[1]
    )
    assert state["view"] == json.loads(json.dumps(view.json())) and state["kernel"] is False
    assert not re.search(r"https?://|src=|<link|@import|url\(", text)
    assert text.count("</script>") == 2 and "<script>document" not in text, (
        "names cannot end a script"
    )
    assert Explorer(view, none()).to_html(tmp_path / "again.html").read_bytes() == path.read_bytes()
    with refused("is a folder: give the name of a file"):
        Explorer(view, none()).to_html(tmp_path)


def test_what_is_not_defined_is_null():
    one = Whole({"t": "accuracy"}, {"t": np.array([1])}, {"t": np.array([1])})
    assert one.json() == [{"value": 100.0, "low": None, "high": None, "examples": 1}]
    assert effect_json(one.effects({"t": np.array([0])})[0])["lostLow"] is None


def test_what_cannot_be_json_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        page({"view": {"title": float("nan")}})


def test_where_no_page_runs_there_is_a_picture_and_text():
    explorer = Explorer(made_up(), none())
    data, _ = explorer._repr_mimebundle_()
    assert data["text/plain"] == repr(explorer) and "0x" not in repr(explorer)
    assert "application/vnd.jupyter.widget-view+json" in data and data["image/png"].startswith(
        b"\x89PNG"
    )
    assert EVIL not in data["text/html"] and "&lt;/script&gt;" in data["text/html"]
    assert data["text/html"] == Explorer(made_up(), none())._repr_mimebundle_()[0]["text/html"], (
        "the same every time"
    )
    assert re.search(
        r"alpha: most important L\dH\d, L\dH\d, L\dH\d; of its top 10 %, 0 of 0 special",
        data["text/html"],
    )


def test_the_command_writes_the_file(small_tasks, tmp_path, capsys):
    words = [f"--set={k}={json.dumps(v)}" for k, v in SMALL.items()]
    common = ["explore", "--profile", "smoke", *words, "--results", str(tmp_path / "results")]
    assert main([*common, "--out", str(tmp_path / "page.html")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("4 units have no record: computing them first\n")
    assert f"{tmp_path / 'page.html'} (0." in told
    state = re.search(r'id="state">(.*?)</script>', (tmp_path / "page.html").read_text(), re.S)[1]
    assert len(json.loads(state)["view"]["patterns"]) == 4
    assert main([*common, "--out", str(tmp_path / "page.html")]) == 0
    assert "no record" not in capsys.readouterr().out
    assert main([*common[:-1], str(tmp_path / "empty"), "--out", str(tmp_path)]) == 2
    assert "is a folder: give the name of a file" in capsys.readouterr().err
    assert not (tmp_path / "empty").exists(), "refused before anything is computed"
    assert main([*common, "--out", str(tmp_path / "page.html"), "--model-seed", "5"]) == 2
    assert "unknown seed of this study '5'" in capsys.readouterr().err

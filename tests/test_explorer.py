"""The explorer without a browser: what a page is told, what a kernel answers, what a file holds."""

import json
import re
from base64 import b64decode
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
from fslib.evaluation import Score
from fslib.explorer.view import as_json, compare
from fslib.explorer.widget import Explorer, Kernel, page
from fslib.intervals import Measure, score_measure

ROOT = Path(__file__).resolve().parent.parent


def asked(explorer: Explorer, **message) -> dict:
    """Return the answer to a question of the page; all that was sent is in `explorer.sent`."""
    explorer.sent = []
    explorer.send = lambda content, buffers=None: explorer.sent.append(content)
    explorer._answer(explorer, message, None)
    return explorer.sent[-1]


def turned(model) -> None:
    """Let a model answer otherwise."""
    with torch.no_grad():
        for classifier in model.classifiers.values():
            classifier.weight.neg_()


def check(estimate: dict, measure: Measure, examples: int) -> None:
    """An estimate of the page is that of a measure."""
    expected = measure.interval()
    expected = [expected.value, expected.low, expected.high, examples]
    np.testing.assert_allclose(list(estimate.values()), expected, atol=1e-3)


# --- a model and tasks


@pytest.fixture
def explorer(zoo) -> Explorer:
    return fslib.explore(zoo.model("bert"), zoo.tasks, examples=4)


def test_a_model_is_shown_with_its_importance(zoo, explorer):
    view = explorer.view
    assert view["shape"] == [3, 4] and view["sets"] == view["wholes"] == []
    for task, (name, whole) in zip(view["tasks"], zoo.tasks.items(), strict=True):
        expected = head_importance(zoo.model("bert"), whole, examples=4)
        np.testing.assert_allclose(task["importance"], expected.ravel(), rtol=1e-5)
        found = tuple(task[key] for key in ("name", "rise", "patterns", "texts"))
        assert found == (name, None, [], 2)
    hooked = fslib.explore(zoo.model("mpnet"), zoo.tasks, examples=4)
    assert [task["texts"] for task in hooked.view["tasks"]] == [0, 0, 0], "none is offered"


def test_scores_are_those_of_evaluate_under_pruned_as_the_model_is_now(zoo, explorer):
    model = explorer._kernel.model
    tasks = {name: task.limited(eval=4) for name, task in zoo.tasks.items()}
    off = np.zeros((3, 4), dtype=bool)
    off[0, 1] = off[2, 3] = True
    found = []
    for _ in range(2):
        answer = asked(explorer, type="scores", id=7, off=[1, 11])
        assert (answer["type"], answer["id"], answer["note"]) == ("scores", 7, "")
        assert answer["off"] == [1, 11], "all views hear it: it says what it is about"
        whole = evaluate(model, tasks)
        with pruned(model, off):
            without = evaluate(model, tasks)
        for i, name in enumerate(tasks):
            before, after = (
                score_measure(name, s.metric, s.predictions[None], s.labels).scaled(100.0)
                for s in (whole[name], without[name])
            )
            measures = {"whole": before, "scores": after, "lost": before - after}
            for part, measure in measures.items():
                check(answer[part][i], measure, 4)
        progress = [(m["done"], m["total"]) for m in explorer.sent[:-1]]
        assert progress == [(0, 3), (1, 3), (2, 3)] and model.control.gate is None
        found.append(answer["whole"])
        turned(model)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"type": "scores", "id": 3, "off": [12]}, "head 12 is outside 0..11"),
        ({"type": "scores", "id": 3}, "KeyError: 'off'"),
        ({"type": "pattern", "task": 9, "number": 0}, "IndexError: list index out of range"),
    ],
)
def test_a_question_without_an_answer_is_told_why(explorer, message, told):
    answer = asked(explorer, **message)
    assert told in answer.pop("text") and answer == message | {"type": "problem"}


def test_an_interrupt_is_told_to_the_page(explorer, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    for name in ("scores", "pattern"):
        monkeypatch.setattr(Kernel, name, interrupted)
        message = {"id": "a-1", "off": [0], "task": 1, "number": 0}
        answer = asked(explorer, type=name, **message)
        assert answer == message | {"type": "problem", "text": "interrupted"}


def test_heads_are_read_and_set_from_python(explorer):
    heads = np.zeros((3, 4), dtype=bool)
    heads[1, 2] = heads[0, 0] = True
    explorer.heads = heads
    assert explorer.off == [0, 6] and np.array_equal(explorer.heads, heads)
    explorer.off = [6, 0, 6]
    assert explorer.off == [0, 6], "sorted, each once"
    with refused("head -1 is outside 0..11"):
        explorer.off = [-1]
    for wrong in (heads.astype(int), heads.T):
        with refused("a bool array (3, 4) (layers, heads)"):
            explorer.heads = wrong


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t, s: fslib.explore(m), "a MultiTaskModel with tasks"),
        (lambda m, t, s: fslib.explore(m, t, seed=1), "give a study (and seed=)"),
        (lambda m, t, s: fslib.explore("bert-base", t), "'bert-base' cannot be explored"),
        (lambda m, t, s: fslib.explore(s, t), "cannot be explored so"),
        (lambda m, t, s: fslib.explore(s, seed=99), "unknown seed of this study 99"),
        (lambda m, t, s: fslib.explore(m, t, examples=1), "examples 1"),
    ],
)
def test_bad_input_is_refused(zoo, tmp_path, call, message):
    with refused(message):
        call(zoo.model("bert"), zoo.tasks, Study("smoke", results=tmp_path))


# --- a study


@pytest.fixture
def study(small_tasks, tmp_path) -> Study:
    changes = {"controls": 2, "lesion_seeds": 1, "lesion_examples": 3}
    return Study("smoke", overrides=SMALL | changes, results=tmp_path)


def test_a_study_shows_its_records(study):
    view, seed = fslib.explore(study).view, study.seeds[0]
    iap = study.units(seed).prune.iap(study.store)
    lesions = study.lesion(seed).lesions(study.store)
    several, alone = ([s for s in view["sets"] if s["whole"] == i] for i in (0, 1))
    assert [{e["examples"] for e in whole} for whole in view["wholes"]] == [{10}, {3}]
    top = f"top 25 % of {iap.tasks[0]}"
    controls = [f"random {c}, as many per layer as the {top}" for c in (1, 2)]
    assert [s["name"] for s in several[:3]] == [top, *controls]
    assert len(several) == 3 * len(iap.tasks) == len({s["name"] for s in several})
    places = iap.heads[0].reshape(len(several), -1)
    scores = np.concatenate([iap.top.scores[:, :, :, None], iap.random.scores], 3)
    scores = scores[0].reshape(len(several), -1)
    shown = [view["wholes"][0], *(s["scores"] for s in several)]
    values = [[e["value"] for e in one] for one in shown]
    expected = 100 * np.array([iap.baseline()[0], *scores])
    np.testing.assert_allclose(values, expected, atol=1e-3)
    assert [s["heads"] for s in several] == [np.flatnonzero(place).tolist() for place in places]
    assert [s["heads"] for s in alone] == [[at] for at in range(np.prod(lesions.shape))]
    for one in alone:
        layer, head = divmod(one["heads"][0], lesions.shape[1])
        assert one["name"] == f"layer {layer + 1}, head {head + 1} alone"
        for task, found in zip(lesions.tasks, one["lost"], strict=True):
            check(found, lesions.measure(task, layer, head), 3)
    for task in view["tasks"]:
        rise = lesions.rise(task["name"]).ravel()
        np.testing.assert_allclose(task["rise"], rise, rtol=1e-5)
        assert len(task["patterns"]) == task["texts"] == 2


def test_a_kernel_finds_what_is_recorded_or_says_that_it_does_not(study):
    explorer = fslib.explore(study)
    view, recorded = explorer.view, explorer.view["sets"][0]
    answer = asked(explorer, type="scores", id=1, off=recorded["heads"])
    for part in ("scores", "lost"):
        assert answer[part] == recorded[part]
    assert answer["whole"] == view["wholes"][0] and answer["note"] == ""
    for t, task in enumerate(view["tasks"]):
        # texts are of all evaluation examples, though scores are from one half of them
        for number, wanted in enumerate(task["patterns"]):
            found = asked(explorer, type="pattern", task=t, number=number)
            assert found["pattern"]["tokens"] == wanted["tokens"] and found["texts"] == 2
            one, other = (b64decode(p["weights"]) for p in (found["pattern"], wanted))
            assert np.abs(np.array([*one]) - np.array([*other])).max() <= 1
            np.testing.assert_allclose(found["pattern"]["importance"], wanted["importance"], 1e-4)
    last = asked(explorer, type="pattern", task=0, number=7)
    assert (last["number"], last["texts"], last["asked"]) == (1, 2, 7)
    kernel = explorer._kernel
    turned(kernel.model)
    now = evaluate(kernel.model, kernel.scored)
    changed = sum(int((now[u].predictions != kernel.recorded[u]).sum()) for u in now)
    count = sum(len(task.eval) for task in kernel.scored.values())
    note = asked(explorer, type="scores", id=1, off=[0])["note"]
    assert changed and f"answers {changed} of {count} examples otherwise than the recorded" in note


# --- the file


def test_a_file_holds_all_and_loads_nothing(tmp_path):
    view = made_up()
    explorer = Explorer(view, Kernel(lambda: None, {}, {}, {}))
    path = explorer.to_html(tmp_path / "deep" / "page.html")
    text = path.read_text(encoding="utf-8")
    state = re.search(r'<script type="application/json" id="state">(.*?)</script>', text, re.S)[1]
    wanted = {"view": as_json(view), "off": [], "percent": 10, "kernel": False}
    assert json.loads(state) == json.loads(json.dumps(wanted))
    assert not re.search(r"https?://|src=|<link|@import|url\(", text)
    assert text.count("</script>") == 2 and "<script>document" not in text, "names end no script"
    with refused("is a folder: give the name of a file"):
        explorer.to_html(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        page({"view": {"title": float("nan")}})


def test_json_has_six_digits_bytes_and_null_for_what_is_not_defined():
    right, wrong = (Score("accuracy", np.array([p]), np.array([1])) for p in (1, 0))
    whole, (found,) = compare([("", [], {"t": right}), ("the first", [0], {"t": wrong})])
    undefined = {"low": None, "high": None, "examples": 1}
    assert as_json(whole) == [{"value": 100.0} | undefined]
    assert as_json(found)["lost"] == [{"value": 100.0} | undefined]
    arrays = {"x": np.array([[1 / 3, np.inf]]), "b": np.array([255, 0], np.uint8), "n": (1, "a")}
    assert as_json(arrays) == {"x": [0.333333, None], "b": "/wA=", "n": [1, "a"]}


def test_where_no_page_runs_there_is_a_picture_and_text():
    view = made_up()
    shown = Explorer(view, Kernel(lambda: None, {}, {}, {}))._repr_mimebundle_()[0]
    assert shown["text/plain"] == f"Explorer(made up {EVIL}; 3 tasks, 2 x 3 heads)"
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert shown["image/png"].startswith(b"\x89PNG")
    assert EVIL not in shown["text/html"] and "&lt;/script&gt;" in shown["text/html"]
    best = np.argsort(-view.tasks[0].importance.ravel())[:3]
    named = ", ".join(f"L{at // 3 + 1}H{at % 3 + 1}" for at in best)
    assert f"<li>alpha: most important {named}</li>" in shown["text/html"]


def test_the_command_writes_the_file(small_tasks, tmp_path, capsys):
    words = [f"--set={k}={json.dumps(v)}" for k, v in SMALL.items()]
    common = ["explore", "--profile", "smoke", *words, "--results", str(tmp_path / "results")]
    path = tmp_path / "page.html"
    assert main([*common, "--out", str(path)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("4 units have no record: computing them first\n")
    assert f"{path} (0." in told
    state = re.search(r'id="state">(.*?)</script>', path.read_text(), re.S)[1]
    assert [len(task["patterns"]) for task in json.loads(state)["view"]["tasks"]] == [2, 2]
    assert main([*common[:-1], str(tmp_path / "empty"), "--out", str(tmp_path)]) == 2
    assert "is a folder: give the name of a file" in capsys.readouterr().err
    assert not (tmp_path / "empty").exists(), "refused before anything is computed"
    assert main([*common, "--out", str(path), "--model-seed", "5"]) == 2
    assert "unknown seed of this study 5" in capsys.readouterr().err


def test_the_committed_page_is_that_of_the_reference_results(tmp_path):
    path = ROOT / "figures" / "explorer.html"
    assert path.stat().st_size <= 3_000_000
    again = fslib.explore(Study("mini", results=ROOT / "results")).to_html(tmp_path / "again.html")
    wanted = "fslib explore --out figures/explorer.html"
    assert again.read_bytes() == path.read_bytes(), wanted

"""The explorer as a reader meets it: in a file, and in JupyterLab, in a browser without a network.

Needs Chromium (Debian: apt-get install chromium); skipped where there is none. Any request that
leaves this machine is a failure. Of a test that fails, screenshots are kept in the folder that it
names.
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from views import EVIL, made_up

from fslib import Study, evaluate, pruned
from fslib.evaluation import Score
from fslib.explorer.view import as_json, compare
from fslib.explorer.widget import MODULE, STYLE, Explorer, Kernel
from fslib.study.units import scored_on

pytestmark = pytest.mark.browser
NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "09_explore.ipynb"
FOCUSED = "document.activeElement"


def opened(tab, view, tmp_path) -> dict:
    """Open the page of a view as a file, and return what it is told."""
    path = Explorer(view, Kernel(lambda: None, {}, {}, {})).to_html(tmp_path / "explorer.html")
    tab.goto(path.as_uri())
    tab.wait_for_selector(".head")
    return as_json(view)


def cell(tab, task: int, at: int):
    return tab.locator(f'.head[data-task="{task}"][data-head="{at}"]')


def click_off(tab, task: int, at: int) -> None:
    cell(tab, task, at).click(modifiers=["Shift"])


def heads_off(tab) -> list[int]:
    cells = tab.locator('.head.off[data-task="0"]')
    return sorted(map(int, cells.evaluate_all("cells => cells.map(c => c.dataset.head)")))


def source(tab) -> str:
    """Return what the page says of the scores that it shows."""
    return tab.locator(".scores .source").inner_text()


def rows(tab, section: str) -> list[list[str]]:
    """Return the text of a table's body."""
    found = tab.locator(f".{section} tbody tr").all()
    return [row.locator("th, td").all_inner_texts() for row in found]


def said(e: dict[str, float], lost: bool = False) -> str:
    """Return a number and its interval as the page writes them."""
    first, low, high = e["value"], e["low"], e["high"]
    text = f"{first:.1f} [{low:.1f}, {high:.1f}]"
    if lost:
        text = f"{0.0 - first:+.1f} [{-high:.1f}, {-low:.1f}]"
    return text.replace("-", "−")


# --- the file


def test_maps_show_importance_and_who_shares_a_top_set(tab, tmp_path):
    view = opened(tab, made_up(), tmp_path)
    cell(tab, 1, 4).hover()
    alone = view["sets"][5]  # after the top set and heads 0 to 3
    assert "Layer 2, head 2" in tab.locator(".details h3").inner_text()
    orders = [np.argsort(-np.array(t["importance"]), kind="stable") for t in view["tasks"]]
    for t, (row, task) in enumerate(zip(rows(tab, "details"), view["tasks"], strict=True)):
        here, rank = task["importance"][4], 1 + orders[t].tolist().index(4)
        share = f"{100 * here / sum(task['importance']):.1f} %"
        changed = said(alone["lost"][t], lost=True)
        numbers = [float(row[i].replace("−", "-")) for i in (1, 6)]
        assert numbers == pytest.approx([here, task["rise"][4]], rel=5e-3, abs=6e-4)
        assert [*row[2:4], row[5]] == [f"{rank} of 6", share, changed]
    for percent, k in ((0, 0), (34, 2), (50, 3), (100, 6)):
        tab.locator("input[type=range]").fill(str(percent))
        tops = [set(order[:k].tolist()) for order in orders]
        assert f"{percent} %, {k} of 6 heads" in tab.locator(".controls").first.inner_text()
        for t, at in np.ndindex(3, 6):
            sharing = sum(at in other for other in tops)
            mark = "" if at not in tops[t] else str(sharing) if sharing > 1 else "●■▲"[t]
            assert cell(tab, t, at).inner_text() == mark
            assert ("in-top" in cell(tab, t, at).get_attribute("class")) == (at in tops[t])


def test_scores_are_the_records_or_need_a_kernel(tab, tmp_path):
    view = opened(tab, made_up(), tmp_path)
    tab.locator("select").nth(1).select_option("0")
    top = view["sets"][0]
    assert f"2 of 6 heads off; recorded: {top['name']}" in source(tab)
    for t, row in enumerate(rows(tab, "scores")):  # beside the whole model on the same examples
        whole = view["wholes"][0][t]
        assert row[1:3] == [view["tasks"][t]["metric"], str(whole["examples"])]
        changed = said(top["lost"][t], lost=True)
        assert row[3:] == [said(whole), said(top["scores"][t]), changed]
    click_off(tab, 0, 1)
    assert "this set has no record, and its scores need a kernel" in source(tab)
    assert [row[4] for row in rows(tab, "scores")] == ["–"] * 3, "no estimate for a measurement"
    assert tab.locator(".compute").count() == 0
    tab.locator("button.none").click()
    click_off(tab, 2, 3)
    assert "recorded: head 3 alone" in source(tab)
    assert rows(tab, "scores")[0][3] == said(view["wholes"][1][0])
    tab.locator("button.layer").first.click()  # the upper row: layer 2, of which one head is off
    assert heads_off(tab) == [3, 4, 5]
    tab.locator("button.top").nth(1).click()
    assert heads_off(tab) == [], "10 % of six heads are none"
    for at in (1, 2, 3):
        click_off(tab, 0, at)
    drawn = set()
    for _ in range(9):
        tab.locator("button.random").click()
        drawn.add(tuple(heads_off(tab)))
    assert len(drawn) > 1 and all([at // 3 for at in d] == [0, 0, 1] for d in drawn)


def test_what_is_not_defined_is_said_to_be(tab, tmp_path):
    view = made_up(1, 2, ("only",))
    right, wrong = ({"only": Score("accuracy", np.array([p]), np.array([1]))} for p in (1, 0))
    whole, view.sets[:] = compare([("", [], right), ("the first alone", [0], wrong)])
    view.wholes[:], view.tasks[0].rise = [whole], np.array([[np.nan, 0.5]])
    opened(tab, view, tmp_path)
    cell(tab, 0, 0).hover()
    assert rows(tab, "details")[0][5:] == ["−100.0 [no interval]", "not defined"]
    click_off(tab, 0, 0)
    numbers = [f"{value} [no interval]" for value in ("100.0", "0.0", "−100.0")]
    assert rows(tab, "scores")[0][2:] == ["1", *numbers]


def test_the_keyboard_does_all(tab, tmp_path):
    opened(tab, made_up(), tmp_path)
    cell(tab, 0, 0).focus()
    walked = []
    for key in ("Right", "Right", "Right", "Up", "Up", "Home", "Left", "End", "Down", "Down"):
        tab.keyboard.press(key if key in ("Home", "End") else f"Arrow{key}")
        walked.append(int(tab.evaluate(f"{FOCUSED}.dataset.head")))
    assert walked == [1, 2, 2, 5, 5, 3, 3, 5, 2, 2]
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("Space")
    assert heads_off(tab) == [1] and cell(tab, 0, 1).inner_text() == "×"
    label = tab.evaluate(f"{FOCUSED}.getAttribute('aria-label')")
    assert label == "layer 1, head 2, in no top set, switched off"
    tab.keyboard.press("Space")
    assert heads_off(tab) == []
    tab.keyboard.press("Shift+Space")
    assert heads_off(tab) == [0, 1, 2]
    tab.keyboard.press("Enter")
    assert "What layer 1, head 2 attends to" in tab.locator(".attention h3").inner_text()
    select = tab.locator(".attention select").first
    select.focus()
    tab.keyboard.press("ArrowDown")
    is_focused = select.evaluate(f"node => node === {FOCUSED}")
    assert select.input_value() == "1" and is_focused, "it stays there"


def test_attention_is_what_was_recorded_and_names_are_text(tab, tmp_path):
    view = made_up()
    opened(tab, view, tmp_path)
    assert tab.title() == f"made up {EVIL}" and EVIL in tab.locator("h2").inner_text()
    cell(tab, 1, 5).click()
    (pattern,) = view.tasks[1].patterns
    words, weights = pattern["tokens"], pattern["weights"][1, 2] / 2.55
    titles = tab.locator("td.weight").evaluate_all("cells => cells.map(c => c.title)")
    places = list(np.ndindex(4, 4))
    assert titles == [f"{words[i]} → {words[j]}: {weights[i, j]:.0f} %" for i, j in places]
    found = [text.removesuffix(" %") for text in tab.locator("td.importance").all_inner_texts()]
    importance = pattern["importance"][1, 2]
    expected = 100 * importance / importance.sum()
    np.testing.assert_allclose([float(x) for x in found], expected, atol=0.51)
    assert f"answer: {EVIL}; the model's: no" in tab.locator(".attention").inner_text()
    assert "<b>bold</b>" in tab.locator(".pattern").inner_text()
    for task in view.tasks:
        task.patterns, task.texts = [], 0
    opened(tab, view, tmp_path)
    cell(tab, 0, 0).click()
    told = tab.locator(".attention .source").inner_text()
    assert told == "The attention weights of this architecture are not seen."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(tab, tmp_path, scheme):
    tab.emulate_media(color_scheme=scheme)
    opened(tab, made_up(24, 16), tmp_path)
    for part in (".legend", ".details table"):
        grey = imread(BytesIO(tab.locator(part).screenshot()))[..., :3].mean(-1)
        paper = np.median(grey)
        assert (paper > 0.8) == (scheme == "light") and np.abs(grey - paper).max() > 0.6
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1300, "tables scroll themselves"


# --- what a kernel would send

VIEW = """async ([code, state]) => {
    const source = `data:text/javascript,${encodeURIComponent(code)}`;
    const { default: explorer } = await import(source);
    const model = explorer.standIn(state), hears = {};
    model.on = (name, hear) => { hears[name] = hear; };
    model.off = (name) => { delete hears[name]; };
    window.asked = [];
    model.send = (message) => window.asked.push(message);
    window.answer = (message) => hears["msg:custom"]?.(message);
    window.fromPython = (off) => { state.off = off; hears["change:off"](); };
    window.end = explorer.render({ model, el: document.body });
}"""


def answer(tab, **message) -> None:
    tab.evaluate("message => window.answer(message)", message)


def test_a_view_hears_what_it_has_asked_and_what_is_scored_for_others(tab):
    view = as_json(made_up())
    (pattern,) = view["tasks"][1]["patterns"]
    for task in view["tasks"]:
        task |= {"patterns": [], "texts": 2}
    state = {"view": view, "off": [], "percent": 10, "kernel": True}
    tab.add_style_tag(path=STYLE)
    tab.evaluate(VIEW, [MODULE.read_text(encoding="utf-8"), state])
    click_off(tab, 0, 1)
    click_off(tab, 0, 2)
    assert source(tab) == "2 of 6 heads off; not scored yet."
    ask, work = tab.locator(".compute"), tab.locator(".work")
    ask.click()
    ask.press("Enter")
    assert ask.evaluate(f"node => node === {FOCUSED}"), "the keyboard stays there"
    (question,) = tab.evaluate("window.asked")  # one at a time
    assert question["type"] == "scores" and question["off"] == [1, 2]
    tab.evaluate("window.fromPython([4])")  # another set, while the first is scored
    answer(tab, type="progress", id=question["id"], done=1, total=4)
    answer(tab, type="progress", id="another's", done=3, total=4)
    assert work.inner_text() == "Without L1H2, L1H3: 1 of 4 tasks scored"
    answer(tab, type="problem", id=question["id"], text="interrupted")
    assert work.inner_text() == "Without L1H2, L1H3: interrupted"
    tab.evaluate("window.fromPython([1, 2])")
    again = question | {"id": "another's", "off": [2, 1], "note": "As it is."}
    effects = {part: view["sets"][0][part] for part in ("scores", "lost")}
    answer(tab, **again, **effects, whole=view["wholes"][1])
    computed = r"2 of 6 heads off; computed at [\d:]+( [AP]M)?\. As it is\."
    assert re.fullmatch(computed, source(tab))
    assert rows(tab, "scores")[0][2:4] == ["12", said(view["wholes"][1][0])]
    tab.locator("button.none").click()
    shown = rows(tab, "scores")[0][3]
    assert shown == said(view["wholes"][0][0]), "what is computed does not stand for the record"
    cell(tab, 1, 4).click()
    texts = tab.locator(".attention select").nth(1)
    texts.select_option("1")
    assert [m["number"] for m in tab.evaluate("window.asked.slice(1)")] == [0, 1]
    problem = {"type": "problem", "task": 1, "text": "<b>no</b>"}
    answer(tab, **problem, number=0)
    assert tab.locator(".attention .problem").count() == 0, "of a text that is not shown"
    answer(tab, **problem, number=1)
    assert tab.locator(".attention .problem").inner_text() == "<b>no</b>"
    answer(tab, type="pattern", task=1, asked=1, number=0, texts=1, pattern=pattern)
    assert tab.locator("td.weight").count() == 16 and texts.input_value() == "0"
    tab.evaluate("window.end()")
    assert tab.locator(".head").count() == 0


# --- JupyterLab


@pytest.fixture
def smoke(tmp_path) -> Study:
    """The smoke profile's records behind notebook 09."""
    study = Study("smoke", results=tmp_path / "results")
    for unit in study.plan("09"):
        study.store.get(unit)
    return study


@pytest.fixture
def lab(smoke, tmp_path) -> Iterator[str]:
    """The address of a JupyterLab on a copy of notebook 09, with the smoke profile."""
    text = NOTEBOOK.read_text(encoding="utf-8").replace('\\"mini\\"', '\\"smoke\\"')
    (tmp_path / NOTEBOOK.name).write_text(text, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"""--no-browser --allow-root --port={port} --ServerApp.port_retries=0
        --ServerApp.root_dir={tmp_path} --IdentityProvider.token= --ServerApp.password=
        --ServerApp.disable_check_xsrf=True --LabApp.news_url=None
        --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"""
    own = {f"JUPYTER_{what}_DIR": str(tmp_path / what) for what in ("CONFIG", "RUNTIME", "DATA")}
    env = os.environ | own | {"FSLIB_RESULTS": str(smoke.folder.parent)}
    command, log = [sys.executable, "-m", "jupyterlab", *words.split()], tmp_path / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=env, cwd=tmp_path)
    address = f"http://127.0.0.1:{port}/lab"
    with server:
        while address not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        yield address
        server.terminate()


def test_the_explorer_scores_with_a_kernel(lab, smoke, tab):
    tab.goto(f"{lab}/tree/{NOTEBOOK.name}?reset")
    tab.get_by_text("Run the cell to explore it").wait_for()  # no kernel knows the widget yet
    tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    tab.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    tab.get_by_text("Run All Cells", exact=True).click()
    page = tab.locator(".fslib-explorer")
    # the cell after it has switched heads off: what is set in Python is seen on the page
    page.locator('.scores .source:has-text("recorded: top 10 % of bbc.")').wait_for()
    cell(page, 0, 5).scroll_into_view_if_needed()
    page.locator("button.none").click()
    click_off(page, 0, 5)
    assert "recorded: layer 1, head 6 alone" in source(page)
    click_off(page, 1, 18)
    assert "not scored yet" in source(page)
    page.locator(".compute").click()
    page.locator('.scores .source:has-text("computed at")').wait_for()
    model = smoke.units(smoke.seeds[0]).train.trained(smoke.store)
    off = np.zeros((model.n_layers, model.n_heads), dtype=bool)
    off.flat[[5, 18]] = True
    tasks = {name: scored_on(task, smoke.profile.lesioned_on) for name, task in smoke.tasks.items()}
    with pruned(model, off):
        expected = [100 * score.value for score in evaluate(model, tasks).values()]
    found = [float(row[4].split()[0]) for row in rows(page, "scores")]
    np.testing.assert_allclose(found, expected, atol=0.051)
    cell(page, 0, 5).click()
    page.locator("td.weight").first.wait_for()
    for kind in ("error", "stderr"):
        output = f'.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.{kind}"]'
        assert tab.locator(output).count() == 0

"""The explorer as a reader meets it: in a file, and in JupyterLab, in a browser without a network.

Needs Chromium (Debian: apt-get install chromium); skipped where there is none. Any request that
leaves this machine is a failure. Of a test that fails, screenshots are kept in the folder that it
names.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import nbformat
import numpy as np
import pytest
from views import EVIL, made_up

from fslib import Study, evaluate, explore, pruned
from fslib.evaluation import Score
from fslib.explorer.view import as_json, compare
from fslib.explorer.widget import MODULE, STYLE, Explorer, Kernel
from fslib.study.units import scored_on

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def opened(tab, view, tmp_path) -> dict:
    """Open the page of a view as a file, and return what it is told."""
    path = Explorer(view, Kernel(lambda: None, {}, {}, {})).to_html(tmp_path / "explorer.html")
    tab.goto(path.as_uri())
    tab.wait_for_selector(".head")
    return as_json(view)


def cell(tab, task: int, at: int):
    return tab.locator(f'.head[data-task="{task}"][data-head="{at}"]')


def click_off(tab, task: int, at: int, key: str = "Shift") -> None:
    cell(tab, task, at).click(modifiers=[key])


def heads_off(tab) -> list[int]:
    cells = tab.locator('.head.off[data-task="0"]')
    return sorted(map(int, cells.evaluate_all("cells => cells.map(c => c.dataset.head)")))


def source(tab) -> str:
    """Return what the page says of the scores that it shows."""
    return tab.locator(".scores .source").inner_text()


def heading(tab, section: str = "details") -> str:
    return tab.locator(f".{section} h3").inner_text()


def rows(tab, section: str) -> list[list[str]]:
    """Return the text of a table's body."""
    found = tab.locator(f".{section} tbody tr").all()
    return [row.locator("th, td").all_inner_texts() for row in found]


def said(e: dict[str, float], lost: bool = False) -> str:
    """Return a number and its interval as the page writes them."""
    first, low, high = e["value"], e["low"], e["high"]
    if lost:
        first, low, high = 0.0 - first, -high, -low
    text = f"{first:+.1f}" if lost else f"{first:.1f}"
    return f"{text} [{low:.1f}, {high:.1f}]".replace("-", "−")


def check_scores(tab, view: dict, expected: dict) -> None:
    """The table of scores shows a set, beside the whole model on the same examples."""
    found = zip(rows(tab, "scores"), view["tasks"], strict=True)
    for t, (row, task) in enumerate(found):
        whole, score, lost = (
            part[t]
            for part in (view["wholes"][expected["whole"]], expected["scores"], expected["lost"])
        )
        assert row[1:3] == [task["metric"], str(whole["examples"])]
        assert row[3:6] == [said(whole), said(score), said(lost, lost=True)]


# --- the file


def test_maps_show_importance_and_who_shares_a_top_set(tab, tmp_path):
    view = opened(tab, made_up(), tmp_path)
    for at in (0, 4):
        cell(tab, 1, at).hover()
        (alone,) = (s for s in view["sets"] if s["heads"] == [at])
        assert f"Layer {at // 3 + 1}, head {at % 3 + 1}" in heading(tab)
        for t, row in enumerate(rows(tab, "details")):
            task = view["tasks"][t]
            importance = task["importance"]
            rank = 1 + sorted(importance, reverse=True).index(importance[at])
            share = f"{100 * importance[at] / sum(importance):.1f} %"
            assert row[0].split(" ", 1)[1].strip() == task["name"].strip()
            assert float(row[1]) == pytest.approx(importance[at], rel=5e-3)
            assert row[2:4] == [f"{rank} of 6", share]
            assert row[5] == said(alone["lost"][t], lost=True)
            assert float(row[6].replace("−", "-")) == pytest.approx(task["rise"][at], abs=6e-4)
    for percent, k in ((0, 0), (34, 2), (50, 3), (100, 6)):
        tab.locator("input[type=range]").fill(str(percent))
        orders = [np.argsort(-np.array(t["importance"]), kind="stable") for t in view["tasks"]]
        tops = [set(order[:k].tolist()) for order in orders]
        assert f"{percent} %, {k} of 6 heads" in tab.locator(".controls").first.inner_text()
        for t, at in np.ndindex(3, 6):
            sharing = sum(at in other for other in tops)
            mark = "" if at not in tops[t] else str(sharing) if sharing > 1 else "●■▲"[t]
            assert cell(tab, t, at).inner_text() == mark
            assert ("in-top" in cell(tab, t, at).get_attribute("class")) == (at in tops[t])
        for at in range(6):  # a label, once set, says what the details say
            cell(tab, 1, at).hover()
            standing = heading(tab).split(": ", 1)[1]
            cell(tab, 0, at).click()
            assert standing in cell(tab, 0, at).get_attribute("aria-label")


def test_scores_are_the_records_or_need_a_kernel(tab, tmp_path):
    view = opened(tab, made_up(), tmp_path)
    tab.locator("select").nth(1).select_option("0")
    top = view["sets"][0]
    assert f"2 of 6 heads off; recorded: {top['name']}" in source(tab)
    check_scores(tab, view, top)
    click_off(tab, 0, 1)
    assert "this set has no record, and its scores need a kernel" in source(tab)
    assert [row[4] for row in rows(tab, "scores")] == ["–"] * 3, "no estimate for a measurement"
    assert tab.locator(".compute").count() == 0
    tab.locator("button.none").click()
    click_off(tab, 2, 3, "Control")
    assert "recorded: head 3 alone" in source(tab)
    (alone,) = (s for s in view["sets"] if s["heads"] == [3])
    check_scores(tab, view, alone)
    tab.locator("button.layer").first.click()  # the upper row: layer 2, of which one head is off
    assert heads_off(tab) == [3, 4, 5]
    tab.locator("button.top").nth(1).click()
    assert heads_off(tab) == [], "10 % of six heads are none"


def test_random_heads_are_as_many_in_every_layer(tab, tmp_path):
    opened(tab, made_up(3, 8, ("only",)), tmp_path)
    for at in (1, 2, 18):
        click_off(tab, 0, at)
    drawn = []
    for _ in range(8):
        tab.locator("button.random").click()
        drawn.append(tuple(heads_off(tab)))
        assert [sum(at // 8 == layer for at in drawn[-1]) for layer in range(3)] == [2, 0, 1]
    assert len(set(drawn)) > 3, "of 224 such sets, others each time"


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


@pytest.mark.parametrize(("layers", "heads"), [(2, 3), (1, 1)])
def test_the_keyboard_does_all(tab, tmp_path, layers, heads):
    count = layers * heads
    opened(tab, made_up(layers, heads), tmp_path)
    focused = "document.activeElement"
    tab.locator('.head[tabindex="0"]').first.focus()
    here = int(tab.evaluate(f"{focused}.dataset.head"))
    moves = {"ArrowRight": 1, "ArrowLeft": -1, "ArrowUp": heads, "ArrowDown": -heads}
    for key in [*moves, *reversed(moves), "End", "Home"]:
        tab.keyboard.press(key)
        first = here - here % heads
        wanted = {"Home": first, "End": first + heads - 1}.get(key, here + moves.get(key, 0))
        same_row = key in ("ArrowUp", "ArrowDown") or wanted // heads == here // heads
        here = wanted if 0 <= wanted < count and same_row else here
        assert int(tab.evaluate(f"{focused}.dataset.head")) == here, key
    name = f"layer {here // heads + 1}, head {here % heads + 1}"
    tab.keyboard.press("Space")
    assert heads_off(tab) == [here] and cell(tab, 0, here).inner_text() == "×"
    assert tab.evaluate(f"{focused}.getAttribute('aria-label')").startswith(f"{name}, ")
    assert f"1 of {count} heads off; recorded" in source(tab)
    tab.keyboard.press("Space")
    assert heads_off(tab) == []
    tab.keyboard.press("Shift+Space")
    assert heads_off(tab) == list(range(here - here % heads, here - here % heads + heads))
    tab.keyboard.press("Enter")
    assert f"What {name} attends to" in heading(tab, "attention")
    select = tab.locator(".attention select").first
    select.focus()
    tab.keyboard.press("ArrowDown")
    is_focused = select.evaluate(f"node => node === {focused}")
    assert select.input_value() == "1" and is_focused, "it stays there"


def test_attention_is_what_was_recorded_and_names_are_text(tab, tmp_path):
    view = made_up()
    opened(tab, view, tmp_path)
    assert tab.title() == f"made up {EVIL}" and EVIL in tab.locator("h2").inner_text()
    cell(tab, 1, 5).click()
    (pattern,) = view.tasks[1].patterns
    weights, importance = pattern["weights"][1, 2] / 255, pattern["importance"][1, 2]
    titles = tab.locator("td.weight").evaluate_all("cells => cells.map(c => c.title)")
    words = pattern["tokens"]
    pairs = [(i, j) for i in range(4) for j in range(4)]
    shares = [f"{words[i]} → {words[j]}: {100 * weights[i, j]:.0f} %" for i, j in pairs]
    assert titles == shares
    found = [text.removesuffix(" %") for text in tab.locator("td.importance").all_inner_texts()]
    expected = 100 * importance / importance.sum()
    np.testing.assert_allclose([float(x) for x in found], expected, atol=0.51)
    assert f"answer: {EVIL}; the model's: no" in tab.locator(".attention").inner_text()
    assert "<b>bold</b>" in tab.locator(".pattern").inner_text()
    assert tab.locator(".fslib-explorer b").count() == 0
    tab.locator(".attention select").first.select_option("0")
    assert "What layer 2, head 3 attends to" in heading(tab, "attention"), "that was clicked"
    for task in view.tasks:
        task.patterns, task.texts = [], 0
    opened(tab, view, tmp_path)
    cell(tab, 0, 0).click()
    told = tab.locator(".attention .source").inner_text()
    assert told == "The attention weights of this architecture are not seen."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark_and_at_twice_the_size(chromium, tmp_path, scheme):
    page = chromium.new_page(viewport={"width": 640, "height": 900}, color_scheme=scheme)
    names = tuple(f"task {i}" for i in range(7))  # the seventh is black
    opened(page, made_up(3, 12, names), tmp_path)
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)

    def lightness(selector: str, what: str) -> float:
        colour = page.locator(selector).last.evaluate(f"""node => {{
            const canvas = document.createElement("canvas").getContext("2d");
            canvas.fillStyle = getComputedStyle(node).{what};
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data];
        }}""")
        return float(np.dot((0.2126, 0.7152, 0.0722), (np.array(colour[:3]) / 255) ** 2.2))

    paper = lightness(".fslib-explorer", "backgroundColor")
    assert (paper > 0.8) == (scheme == "light")
    marks = [f".map:nth-child({i + 1}) .mark" for i in range(len(names))]
    for selector in (".fslib-explorer", ".legend", ".details th", *marks):
        ink = lightness(selector, "color")
        contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert contrast > (3 if "mark" in selector else 7), f"{selector}: see {tmp_path}"
    size = "node => parseFloat(getComputedStyle(node).fontSize)"
    assert page.locator(".head").first.evaluate(size) >= 22, "it grows with the reader's setting"
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 1000, f"on half a screen, tables scroll by themselves: see {tmp_path}"
    page.close()


def test_the_largest_model_reacts_in_a_tenth_of_a_second(tab, tmp_path):
    names = tuple(f"task {i}" for i in range(10))
    opened(tab, made_up(24, 16, names, tokens=32), tmp_path)
    measured = tab.evaluate("""async () => {
        const slider = document.querySelector("input[type=range]");
        const cells = [...document.querySelectorAll('.head[data-task="3"]')];
        const hover = new MouseEvent("mouseover", { bubbles: true });
        const times = {};
        const time = (name, act) => {
            const all = [];
            for (let i = 0; i < 5; i += 1) {
                const begun = performance.now();
                act(i);
                document.body.getBoundingClientRect();  // style and layout are done
                all.push(performance.now() - begun);
            }
            times[name] = all.sort((a, b) => a - b)[2];
        };
        time("slider", (i) => {
            slider.value = 10 + 15 * i;
            slider.dispatchEvent(new Event("input"));
        });
        time("hover", (i) => cells[40 * i].dispatchEvent(hover));
        time("top set", (i) => document.querySelectorAll("button.top")[i].click());
        time("attention", (i) => cells[40 * i + 7].click());
        return times;
    }""")
    assert max(measured.values()) < 100, f"milliseconds, 24 x 16 heads, 10 tasks: {measured}"


def test_the_committed_page_is_that_of_the_reference_results(tab, tmp_path):
    path = ROOT / "figures" / "explorer.html"
    assert path.stat().st_size <= 3_000_000
    tab.goto(path.as_uri())
    tab.wait_for_selector(".head")
    study = Study("mini", results=ROOT / "results")
    again = explore(study).to_html(tmp_path / "again.html").read_bytes()
    assert again == path.read_bytes(), "fslib explore --out figures/explorer.html"
    whole = study.units(study.seeds[0]).prune.iap(study.store).baseline()[0]
    found = [float(row[3].split()[0]) for row in rows(tab, "scores")]
    np.testing.assert_allclose(found, 100 * whole, atol=0.051)


# --- two views of one widget, and what a kernel would send

TWO_VIEWS = """async ([code, state]) => {
    const source = `data:text/javascript,${encodeURIComponent(code)}`;
    const { default: explorer } = await import(source);
    const model = explorer.standIn(state), listeners = {};
    const tell = (name, ...what) => (listeners[name] ?? []).forEach((hear) => hear(...what));
    model.on = (name, hear) => (listeners[name] ??= []).push(hear);
    model.off = (name, hear) => {
        listeners[name] = listeners[name].filter((each) => each !== hear);
    };
    window.saved = [];
    model.set = (name, value) => {
        state[name] = value;
        if (name === "off") window.saved.push(value);
        tell(`change:${name}`);
    };
    window.asked = [];
    model.send = (message) => window.asked.push(message);
    window.answer = (message) => tell("msg:custom", message);
    window.fromPython = (off) => { state.off = off; tell("change:off"); };
    window.end = ["one", "two"].map((id) => {
        const el = document.body.appendChild(document.createElement("div"));
        el.id = id;
        return explorer.render({ model, el });
    });
}"""


def two_views(tab, view: dict):
    """Show two views of one explorer on a page.

    What they ask is in `window.asked`, and `window.answer` tells both.
    """
    tab.add_style_tag(path=STYLE)
    state = {"view": view, "off": [], "percent": 10, "kernel": True}
    tab.evaluate(TWO_VIEWS, [MODULE.read_text(encoding="utf-8"), state])
    return tab.locator("#one"), tab.locator("#two")


def answer(tab, **message) -> None:
    tab.evaluate("message => window.answer(message)", message)


def test_two_views_of_one_explorer_share_heads_and_scores(tab):
    """Progress and trouble are told to the view that asked, scores to both."""
    view = as_json(made_up())
    one, two = two_views(tab, view)
    unscored = "2 of 6 heads off; not scored yet."
    for at in (1, 2):
        click_off(one, 0, at)
    assert source(one) == source(two) == unscored
    ask, work = one.locator(".compute"), one.locator(".work")
    ask.click()
    (question,) = tab.evaluate("window.asked")
    assert question["type"] == "scores" and question["off"] == [1, 2]
    ask.press("Enter")
    assert tab.evaluate("window.asked.length") == 1, "one question at a time"
    assert ask.evaluate("node => node === document.activeElement"), "the keyboard stays there"
    answer(tab, type="progress", id=question["id"], done=0, total=4)
    assert work.inner_text().startswith("Without L1H2, L1H3: getting the model")
    answer(tab, type="progress", id=question["id"], done=1, total=4)
    assert work.inner_text() == "Without L1H2, L1H3: 1 of 4 tasks scored"
    assert one.locator("progress").get_attribute("value") == "1"
    assert two.locator("progress").is_hidden()
    one.locator("select").nth(1).select_option("0")  # another set, while the first is scored
    assert "recorded: top 33 % of alpha" in source(one)
    assert work.inner_text() == "Without L1H2, L1H3: 1 of 4 tasks scored"
    tab.evaluate("window.fromPython([1, 2])")
    answer(tab, type="problem", id=question["id"], text="interrupted")
    assert work.inner_text() == "Without L1H2, L1H3: interrupted"
    assert "problem" in work.get_attribute("class") and two.locator(".work").is_hidden()
    assert source(one) == source(two) == unscored
    ask.click()
    again = tab.evaluate("window.asked")[1] | {"off": [2, 1], "note": "As it is."}
    effects = {part: view["sets"][0][part] for part in ("scores", "lost")}
    answer(tab, **again, **effects, whole=view["wholes"][1])
    for which in (one, two):
        computed = r"2 of 6 heads off; computed at [\d:]+( [AP]M)?\. As it is\."
        assert re.fullmatch(computed, source(which))
        assert which.locator(".compute").inner_text() == "Score these heads again"
        assert rows(which, "scores")[0][2:4] == ["12", said(view["wholes"][1][0])]
    two.locator("button.none").click()
    shown = rows(one, "scores")[0][3]
    assert shown == said(view["wholes"][0][0]), "what is computed does not stand for the record"
    saved = tab.evaluate("window.saved.length")
    tab.evaluate("window.fromPython([4])")
    assert heads_off(one) == [4]
    assert tab.evaluate("window.saved.length") == saved, "Python's own is not written back to it"
    tab.evaluate("window.end[0]()")
    assert one.locator(".head").count() == 0
    answer(tab, type="pattern", task=0, asked=0, number=0, texts=1, pattern={})  # too late


def test_texts_are_as_many_as_the_kernel_says(tab):
    view = as_json(made_up())
    ((pattern,),) = (task["patterns"] for task in view["tasks"][1:2])
    for task in view["tasks"]:
        task |= {"patterns": [], "texts": 2}
    one, _ = two_views(tab, view)
    tasks, texts = (one.locator(".attention select").nth(i) for i in (0, 1))
    cell(one, 1, 4).click()
    texts.select_option("1")
    assert [m["number"] for m in tab.evaluate("window.asked")] == [0, 1]
    answer(tab, type="pattern", task=1, asked=0, number=0, texts=1, pattern=pattern)
    assert one.locator("td.weight").count() == 16 and texts.input_value() == "0"
    tasks.select_option("2")
    problem = {"type": "problem", "task": 2, "text": "<b>no</b>"}
    answer(tab, **problem, number=1)
    assert one.locator(".attention .problem").count() == 0, "of a text that is not shown"
    answer(tab, **problem, number=0)
    assert one.locator(".attention .problem").inner_text() == "<b>no</b>"
    tasks.select_option("1")
    answer(tab, **problem, number=0)
    assert one.locator("td.weight").count() == 16, "it stays when another text fails"
    cell(one, 1, 2).click()
    last = tab.evaluate("window.asked.at(-1)")
    assert last == {"type": "pattern", "task": 1, "number": 0}, "the model may have changed"


# --- JupyterLab


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Study:
    """The smoke profile's records behind notebook 09."""
    study = Study("smoke", results=tmp_path_factory.mktemp("results"))
    for unit in study.plan("09"):
        study.store.get(unit)
    return study


@pytest.fixture(scope="module")
def lab(chromium, smoke, tmp_path_factory) -> Iterator[str]:
    """The address of a JupyterLab on a copy of the notebooks, the ninth with the smoke profile."""
    folder = tmp_path_factory.mktemp("lab")
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        if path.stem.startswith("09"):
            notebook.cells[1].source = notebook.cells[1].source.replace('"mini"', '"smoke"')
        nbformat.write(notebook, folder / path.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"""--no-browser --allow-root --port={port} --ServerApp.port_retries=0
        --ServerApp.root_dir={folder} --IdentityProvider.token= --ServerApp.password=
        --ServerApp.disable_check_xsrf=True --LabApp.news_url=None
        --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"""
    own = {
        f"JUPYTER_{what.upper()}_DIR": str(folder / what) for what in ("config", "runtime", "data")
    }
    env = os.environ | own | {"FSLIB_RESULTS": str(smoke.folder.parent)}
    command, log = [sys.executable, "-m", "jupyterlab", *words.split()], folder / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=env, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urlopen(f"{address}/api", timeout=5).close()
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def notebook(tab, lab: str, name: str) -> None:
    """Open a notebook, in a workspace of its own."""
    tab.goto(f"{lab}/lab/workspaces/{name[:2]}/tree/{name}?reset")
    tab.wait_for_selector(".jp-Notebook .jp-Cell")


def run_all(tab) -> None:
    """Run all cells, on the kernel that is offered where the notebook has none yet."""
    tab.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    tab.get_by_text("Run All Cells", exact=True).click()
    accept = tab.locator(".jp-Dialog .jp-mod-accept")
    accept.or_(tab.locator(".fslib-explorer .head").first).first.wait_for()
    if accept.count():
        accept.click()
        tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        run_all(tab)


def test_the_explorer_scores_with_a_kernel(tab, lab, smoke):
    notebook(tab, lab, "09_explore.ipynb")
    tab.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    run_all(tab)
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
    assert tab.locator('.jp-OutputArea-output[data-mime-type*="error"]').count() == 0


def test_every_notebook_opens_without_an_error(tab, lab):
    for path in NOTEBOOKS:
        notebook(tab, lab, path.name)
        tab.wait_for_selector(".jp-OutputArea-output")
        for kind in ("error", "stderr"):
            output = f'.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.{kind}"]'
            assert tab.locator(output).count() == 0, path.name
        assert tab.get_by_text("Error displaying widget").count() == 0, path.name
    # the ninth, where no kernel runs
    tab.get_by_text("Run the cell to explore it").wait_for()

"""The site: the same bytes twice, links that work, and whole in a browser without a network."""

import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
import yaml
from refusal import refused

from fslib.cli import main
from fslib.site import build
from fslib.site.build import METHOD, PAGES, make_html, write_site
from fslib.site.conf import _as_plain_text
from fslib.study.profiles import PROFILES
from fslib.study.runner import find_notebooks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    words = ["site", "--out", str(folder), "--repository", "some-one/fslib.x"]
    assert main(words) == 0
    return folder


class Page:
    """What a page points to, and what can be pointed to on it."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")

        def found(pattern: str) -> list[str]:
            return [unescape(value) for value in re.findall(pattern, text)]

        self.targets = found(r'<a\b[^>]*\shref="([^"]+)"')
        self.loaded = found(r'<(?!a\b)[^>]*\s(?:src|href)="([^"]+)"')
        self.anchors = found(r'<[^>]*\sid="([^"]+)"') + found(r'<[^>]*\sname="([^"]+)"')


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    made = (path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts)
    return {path: Page(path) for path in made if path.name != "heads.html"}


def test_every_page_is_there(site):
    wanted = {f"notebooks/{path.stem}" for path in find_notebooks()} | {*PAGES, "index", "search"}
    wanted |= {f"profiles/{name}" for name in PROFILES} | {f"method/{name}" for name in METHOD}
    assert all((site / f"{name}.html").is_file() for name in wanted)
    assert (site / "heads.html").read_bytes() == (ROOT / "figures" / "explorer.html").read_bytes()
    link = "https://mybinder.org/v2/gh/some-one/fslib.x/HEAD?urlpath=lab/tree/notebooks"
    assert link in (site / "notebooks.html").read_text(encoding="utf-8")


def test_two_builds_are_the_same_bytes(site):
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}

    before = contents()
    write_site(site, lambda line: None, "some-one/fslib.x")
    assert contents() == before


def test_nothing_is_loaded_from_elsewhere_and_formulas_are_mathml(site, pages):
    for path, page in pages.items():
        assert not [x for x in page.loaded if re.match("(https?:)?//|.*mathjax", x, re.I)], path
    assert "<math" in (site / "notebooks" / "02_head_importance.html").read_text(encoding="utf-8")
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"url\(['\"]?(https?:)?//", text), path.name


def test_all_links_and_anchors_resolve(site, pages):
    links = [(path, target) for path, page in pages.items() for target in page.targets]
    links += [(path, target) for path, page in pages.items() for target in page.loaded]
    here = [x for x in links if not re.match(r"https?:|mailto:|data:|javascript:", x[1])]
    assert len(here) > 500
    for path, target in here:
        place, _, anchor = unquote(target).partition("#")
        there = (path.parent / place.partition("?")[0]).resolve() if place else path
        told = f"{path.relative_to(site)} points to {target}"
        assert there.exists(), told
        if anchor not in ("", "main-content") and there in pages:
            assert anchor in pages[there].anchors, told


def test_a_profile_has_its_claims_and_its_notebooks(site):
    for name in ("mini", "evidence"):
        saved = pd.read_csv(ROOT / "results" / name / "tables" / "08_claims.csv")
        text = (site / "profiles" / f"{name}.html").read_text(encoding="utf-8")
        rows = re.findall(r"<tr.*?</tr>", re.search(r"<table.*?</table>", text, re.S)[0], re.S)
        for row, (_, wanted) in zip(rows[1:], saved.iterrows(), strict=True):
            cells = unescape(re.sub(r"<[^>]+>", "|", row)).replace("’", "'")
            assert all(f"|{wanted[c]}|" in cells for c in ("claim", "measured here", "verdict"))
    for path in (ROOT / "results" / "evidence" / "notebooks").glob("*.ipynb"):
        assert f'href="../results/evidence/notebooks/{path.stem}.html"' in text
    assert "tiny-random" in (site / "profiles" / "smoke.html").read_text(encoding="utf-8")


def test_docstrings_are_read_as_plain_text_in_google_style(site):
    text = unescape(re.sub(r"<[^>]+>", "", (site / "method" / "importance.html").read_text()))
    assert "|<ctx, grad>|" in text, "bars are bars"
    assert "I_t[l,h] = (1/N) * sum over x, i of" in text, "a formula is as it is written"
    lines = ["A *b* of `c_*` and |d| e_ f_g.", "", "Args:", "    n: How |many|."]
    _as_plain_text(None, "function", "f", None, None, lines)
    assert lines[0] == r"A \*b\* of `c_*` and \|d\| e\_ f_g."
    assert lines[2:4] == ["Args:", r"    n: How \|many\|."]


def test_what_sphinx_warns_of_is_refused_but_for_the_style_of_docstrings(tmp_path, monkeypatch):
    page = "# Page\n\n```{eval-rst}\n.. autofunction:: fslib.site.build.contents\n```\n"
    index, out = tmp_path / "source" / "index.md", tmp_path / "site"
    index.parent.mkdir()
    index.write_text(page)
    monkeypatch.setattr(build.contents, "__doc__", "Return\n      this.\n  that")
    make_html(index.parent, out)
    assert (out / "index.html").is_file()
    index.write_text("# Page\n\n[gone](figures/gone.png)\n")
    with refused("the site is not built with warnings", "figures/gone.png"):
        make_html(index.parent, tmp_path / "other")


def test_links_to_folders_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "figures").mkdir()
    text = "[a](figures/a.png) [b](figures) ![c](figures) [d](#here) [e](https://x.y)"
    (tmp_path / "README.md").write_text(text)
    assert build.landing() == text.replace("[b](figures)", "b")


def test_a_folder_that_is_no_site_is_left_alone(tmp_path, capsys):
    (tmp_path / "index.html").write_text("of somebody else")
    for out in (tmp_path, tmp_path / "index.html"):
        assert main(["site", "--out", str(out)]) == 2
        assert "is there and no site" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "of somebody else"


def test_the_workflows_do_what_a_reader_does():
    steps = {}
    for name in ("ci", "site"):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
        steps[name] = [s.get("run") for s in next(iter(workflow["jobs"].values()))["steps"]]
    assert "bash .ci/run" in steps["ci"]
    build_it = 'fslib site --out site --repository "$GITHUB_REPOSITORY"'
    assert steps["site"][2:4] == ['pip install -r requirements.lock -e ".[site]"', build_it]


@pytest.mark.browser
def test_in_a_browser_no_page_complains_and_search_finds(tab, site, pages):
    for path in pages:
        if "_modules" not in path.parts:
            tab.goto(path.as_uri())
    tab.goto((site / "search.html").as_uri() + "?q=dissociation")
    tab.wait_for_selector("#search-results li")
    assert tab.locator("#search-results li a", has_text="issociation").count()
    tab.goto((site / "explorer.html").as_uri())
    tab.frame_locator("iframe").locator(".head").first.wait_for()
    assert tab.frame_locator("iframe").locator("h2").inner_text().startswith("mini: minilm-l6")

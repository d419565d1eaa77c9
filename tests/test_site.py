"""The site: gathered from what is there, the same bytes twice, and whole in a browser without a network."""

import hashlib
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
import yaml
from refusal import refused

from fslib.questions import main
from fslib.site.build import build, landing, linked, section
from fslib.site.pages import escaped
from fslib.study.profiles import PROFILES
from fslib.study.runner import find_notebooks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    assert main(["site", "--out", str(folder)]) == 0
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


class Page(HTMLParser):
    """What a page points to, and what can be pointed to on it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.targets.append(found["href"])
        elif found.get("src") or (tag == "link" and found.get("href")):
            self.loaded.append(found.get("src") or found["href"])


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    made = (
        path
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.parts and path.name != "heads.html"
    )
    return {path: Page(path) for path in made}


def test_every_page_is_there(site):
    wanted = {f"notebooks/{path.stem}" for path in find_notebooks()} | {
        f"profiles/{name}" for name in PROFILES
    }
    wanted |= {
        f"method/{name}"
        for name in ("importance", "pruning", "dissociation", "training", "iat", "tasks")
    }
    wanted |= {"index", "explorer", "benchmarks", "commands", "paper", "cite", "search", "heads"}
    assert all((site / f"{name}.html").is_file() for name in wanted)
    assert (site / "heads.html").read_bytes() == (ROOT / "figures" / "explorer.html").read_bytes()


def test_two_builds_are_the_same_bytes(site, tmp_path):
    assert digests(build(tmp_path / "again", lambda line: None).parent) == digests(site)


def test_nothing_is_loaded_from_elsewhere_and_formulas_are_mathml(site, pages):
    for path, page in pages.items():
        assert not [x for x in page.loaded if re.match(r"(https?:)?//", x)], path.name
        assert not [x for x in page.loaded if "mathjax" in x.lower()], path.name
    assert "<math" in (site / "notebooks" / "02_head_importance.html").read_text(encoding="utf-8")
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", path.read_text(encoding="utf-8")), (
            path.name
        )


def test_all_links_and_anchors_resolve(site, pages):
    checked = 0
    for path, page in pages.items():
        for target in page.targets + page.loaded:
            if re.match(r"https?:|mailto:|data:|javascript:", target):
                continue
            place, _, anchor = unquote(target).partition("#")
            there = (path.parent / place.partition("?")[0]).resolve() if place else path
            assert there.exists(), f"{path.relative_to(site)} points to {target}"
            if anchor and there in pages and anchor not in ("", "main-content"):
                assert anchor in pages[there].anchors, (
                    f"{path.relative_to(site)} points to {target}"
                )
            checked += 1
    assert checked > 500


def test_the_claims_are_those_of_the_tables(site):
    (rows,) = tables(site / "index.html")
    assert rows[0] == [
        "claim",
        "measured here",
        "mini",
        "mini: verdict",
        "evidence",
        "evidence: verdict",
    ]
    for column, profile in ((2, "mini"), (4, "evidence")):
        saved = pd.read_csv(ROOT / "results" / profile / "tables" / "08_claims.csv")
        assert [row[:2] for row in rows[1:]] == saved[
            ["claim", "measured here"]
        ].to_numpy().tolist()
        assert [row[column + 1] for row in rows[1:]] == saved["verdict"].tolist()
        for row, (_, part) in zip(rows[1:], saved.iterrows(), strict=True):
            estimate = f"{part['value']:.2f} [{part['low']:.2f}, {part['high']:.2f}]"
            p = "< 0.001" if part["p"] < 0.001 else f"= {part['p']:.3f}"
            told = f"p {p}, {part['MDE']:.2g}"
            wanted = (
                "none"
                if pd.isna(part["value"])
                else estimate
                if pd.isna(part["p"])
                else f"{estimate}, {told}"
            )
            assert row[column] == wanted


def test_a_profile_has_its_claims_and_its_notebooks(site):
    for name in ("mini", "evidence"):
        saved = pd.read_csv(ROOT / "results" / name / "tables" / "08_claims.csv").drop(
            columns="the paper says"
        )
        rows = tables(site / "profiles" / f"{name}.html")[0]
        assert (
            rows[0][:2] == ["claim", "verdict"]
            and {*rows[0]} == {*saved.columns}
            and len(rows) == 1 + len(saved)
        )
        for found, (_, wanted) in zip(rows[1:], saved.iterrows(), strict=True):
            told = dict(zip(rows[0], found, strict=True))
            assert all(told[c] == wanted[c] for c in ("claim", "measured here", "verdict"))
            for c in ("value", "low", "high", "p", "MDE"):
                assert told[c] == ("" if pd.isna(wanted[c]) else f"{wanted[c]:.3g}")
    for name in ("evidence", "glue-mini"):
        text = (site / "profiles" / f"{name}.html").read_text(encoding="utf-8")
        for path in (ROOT / "results" / name / "notebooks").glob("*.ipynb"):
            assert f'href="../results/{name}/notebooks/{path.stem}.html"' in text


def tables(page: Path) -> list[list[list[str]]]:
    """Return the texts of a page's tables, row by row."""

    def text(cell: str) -> str:
        return unescape(re.sub(r"<[^>]+>", "", cell)).replace("’", "'").strip()

    found = re.findall(r"<table.*?</table>", page.read_text(encoding="utf-8"), re.S)
    cells = r"<t[hd].*?>(.*?)</t[hd]>"
    return [
        [
            list(map(text, re.findall(cells, row, re.S)))
            for row in re.findall(r"<tr.*?</tr>", t, re.S)
        ]
        for t in found
    ]


def test_docstrings_are_read_as_they_are_written(site):
    text = re.sub(r"<[^>]+>", "", (site / "method" / "importance.html").read_text(encoding="utf-8"))
    assert (
        "Return the importance of every head for a task, (layers, heads), higher = more important."
        in text
    )
    assert "normalize: None, or “layer” to divide each layer by its L2 norm." in text
    assert "|&lt;ctx, grad&gt;|" in text, "bars are bars"
    assert escaped("a *b* of `c_d` and e_ | f") == r"a \*b\* of ``c_d`` and e\_ \| f"


def test_parts_of_the_readme_are_found_or_missed_by_name(tmp_path):
    readme = "# t\n\nfirst\n\n## What came out\n\n| typed |\n| - |\n\n## Two commands\n\none\n\n## Last\n\nend\n"
    assert section(readme, "Two commands") == "## Two commands\n\none\n\n"
    assert section(readme, "Last", title=False) == "\nend\n"
    page = landing(readme)
    assert (
        "first" in page
        and "one" in page
        and "own lesion against others'" in page
        and "typed" not in page
    )
    with refused("README.md has no section 'Lost'"):
        section(readme, "Lost")
    text = "[a](figures/teaser.png) [b](results/glue-mini) [c](https://x.y) [d](#here) ![e](figures/teaser.png)"
    assert linked(text, tmp_path, Path()) == text.replace("[b](results/glue-mini)", "b")
    assert (tmp_path / "figures" / "teaser.png").is_file()


def test_a_published_site_links_to_its_notebooks_on_binder(tmp_path, capsys):
    readme = (ROOT / "README.md").read_text()
    link = "https://mybinder.org/v2/gh/some-one/fslib.x/HEAD?urlpath=lab/tree/notebooks"
    assert f"]({link})" in landing(readme, "some-one/fslib.x") and "mybinder" not in landing(readme)
    for wrong in ("fslib", "a/b/c", "a b/c", "https://github.com/a/b"):
        assert main(["site", "--out", str(tmp_path / "site"), "--repository", wrong]) == 2
        assert "give owner/name" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_a_folder_that_is_no_site_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("work")
    (tmp_path / "index.html").write_text("of somebody else")
    assert main(["site", "--out", str(tmp_path)]) == 2
    assert "is there and no site" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "work"


def test_the_workflows_do_what_a_reader_does():
    workflows = {
        path.stem: yaml.safe_load(path.read_text())
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
    }
    assert workflows.keys() == {"ci", "site"}
    steps = {
        name: [s.get("run") for s in next(iter(w["jobs"].values()))["steps"]]
        for name, w in workflows.items()
    }
    assert "bash .ci/run" in steps["ci"]
    build_it = 'fslib site --out site --repository "$GITHUB_REPOSITORY"'
    assert steps["site"][2:4] == ['pip install -r requirements.lock -e ".[site]"', build_it]


@pytest.mark.browser
def test_in_a_browser_no_page_complains_and_search_finds(tab, site, pages):
    for path in pages:
        tab.goto(path.as_uri())
    tab.goto((site / "search.html").as_uri() + "?q=dissociation")
    tab.wait_for_selector("#search-results li")
    assert tab.locator("#search-results li a", has_text="issociation").count()
    tab.goto((site / "explorer.html").as_uri())
    tab.frame_locator("iframe").locator(".head").first.wait_for()
    assert tab.frame_locator("iframe").locator("h2").inner_text().startswith("mini: minilm-l6")

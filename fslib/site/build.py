"""The site: notebooks, method, results and the explorer as pages that ask for nothing, built offline with Sphinx.

Nothing on it is written twice. Pages are gathered from the README, the notebooks, the docstrings and the tables of the
results; what the pages look like is in `fslib.site.pages`.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import yaml

from fslib.errors import FslibError
from fslib.claims import shown_p
from fslib.study.files import in_markdown, remove, scratch_folder, writing
from fslib.study.profiles import PROFILES, Profile
from fslib.study.provenance import ROOT
from fslib.study.store import distinct
from fslib.study.runner import find_notebooks, notebooks_in
from fslib.study.study import Study

MARK = ".fslib-site"  # in a folder that may be replaced
# the method in six pages: title, modules
METHOD = {
    "importance": ("Importance of heads", ("importance", "heads")),
    "pruning": ("Switching heads off", ("pruning", "lesions", "model.attention")),
    "dissociation": ("Dissociation and its intervals", ("iap", "scoring", "intervals")),
    "training": ("Multi-task training and its endings", ("training", "endings")),
    "iat": ("Important attention-head training", ("iat",)),
    "tasks": ("Similarity of tasks, and transfer", ("similarity", "finetuning")),
}
REPOSITORY = re.compile(r"[\w-]+/[\w.-]+", re.ASCII)
LINK = re.compile(r"(?P<before>!?\[[^\]]*\])\((?P<target>[^)\s]+)\)")


def build(out: Path, say: Callable[[str], None], repository: str = "") -> Path:
    """Write the site into a folder, in the place of the one that is there, and return its landing page.

    repository: owner/name on GitHub, for a link that opens the notebooks on Binder; "" for no such link.
    Raises FslibError for another form of it, outside a clone, where Sphinx is not installed, and for the first thing
    that Sphinx warns of.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file()):
        raise FslibError(f"{out} is there and no site: give a folder of its own, with --out")
    if repository and not REPOSITORY.fullmatch(repository):
        raise FslibError(f"{repository!r:.80} is no repository on GitHub: give owner/name")
    try:
        from fslib.site.pages import make_html
    except ImportError as error:
        raise FslibError(f'{error.name} is not installed: pip install -e ".[site]"') from error
    with scratch_folder() as scratch:
        source, made = scratch / "source", scratch / "site"
        say("gathering pages")
        gather(source, repository)
        say(
            f"building {sum(1 for path in source.rglob('*') if path.suffix in ('.md', '.ipynb'))} pages"
        )
        make_html(source, made)
        (made / MARK).write_text(
            "written by fslib site; the next one replaces this folder\n", encoding="utf-8"
        )
        with writing(out, instead="another folder with --out"):
            remove(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, out)
    return out / "index.html"


def gather(source: Path, repository: str = "") -> None:
    """Write all pages as Sphinx reads them, with the files that they show or link to; repository: as in `build`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {
        "index.md": landing(readme, repository),
        "explorer.md": explorer_page(),
        "benchmarks.md": f"# What it costs, and how often it is wrong\n\n"
        f"{section(readme, 'How a claim is decided, and how often that is wrong')}\n{section(readme, 'What it costs')}",
        "commands.md": f"# Use it\n\n{section(readme, 'The library')}\n{section(readme, 'Commands')}\n"
        f"{section(readme, 'More than one machine')}",
        "cite.md": f"# Cite\n\n{section(readme, 'Cite', title=False)}",
        "notebooks.md": f"# Notebooks\n\n{contents(f'notebooks/{p.stem}' for p in find_notebooks())}",
        "method.md": f"# The method\n\n{section(readme, 'Where to read the method', title=False)}\n"
        f"{contents(f'method/{name}' for name in METHOD)}",
        "profiles.md": f"# Profiles\n\n{contents(f'profiles/{name}' for name in PROFILES)}",
    }
    pages |= {
        f"method/{name}.md": method_page(title, modules)
        for name, (title, modules) in METHOD.items()
    }
    pages |= {f"profiles/{name}.md": profile_page(name) for name in PROFILES}
    for name, text in pages.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(linked(text, source, Path()), encoding="utf-8")
    for path in find_notebooks() + [path for name in PROFILES for path in executed_notebooks(name)]:
        place = source / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        linked(path.read_text(encoding="utf-8"), source, place.parent.relative_to(source))
        shutil.copy(path, place)
    shutil.copy(ROOT / "figures" / "explorer.html", source / "heads.html")


def section(readme: str, heading: str, *, title: bool = True) -> str:
    """Return a section of the README by its heading, with it or without. Raises FslibError if there is none."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", readme, re.M | re.S)
    if not found:
        raise FslibError(f"README.md has no section {heading!r}")
    return (f"## {heading}\n" if title else "") + found[1]


def contents(pages: Iterable[str], *, hidden: bool = False) -> str:
    """Return a table of contents of pages."""
    return (
        "```{toctree}\n"
        + (":hidden:\n" if hidden else ":maxdepth: 1\n")
        + "\n"
        + "\n".join(pages)
        + "\n```\n"
    )


def landing(readme: str, repository: str = "") -> str:
    """Return the landing page: what this is, what came out, and two commands; repository: as in `build`."""
    first = readme[: readme.index("\n## ")]
    # README has the claims typed, for readers of plain text
    came_out = re.sub(
        r"(?:^\|.*\n)+",
        lambda _: claims_of_profiles(),
        section(readme, "What came out"),
        count=1,
        flags=re.M,
    )
    pages = ("notebooks", "explorer", "method", "profiles", "commands", "benchmarks", "cite")
    commands = section(readme, "Two commands")
    if repository:  # a link, not Binder's badge, which is loaded from there
        notebooks = f"https://mybinder.org/v2/gh/{repository}/HEAD?urlpath=lab/tree/notebooks"
        commands += f"Without installing anything: [the notebooks on Binder]({notebooks})."
    return "\n\n".join((first, came_out, commands, contents(pages, hidden=True)))


def claims_of_profiles() -> str:
    """Return notebook 08's claims in Markdown, `mini` beside `evidence`, one row per number that a claim stands on."""
    saved = pd.read_csv(ROOT / "results" / "evidence" / "tables" / "08_profiles.csv")
    table = saved[["claim", "measured here"]]
    for name in ("mini", "evidence"):
        numbers = zip(*(saved[f"{name}: {what}"] for what in ("estimate", "p", "MDE")), strict=True)
        cells = [
            ", ".join((value, shown_p(p), f"{mde:.2g}")) if pd.notna(p) else value
            for value, p, mde in numbers
        ]
        table = table.assign(
            **{f"`{name}`": cells, f"`{name}`: verdict": saved[f"{name}: verdict"]}
        )
    return markdown(table)


def claims_table(profile: str) -> str:
    """Return notebook 08's table of claims of a profile in Markdown, "" where it has none."""
    path = ROOT / "results" / profile / "tables" / "08_claims.csv"
    if not path.is_file():
        return ""
    table = pd.read_csv(path).drop(columns="the paper says")
    table.insert(1, "verdict", table.pop("verdict"))  # a narrow page shows the first columns
    return markdown(table)


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """Return a table in Markdown, numbers with so many digits, nothing where there is none."""
    shown = table.map(lambda x: f"{x:.{digits}g}" if isinstance(x, float) else in_markdown(x))
    return (
        str(shown.where(table.notna(), "").to_markdown(index=False, disable_numparse=True)) + "\n"
    )


def explorer_page() -> str:
    """Return the page that holds the explorer of the reference results."""
    return (
        "# Look at heads\n\nOne model of the reference results (`mini`), from its records. "
        '<a href="heads.html">By itself</a>; made by `fslib explore`.\n\n'
        '<iframe src="heads.html" title="the head explorer" style="width: 100%; height: 60rem; border: 0"></iframe>\n'
    )


def method_page(title: str, modules: Iterable[str]) -> str:
    """Return a page that is made of the docstrings of modules."""
    parts = [
        f".. automodule:: fslib.{name}\n   :members:\n   :member-order: bysource\n"
        for name in modules
    ]
    return f"# {title}\n\n" + "\n".join(
        f"## fslib.{m}\n\n```{{eval-rst}}\n{p}```\n" for m, p in zip(modules, parts, strict=True)
    )


def profile_page(name: str) -> str:
    """Return a page of one profile: its settings, and what came out where it has results."""
    profile = Profile(**PROFILES[name])
    settings = profile.model_dump(mode="json", exclude_unset=True)
    yaml_text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100)
    parts = [
        f"# {name}\n",
        f"`fslib run --profile {name}` with these settings (the others are as everywhere):\n",
    ]
    parts += [f"```yaml\n{yaml_text}```\n"]
    if table := claims_table(name):
        parts += ["## Claims\n", table]
    if executed := executed_notebooks(name):
        parts += [
            "## Notebooks\n",
            contents(f"/{path.relative_to(ROOT).with_suffix('')}" for path in executed),
        ]
    figures = sorted((ROOT / "results" / name / "figures").glob("*.png"))
    parts += ["## Figures\n"] if figures else ["No results of this profile are kept here.\n"]
    parts += [f"### {p.stem}\n\n![{p.stem}](/results/{name}/figures/{p.name})\n" for p in figures]
    return "\n".join(parts)


def executed_notebooks(profile: str) -> list[Path]:
    """Return the notebooks of a profile as they were executed; none of `mini`, whose are those of `notebooks`."""
    return [] if profile == "mini" else notebooks_in(ROOT / "results" / profile / "notebooks")


def linked(text: str, source: Path, folder: Path) -> str:
    """Return a page whose links work: what they point to in the repository is put beside it, other files lose them.

    folder: where in the repository, and among the sources, the page stands. A target with a slash before it is seen
    from the top.
    """

    def kept(found: re.Match[str]) -> str:
        target = found["target"]
        if re.match(r"https?:|#|mailto:|data:", target):
            return found[0]
        path = (ROOT / (target[1:] if target.startswith("/") else folder / target)).resolve()
        if not path.is_relative_to(ROOT):
            return found[0]
        place = source / path.relative_to(ROOT)
        if (
            path.is_file()
            and path.suffix != ".md"
            and "notebooks" not in path.relative_to(ROOT).parts[:1]
        ):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        elif path.is_dir():
            return found["before"].strip("![]")
        return found[0]

    return LINK.sub(kept, text)

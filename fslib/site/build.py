"""The site: README, notebooks, method, results and the explorer as pages, built offline.

Nothing on it is written twice: pages are gathered from README, notebooks, docstrings and results. A
reader's browser loads nothing from elsewhere. Sphinx's settings are in `fslib.site.conf`.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import yaml

from fslib.errors import FslibError
from fslib.study.files import remove, scratch_folder, write_text, writing
from fslib.study.profiles import PROFILES, make_profile
from fslib.study.provenance import ROOT
from fslib.study.runner import find_notebooks, notebooks_in

MARK = ".fslib-site"  # in a folder that may be replaced
PAGES = ("notebooks", "explorer", "method", "profiles")
# What README and notebooks link to, beside the results of profiles.
FILES = ("CITATION.cff", "LICENSE", "environment.yml", "pyproject.toml", "requirements.lock")
FOLDERS = ("figures", "fslib", "notebooks", "tests")
LEFT_OUT = shutil.ignore_patterns("runs", "checkpoints", "__pycache__", ".*")
# the method in six pages: title, modules
METHOD = {
    "importance": ("Importance of heads", ("importance", "heads")),
    "pruning": ("Switching heads off", ("pruning", "lesions", "model.attention")),
    "dissociation": ("Dissociation and its intervals", ("iap", "scoring", "intervals")),
    "training": ("Multi-task training and its endings", ("training", "endings")),
    "iat": ("Important attention-head training", ("iat",)),
    "tasks": ("Similarity of tasks, and transfer", ("similarity", "finetuning")),
}
MODULE = "## fslib.NAME\n\n```{eval-rst}\n.. automodule:: fslib.NAME\n   :members:\n```\n"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([\w./-]+)\)")
EXPLORER = """# Look at heads

One model of `mini`, from its records, by `fslib explore`. <a href="heads.html">By itself</a>.

<iframe src="heads.html" title="head explorer" width="100%" height="960" frameborder="0"></iframe>
"""


def write_site(out: Path, say: Callable[[str], None], repository: str = "") -> Path:
    """Write the site into a folder, in the place of an older one, and return its landing page.

    Args:
        out: The folder.
        say: Is told what is being done.
        repository: owner/name on GitHub, for a link that opens the notebooks on Binder; "": none.

    Raises:
        FslibError: For a folder that holds something else, outside a clone, where Sphinx is not
            installed, and for the first thing that Sphinx warns of.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file()):
        raise FslibError(f"{out} is there and no site: give a folder of its own, with --out")
    with scratch_folder() as scratch:
        say("gathering pages")
        gather(scratch / "source", repository)
        say("building them")
        make_html(scratch / "source", scratch / "site")
        shutil.copy(ROOT / "figures" / "explorer.html", scratch / "site" / "heads.html")
        with writing(out, instead="another folder with --out"):
            remove(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(scratch / "site", out)
    return out / "index.html"


def gather(source: Path, repository: str = "") -> None:
    """Write all pages as Sphinx reads them, beside the folders of the repository.

    Args:
        source: Where to write them.
        repository: As in `write_site`.
    """
    notebooks = find_notebooks()
    on_binder = f"https://mybinder.org/v2/gh/{repository}/HEAD?urlpath=lab/tree/notebooks"
    binder = f"[Run them on Binder]({on_binder}), without installing anything.\n\n"
    pages = {
        "index": f"{landing()}\n\n{contents(PAGES, 'hidden:')}",
        "explorer": EXPLORER,
        "notebooks": f"# Notebooks\n\n{binder if repository else ''}"
        + contents(f"notebooks/{path.stem}" for path in notebooks),
        "method": "# The method\n\n" + contents(f"method/{name}" for name in METHOD),
        "profiles": "# Profiles\n\n" + contents(f"profiles/{name}" for name in PROFILES),
    }
    pages |= {f"method/{name}": method_page(*what) for name, what in METHOD.items()}
    pages |= {f"profiles/{name}": profile_page(name) for name in PROFILES}
    for name in (*FOLDERS, *(f"results/{profile}" for profile in PROFILES)):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, ignore=LEFT_OUT)
    for name in (*FILES, "results/architectures.csv"):
        shutil.copy(ROOT / name, source / name)
    for name, text in pages.items():
        write_text(source / f"{name}.md", text)


def make_html(source: Path, out: Path) -> None:
    """Build the pages of a folder.

    Raises:
        FslibError: Where Sphinx is not installed, and for its first warning: a site has none. How
            docstrings are written is another matter.
    """
    try:
        from sphinx.cmd.build import build_main
    except ImportError as error:
        raise FslibError(f'{error.name} is not installed: pip install -e ".[site]"') from error
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")  # two builds are the same bytes
    words = ["-q", "--no-color", "-c", str(Path(__file__).parent)]
    words += ["-d", str(out.with_name("doctrees")), str(source), str(out)]
    with redirect_stderr(StringIO()) as stream:
        failed = build_main(words)
    told = stream.getvalue()
    warnings = re.findall(r"^(?!.*docstring of ).*(?:WARNING|ERROR|CRITICAL): .*", told, re.M)
    if failed or warnings:
        what = " ".join(warnings or told.split())[:1000]
        raise FslibError(f"the site is not built with warnings: {what}")
    (out / ".buildinfo").unlink()  # differs when a process builds twice
    (out / MARK).write_text("written by fslib site; the next one replaces this folder\n")


def landing() -> str:
    """Return README; a link to a folder, which has no page, is left out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return LINK.sub(lambda link: link[1] if (ROOT / link[2]).is_dir() else link[0], text)


def contents(pages: Iterable[str], option: str = "maxdepth: 1") -> str:
    """Return a table of contents of pages."""
    return "\n".join(["```{toctree}", f":{option}", "", *pages, "```", ""])


def method_page(title: str, modules: Iterable[str]) -> str:
    """Return a page that is made of the docstrings of modules."""
    parts = [MODULE.replace("NAME", name) for name in modules]
    return "\n".join([f"# {title}\n", *parts])


def profile_page(name: str) -> str:
    """Return a page of a profile: its settings, and what came out where it has results."""
    settings = make_profile(name, {}).model_dump(mode="json", exclude_unset=True)
    in_yaml = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100)
    command = f"`fslib run --profile {name}` with these settings (the others are as everywhere):"
    parts = [f"# {name}\n", command, f"```yaml\n{in_yaml}```\n"]
    results = ROOT / "results" / name
    if (claims := results / "tables" / "08_claims.md").is_file():
        parts += ["## Claims\n", claims.read_text(encoding="utf-8")]
    executed = notebooks_in(results / "notebooks")
    if executed and name != "mini":  # whose notebooks are those of the page "notebooks"
        pages = (f"/results/{name}/notebooks/{path.stem}" for path in executed)
        parts += ["## Notebooks\n", contents(pages)]
    figures = sorted((results / "figures").glob("*.png"))
    parts += ["## Figures\n"] if figures else ["No results of this profile are kept here.\n"]
    parts += [f"### {p.stem}\n\n![{p.stem}](/results/{name}/figures/{p.name})\n" for p in figures]
    return "\n".join(parts)

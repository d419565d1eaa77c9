"""How the site's pages are made: Sphinx without a network, formulas as MathML, docstrings as they are written here."""

import inspect
import os
import re
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

from fslib.errors import FslibError, first_line

SETTINGS: dict[str, Any] = {
    "project": "fslib",
    "author": "the fslib authors",
    "release": version("fslib"),
    "extensions": ["sphinx.ext.autodoc", "myst_nb", __name__],
    "html_theme": "pydata_sphinx_theme",
    "html_title": "fslib",
    "html_math_renderer": "mathml",
    "html_copy_source": False,
    "html_show_search_summary": False,  # fetched page by page, which a browser refuses of files
    "html_context": {"default_mode": "auto"},
    "html_show_sourcelink": False,
    "html_show_copyright": False,
    "html_theme_options": {
        "show_toc_level": 2,
        "navbar_align": "left",
        "secondary_sidebar_items": ["page-toc"],
        "footer_start": [],
        "footer_end": [],
    },
    "html_extra_path": ["heads.html"],
    "exclude_patterns": ["figures", "fslib", "tests"],
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 3,
    "autodoc_typehints": "none",
    "autodoc_class_signature": "separated",
    "default_role": "code",
    # headings of a page that is made of parts; what a second build in one process registers again
    "suppress_warnings": ["myst.header", "app.add_node", "app.add_directive", "app.add_role"],
}


def make_html(source: Path, out: Path) -> None:
    """Build the pages of a folder of sources. Raises FslibError for the first warning: a site has none."""
    warnings, noise = StringIO(), StringIO()
    os.environ.setdefault(
        "SOURCE_DATE_EPOCH", "0"
    )  # no time of building anywhere: two builds are the same bytes
    try:
        app = Sphinx(
            str(source),
            None,
            str(out),
            str(source.parent / "doctrees"),
            "html",
            confoverrides=SETTINGS,
            status=noise,
            warning=warnings,
            freshenv=True,
        )
        app.build(force_all=True)
    except SphinxError as error:
        raise FslibError(f"the site cannot be built: {first_line(error)}") from error
    told = re.sub(r"\x1b\[[\d;]*m", "", warnings.getvalue()).strip()
    if told or app.statuscode:
        raise FslibError(f"the site is not built with warnings: {told[:1000]}")
    for left in (
        ".buildinfo",
        ".buildinfo.bak",
        "objects.inv",
    ):  # for other builds, of which there are none
        (out / left).unlink(missing_ok=True)
    (out / "_sources").rmdir()


def setup(app: Sphinx) -> dict[str, bool]:
    """Let Sphinx write formulas as MathML and read the package's docstrings."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.connect("autodoc-process-docstring", _as_rst)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": False, "parallel_write_safe": False}


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _display(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def _skip(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what a module only imports, and NamedTuple's fields, which its docstring explains."""
    return (
        True
        if what == "class" and type(member).__name__ in ("_tuplegetter", "member_descriptor")
        else None
    )


def _as_rst(app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring: lines `word: explanation` become a list, the rest paragraphs."""
    text = inspect.cleandoc("\n".join(lines))
    made: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        rows = paragraph.split("\n")
        if all(row.startswith("    ") for row in rows):  # a formula
            made += [".. code-block:: text", "", *rows, ""]
            continue
        entries: list[str] = []
        for row in rows:
            is_entry = re.match(r"[A-Za-z_][\w, *]*(\[\w+\])?: ", row)
            if is_entry or not entries or (row.startswith("- ")):
                entries.append(row.strip())
            else:
                entries[-1] += " " + row.strip()
        for entry in entries:
            named = re.match(r"([a-z_][\w, ]*): (.*)", entry)
            if named and len(entries) > 1 and len(named[1].split()) <= 6:
                made += [f"* **{escaped(named[1])}**: {escaped(named[2])}", ""]
            else:
                made += [
                    f"* {escaped(entry[2:])}" if entry.startswith("- ") else escaped(entry),
                    "",
                ]
    lines[:] = made


def escaped(text: str) -> str:
    """Return a text in which nothing but code in backticks means more than it says."""
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(
        f"``{p.strip('`')}``" if i % 2 else re.sub(r"([\\*|_`])", r"\\\1", p)
        for i, p in enumerate(parts)
    )

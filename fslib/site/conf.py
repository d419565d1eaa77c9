"""Sphinx's settings: no network, formulas as MathML, docstrings in Google style."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

project = html_title = "fslib"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
# The folders of the repository stand among the sources, so that links to their files work.
include_patterns = ["*.md", "*/*.md", "notebooks/*.ipynb", "results/*/notebooks/*.ipynb"]
exclude_patterns = ["figures", "fslib", "tests", "results/mini/notebooks"]
default_role = "code"
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
viewcode_follow_imported_members = False  # methods of named tuples are of no module
html_theme = "pydata_sphinx_theme"
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = html_show_copyright = False
html_show_search_summary = False  # fetched page by page, which a browser refuses of files
html_context = {"default_mode": "auto"}
html_theme_options = {"show_toc_level": 2, "navbar_align": "left", "footer_end": []}
CODE = re.compile(r"(`+[^`]+`+)|([*|\\]|_(?!\w))")


def setup(app: Sphinx) -> None:
    """Let Sphinx write formulas as MathML and read docstrings as plain text."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    app.connect("autodoc-process-docstring", _as_plain_text, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", _skip)


def _formula(translator: Any, node: nodes.Node) -> None:
    is_block = isinstance(node, nodes.math_block)
    text = convert(node.astext(), display="block" if is_block else "inline")
    translator.body.append(f'<div class="formula">{text}</div>' if is_block else text)
    raise nodes.SkipNode


def _skip(app: Sphinx, what: str, name: str, member: Any, *options: Any) -> bool | None:
    """Leave out the fields of a NamedTuple, which its docstring explains."""
    return True if type(member).__name__ == "_tuplegetter" else None


def _as_plain_text(app: Any, what: str, name: str, of: Any, how: Any, lines: list[str]) -> None:
    """Make formulas of indented paragraphs; elsewhere only code in backticks has a meaning."""
    made = []
    for paragraph in re.split(r"\n(?: *\n)+", "\n".join(lines).rstrip()):
        if paragraph.startswith("    "):
            made += [".. code-block:: text", "", *paragraph.split("\n"), ""]
        else:
            escaped = CODE.sub(lambda found: found[1] or f"\\{found[2]}", paragraph)
            made += [*escaped.split("\n"), ""]
    lines[:] = made

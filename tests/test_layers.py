"""The house: which module may import which, held by reading every import, those inside functions too."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fslib"
# from the ground up; what stands right under fslib/ is the method
LAYERS = ("ground", "data", "model", "method", "study", "questions")
GROUND = {"fslib.errors", "fslib.progress"}
ABOVE_THE_METHOD = {
    "matplotlib",
    "seaborn",
    "pydantic",
    "papermill",
    "IPython",
    "nbformat",
    "nbclient",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> str:
    if module in GROUND:
        return "ground"
    folder = module.split(".")[1]
    return folder if folder in LAYERS else "method"


def targets(tree: ast.AST, module: str) -> Iterator[str]:
    """Every module that a syntax tree imports: `from fslib import plot as plots` is the module fslib.plot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: import by the whole name"
            assert node.module
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (i if i in MODULES else node.module for i in inner)


IMPORTS = {m: sorted(set(targets(ast.parse(path.read_text()), m))) for m, path in MODULES.items()}
OURS = {
    m: [t for t in found if t.split(".")[0] == "fslib"]
    for m, found in IMPORTS.items()
    if m != "fslib"
}
EVERY = pytest.mark.parametrize("module", OURS)


def test_the_house_stands_as_it_was_drawn():
    assert {layer(m) for m in OURS} == set(LAYERS)
    method = {m.removeprefix("fslib.") for m in OURS if layer(m) == "method"}
    assert method == {
        "heads", "scoring", "intervals", "dissociation", "evaluation", "importance", "pruning", "lesions", "endings",
        "iat", "training", "similarity", "transfer",
    }  # fmt: skip


@EVERY
def test_a_module_imports_from_its_own_layer_or_a_lower_one(module):
    at = LAYERS.index(layer(module))
    assert "fslib" not in OURS[module], "names come from the module that defines them"
    assert [t for t in OURS[module] if LAYERS.index(layer(t)) > at] == []


def test_no_circle():
    left = {m: set(found) - {m} for m, found in OURS.items()}
    while ready := [m for m, found in left.items() if not found & left.keys()]:
        for module in ready:
            del left[module]
    assert left == {}


@EVERY
def test_no_question_imports_another_but_the_last(module):
    others = [t for t in OURS[module] if layer(t) == "questions"]
    assert (
        not others
        or module in ("fslib.questions", "fslib.questions.q08_claims")
        or layer(module) != "questions"
    )


@EVERY
def test_below_the_study_nothing_is_drawn_checked_or_executed(module):
    if LAYERS.index(layer(module)) < LAYERS.index("study"):
        assert not {t.split(".")[0] for t in IMPORTS[module]} & ABOVE_THE_METHOD


def test_heads_need_numpy_alone():
    others = {t.split(".")[0] for t in IMPORTS["fslib.heads"]} - set(sys.stdlib_module_names)
    assert others == {"numpy", "jaxtyping", "fslib"} and OURS["fslib.heads"] == ["fslib.errors"]


def test_the_test_sees_every_form_of_import():
    code = "import fslib.plot\ndef f():\n    from fslib.study import runner, Nothing\n    import papermill.x as p\n"
    assert list(targets(ast.parse(code), "m")) == [
        "fslib.plot", "fslib.study.runner", "fslib.study", "papermill.x"
    ]  # fmt: skip


def test_the_method_loads_no_plots_and_the_study_is_there_when_it_is_asked_for():
    code = (
        "import sys, fslib\n"
        "loaded = {'matplotlib', 'seaborn', 'papermill', 'pydantic'} & sys.modules.keys()\n"
        "assert not loaded, loaded\n"
        "assert all(getattr(fslib, name) is not None for name in fslib.__all__)\n"
        "assert len(fslib.Study('smoke').plan('03')) == 6\n"
        "assert not hasattr(fslib, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_readme_counts_the_lines_of_the_method():
    table = re.findall(
        r"^\| (\[\w+\.py\]\(.*?\)) \| (\d+) \|", (ROOT / "README.md").read_text(), re.M
    )
    assert len(table) == 10
    for links, said in table:
        lines = sum(
            len((ROOT / path).read_text().splitlines()) for path in re.findall(r"\((.*?)\)", links)
        )
        assert abs(lines - int(said)) <= 0.05 * lines, (
            f"{links}: README says {said} lines, it has {lines}"
        )


def test_the_readme_draws_the_house_as_it_is():
    drawn = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    rows = [line.split() for line in drawn.splitlines()]
    house = {row[0].removesuffix("/"): row[1:] for row in rows if row[0].endswith("/")} | {
        "ground": rows[-1]
    }
    assert list(house) == ["questions", "study", "fslib", "model", "data", "ground"]
    house["method"] = house.pop("fslib")
    for name, drawn_here in house.items():
        inside = {
            m.split(".")[-1]
            for m in OURS
            if layer(m) == name and m not in {f"fslib.{name}" for name in LAYERS}
        }
        assert set(drawn_here) == inside

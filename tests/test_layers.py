"""The house: which module may import which; every import is read, those in functions too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fslib

ROOT = Path(__file__).resolve().parent.parent
# from the ground up; what stands right under fslib/ is the method
LAYERS = {
    "errors": 0, "progress": 0, "data": 1, "model": 2, "method": 3, "study": 4, "questions": 5,
    "explorer": 6, "site": 6, "cli": 7,
}  # fmt: skip
NOT_BELOW_STUDY = {"pydantic", "papermill", "nbformat", "nbclient", "IPython"}
DRAWING = {"matplotlib", "seaborn"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted((ROOT / "fslib").rglob("*.py"))}


def layer(module: str) -> str:
    room = module.split(".")[1]
    return room if room in LAYERS else "method"


def imported(source: str) -> Iterator[str]:
    """Every module that code imports: `from fslib import plot as p` is fslib.plot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, "import by the whole name"
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (i if i in MODULES else node.module for i in inner)


IMPORTS = {m: set(imported(path.read_text())) for m, path in MODULES.items() if m != "fslib"}


def test_a_module_imports_from_its_own_layer_or_a_lower_one_and_from_no_circle():
    ours = {m: {t for t in found if t.split(".")[0] == "fslib"} for m, found in IMPORTS.items()}
    assert {layer(m) for m in ours} == LAYERS.keys()
    for module, found in ours.items():
        at = LAYERS[layer(module)]
        # the package itself is a table of names; its version is asked for by name
        assert not [t for t in found if t == "fslib" or LAYERS[layer(t)] > at], module
    left = {m: found - {m} for m, found in ours.items()}
    while ready := [m for m, found in left.items() if not found & left.keys()]:
        for module in ready:
            del left[module]
    assert left == {}, "a circle"


def test_below_the_study_nothing_is_checked_or_executed_and_only_plot_draws():
    for module, found in IMPORTS.items():
        others = {t.split(".")[0] for t in found}
        if LAYERS[layer(module)] < LAYERS["study"]:
            assert not others & NOT_BELOW_STUDY, module
            assert module == "fslib.plot" or not others & DRAWING, module
    heads = {t.split(".")[0] for t in IMPORTS["fslib.heads"]} - set(sys.stdlib_module_names)
    assert heads == {"numpy", "jaxtyping", "fslib"}


def test_no_module_bears_the_name_of_a_public_function():
    modules = {m.removeprefix("fslib.") for m in IMPORTS}
    assert not {name for name in fslib.__all__ if name in modules} - {"similarity"}


def test_the_package_is_lazy_and_everything_is_there_when_it_is_asked_for():
    code = (
        "import sys, fslib\n"
        "heavy = {'torch', 'matplotlib', 'pandas', 'pydantic', 'papermill'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert all(getattr(fslib, name) is not None for name in fslib.__all__)\n"
        "assert not hasattr(fslib, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

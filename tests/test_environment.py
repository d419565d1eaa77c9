"""Lock, pyproject.toml and environment.yml agree; the code is installed whole, and checked."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fslib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, str]:
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    ]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(pins), (
        f"not an exact pin: {[line for line, pin in zip(lines, pins, strict=True) if not pin]}"
    )
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


OPTIONAL = PROJECT["optional-dependencies"]


def test_every_direct_dependency_is_locked_within_its_bounds():
    versions = locked()
    for group in (PROJECT["dependencies"], *OPTIONAL.values()):
        for needed in map(Requirement, group):
            pin = versions[canonicalize_name(needed.name)]
            assert needed.specifier.contains(pin), needed


def imported(tree: ast.AST) -> set[str]:
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    return {name.split(".")[0] for name in names}


def test_what_the_package_imports_is_among_its_dependencies():
    wanted = [*PROJECT["dependencies"], *OPTIONAL["cluster"], *OPTIONAL["site"]]
    declared = {canonicalize_name(Requirement(text).name) for text in wanted}
    provided_by = packages_distributions()
    for path in (ROOT / "fslib").rglob("*.py"):
        for name in imported(ast.parse(path.read_text())) - set(sys.stdlib_module_names):
            makers = {canonicalize_name(d) for d in provided_by.get(name, [])}
            assert name == "fslib" or makers & declared, f"{name}, in {path}"


def test_no_function_is_longer_than_a_screen():
    """Its body, without the docstring."""
    for path in (ROOT / "fslib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                lines = (node.end_lineno or 0) - first.lineno + 1
                assert lines <= 60, f"{node.name} in {path}: {lines} lines"


def test_the_version_is_said_once():
    assert fslib.__version__ == PROJECT["version"]


def test_the_lock_leaves_the_gpu_packages_to_torch():
    assert "torch" in locked()
    assert not [name for name in locked() if name.startswith(("nvidia", "cuda", "triton"))]


def test_what_is_installed_is_what_is_locked():
    differing = {
        name: (pin, version(name))
        for name, pin in locked().items()
        if version(name).split("+")[0] != pin
    }
    assert not differing


def test_the_conda_environment_reads_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.lock", "-e .[test]"]
    assert [re.split("[=<>]", d)[0] for d in conda] == ["python", "pip"], (
        "everything else comes from the lock"
    )
    (python,) = (d.split("=")[1] for d in conda if d.startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_linters_and_types(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def isolation() -> list[str]:
    """Let pip build with the setuptools that is here, if pyproject.toml asks for it."""
    text = (ROOT / "pyproject.toml").read_text()
    (needed,) = map(Requirement, tomllib.loads(text)["build-system"]["requires"])
    try:
        here = needed.specifier.contains(version(needed.name))
    except PackageNotFoundError:
        here = False
    return ["--no-build-isolation"] if here else []


def contents(folder: Path) -> set[str]:
    """What the package is made of: code, and what lies beside it."""
    paths = (path for path in (folder / "fslib").rglob("*") if path.is_file())
    return {str(p.relative_to(folder)) for p in paths if "__pycache__" not in p.parts}


def test_what_pip_installs_is_the_whole_package(tmp_path):
    """Installed from a copy, for a build leaves files beside its sources; used away from both."""
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    elsewhere.mkdir()
    shutil.copytree(ROOT / "fslib", source / "fslib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *isolation()]
    run = {"capture_output": True, "text": True}
    done = subprocess.run([*pip, "--target", str(target), "."], cwd=source, **run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(target) == contents(ROOT)
    endings = {Path(name).suffix for name in contents(target)}
    assert endings == {".py", ".yaml", ".js", ".css", ".html"}

    code = "import fslib; print(fslib.__file__, len(fslib.Study('smoke').plan('03')))"
    run |= {"cwd": elsewhere, "env": os.environ | {"PYTHONPATH": str(target)}}
    used = subprocess.run([sys.executable, "-c", code], **run)
    assert used.stdout.split() == [str(target / "fslib" / "__init__.py"), "6"], used.stderr
    command = subprocess.run([target / "bin" / "fslib", "--help"], **run)
    assert command.returncode == 0 and "usage: fslib" in command.stdout.lower(), command.stderr

"""Lock, pyproject.toml and environment.yml agree; the code is installed whole, and checked."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fslib

ROOT = Path(__file__).resolve().parent.parent
TABLE = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = TABLE["project"]


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): pin for name, pin in pins}


OPTIONAL = PROJECT["optional-dependencies"]


def test_every_direct_dependency_is_locked_within_its_bounds_and_installed():
    versions = locked()
    for needed in map(Requirement, [*PROJECT["dependencies"], *chain(*OPTIONAL.values())]):
        assert needed.specifier.contains(versions[canonicalize_name(needed.name)]), needed
    assert {name: version(name).split("+")[0] for name in versions} == versions
    # the GPU packages are left to torch
    assert not [name for name in versions if name.startswith(("nvidia", "cuda", "triton"))]
    assert fslib.__version__ == PROJECT["version"]


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


def test_the_conda_environment_reads_the_same_lock():
    """And nothing else."""
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip == {"pip": ["-r requirements.lock", "-e .[test]"]}
    assert [re.split("[=<>]", d)[0] for d in conda] == ["python", "pip"]
    python = conda[0].split("=")[1]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_linters_and_types(command):
    words = [sys.executable, "-m", *command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def contents(folder: Path) -> set[str]:
    """What the package is made of: code, and what lies beside it."""
    paths = (path for path in (folder / "fslib").rglob("*") if path.is_file())
    return {str(p.relative_to(folder)) for p in paths if "__pycache__" not in p.parts}


def test_what_pip_installs_is_the_whole_package(tmp_path):
    """Installed from a copy, for a build leaves files beside its sources; used away from both."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "fslib", source / "fslib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    (needed,) = map(Requirement, TABLE["build-system"]["requires"])
    here = needed.name in packages_distributions()
    if here and needed.specifier.contains(version(needed.name)):
        pip.append("--no-build-isolation")
    run = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run([*pip, "--target", str(target), str(source)], **run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(target) == contents(ROOT)
    code = "import fslib; print(fslib.__file__, len(fslib.Study('smoke').plan('03')))"
    run |= {"env": os.environ | {"PYTHONPATH": str(target)}}
    used = subprocess.run([sys.executable, "-c", code], **run)
    assert used.stdout.split() == [str(target / "fslib" / "__init__.py"), "6"], used.stderr
    command = subprocess.run([target / "bin" / "fslib", "--help"], **run)
    assert command.returncode == 0 and "usage: fslib" in command.stdout.lower(), command.stderr

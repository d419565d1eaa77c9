"""The lock, pyproject.toml and environment.yml describe one environment; the code is installed whole, and checked."""

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


@pytest.mark.parametrize("group", ["dependencies", *PROJECT["optional-dependencies"]])
def test_every_direct_dependency_is_locked_within_its_bounds(group):
    wanted = PROJECT[group] if group == "dependencies" else PROJECT["optional-dependencies"][group]
    versions = locked()
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def imported(tree: ast.AST) -> set[str]:
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    return {name.split(".")[0] for name in names}


def test_what_the_package_imports_is_among_its_dependencies():
    wanted = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["cluster"],
        *PROJECT["optional-dependencies"]["site"],
    ]
    declared = {canonicalize_name(Requirement(text).name) for text in wanted}
    provided_by = packages_distributions()
    for path in [*(ROOT / "fslib").rglob("*.py"), ROOT / "fslib_command.py"]:
        others = imported(ast.parse(path.read_text())) - set(sys.stdlib_module_names) - {"fslib"}
        missing = {
            n for n in others if not {canonicalize_name(d) for d in provided_by[n]} & declared
        }
        assert not missing, path


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
    """The option that lets pip build with the setuptools that is here, if it is the one pyproject.toml asks for."""
    (needed,) = map(
        Requirement,
        tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"],
    )
    try:
        return ["--no-build-isolation"] if needed.specifier.contains(version(needed.name)) else []
    except PackageNotFoundError:
        return []


def modules(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in (folder / "fslib").rglob("*.py")}


def test_what_pip_installs_is_the_whole_package(tmp_path):
    """Installed from a copy, for a build leaves files beside its sources; used away from both."""
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    elsewhere.mkdir()
    shutil.copytree(ROOT / "fslib", source / "fslib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "fslib_command.py"):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        *isolation(),
        "--target",
        str(target),
        ".",
    ]
    done = subprocess.run(pip, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    assert modules(target) == modules(ROOT)
    folders = {path.parent.relative_to(target) for path in (target / "fslib").rglob("*.py")}
    assert {str(folder) for folder in folders} == {
        "fslib",
        *(f"fslib/{n}" for n in ("data", "model", "study", "questions")),
    }
    code = "import fslib.questions; print(fslib.__file__, fslib.questions.__file__, len(fslib.Study('smoke').plan('03')))"
    environment = os.environ | {"PYTHONPATH": str(target)}
    used = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    package = target / "fslib"
    assert used.stdout.split() == [
        str(package / "__init__.py"),
        str(package / "questions" / "__init__.py"),
        "6",
    ]
    command = subprocess.run(
        [target / "bin" / "fslib", "--help"], cwd=elsewhere, env=environment, capture_output=True
    )
    assert command.returncode == 0 and b"usage: fslib" in command.stdout

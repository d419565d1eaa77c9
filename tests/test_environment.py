"""The lock, pyproject.toml and environment.yml describe one environment; the code passes its own checks."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(pins), f"not an exact pin: {[line for line, pin in zip(lines, pins, strict=True) if not pin]}"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


@pytest.mark.parametrize("group", ["dependencies", *PROJECT["optional-dependencies"]])
def test_every_direct_dependency_is_locked_within_its_bounds(group):
    wanted = PROJECT[group] if group == "dependencies" else PROJECT["optional-dependencies"][group]
    versions = locked()
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def test_the_lock_leaves_the_gpu_packages_to_torch():
    assert "torch" in locked()
    assert not [name for name in locked() if name.startswith(("nvidia", "cuda", "triton"))]


def test_what_is_installed_is_what_is_locked():
    from importlib.metadata import version

    differing = {name: (pin, version(name)) for name, pin in locked().items() if version(name).split("+")[0] != pin}
    assert not differing


def test_the_conda_environment_reads_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.lock", "-e .[test]"]
    assert [re.split("[=<>]", d)[0] for d in conda] == ["python", "pip"], "everything else comes from the lock"
    (python,) = (d.split("=")[1] for d in conda if d.startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_linters_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_is_long():
    longest = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "fslib").glob("*.py")}
    assert max(longest.values()) <= 400, longest

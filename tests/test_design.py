"""The design of the profile `evidence` was committed before its first record: no result chose what decides."""

import ast
import json
import subprocess
from pathlib import Path

import pytest

from fslib.study.profiles import make_profile

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "results" / "evidence"
RECORDS = sorted((FOLDER / "runs").glob("*.json"))
# the commit of the design, and its settings with all defaults, as they were understood then
DESIGN = json.loads((FOLDER / "design.json").read_text())
# Constants, the verdict, its correction and the gates. Not the analysis as a whole: mistakes in it may be mended.
RULES = (
    "SESOI", "SIGNIFICANCE", "LEAST_SEEDS", "LEAST_TASKS", "LEAST_CHANGED",
    "verdict", "holm", "decided", "gate_half", "score_half", "above_best_constant", "learned",
)  # fmt: skip


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(
            f"git {' '.join(words)}: {done.stderr.strip()} (the history is needed: clone without --depth)"
        )
    return done.stdout


def parts(source: str) -> dict[str, str]:
    """{name: code} of a module's assignments and of all functions, without docstrings and comments."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node):
                node.body = node.body[1:]
            found[node.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            (target,) = node.targets if isinstance(node, ast.Assign) else (node.target,)
            found[ast.unparse(target)] = ast.unparse(node.value)
    return found


def settings(source: str) -> str:
    """The settings of the profile as they are written in `PROFILES`, without comments."""
    written = ast.parse(parts(source)["PROFILES"], mode="eval").body
    assert isinstance(written, ast.Dict)
    (found,) = (
        v
        for k, v in zip(written.keys, written.values, strict=True)
        if ast.literal_eval(k) == "evidence"
    )
    return ast.unparse(found)


def test_every_record_was_computed_on_the_design_or_after_it():
    commits = {json.loads(path.read_text())["commit"] for path in RECORDS}
    assert commits, "there are records"
    for commit in commits:
        assert commit == git("rev-parse", f"{commit}^{{commit}}").strip(), (
            "no record is of code that was not committed"
        )
        assert git("merge-base", DESIGN["commit"], commit).strip() == DESIGN["commit"]


def test_settings_are_those_of_the_design():
    path = "fslib/study/profiles.py"
    assert settings(git("show", f"{DESIGN['commit']}:{path}")) == settings(
        (ROOT / path).read_text()
    )
    now = make_profile("evidence", {}).model_dump(mode="json")
    assert {name: now[name] for name in DESIGN["settings"]} == DESIGN["settings"], (
        "defaults that the profile leaves"
    )


def test_rules_are_those_of_the_design_which_notebook_08_shows():
    path = "fslib/study/evidence.py"
    then, now = parts(git("show", f"{DESIGN['commit']}:{path}")), parts((ROOT / path).read_text())
    assert {name: now[name] for name in RULES} == {name: then[name] for name in RULES}
    assert (
        git("show", f"{DESIGN['commit']}:notebooks/08_claims.ipynb").count("q08.design(study)") == 1
    )


def test_seeds_are_not_those_of_pilots():
    assert DESIGN["settings"]["first_seed"] == 100
    configs = [json.loads(path.read_text())["config"] for path in RECORDS]
    assert all(seed >= 100 for config in configs for seed in seeds(config))


def seeds(value: object) -> list[int]:
    if isinstance(value, dict):
        own = [value["seed"]] if "seed" in value else []
        return own + [s for v in value.values() for s in seeds(v)]
    return []

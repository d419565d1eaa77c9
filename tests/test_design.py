"""The settings of `evidence` were committed before its first record: no result chose them."""

import ast
import json
import re
import subprocess
from pathlib import Path

from fslib.data.bbc import EMBEDDED
from fslib.model.encoders import PRETRAINED
from fslib.study.profiles import PROFILES, make_profile

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "results" / "evidence"
CONFIGS = [json.loads(path.read_text()) for path in sorted((FOLDER / "runs").glob("*.json"))]
# the commit of the design, and its settings with all defaults, as they were understood then
DESIGN = json.loads((FOLDER / "design.json").read_text())


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr} (needs the history: clone without --depth)"
    return done.stdout


def then(path: str) -> str:
    """What a file held at the commit of the design."""
    return git("show", f"{DESIGN['commit']}:{path}")


def parts(source: str) -> dict[str, ast.AST]:
    """A module's assignments and all its functions by name, without docstrings."""
    found: dict[str, ast.AST] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node):
                node.body = node.body[1:]
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = node.value
    return found


def test_every_record_was_computed_on_the_design_or_after_it():
    commits = {record["commit"] for record in CONFIGS}
    assert commits, "there are records"
    for commit in commits:
        git("merge-base", "--is-ancestor", DESIGN["commit"], commit)  # fails if it is none


def test_settings_are_those_of_the_design():
    names = {"EMBEDDED": EMBEDDED, "PRETRAINED": PRETRAINED}
    written = parts(then("fslib/study/profiles.py"))["PROFILES"]
    place = [key and ast.literal_eval(key) for key in written.keys].index("evidence")
    settings = eval(ast.unparse(written.values[place]), names)
    assert json.loads(json.dumps(settings)) == json.loads(json.dumps(PROFILES["evidence"]))
    now = make_profile("evidence", {}).model_dump(mode="json")
    left = {name: now[name] for name in DESIGN["settings"]}
    assert left == DESIGN["settings"], "defaults that the profile leaves"


def test_seeds_are_not_those_of_pilots():
    assert DESIGN["settings"]["first_seed"] == 100
    found = [int(seed) for seed in re.findall(r'"seed": (\d+)', json.dumps(CONFIGS))]
    assert found and min(found) >= 100

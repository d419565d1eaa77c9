"""The table of architectures is what its benchmark finds, and what README says of it is so."""

import csv
import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
import transformers
from tinymodels import one_thread

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "tests" / "benchmarks" / "architectures.py"
SPEC = importlib.util.spec_from_file_location("architectures", PATH)
architectures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(architectures)


@pytest.fixture(scope="module")
def table():
    with architectures.TABLE.open(encoding="utf-8") as file:
        return {row["model type"]: row for row in csv.DictReader(file)}


@pytest.mark.filterwarnings("ignore")
def test_a_quarter_of_the_table_is_found_again(table):
    models = architectures.text_models()
    assert models.keys() == table.keys()
    with one_thread():
        for kind in sorted(models)[::4]:  # all of them, in minutes: the benchmark
            row = architectures.row(kind, *models[kind])
            assert {name: row.get(name, "") for name in table[kind]} == table[kind], kind


def test_what_works_has_passed_the_checks_and_what_does_not_says_why(table):
    for row in table.values():
        if row["result"] == "works":
            for passed in ("the empty set changes nothing", "one head off is zeros in its place"):
                assert passed in row["why"] and row["IAT"]
        else:
            assert row["result"] in ("refused", "not built", "unsure")
            assert row["why"] and not row["IAT"]


def test_readme_counts_what_the_table_does(table):
    counts = Counter(row["result"] for row in table.values())
    rows = Counter(row["IAT"] for row in table.values())
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    version = re.match(r"\d+\.\d+", transformers.__version__)[0]
    assert f"Of the {len(table)} architectures in transformers {version} that read text" in said
    assert f"{counts['works']} work" in said and f"{counts['refused']} are refused" in said
    assert f"{counts['unsure']} are loaded but do not pass" in said
    assert f"{counts['not built']} were not built so small" in said
    assert f"the rows of every head in {rows['yes']} of them" in said

"""Bad input of every kind gets one clear line: some 570 cases, run without the types that tests enforce elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import CASES

SCRIPT = Path(__file__).with_name("hostile.py")
NAMED = {
    "folder: no tokenizer": "no tokenizer files",
    "folder: special tokens alone": "special tokens alone",
    "folder: ids beyond the embedding": "token id 6000",
    "folder: config indivisible": "not a multiple of the number of attention",
    "checkpoint: no tokenizer": "no tokenizer files",
    "folder: pooling max": "pooling_mode_max_tokens",
    "folder: pooling two": "pooling_mode_cls_token and pooling_mode_mean_tokens",
    "folder: config vocabulary text": "vocab_size",
    "no room for a pair": "at least 5",
    "floats or names": "label 0.0 may be the class index or the label name '0'",
    "columns in a dict": "as (texts, labels)",
    "max_length=4": "at least 5",  # three special tokens, and one for each text of a pair
    "evaluate DataParallel": "model.module",
    "importance DataParallel": "model.module",
    "train DataParallel": "model.module",
    "surrogate in a text": "example 0: '\\ud800'",
    "surrogate in a pair": "example 0: '\\udc80'",
    "indices or names": "label 0 may be the class index or the label name",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{case: (what was raised, its message)}."""
    folder = tmp_path_factory.mktemp("hostile")
    done = subprocess.run(
        [sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(answers, case):
    kind, message = answers[case]
    assert kind == "FslibError", message
    assert message and "\n" not in message
    assert NAMED.get(case, "") in message


def test_what_is_named_is_tried():
    assert NAMED.keys() <= CASES.keys()
    assert len(CASES) > 550

"""Bad input of every kind gets one clear line, without the types that tests enforce elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import CARDS, COMPUTED, FOLDERS, VALUES

SCRIPT = Path(__file__).with_name("hostile.py")
CALLS = [*dict.fromkeys([*VALUES, *COMPUTED, *FOLDERS, "fslib.json", "encoder"])]
NAMED = {  # (what is wrong, the wrong value): words of the answer
    ("tokenizer.json", "None"): "no tokenizer files",
    ("encoder", "None"): "no tokenizer files",
    ("config.json", "{'num_attention_heads': 5}"): "not a multiple of the number of attention",
    ("config.json", "{'vocab_size': 'many'}"): "vocab_size",
    ("1_Pooling/config.json", "{'pooling_mode_max_tokens': True}"): "pooling_mode_max_tokens",
    ("evaluate(V, tasks)", "nn.DataParallel(model)"): "model.module",
    ("MultiTaskModel.from_pretrained(source, tasks, max_length=V)", "4"): "at least 5",
    ("make_task('own', V, label_names=['x', 'y'])", "('abcd', [0, 1, 0, 1])"): "two lists",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{call: [(wrong value, what was raised, its message)]}."""
    words = [sys.executable, SCRIPT, tmp_path_factory.mktemp("hostile")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("call", CALLS)
def test_one_clear_line(answers, call):
    wrong = [a for a in answers[call] if a[1] != "FslibError" or not a[2] or "\n" in a[2]]
    assert not wrong


def test_the_line_names_the_trouble(answers):
    found = {(call, value): said for call, many in answers.items() for value, _, said in many}
    assert sum(map(len, answers.values())) > 500 and len(CARDS) == len(answers["fslib.json"])
    assert [key for key, part in NAMED.items() if part not in found[key]] == []

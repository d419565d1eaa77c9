"""Bad input of every kind, run in a process of its own: fslib answers, not the types tests enforce.

`python tests/hostile.py FOLDER` prints {call: [[wrong value, type of what was raised, message]]} as
JSON; the type is "" where nothing was raised. FOLDER is scratch space.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tinymodels import save, toy_task
from torch import nn

import fslib
from fslib.data.batches import Encoded
from fslib.data.tasks import Task
from fslib.importance import contributions
from fslib.training import History

NAN = float("nan")
COUNT = (-1, 2.0, True, "2", [2])  # wrong for whole numbers
FLOAT = (-1, NAN, "1", None, True)  # wrong for numbers that may be 0
SHARE = (-0.1, 0, 1.5, "0.3", None, True, NAN, [0.3])  # wrong for shares
NUMBER = (None, 5, ["single"], {"a": 1})  # wrong for texts
OBJECT = ("single", *NUMBER)  # wrong for everything else
FLAG = ("no", None, 5, [True])
SET = ("maps['pair']", "top.astype(int)", "top[0]", "[[True], [True, False]]")  # no head sets
WRAPPED = ("nn.DataParallel(model)", "nn.Sequential(model)", "None")  # computed: no models
PRUNE = "prune_important_heads(model, tasks, [0.5], 1"
OWN = "(['a', 'b'], [0, 1]), (['c'], [1]), label_names="

# A call with the wrong value V, and what V is in turn
VALUES: dict[str, tuple[Any, ...]] = {
    "evaluate(model, tasks, batch_size=V)": (*COUNT, 0, None),
    "evaluate(model, V)": OBJECT,
    "evaluate(model, single, split=V)": OBJECT,
    "prune_important_heads(model, tasks, [0.5], V, importance=maps)": COUNT,
    "prune_important_heads(model, tasks, [0.5], 1, examples=V)": (*COUNT, 0),
    "prune_important_heads(model, tasks, [V], 0, importance=maps)": SHARE,
    "prune_important_heads(model, tasks, V)": (0.3, "0.3", None, 5),
    "prune_important_heads(model, V)": OBJECT,
    "prune_important_heads(model, tasks, [0.5], 0, importance=V)": ("single", *NUMBER[1:]),
    "prune_important_heads(model, tasks, [0.5], 0, importance=maps, iterative=V)": FLAG,
    "random_heads(top, V, np.random.default_rng(0))": (*COUNT, None),
    "random_heads(V, 1, np.random.default_rng(0))": OBJECT,
    "random_heads(top, 1, V)": OBJECT,
    "top_heads(maps['pair'], 0.5, min_per_layer=V)": (*COUNT, None),
    "top_heads(maps['pair'], V)": SHARE,
    "top_heads(V, 0.5)": OBJECT,
    "overlap(V, top)": OBJECT,
    "pruned(model, V).__enter__()": OBJECT,
    "rank_correlation(V, maps['pair'])": OBJECT,
    "single.limited(train=5, seed=V)": COUNT,
    "make_task('own', (list('abcdef'), [0, 1] * 3), label_names=['x', 'y'], seed=V)": COUNT,
    "make_task('own', V, label_names=['x', 'y'])": OBJECT,
    f"make_task(V, {OWN}['x', 'y'])": ("Single", *NUMBER),
    f"make_task('own', {OWN}V)": ("single", None, 5, ["x"], {"x": 0, "y": 1}, {"x", "y"}, "xy"),
    "Task('own', V, V, ('x', 'y'))": OBJECT,
    f"make_task('own', {OWN}['x', 'y'], metric=V)": ("single", *NUMBER[1:]),
    "load_tasks(V)": OBJECT,
    "task_names(V)": ("single", *NUMBER[1:]),
    "glue_task(V)": OBJECT,
    "MultiTaskModel.from_pretrained(source, V)": OBJECT,
    "MultiTaskModel.from_pretrained(V, tasks)": (None, 5, "", "no-such-model", "a/../b"),
    "MultiTaskModel.from_pretrained(source, tasks, max_length=V)": (*COUNT, 0, None, 1, 4, 1.5),
    "MultiTaskModel.from_pretrained(source, tasks, seed=V)": (*COUNT, 2**70),
    "MultiTaskModel.load(V)": OBJECT,
    "model.save(V)": NUMBER,
    "Encoded(single.eval, model.tokenizer, V)": (*COUNT, 0, None),
    "head_importance(model, single, examples=4, seed=V)": COUNT,
    "head_importance(model, single, estimator='integrated', steps=V)": (*COUNT, 0),
    "head_importance(model, single, estimator=V)": OBJECT,
    "head_importance(model, V)": OBJECT,
    "contributions(model, single, examples=4).importance(subset=V)": (5, [[0]], [0.5], ["a"], True),
    "contributions(model, V)": OBJECT,
    "mean_context(model, single, examples=V)": COUNT,
    "mean_context(model, V)": OBJECT,
    "transfer(model, new, size=V)": COUNT,
    "transfer(model, new, steps=V)": (*COUNT, 0),
    "transfer(model, new, part='classifier', seed=V)": COUNT,
    "transfer(model, V)": OBJECT,
    "IAT(examples=V)": (*COUNT, 0),
    "IAT(heads=V)": OBJECT,
    "PCGrad(project=V)": FLAG,
    "train(model, tasks, steps=2, seed=V)": COUNT,
    "train(model, tasks, steps=2, sampling=V)": OBJECT,
    "train(model, V)": OBJECT,
    "list(branch(model, tasks, V, steps=2))": OBJECT,
    "History(['a']).steps_of(V)": OBJECT,
    "iap.dissociation(draws=V)": (*COUNT, 0),
    "iap.dissociation(draws=10, seed=V)": COUNT,
    "dissociation(V, V)": OBJECT,
    "dissociation(np.ones((4, 2, 2)), np.ones(V))": ((), 1, 3, (4, 1), (2, 2), (3, 1, 2)),
    "dissociation(np.ones((4, 2, 2)), np.ones(2), 'retention', np.ones(V))": ((), 1, 3, (4, 1)),
    "IAP.over_seeds(V)": OBJECT,
    "Study('smoke', results=V)": NUMBER[1:],
    "similarity.representations(model, ['w1'], batch_size=V)": (*COUNT, 0),
    "similarity.representations(model, V)": (*OBJECT[:3], [1], {"a": 1}),
    "similarity.linear_cka(V, V)": OBJECT,
    "similarity.task_similarity(V, {'a': V})": OBJECT,
    "similarity.text_embedding(model, V)": OBJECT,
}
# A call, some of its settings, and what each is in turn
TOGETHER: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("train(model, tasks, **({'steps': 2} | {'%s': V}))", "steps batch_size epochs", (*COUNT, 0)),
    ("train(model, tasks, steps=2, %s=V)", "lr weight_decay warmup decay", FLOAT),
    ("train(model, tasks, steps=2, %s=V)", "clip", (-1, NAN, "1", True)),  # None: any norm
    ("train(model, tasks, steps=2, %s=V)", "evaluate_every", (*COUNT, 0)),
    (f"{PRUNE}, importance=maps, %s=V)", "batch_size seed min_per_layer", COUNT),
    ("IAT(%s=V)", "alpha delta", SHARE),
    ("IAT(%s=V)", "shared strict dropout", FLAG),
    ("IAT(%s=V)", "leak", COUNT),
    ("single.limited(%s=V)", "train eval", (*COUNT, 0)),
    ("head_importance(model, single, %s=V)", "examples batch_size", (*COUNT, 0)),
)
for call, settings, values in TOGETHER:
    VALUES |= {call % setting: values for setting in settings.split()}
# A setting of a profile, and what it is in turn
SETTINGS: dict[str, tuple[Any, ...]] = {
    "stepps": (3,),
    "steps": (0, -1, 2.5, True, None, "many", [1], {"a": 1}),
    "lr": (0, -1, NAN, "fast"),
    "sampling": ("anealed",),
    "fractions": ([], [0], [1.5], [0.1, 0.1], 0.1),
    "tasks": ([], ["bbc"], ["bbc", "bbc"], ["bbc", "BBC"], ["bbc", "bbcs"], "bbc", ["a/b", "bbc"]),
    "controls": (0, -1),
    "encoders": ([], ["minilm-l1", "minilm-l1"]),
    "encoder_lrs": ({"minilm-l3": 2.0},),
    **dict.fromkeys(("alpha", "delta"), (0, 1.5)),
    **dict.fromkeys(("other_alphas", "other_deltas", "doses"), ([2], [0], [0.5, 0.5])),
    **dict.fromkeys(("seeds", "threads", "max_length", "batch_size", "epochs"), (0,)),
    **dict.fromkeys(("draws", "ending_seeds", "eval_examples", "importance_examples"), (1,)),
}
VALUES |= {f"Study('smoke', overrides={{{s!r}: V}})": values for s, values in SETTINGS.items()}
# A call with something computed, V
COMPUTED: dict[str, tuple[str, ...]] = {
    "overlap(V, V)": SET,
    "random_heads(V, 1, np.random.default_rng(0))": SET,
    "pruned(model, V).__enter__()": SET,
    "evaluate(V, tasks)": WRAPPED,
    "head_importance(V, single)": WRAPPED,
    "train(V, tasks, steps=2)": WRAPPED,
    "prune_important_heads(V, tasks)": WRAPPED,
    "transfer(V, new)": WRAPPED,
    "pruned(V, top).__enter__()": WRAPPED,
    "mean_context(V, single)": WRAPPED,
    "pruned(model, top, ablation='mean', mean=V).__enter__()": (
        "torch.zeros(())",
        "torch.zeros(1, 1, 1)",
        "torch.zeros(8)",
        "torch.zeros(3, 4, 1)",
        "torch.full((3, 4, 8), torch.nan)",
        "[0.0]",
    ),
    "top_heads(V, 0.5)": (
        "maps['pair'] * 1j",
        "maps['pair'].astype(str)",
        "torch.ones(3, 4, requires_grad=True)",
    ),
    "V(train)(model, tasks, steps=2)": ("torch.inference_mode()", "torch.no_grad()"),
    "V": (
        "rank_correlation(np.ones((2, 12)), np.ones((12, 2)))",
        "similarity.representations(model, ['a\\ud800'])",
        "IAT(heads='random', alpha=1)",
        "transfer(MultiTaskModel.from_pretrained(source, single, max_length=3), pair, steps=1)",
    ),
    "make_task('own', V, label_names=['x', 'y'])": (
        "(['a\\ud800', 'b', 'c'], [0, 1, 0])",
        "([('b', '\\udc80a'), ('a', 'b')], [0, 1])",
        "('abcd', [0, 1, 0, 1])",
        "(['a', 'b', 'c'], 'xyx')",
        "({'a', 'b', 'c'}, [0, 1, 0])",
        "(['a', 'b'], {0, 1})",
        "(['a', 'b', 'c'], b'\\0\\1\\0')",
        "{'text': ['a'], 'label': [0]}",
    ),
    "make_task('own', (['a', 'b', 'c'], V), label_names=['1', '0'])": ("[0, 1, 0]", "[0.0, 1, 0]"),
}
POOLING = "1_Pooling/config.json"
BROKEN = (b"[]", b'{"\xe9": 1}', b"{")
# A model's folder in which one file is this (bytes), has these entries (dict), or is gone (None)
FOLDERS: dict[str, tuple[bytes | dict[str, Any] | None, ...]] = {
    "tokenizer.json": (None, *BROKEN),
    "tokenizer_config.json": (
        *BROKEN[:2],
        *({"model_max_length": value} for value in ("many", float("inf"), True)),
    ),
    "config.json": (
        *BROKEN[::2],
        b'{"model_type": "b\xe9rt"}',
        *({"num_hidden_layers": value} for value in ("three", 2.5, None, -1)),
        *({"num_attention_heads": value} for value in (3.5, 0, 5)),
        *({name: "many"} for name in ("max_position_embeddings", "vocab_size")),
    ),
    POOLING: (
        *(*BROKEN, b"[" * 100_000),
        {"pooling_mode_max_tokens": True},
        *({"pooling_mode_mean_tokens": value} for value in (False, 1.5)),
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
    ),
}
# A checkpoint whose card is this, or has these entries
CARDS: tuple[bytes | dict[str, Any], ...] = (
    *BROKEN[:2],
    *({"max_length": value} for value in (0, "long", 7.5)),
    {"pooling": "max"},
    *({"answers": value} for value in ([], {"single": {"outputs": "3"}}, {"single": 3})),
)


class Given:
    """What the calls work on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = str(save("bert", folder / "bert"))
        self.single, self.pair = toy_task("single"), toy_task("pair")
        self.tasks = [self.single, self.pair]
        rows = (["w1 w2", "w3", "w4 w5", "w6"] * 2, [0, 1, 0, 1] * 2)
        self.new = fslib.make_task("new", rows, label_names=["x", "y"])
        every = [*self.tasks, toy_task("regression")]
        self.model = fslib.MultiTaskModel.from_pretrained(self.source, every)
        self.maps = {t.name: np.arange(12.0).reshape(3, 4) for t in self.tasks}
        self.top = fslib.top_heads(self.maps["single"], 0.3)
        scores = {"importance": self.maps}
        self.iap = fslib.prune_important_heads(self.model, self.tasks, [0.5], 1, **scores)
        self.names = {name: getattr(fslib, name) for name in fslib.__all__} | vars(self)
        more = (Encoded, contributions, History, Task)
        self.names |= {thing.__name__: thing for thing in more}
        self.names |= {"np": np, "torch": torch, "nn": nn}

    def call(self, call: str, value: Any) -> Any:
        return eval(call, self.names | {"V": value})

    def loaded(self, file: str, content: bytes | dict[str, Any] | None) -> Any:
        """Load and use a copy of the model's folder with another file in it."""
        copy = Path(shutil.copytree(self.source, self.folder / "copy", dirs_exist_ok=True))
        changed(copy / file, content)
        model = fslib.MultiTaskModel.from_pretrained(copy, self.tasks)
        return fslib.evaluate(model, self.tasks)

    def restored(self, file: str, content: bytes | dict[str, Any] | None) -> Any:
        """Load and use a checkpoint with another file in it."""
        self.model.save(self.folder / "saved")
        changed(self.folder / "saved" / file, content)
        return fslib.evaluate(fslib.MultiTaskModel.load(self.folder / "saved"), self.tasks)


def changed(path: Path, content: bytes | dict[str, Any] | None) -> None:
    path.parent.mkdir(exist_ok=True)
    if content is None:
        for gone in path.parent.glob("*token*"):
            gone.unlink()
    elif isinstance(content, dict):
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | content))
    else:
        path.write_bytes(content)


def cases(given: Given) -> list[tuple[str, str, Any, tuple[Any, ...]]]:
    """Return (call, wrong value in words, function, its arguments) of all that is tried."""
    found = [(call, repr(v), given.call, (call, v)) for call in VALUES for v in VALUES[call]]
    for call, values in COMPUTED.items():
        found += [(call, v, given.call, (call.replace("V", v), None)) for v in values]
    for file, contents in FOLDERS.items():
        found += [(file, repr(c)[:80], given.loaded, (file, c)) for c in contents]
    found += [("fslib.json", repr(c)[:80], given.restored, ("fslib.json", c)) for c in CARDS]
    return [*found, ("encoder", "None", given.restored, ("encoder/tokenizer.json", None))]


def main() -> None:
    given = Given(Path(sys.argv[1]))
    answers: dict[str, list[list[str]]] = {}
    for call, value, run, arguments in cases(given):
        try:
            answer = ["", repr(run(*arguments))[:200]]
        except Exception as error:
            answer = [type(error).__name__, str(error)]
            given.model.control.gate = given.model.control.fill = None
            given.model.eval()
        answers.setdefault(call, []).append([value, *answer])
        shutil.rmtree(given.folder / "copy", ignore_errors=True)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()

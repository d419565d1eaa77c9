"""Bad input of every kind, run in a process of its own: there fslib answers, and not the types that tests enforce.

`python tests/hostile.py FOLDER` prints {case: [type of what was raised, its message]} as JSON; ["", result] where
nothing was. FOLDER is scratch space.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tinymodels import save, toy_task
from torch import nn

import fslib
from fslib import similarity
from fslib.data.batches import Encoded

CASES: dict[str, Callable[[Any], object]] = {}
BAD_COUNTS = {"minus": -1, "float": 2.0, "bool": True, "text": "2", "list": [2]}


class Given:
    """What the cases work on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = save("bert", folder / "bert")
        self.single, self.pair = toy_task("single"), toy_task("pair")
        self.regression = toy_task("regression")
        self.tasks = [self.single, self.pair]
        self.model = fslib.MultiTaskModel.from_pretrained(
            self.source, [*self.tasks, self.regression]
        )
        self.maps = {t.name: np.arange(12.0).reshape(3, 4) for t in self.tasks}
        self.top = fslib.top_heads(self.maps["single"], 0.3)
        self.iap = fslib.prune_important_heads(
            self.model, self.tasks, [0.5], 1, importance=self.maps
        )

    def damaged(self, name: str, change: Callable[[Path], object]) -> str:
        """A copy of the model folder with one thing done to it."""
        copy = self.folder / name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.source, copy)
        change(copy)
        return str(copy)

    def loaded(self, name: str, change: Callable[[Path], object]) -> object:
        """Load such a copy, and use it."""
        model = fslib.MultiTaskModel.from_pretrained(self.damaged(name, change), self.tasks)
        return fslib.evaluate(model, self.tasks)


def counts(name: str, call: Callable[[Any, Any], object], *also: Any) -> None:
    """Try every kind of wrong count, and `also`."""
    for kind, value in {**BAD_COUNTS, **{repr(v): v for v in also}}.items():
        CASES[f"{name}={kind}"] = lambda g, value=value: call(g, value)


def config(**changes: object) -> Callable[[Path], object]:
    """Change config.json."""

    def change(folder: Path) -> object:
        path = folder / "config.json"
        return path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(file: str, content: bytes) -> Callable[[Path], object]:
    """Replace a file."""

    def change(folder: Path) -> object:
        (folder / file).parent.mkdir(exist_ok=True)
        return (folder / file).write_bytes(content)

    return change


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def special_alone(folder: Path) -> None:
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["model"]["vocab"] = {
        w: i for w, i in saved["model"]["vocab"].items() if w.startswith("[")
    }
    path.write_text(json.dumps(saved))


def ids_beyond(folder: Path) -> None:
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["model"]["vocab"]["w1"] = 6000
    path.write_text(json.dumps(saved))


counts("evaluate batch_size", lambda g, v: fslib.evaluate(g.model, g.tasks, batch_size=v), 0, None)
counts(
    "prune batch_size",
    lambda g, v: fslib.prune_important_heads(
        g.model, g.tasks, [0.5], 1, importance=g.maps, batch_size=v
    ),
)
counts(
    "prune controls",
    lambda g, v: fslib.prune_important_heads(g.model, g.tasks, [0.5], v, importance=g.maps),
)
counts(
    "prune seed",
    lambda g, v: fslib.prune_important_heads(g.model, g.tasks, [0.5], 1, importance=g.maps, seed=v),
)
counts(
    "prune min_per_layer",
    lambda g, v: fslib.prune_important_heads(
        g.model, g.tasks, [0.5], 1, importance=g.maps, min_per_layer=v
    ),
)
counts(
    "prune examples",
    lambda g, v: fslib.prune_important_heads(g.model, g.tasks, [0.5], 1, examples=v),
    0,
)
counts("random_heads n", lambda g, v: fslib.random_heads(g.top, v, np.random.default_rng(0)), None)
counts(
    "top_heads min_per_layer",
    lambda g, v: fslib.top_heads(g.maps["pair"], 0.5, min_per_layer=v),
    None,
)
counts("limited eval", lambda g, v: g.single.limited(eval=v), 0)
counts("limited train", lambda g, v: g.single.limited(train=v), 0)
counts("limited seed", lambda g, v: g.single.limited(train=5, seed=v))
counts(
    "make_task seed",
    lambda g, v: fslib.make_task(
        "own", (list("abcdef"), [0, 1] * 3), label_names=["x", "y"], seed=v
    ),
)
counts(
    "max_length",
    lambda g, v: fslib.MultiTaskModel.from_pretrained(g.source, g.tasks, max_length=v),
    0,
    None,
    1,
    1.5,
    4,
)
counts("max_length of Encoded", lambda g, v: Encoded(g.single.eval, g.model.tokenizer, v), 0, None)
counts(
    "model seed",
    lambda g, v: fslib.MultiTaskModel.from_pretrained(g.source, g.tasks, seed=v),
    2**70,
)
counts("importance examples", lambda g, v: fslib.head_importance(g.model, g.single, examples=v), 0)
counts(
    "importance batch_size", lambda g, v: fslib.head_importance(g.model, g.single, batch_size=v), 0
)
counts("importance seed", lambda g, v: fslib.head_importance(g.model, g.single, examples=4, seed=v))
counts(
    "importance steps",
    lambda g, v: fslib.head_importance(g.model, g.single, estimator="integrated", steps=v),
    0,
)
for value in (5, [[0, 1]], [0.5], ["a"], True):
    CASES[f"importance subset={value!r}"] = lambda g, v=value: fslib.contributions(
        g.model, g.single, examples=4
    ).importance(subset=v)
counts("mean_context examples", lambda g, v: fslib.mean_context(g.model, g.single, examples=v))
counts("transfer size", lambda g, v: fslib.transfer(g.model, toy_task_named("new"), size=v))
counts("transfer steps", lambda g, v: fslib.transfer(g.model, toy_task_named("new"), steps=v), 0)
counts(
    "transfer seed",
    lambda g, v: fslib.transfer(g.model, toy_task_named("new"), part="classifier", seed=v),
)
counts("IAT examples", lambda g, v: fslib.IAT(examples=v), 0)
for setting in ("steps", "batch_size", "epochs", "evaluate_every"):
    counts(
        f"train {setting}",
        lambda g, v, s=setting: fslib.train(g.model, g.tasks, **({"steps": 2} | {s: v})),
        0,
    )
counts("train seed", lambda g, v: fslib.train(g.model, g.tasks, steps=2, seed=v))
counts("relabelling draws", lambda g, v: g.iap.dissociation(draws=v), 0)
counts("relabelling seed", lambda g, v: g.iap.dissociation(draws=10, seed=v))
counts(
    "interval draws", lambda g, v: fslib.evaluate(g.model, g.single)["single"].interval(draws=v), 0
)
counts(
    "representations batch_size",
    lambda g, v: similarity.representations(g.model, ["w1"], batch_size=v),
    0,
)
for setting in ("lr", "weight_decay", "warmup", "clip"):
    for value in (-1, float("nan"), "1", None, True):
        CASES[f"train {setting}={value!r}"] = lambda g, s=setting, v=value: fslib.train(
            g.model, g.tasks, steps=2, **{s: v}
        )
for value in (-0.1, 0, 1.5, "0.3", None, True, float("nan"), [0.3]):
    CASES[f"top_heads fraction={value!r}"] = lambda g, v=value: fslib.top_heads(g.maps["pair"], v)
    CASES[f"prune fractions=[{value!r}]"] = lambda g, v=value: fslib.prune_important_heads(
        g.model, g.tasks, [v], 0, importance=g.maps
    )
    CASES[f"IAT alpha={value!r}"] = lambda g, v=value: fslib.IAT(alpha=v)
    CASES[f"IAT delta={value!r}"] = lambda g, v=value: fslib.IAT(delta=v)
for value in (0.3, "0.3", None, 5):
    CASES[f"prune fractions={value!r}"] = lambda g, v=value: fslib.prune_important_heads(
        g.model, g.tasks, v
    )


def toy_task_named(name: str) -> fslib.Task:
    return fslib.make_task(
        name, (["w1 w2", "w3", "w4 w5", "w6"] * 2, [0, 1, 0, 1] * 2), label_names=["x", "y"]
    )


for name, change in {
    "no tokenizer": without_tokenizer,
    "special tokens alone": special_alone,
    "ids beyond the embedding": ids_beyond,
    "tokenizer []": write("tokenizer.json", b"[]"),
    "tokenizer latin-1": write("tokenizer.json", b'{"\xe9": 1}'),
    "tokenizer not JSON": write("tokenizer.json", b"{"),
    "tokenizer_config []": write("tokenizer_config.json", b"[]"),
    "tokenizer_config latin-1": write("tokenizer_config.json", b'{"\xe9": 1}'),
    "tokenizer max length text": write("tokenizer_config.json", b'{"model_max_length": "many"}'),
    "config []": write("config.json", b"[]"),
    "config latin-1": write("config.json", b'{"model_type": "b\xe9rt"}'),
    "config not JSON": write("config.json", b"{"),
    "config layers text": config(num_hidden_layers="three"),
    "config layers float": config(num_hidden_layers=2.5),
    "config layers null": config(num_hidden_layers=None),
    "config heads float": config(num_attention_heads=3.5),
    "config heads 0": config(num_attention_heads=0),
    "config layers -1": config(num_hidden_layers=-1),
    "config positions text": config(max_position_embeddings="many"),
    "config indivisible": config(num_attention_heads=5),
    "pooling []": write("1_Pooling/config.json", b"[]"),
    "pooling latin-1": write("1_Pooling/config.json", b'{"\xe9": 1}'),
    "pooling not JSON": write("1_Pooling/config.json", b"{"),
    "pooling deep": write("1_Pooling/config.json", b"[" * 100_000),
    "pooling max": write("1_Pooling/config.json", b'{"pooling_mode_max_tokens": true}'),
    "pooling none": write("1_Pooling/config.json", b'{"pooling_mode_mean_tokens": false}'),
    "pooling two": write(
        "1_Pooling/config.json",
        b'{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}',
    ),
    "tokenizer max length inf": write("tokenizer_config.json", b'{"model_max_length": Infinity}'),
    "tokenizer max length true": write("tokenizer_config.json", b'{"model_max_length": true}'),
    "config vocabulary text": config(vocab_size="many"),
    "pooling number": write("1_Pooling/config.json", b'{"pooling_mode_mean_tokens": 1.5}'),
}.items():
    CASES[f"folder: {name}"] = lambda g, n=name, c=change: g.loaded(n, c)


def saved(g: Given, change: Callable[[dict], object]) -> object:
    """Save the model, change its card, load it."""
    g.model.save(g.folder / "saved")
    path = g.folder / "saved" / "fslib.json"
    card = json.loads(path.read_text())
    made = change(card)
    path.write_bytes(
        made if isinstance(made, bytes) else json.dumps(card if made is None else made).encode()
    )
    return fslib.evaluate(fslib.MultiTaskModel.load(g.folder / "saved"), g.tasks)


for name, edit in {
    "list": lambda card: [],
    "latin-1": lambda card: b'{"\xe9": 1}',
    "max_length 0": lambda card: card.update(max_length=0),
    "max_length text": lambda card: card.update(max_length="long"),
    "max_length float": lambda card: card.update(max_length=7.5),
    "pooling": lambda card: card.update(pooling="max"),
    "answers []": lambda card: card.update(answers=[]),
    "answers text": lambda card: card["answers"]["single"].update(outputs="3"),
    "answers names": lambda card: card["answers"]["single"].update(label_names=3),
}.items():
    CASES[f"checkpoint: {name}"] = lambda g, e=edit: saved(g, e)


def _bare(g: Given) -> object:
    g.model.save(g.folder / "bare")
    without_tokenizer(g.folder / "bare" / "encoder")
    return fslib.evaluate(fslib.MultiTaskModel.load(g.folder / "bare"), g.tasks)


CASES["checkpoint: no tokenizer"] = _bare


for what, wrong in {
    "text": "single",
    "None": None,
    "number": 5,
    "list of texts": ["single"],
    "dict": {"a": 1},
}.items():
    CASES[f"evaluate tasks {what}"] = lambda g, w=wrong: fslib.evaluate(g.model, w)
    CASES[f"importance task {what}"] = lambda g, w=wrong: fslib.head_importance(g.model, w)
    CASES[f"contributions task {what}"] = lambda g, w=wrong: fslib.contributions(g.model, w)
    CASES[f"mean_context task {what}"] = lambda g, w=wrong: fslib.mean_context(g.model, w)
    CASES[f"prune tasks {what}"] = lambda g, w=wrong: fslib.prune_important_heads(g.model, w)
    CASES[f"train tasks {what}"] = lambda g, w=wrong: fslib.train(g.model, w)
    CASES[f"transfer target {what}"] = lambda g, w=wrong: fslib.transfer(g.model, w)
    CASES[f"from_pretrained tasks {what}"] = lambda g, w=wrong: (
        fslib.MultiTaskModel.from_pretrained(g.source, w)
    )
    CASES[f"pruned heads {what}"] = lambda g, w=wrong: fslib.pruned(g.model, w).__enter__()
    CASES[f"overlap {what}"] = lambda g, w=wrong: fslib.overlap(w, g.top)
    CASES[f"random_heads like {what}"] = lambda g, w=wrong: fslib.random_heads(
        w, 1, np.random.default_rng(0)
    )
    CASES[f"rank_correlation {what}"] = lambda g, w=wrong: fslib.rank_correlation(w, g.maps["pair"])
    CASES[f"top_heads of {what}"] = lambda g, w=wrong: fslib.top_heads(w, 0.5)
    CASES[f"dissociation of {what}"] = lambda g, w=wrong: fslib.iap(w, w)
    CASES[f"load_tasks {what}"] = lambda g, w=wrong: fslib.load_tasks(w)
    CASES[f"make_task {what}"] = lambda g, w=wrong: fslib.make_task(
        "own", w, label_names=["x", "y"]
    )
    CASES[f"evaluate split {what}"] = lambda g, w=wrong: fslib.evaluate(g.model, g.single, split=w)
    CASES[f"branch endings {what}"] = lambda g, w=wrong: list(
        fslib.branch(g.model, g.tasks, w, steps=2)
    )
    CASES[f"IAT heads {what}"] = lambda g, w=wrong: fslib.IAT(heads=w)
    CASES[f"importance estimator {what}"] = lambda g, w=wrong: fslib.head_importance(
        g.model, g.single, estimator=w
    )
    CASES[f"sampling {what}"] = lambda g, w=wrong: fslib.train(
        g.model, g.tasks, sampling=w, steps=2
    )
    CASES[f"load {what}"] = lambda g, w=wrong: fslib.MultiTaskModel.load(w)
    CASES[f"task name {what}"] = lambda g, w=wrong: fslib.make_task(
        "Single" if w == "single" else w, (["a", "b"], [0, 1]), (["c"], [1]), label_names=["x", "y"]
    )
    CASES[f"similarity of {what}"] = lambda g, w=wrong: similarity.linear_cka(w, w)
    CASES[f"task_similarity of {what}"] = lambda g, w=wrong: similarity.task_similarity(w, {"a": w})
    CASES[f"text_embedding task {what}"] = lambda g, w=wrong: similarity.text_embedding(g.model, w)
    CASES[f"random_heads rng {what}"] = lambda g, w=wrong: fslib.random_heads(g.top, 1, w)
    CASES[f"over_seeds {what}"] = lambda g, w=wrong: fslib.IAP.over_seeds(w)
    CASES[f"PCGrad project {what}"] = lambda g, w=wrong: fslib.PCGrad(project=w)
    CASES[f"IAT shared {what}"] = lambda g, w=wrong: fslib.IAT(shared=w)
    CASES[f"IAT strict {what}"] = lambda g, w=wrong: fslib.IAT(strict=w)
    CASES[f"prune iterative {what}"] = lambda g, w=wrong: fslib.prune_important_heads(
        g.model, g.tasks, [0.5], 0, importance=g.maps, iterative=w
    )
    CASES[f"make_task label_names {what}"] = lambda g, w=wrong: fslib.make_task(
        "own", (["a", "b"], [0, 1]), (["c"], [1]), label_names=w if w != ["single"] else w * 2
    )
    CASES[f"Task of {what}"] = lambda g, w=wrong: fslib.Task("own", w, w, ("x", "y"))
    CASES[f"steps_of {what}"] = lambda g, w=wrong: fslib.History(["a"]).steps_of(w)
    if what != "text":  # the name of a folder
        CASES[f"save {what}"] = lambda g, w=wrong: g.model.save(w)
    if what not in ("text", "None"):
        CASES[f"prune importance {what}"] = lambda g, w=wrong: fslib.prune_important_heads(
            g.model, g.tasks, [0.5], 0, importance=w
        )
        CASES[f"task_names {what}"] = lambda g, w=wrong: fslib.task_names(w)
        CASES[f"Study results {what}"] = lambda g, w=wrong: fslib.Study("smoke", results=w)
    CASES[f"glue_task {what}"] = lambda g, w=wrong: fslib.glue_task(w)
    CASES[f"representations {what}"] = lambda g, w=wrong: similarity.representations(
        g.model, w if w != ["single"] else [1]
    )

for what, wrap in {
    "DataParallel": nn.DataParallel,
    "Sequential": nn.Sequential,
    "None": lambda m: None,
}.items():
    CASES[f"evaluate {what}"] = lambda g, w=wrap: fslib.evaluate(w(g.model), g.tasks)
    CASES[f"importance {what}"] = lambda g, w=wrap: fslib.head_importance(w(g.model), g.single)
    CASES[f"train {what}"] = lambda g, w=wrap: fslib.train(w(g.model), g.tasks, steps=2)
    CASES[f"prune {what}"] = lambda g, w=wrap: fslib.prune_important_heads(w(g.model), g.tasks)
    CASES[f"transfer {what}"] = lambda g, w=wrap: fslib.transfer(w(g.model), toy_task_named("new"))
    CASES[f"pruned {what}"] = lambda g, w=wrap: fslib.pruned(w(g.model), g.top).__enter__()
    CASES[f"mean_context {what}"] = lambda g, w=wrap: fslib.mean_context(w(g.model), g.single)

for name in (None, 5, "", "no-such-model", "a/../b"):
    CASES[f"model name {name!r}"] = lambda g, n=name: fslib.MultiTaskModel.from_pretrained(
        n, g.tasks
    )
WRONG_SETS: dict[str, Callable[[Any], Any]] = {
    "map": lambda g: g.maps["pair"],
    "integers": lambda g: g.top.astype(int),
    "row": lambda g: g.top[0],
    "ragged": lambda g: [[True], [True, False]],
}
for what, wrong_set in WRONG_SETS.items():
    CASES[f"overlap of {what}"] = lambda g, w=wrong_set: fslib.overlap(w(g), w(g))
    CASES[f"random_heads like {what}"] = lambda g, w=wrong_set: fslib.random_heads(
        w(g), 1, np.random.default_rng(0)
    )
    CASES[f"pruned {what}"] = lambda g, w=wrong_set: fslib.pruned(g.model, w(g)).__enter__()
CASES["rank_correlation shapes"] = lambda g: fslib.rank_correlation(
    np.ones((2, 12)), np.ones((12, 2))
)
for shape in ((), (1,), (3,), (4, 1), (2, 2), (3, 1, 2)):
    CASES[f"dissociation unpruned {shape}"] = lambda g, s=shape: fslib.iap(
        np.ones((4, 2, 2)), np.ones(s)
    )
    CASES[f"dissociation chance {shape}"] = lambda g, s=shape: fslib.iap(
        np.ones((4, 2, 2)), np.ones(2), "retention", np.ones(s)
    )
for what, shape in {"scalar": (), "broadcast": (1, 1, 1), "head": (8,), "other": (3, 4, 1)}.items():
    CASES[f"mean {what}"] = lambda g, s=shape: fslib.pruned(
        g.model, g.top, ablation="mean", mean=torch.zeros(s)
    ).__enter__()
CASES["mean NaN"] = lambda g: fslib.pruned(
    g.model, g.top, ablation="mean", mean=torch.full((3, 4, 8), torch.nan)
).__enter__()
CASES["mean list"] = lambda g: fslib.pruned(g.model, g.top, ablation="mean", mean=[0.0]).__enter__()
CASES["train under inference_mode"] = lambda g: torch.inference_mode()(fslib.train)(
    g.model, g.tasks, steps=2
)
CASES["train under no_grad"] = lambda g: torch.no_grad()(fslib.train)(g.model, g.tasks, steps=2)
CASES["surrogate in a text"] = lambda g: fslib.make_task(
    "own", (["a\ud800", "b"], [0, 1]), (["c"], [1]), label_names=["x", "y"]
)
CASES["surrogate in a pair"] = lambda g: fslib.make_task(
    "own", ([("b", "\udc80a"), ("a", "b")], [0, 1]), ([("c", "d")], [1]), label_names=["x", "y"]
)
CASES["surrogate in representations"] = lambda g: similarity.representations(g.model, ["a\ud800"])
CASES["one string of texts"] = lambda g: fslib.make_task(
    "own", ("abcd", [0, 1, 0, 1]), label_names=["x", "y"]
)
CASES["one string of labels"] = lambda g: fslib.make_task(
    "own", (["a", "b", "c"], "xyx"), label_names=["x", "y"]
)
CASES["one string of names"] = lambda g: fslib.make_task(
    "own", (["a", "b", "c"], ["x", "y", "x"]), label_names="xy"
)
CASES["names that are numbers"] = lambda g: fslib.make_task(
    "own", (["a", "b", "c"], [0, 1, 0]), label_names=[1, 0]
)
CASES["indices or names"] = lambda g: fslib.make_task(
    "own", (["a", "b", "c"], [0, 1, 0]), label_names=["1", "0"]
)
for what, names in {
    "set": {"x", "y"},
    "generator": (n for n in "xy"),
    "dict": {"x": 0, "y": 1},
}.items():
    CASES[f"names in a {what}"] = lambda g, n=names: fslib.make_task(
        "own", (["a", "b"], [0, 1]), label_names=n
    )
CASES["texts in a set"] = lambda g: fslib.make_task(
    "own", ({"a", "b", "c"}, [0, 1, 0]), label_names=["x", "y"]
)
CASES["labels in a set"] = lambda g: fslib.make_task(
    "own", (["a", "b"], {0, 1}), (["c"], [0]), label_names=["x", "y"]
)
CASES["labels in bytes"] = lambda g: fslib.make_task(
    "own", (["a", "b", "c"], b"\0\1\0"), label_names=["x", "y"]
)
CASES["columns in a dict"] = lambda g: fslib.make_task(
    "own", {"text": ["a"], "label": [0]}, label_names=["x", "y"]
)
CASES["floats or names"] = lambda g: fslib.make_task(
    "own", (["a", "b", "c"], [0.0, 1.0, 0.0]), label_names=["1", "0"]
)
CASES["random heads of all heads"] = lambda g: fslib.IAT(heads="random", alpha=1)
CASES["no room for a pair"] = lambda g: fslib.transfer(
    fslib.MultiTaskModel.from_pretrained(g.source, g.single, max_length=3), g.pair, steps=1
)
CASES["map of complex numbers"] = lambda g: fslib.top_heads(g.maps["pair"] * 1j, 0.5)
CASES["map of texts"] = lambda g: fslib.top_heads(g.maps["pair"].astype(str), 0.5)
CASES["map that requires a gradient"] = lambda g: fslib.top_heads(
    torch.ones(3, 4, requires_grad=True), 0.5
)


def main() -> None:
    given = Given(Path(sys.argv[1]))
    answers = {}
    for name, run in CASES.items():
        try:
            answers[name] = ["", repr(run(given))[:200]]
        except Exception as error:
            answers[name] = [type(error).__name__, str(error)]
            for module in (given.model, given.model.encoder):
                given.model.control.gate = given.model.control.fill = None
                module.eval()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()

"""Further kinds of units, each a comparison within one record: ways to choose heads, endings, transfer, similarity."""

from typing import Any

import numpy as np
import torch
from pydantic import Field

from fslib.dissociation import IAP
from fslib.endings import Ending, PCGrad, Stop
from fslib.errors import FslibError, unknown
from fslib.evaluation import evaluate
from fslib.experiments import (
    UNITS,
    Config,
    Outcome,
    Store,
    TrainConfig,
    TrainingSettings,
    cached_task,
    compact,
    new_model,
    training_options,
)
from fslib.iat import IAT, HeadRows, head_rows
from fslib.importance import head_importance
from fslib.model.multitask import MultiTaskModel
from fslib.progress import hidden
from fslib.pruning import prune_important_heads
from fslib.results import Record
from fslib.similarity import (
    cosine,
    head_overlap,
    importance_similarity,
    linear_cka,
    representations,
    task_embedding,
    task_similarity,
    text_embedding,
)
from fslib.training import branch, train
from fslib.transfer import PARTS, transfer

ENDINGS: dict[str, Any] = {"IAT": IAT, "PCGrad": PCGrad, "Stop": Stop}
MEASURES = ("importance", "top heads", "TaskEmb", "TextEmb", "CKA")


class SelectionConfig(Config):
    """One trained model, its heads chosen in several ways: {name: options of `head_importance`}."""

    model: TrainConfig
    selections: dict[str, dict[str, Any]] = Field(min_length=1)
    examples: int = Field(ge=1)
    fraction: float = Field(gt=0, le=1)
    randoms: int = Field(ge=1)


def _selection(config: SelectionConfig, store: Store) -> Outcome:
    """D of every selection; and `randoms` random sets a task, matched by layer ("matched") or not ("unmatched")."""
    model, tasks = store.model(config.model), config.model.load()
    arrays: dict[str, np.ndarray] = {}

    def prune(name: str, maps: dict[str, np.ndarray], controls: int = 0) -> None:
        iap = prune_important_heads(model, tasks, [config.fraction], controls, importance=maps, seed=config.model.seed)
        arrays.update(_named(name, iap))

    shared: dict[str, Any] = {"examples": config.examples, "seed": config.model.seed}
    for number, (name, options) in enumerate(config.selections.items()):
        maps = {t: head_importance(model, task, **shared | options) for t, task in tasks.items()}
        arrays |= {f"importance/{name}/{t}": scores.astype(np.float32) for t, scores in maps.items()}
        prune(name, maps, 0 if number else config.randoms)
    for draw in range(config.randoms):
        maps = {t: head_importance(model, task, estimator="random", seed=1000 + draw) for t, task in tasks.items()}
        prune(f"unmatched {draw}", maps)
    return {"shape": [model.n_layers, model.n_heads], **_about(tasks, [config.fraction])}, arrays


def _about(tasks: dict, fractions: list[float]) -> dict[str, Any]:
    return {"tasks": list(tasks), "metrics": [t.metric for t in tasks.values()], "fractions": list(fractions)}


def _named(name: str, iap: IAP) -> dict[str, np.ndarray]:
    return {f"{name}/{k}": compact(v) if k != "heads" else v for k, v in iap.arrays().items()}


def read_named_iap(record: Record, name: str) -> IAP:
    """The `IAP` that a record keeps under a name."""
    parts = {k.removeprefix(f"{name}/"): v for k, v in record.arrays.items() if k.startswith(f"{name}/")}
    if not parts:
        raise FslibError(f"record {record.kind}-{record.key} holds no pruning of {name!r}")
    about = {k: record.result[k] for k in ("tasks", "metrics", "fractions")}
    return IAP.from_arrays(**about, arrays=parts)


class EndingsConfig(TrainConfig):
    """One trunk and its endings: {name: {"kind": IAT, PCGrad or Stop, and its options}, or None for plain training}.

    pruned: the endings whose dissociation is measured, at `fractions`, on the first `prune_examples` of evaluation.
    """

    endings: dict[str, dict[str, Any] | None] = Field(min_length=1)
    pruned: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (0.3,)
    examples: int = Field(ge=1)
    prune_examples: int | None = Field(None, ge=2)


def make_ending(spec: dict[str, Any] | None) -> Ending | None:
    """An ending from its description in a config."""
    if spec is None:
        return None
    options = dict(spec)
    kind = options.pop("kind", "")
    if kind not in ENDINGS:
        raise unknown("kind of ending", kind, ENDINGS)
    try:
        return ENDINGS[kind](**options)
    except TypeError as error:
        raise FslibError(f"ending {spec}: {error}") from None


def _endings(config: EndingsConfig, store: Store) -> Outcome:
    tasks = config.load()
    pruned_on = {n: t.limited(eval=config.prune_examples) for n, t in tasks.items()}
    model = new_model(config, tasks)
    endings = {name: make_ending(spec) for name, spec in config.endings.items()}
    result: dict[str, Any] = {"branched": {}, "parameters": {}, "moved": {}}
    arrays: dict[str, np.ndarray] = {}
    movement: Movement | None = None
    for name, history in branch(model, tasks, endings, **training_options(config)):
        result["branched"][name], result["parameters"][name] = history.branched, model.n_parameters()
        scores = evaluate(model, tasks)
        arrays |= {f"predictions/{name}/{t}": compact(s.predictions) for t, s in scores.items()}
        arrays |= {f"heads/{name}/{t}": heads for t, heads in history.heads.items()}
        if isinstance(endings[name], Stop):
            movement = Movement(model, history.branched)
        elif movement is not None and history.branched == movement.step:
            result["moved"][name] = movement.since(history.heads)
        if name in config.pruned:
            scored = {
                t: head_importance(model, task, examples=config.examples, seed=config.seed) for t, task in tasks.items()
            }
            iap = prune_important_heads(model, pruned_on, config.fractions, 0, importance=scored, seed=config.seed)
            arrays |= _named(name, iap)
    each = [config.steps - start for start in result["branched"].values()]
    result["steps"] = {"branching": config.steps - min(each) + sum(each), "unbroken": config.steps * len(each)}
    return result | _about(tasks, sorted(config.fractions)), arrays


class Movement:
    """How far rows of heads move between a step and now, as a root mean square over weights."""

    def __init__(self, model: MultiTaskModel, step: int) -> None:
        self.step, self.rows = step, head_rows(model)
        self.then = {row.parameter: row.parameter.detach().clone() for row in self.rows}
        self.outside: np.ndarray | None = None

    def since(self, heads: dict[str, np.ndarray]) -> dict[str, float]:
        """For heads that are in some task's set, and in none; the first sets that are given say which."""
        if heads and self.outside is None:
            self.outside = ~np.logical_or.reduce(list(heads.values()))
        if self.outside is None:
            return {}
        parts = {"in no set": [r for r in self.rows if not (r.owners & ~self.outside).any()]}
        parts["in a set"] = [r for r in self.rows if (r.owners & ~self.outside).any()]
        return {what: self._rms(rows) for what, rows in parts.items() if rows}

    def _rms(self, rows: list[HeadRows]) -> float:
        changes = [(r.of(r.parameter.detach()) - r.of(self.then[r.parameter])).flatten() for r in rows]
        return float(torch.cat(changes).double().square().mean().sqrt())


class TransferConfig(TrainConfig):
    """From a source trained on `tasks`, plainly and with IAT, and from the encoder as it was, to a `target`."""

    target: str
    sizes: tuple[int | None, ...] = Field(min_length=1)
    iat: dict[str, Any]
    passes: int = Field(ge=1)
    min_steps: int = Field(ge=1)
    max_steps: int = Field(ge=1)

    def target_steps(self, size: int) -> int:
        """Steps for a training set of a size: `passes` over it, within the bounds."""
        return min(self.max_steps, max(self.min_steps, self.passes * size // self.batch_size))


def _transfer(config: TransferConfig, store: Store) -> Outcome:
    tasks, target = config.load(), cached_task(config.target)
    if config.target in tasks:
        raise FslibError(f"target {config.target!r} is one of the source's tasks {list(tasks)}: leave it out of them")
    target = target.limited(eval=config.eval_examples)
    model = new_model(config, tasks)
    arrays: dict[str, np.ndarray] = {}
    steps: dict[str, int] = {}

    def learn(source: str) -> None:
        for size in config.sizes:
            n = len(target.train) if size is None else size
            steps[str(n)] = config.target_steps(n)
            options: dict[str, Any] = {"size": size, "seed": config.seed, "batch_size": config.batch_size}
            for part in PARTS:
                with hidden():
                    found = transfer(model, target, part=part, steps=steps[str(n)], lr=config.lr, **options)
                arrays[f"predictions/{source}/{part}/{n}"] = compact(found.score.predictions)

    learn("pre-trained")
    endings: dict[str, Ending | None] = {"IAT": IAT(**config.iat), "multi-task": None}
    for name, _ in branch(model, tasks, endings, **training_options(config)):
        scores = evaluate(model, tasks)
        arrays |= {f"source/{name}/{t}": compact(s.predictions) for t, s in scores.items()}
        learn(name)
    return {"steps": steps, "metric": target.metric, "parts": list(PARTS)}, arrays


class SimilarityConfig(TrainingSettings):
    """Similarity of every two of `tasks`, from models trained on one of them each, for `steps` steps."""

    seed: int = Field(0, ge=0)
    examples: int = Field(ge=2)
    fraction: float = Field(0.3, gt=0, le=1)


def _similarity(config: SimilarityConfig, store: Store) -> Outcome:
    """Measured on models that never saw the pair, so that no measure shares its noise with the pair's dissociation."""
    tasks = config.load()
    shared: dict[str, Any] = {"examples": config.examples, "seed": config.seed}
    parts = [task.limited(train=config.examples, seed=config.seed).train for task in tasks.values()]
    pretrained = MultiTaskModel.from_pretrained(config.encoder, tasks, max_length=config.max_length)
    found: dict[str, list] = {measure: [] for measure in MEASURES}
    for name, task in tasks.items():
        settings = {k: getattr(config, k) for k in TrainingSettings.model_fields} | {"tasks": (name,)}
        single = TrainConfig(**settings, seed=config.seed)
        train(model := new_model(single, {name: task}), task, **training_options(single))
        found["importance"].append(head_importance(model, task, **shared))
        found["TaskEmb"].append(task_embedding(model, task, **shared))
        found["TextEmb"].append(text_embedding(pretrained, task, **shared))
        # of one task's pairs and another's single texts alike: all models see the texts of all tasks
        found["CKA"].append(np.concatenate([representations(model, part) for part in parts]))
    found["top heads"] = found["importance"]
    compare: dict[str, Any] = {
        "importance": importance_similarity,
        "top heads": lambda a, b: head_overlap(a, b, config.fraction),
        "TaskEmb": task_similarity,
        "TextEmb": cosine,
        "CKA": linear_cka,
    }
    matrices = {m: [[float(compare[m](a, b)) for b in found[m]] for a in found[m]] for m in MEASURES}
    arrays = {f"importance/{t}": m.astype(np.float32) for t, m in zip(tasks, found["importance"], strict=True)}
    return {"tasks": list(tasks), "similarity": matrices}, arrays


UNITS |= {
    "selection": (SelectionConfig, _selection),
    "endings": (EndingsConfig, _endings),
    "transfer": (TransferConfig, _transfer),
    "similarity": (SimilarityConfig, _similarity),
}

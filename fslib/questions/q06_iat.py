"""Notebook 06: claims C3, C4 and C6, does training only a task's own heads raise specialization and scores?"""

from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pydantic import Field

from fslib.dissociation import IAP
from fslib.endings import Ending, PCGrad, Stop
from fslib.errors import FslibError, unknown
from fslib.evaluation import evaluate
from fslib.heads import checked_fractions
from fslib.iat import IAT, HeadRows, head_rows
from fslib.importance import head_importance
from fslib.intervals import Measure, mean_of, score_measure
from fslib.model.multitask import MultiTaskModel
from fslib.pruning import prune_important_heads
from fslib.study.evidence import (
    LEAST_CHANGED,
    Evidence,
    Half,
    Part,
    above_constant,
    changed_share,
    differences,
    entering,
    gate_half,
    halved,
    learned,
    score_half,
)
from fslib.study.fingerprints import cached_task
from fslib.study.plots import forest, looks, panels, styled
from fslib.study.records import Record, Result, Store, Unit
from fslib.study.study import Study, plans
from fslib.study.units import SeededFineTuning, TrainUnit, iap_arrays, in_bytes, recorded_iap
from fslib.training import branch, lr_share

ENDINGS: dict[str, Any] = {"IAT": IAT, "PCGrad": PCGrad, "Stop": Stop}
RANDOM = "IAT, random heads"
PRUNED = ("trunk", "plain", "IAT", RANDOM)  # the endings whose dissociation is measured


class EndingsUnit(SeededFineTuning, Unit):
    """One trunk and its endings: {name: {"kind": IAT, PCGrad or Stop, and its options}, or None for plain training}.

    pruned: the endings whose dissociation is measured, at `fractions`, on the first `prune_examples` of evaluation.
    """

    kind: ClassVar[str] = "endings"
    endings: dict[str, dict[str, Any] | None] = Field(min_length=1)
    pruned: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (0.3,)
    examples: int = Field(ge=1)
    prune_examples: int | None = Field(None, ge=2)

    def check(self) -> None:
        """Raise FslibError for what the encoder's heads or the number of steps do not allow."""
        super().check()
        checked_fractions(self.fractions, self.shape())
        for spec in self.endings.values():
            if ending := make_ending(spec):
                ending.start(self.steps)
            if spec and "alpha" in spec:
                checked_fractions([spec["alpha"]], self.shape(), what="alpha")

    def compute(self, store: Store) -> Result:
        """Train the trunk, then every ending from it; score each, and prune those that are named."""
        tasks = self.load()
        model = self.new_model(tasks)
        endings = {name: make_ending(spec) for name, spec in self.endings.items()}
        values: dict[str, Any] = {"branched": {}, "parameters": {}, "moved": {}}
        arrays: dict[str, np.ndarray] = {}
        movement: Movement | None = None
        for name, history in branch(model, tasks, endings, **self.options()):
            values["branched"][name], values["parameters"][name] = history.branched, model.n_parameters()
            scores = evaluate(model, tasks)
            arrays |= {f"predictions/{name}/{t}": in_bytes(s.predictions) for t, s in scores.items()}
            arrays |= {f"heads/{name}/{t}": heads for t, heads in history.heads.items()}
            if isinstance(endings[name], Stop):
                movement = Movement(model, history.branched)
            elif movement is not None and history.branched == movement.step:
                values["moved"][name] = movement.since(history.heads)
            if name in self.pruned:
                arrays |= iap_arrays(self._prune(model), name)
        each = [self.steps - start for start in values["branched"].values()]
        values["steps"] = {"branching": self.steps - min(each) + sum(each), "unbroken": self.steps * len(each)}
        metrics = [task.metric for task in tasks.values()]
        return Result(values | {"tasks": list(tasks), "metrics": metrics, "fractions": sorted(self.fractions)}, arrays)

    def _prune(self, model: MultiTaskModel) -> IAP:
        """Score every task's heads as the model is now, and prune them."""
        tasks = self.load()
        maps = {t: head_importance(model, task, examples=self.examples, seed=self.seed) for t, task in tasks.items()}
        limited = {n: t.limited(eval=self.prune_examples) for n, t in tasks.items()}
        return prune_important_heads(model, limited, self.fractions, 0, importance=maps, seed=self.seed)


def make_ending(spec: dict[str, Any] | None) -> Ending | None:
    """Return an ending from its description. Raises FslibError for an unknown kind or option."""
    if spec is None:
        return None
    options = dict(spec)
    kind = options.pop("kind", "")
    if kind not in ENDINGS:
        raise unknown("kind of ending", kind, ENDINGS)
    try:
        ending: Ending = ENDINGS[kind](**options)
    except TypeError as error:
        raise FslibError(f"ending {spec}: {error}") from None
    return ending


class Movement:
    """How far rows of heads move between a step and now, as a root mean square over weights."""

    def __init__(self, model: MultiTaskModel, step: int) -> None:
        self.step, self.rows = step, head_rows(model)
        self.then = {row.parameter: row.parameter.detach().clone() for row in self.rows}
        self.inside: np.ndarray | None = None

    def since(self, heads: dict[str, np.ndarray]) -> dict[str, float]:
        """Return how far rows moved of heads in some task's set, and in none; the first sets given say which."""
        if heads and self.inside is None:
            self.inside = np.logical_or.reduce(list(heads.values()))
        if self.inside is None:
            return {}
        parts = {"in no set": [r for r in self.rows if not r.belong_to(self.inside)]}
        parts["in a set"] = [r for r in self.rows if r.belong_to(self.inside)]
        return {what: self._rms(rows) for what, rows in parts.items() if rows}

    def _rms(self, rows: list[HeadRows]) -> float:
        changes = [(r.of(r.parameter.detach()) - r.of(self.then[r.parameter])).flatten() for r in rows]
        return float(torch.cat(changes).double().square().mean().sqrt())


def design(study: Study) -> dict[str, dict[str, Any] | None]:
    """Return every ending by name, as a unit describes it; None is plain training."""
    p = study.profile
    iat = {"kind": "IAT", "delta": p.delta, "alpha": p.alpha}
    mixed = {"PCGrad": {"kind": "PCGrad", "delta": p.delta}}
    mixed |= {"mixed batches": {"kind": "PCGrad", "delta": p.delta, "project": False}}
    return {
        "trunk": {"kind": "Stop", "delta": p.delta},
        "IAT": iat,
        "plain": None,
        RANDOM: iat | {"heads": "random"},
        "IAT, least heads": iat | {"heads": "least"},
        **({} if left_out(study) else mixed),
        "IAT, others frozen": iat | {"others": "freeze"},
        "IAT, leaky": iat | {"strict": False},
        **{f"IAT, alpha {a:g}": iat | {"alpha": a} for a in p.other_alphas},
        **{f"IAT, delta {d:g}": iat | {"delta": d} for d in p.other_deltas},
    }


def left_out(study: Study) -> str:
    """Say why there are no endings that mix tasks in a batch, or nothing ("") where there are."""
    tasks, batch = len(study.profile.tasks), study.profile.batch_size
    return f"no PCGrad: a batch of {batch} has no example of some of {tasks} tasks" if batch < tasks else ""


def seeds(study: Study) -> list[int]:
    """Return the seeds of the trunks."""
    return study.seeds_of(study.profile.ending_seeds)


def endings_unit(study: Study, seed: int) -> EndingsUnit:
    """Return one trunk and all its endings."""
    p = study.profile
    settings = study.training(seed, small=True, eval_examples=p.ending_examples).model_dump()
    options: dict[str, Any] = {"pruned": PRUNED, "fractions": (p.alpha,), "examples": p.small_examples}
    return EndingsUnit(**settings, **options, endings=design(study), prune_examples=p.eval_examples)


def single_unit(study: Study, seed: int, task: str) -> TrainUnit:
    """Return a task trained alone, for as many steps as it gets on the trunk and its plain ending."""
    return study.training(seed, task, small=True, eval_examples=study.profile.ending_examples)


@plans("06")
def plan(study: Study) -> list[Unit]:
    """Return every seed's trunk with its endings, and every task alone."""
    single = [single_unit(study, s, t) for s in seeds(study) for t in study.profile.tasks]
    return [*(endings_unit(study, s) for s in seeds(study)), *single]


def _records(study: Study) -> list[Record]:
    return [study.store.get(endings_unit(study, s)) for s in seeds(study)]


def _predictions(study: Study, half: Half) -> dict[str, dict[str, np.ndarray]]:
    """Return {ending, or "single-task": {task: (seeds, n)}} on a half of the evaluation examples."""
    records = _records(study)

    def single(task: str) -> list[np.ndarray]:
        return [study.store.get(single_unit(study, s, task)).arrays[f"predictions/{task}"] for s in seeds(study)]

    found = {"single-task": {t: halved(np.stack(single(t)), half) for t in study.profile.tasks}}
    for name in records[0].config["endings"]:
        found[name] = {
            t: halved(np.stack([r.arrays[f"predictions/{name}/{t}"] for r in records]), half)
            for t in study.profile.tasks
        }
    return found


def score_measures(study: Study) -> dict[str, dict[str, Measure]]:
    """Return {ending, or "single-task": {task: score of every seed's model, on the half that is scored}}."""
    tasks = {t: cached_task(t).limited(eval=study.profile.ending_examples) for t in study.profile.tasks}
    labels = {t: halved(task.eval.labels, score_half) for t, task in tasks.items()}
    return {
        name: {t: score_measure(t, tasks[t].metric, p, labels[t]) for t, p in by_task.items()}
        for name, by_task in _predictions(study, score_half).items()
    }


def scores(study: Study, reference: str = "plain") -> pd.DataFrame:
    """Return one row per ending (and single-task training) and task, and their mean: score, minus the reference's."""
    table = differences(score_measures(study), reference, ("ending", "task"))
    table.insert(2, "seeds", len(seeds(study)))
    return table


def _pruned(study: Study, ending: str) -> IAP:
    """Return what pruning did after an ending, over seeds."""
    return IAP.over_seeds([recorded_iap(record, ending) for record in _records(study)])


def dissociation_measures(study: Study) -> dict[str, dict[str, Measure]]:
    """Return {ending: {task: D of every seed's model}}, of the tasks that plain training has learned, or all."""
    plain, found = _pruned(study, "plain"), {}
    for name in PRUNED:
        result = entering(_pruned(study, name), plain).dissociation(draws=study.profile.draws)
        found[name] = {task: result.measure(task) for task in result.tasks}
    return found


def dissociation(study: Study, reference: str = "plain") -> pd.DataFrame:
    """Return D (lesion, at IAT's alpha) before and after each ending, per task and as mean, minus the reference's."""
    table = differences(dissociation_measures(study), reference, ("ending", "task"), value="D")
    table.insert(2, "seeds", len(seeds(study)))
    return table


def dose(study: Study) -> str:
    """Say how much of a treatment IAT is: its share of the steps and of the learning rate, and what it changes."""
    p = study.profile
    spent = 100 * lr_share(p.small_steps, p.delta, p.lr_floor)
    return (
        f"Dose: the last {100 * p.delta:g} % of the steps spend {spent:.1f} % of the learning rate, and IAT changes "
        f"{100 * changed(study):.1f} % of the predictions of plain training."
    )


def changed(study: Study) -> float:
    """Return the share of predictions that IAT changes against plain training, on the half that no score is from."""
    predictions = _predictions(study, gate_half)
    return changed_share(predictions["IAT"], predictions["plain"])


def evidence(study: Study) -> dict[str, Evidence]:
    """Return what there is on C3 and C4: IAT minus plain training, and minus IAT with random heads; both are needed."""
    share, failed = changed(study), ""
    if share < LEAST_CHANGED:
        failed = f"{100 * share:.1f} % of predictions changed, and a treatment is {100 * LEAST_CHANGED:g} % or more"
    passed = learned(above_constant(_pruned(study, "plain")))
    few = "" if len(passed) > 1 else "fewer than two tasks are learned"
    by_claim = {"C3": (dissociation_measures(study), 1.0), "C4": (score_measures(study), 100.0)}
    found = {}
    for claim, (measures, scale) in by_claim.items():
        mean = {name: mean_of(list(measures[name].values())).scaled(scale) for name in ("IAT", "plain", RANDOM)}
        parts = [
            Part.of(f"IAT minus {words}", mean["IAT"] - mean[name])
            for name, words in (("plain", "plain training"), (RANDOM, "IAT with random heads"))
        ]
        found[claim] = Evidence(claim, tuple(parts), failed or (few if claim == "C3" else ""))
    return found


def movement(study: Study) -> pd.DataFrame:
    """Return one row per ending: how far head rows moved (root mean square), in units of plain training's."""
    moved = [r.result["moved"] for r in _records(study)]
    rows = []
    for name in moved[0]:
        if all(name in m and m[name] for m in moved):
            shares = {k: np.mean([m[name][k] / m["plain"][k] for m in moved if k in m[name]]) for k in moved[0][name]}
            rows.append({"ending": name, **{f"rows of heads {k}": v for k, v in shares.items()}})
    return pd.DataFrame(rows)


def parameters(study: Study) -> pd.DataFrame:
    """Return one row per seed and ending: the parameters of the model after it."""
    rows = [
        {"seed": s, "ending": name, "parameters": n}
        for s, record in zip(seeds(study), _records(study), strict=True)
        for name, n in record.result["parameters"].items()
    ]
    return pd.DataFrame(rows)


def counted_steps(study: Study) -> pd.DataFrame:
    """Count the steps that the endings took by branching, and would have taken one by one."""
    record = study.store.get(endings_unit(study, study.seed))
    steps, full = record.result["steps"], record.config["steps"]
    named = {"one trunk, all endings": steps["branching"], "every ending from the first step": steps["unbroken"]}
    return pd.DataFrame([{"how": how, "steps": n, "trainings": n / full} for how, n in named.items()])


def sentences(study: Study) -> str:
    """Say what becomes of C3 and C4 by themselves, before p is corrected for the other claims."""
    return "\n".join([*(f"{claim} {found}" for claim, found in evidence(study).items()), dose(study)])


@styled
def plot_scores(table: pd.DataFrame, reference: str = "plain") -> Figure:
    """Draw, left: mean score minus the reference's. Then the same for each task."""
    tasks = list(dict.fromkeys(table["task"]))
    tasks = ["mean", *(t for t in tasks if t != "mean")]
    names = [n for n in dict.fromkeys(table["ending"]) if n != reference]
    figure, axes = panels(len(tasks), 0.8 + 0.22 * len(names), sharey=True, width_ratios=[1.6, *[1] * (len(tasks) - 1)])
    for ax, task in zip(axes, tasks, strict=True):
        part = table[table["task"] == task].set_index("ending").loc[names]
        colour = "black" if task == "mean" else looks(tasks[1:])[task]["color"]
        forest(ax, names, *(100 * part[k] for k in (f"minus {reference}", "diff low", "diff high")), color=colour)
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set_title("mean over tasks" if task == "mean" else task)
    figure.supxlabel(f"score minus that of {reference} multi-task training, same trunk (points)", fontsize=8.5)
    return figure


@styled
def plot_dissociation(table: pd.DataFrame, reference: str = "plain") -> Figure:
    """Draw, left: dissociation at the end of training. Right: its difference from the reference's."""
    part = table[table["task"] == "mean"]
    figure, (left, right) = panels(2, 0.8 + 0.26 * len(part), sharey=True)
    forest(left, part["ending"], part["D"], part["low"], part["high"])
    forest(right, part["ending"], part[f"minus {reference}"], part["diff low"], part["diff high"])
    for ax in (left, right):
        ax.axvline(0, color="black", linewidth=0.6)
    left.set(xlabel="dissociation D (points)")
    right.set(xlabel=f"D minus that of {reference} training (points)")
    return figure

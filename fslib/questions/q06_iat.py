"""Notebook 06: claims C3, C4 and C6, does training only a task's own heads raise specialization and scores?"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.claims import (
    LEAST_CHANGED,
    SESOI,
    Evidence,
    Half,
    Part,
    above_constant,
    changed_share,
    entering,
    gate_examples,
    gate_half,
    halved,
    learned,
    paired_differences,
    score_half,
)
from fslib.iap import IAP
from fslib.intervals import Measure, mean_of, score_measure
from fslib.plot import COLOURS, MARKERS, forest, looks, panels, percent, styled
from fslib.study.design import at_dose
from fslib.study.fingerprints import cached_task
from fslib.study.store import Record
from fslib.study.study import Study
from fslib.study.units import PLAIN, RANDOM, TREATED, TRUNK, EndingsUnit, recorded_iap
from fslib.training import lr_share


def alone_seeds(study: Study) -> list[int]:
    """Return the seeds of which every task is also trained alone."""
    return study.ending_seeds[: study.profile.alone_seeds]


@dataclass(frozen=True)
class Dose:
    """An ending with IAT, the same with random heads, and where they stand: in which trunks, of which seeds.

    floor: under the trunk's learning rate, as a share of the highest. decides: whether claims are decided at this dose.
    """

    ending: str
    control: str
    delta: float
    floor: float
    decides: bool
    units: tuple[EndingsUnit, ...]

    @property
    def share(self) -> float:
        """The share of the learning rate, summed over steps, that the ending gets."""
        return lr_share(self.units[0].steps, self.delta, self.floor)


def deciding(study: Study) -> Dose:
    """Return the dose that claims are decided at."""
    p = study.profile
    return Dose(
        TREATED,
        RANDOM,
        p.delta,
        p.lr_floor,
        True,
        tuple(study.endings_unit(s) for s in study.ending_seeds),
    )


def all_doses(study: Study) -> list[Dose]:
    """Return every dose: the one that decides, other lengths of the ending, and floors under the learning rate."""
    p, chosen = study.profile, study.dose_seeds
    trunks = tuple(study.endings_unit(s) for s in chosen)
    lengths = [
        Dose(at_dose(TREATED, d), at_dose(RANDOM, d), d, p.lr_floor, False, trunks) for d in p.doses
    ]
    lifted = [tuple(study.floor_unit(s, floor) for s in chosen) for floor in p.dose_floors]
    floors = [
        Dose(TREATED, RANDOM, p.floor_delta, floor, False, u)
        for floor, u in zip(p.dose_floors, lifted, strict=True)
    ]
    return [deciding(study), *lengths, *floors]


def _predictions(
    study: Study, dose: Dose, half: Half, names: Iterable[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Return {ending: {task: (seeds, n)}} on a half of the evaluation examples, of the endings that are named."""
    records = [study.store.get(unit) for unit in dose.units]
    return {
        name: {
            t: halved(np.stack([r.arrays[f"predictions/{name}/{t}"] for r in records]), half)
            for t in study.ending_tasks
        }
        for name in names
    }


def _shared(lists: Iterable[Iterable[str]]) -> list[str]:
    """Return the names that stand in all lists, in the order of the first."""
    first, *others = map(list, lists)
    return [name for name in first if all(name in other for other in others)]


def score_measures(study: Study, dose: Dose, names: Iterable[str]) -> dict[str, dict[str, Measure]]:
    """Return {ending: {task: score of every seed's model, on the half that is scored}}, in the trunks of a dose."""
    return _measured(study, _predictions(study, dose, score_half, names))


def _measured(
    study: Study, predictions: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, Measure]]:
    """Return the scores of predictions, {ending: {task: (seeds, n)}}, on the half that is scored."""
    tasks = {
        t: cached_task(t).limited(eval=study.profile.ending_examples) for t in study.ending_tasks
    }
    labels = {t: halved(task.eval.labels, score_half) for t, task in tasks.items()}
    return {
        name: {t: score_measure(t, tasks[t].metric, p, labels[t]) for t, p in by_task.items()}
        for name, by_task in predictions.items()
    }


def _single(study: Study) -> dict[str, dict[str, Measure]]:
    """Return {"single-task": {task: score of models trained on it alone, of `alone_seeds`}}."""
    found = {}
    for task in study.ending_tasks:
        records = [study.store.get(study.single_unit(s, task)) for s in alone_seeds(study)]
        found[task] = halved(
            np.stack([r.arrays[f"predictions/{task}"] for r in records]), score_half
        )
    return _measured(study, {"single-task": found})


def scores(study: Study, reference: str = PLAIN) -> pd.DataFrame:
    """Return one row per ending (and single-task training) and task, and their mean: score, minus the reference's."""
    alone = replace(deciding(study), units=tuple(study.endings_unit(s) for s in alone_seeds(study)))
    single = _single(study) | score_measures(study, alone, [reference])
    table = paired_differences(single, reference, ("ending", "task")).query(
        "ending == 'single-task'"
    )
    table.insert(2, "seeds", len(alone.units))
    every = _compared(study, score_measures, lambda unit: unit.endings, reference, "score")
    return pd.concat([table, every], ignore_index=True)


def _compared(
    study: Study,
    measures: Callable[[Study, Dose, list[str]], dict[str, dict[str, Measure]]],
    endings: Callable[[EndingsUnit], Iterable[str]],
    reference: str,
    value: str,
) -> pd.DataFrame:
    """Return every ending beside the reference, both on as many seeds as have that ending."""
    every = deciding(study)
    whole = replace(every, units=tuple(study.endings_unit(s) for s in study.dose_seeds))
    common = _shared(map(endings, every.units))
    extra = [name for name in _shared(map(endings, whole.units)) if name not in common]
    frames = []
    for dose, names in ((every, common), (whole, [*extra, reference] if extra else [])):
        if names:
            table = paired_differences(
                measures(study, dose, names), reference, ("ending", "task"), value=value
            )
            table.insert(2, "seeds", len(dose.units))
            frames.append(table if dose is every else table[table["ending"] != reference])
    return pd.concat(frames, ignore_index=True)


def _pruned(study: Study, dose: Dose, ending: str) -> IAP:
    """Return what pruning did after an ending, over seeds."""
    return IAP.over_seeds([recorded_iap(study.store.get(unit), ending) for unit in dose.units])


def dissociation_measures(
    study: Study, dose: Dose, names: Iterable[str]
) -> dict[str, dict[str, Measure]]:
    """Return {ending: {task: D of every seed's model}}, of the tasks that plain training has learned, or all.

    Whatever the dose, the trunks that decide say which tasks are learned: all doses are compared on the same ones.
    """
    gated, found = _pruned(study, deciding(study), PLAIN), {}
    for name in names:
        result = entering(_pruned(study, dose, name), gated).dissociation(draws=study.profile.draws)
        found[name] = {task: result.measure(task) for task in result.tasks}
    return found


def dissociation(study: Study, reference: str = PLAIN) -> pd.DataFrame:
    """Return D (lesion) before and after each ending, per task and as mean over tasks, minus the reference's."""
    return _compared(study, dissociation_measures, lambda unit: unit.pruned, reference, "D")


def dose(study: Study) -> str:
    """Say how much of a treatment IAT is: its share of the steps and of the learning rate, and what it changes."""
    found = deciding(study)
    return (
        f"Dose: the last {100 * found.delta:g} % of the steps spend {100 * found.share:.1f} % of the learning rate, "
        f"and IAT changes {100 * changed(study, found):.1f} % of the predictions of plain training."
    )


def changed(study: Study, dose: Dose) -> float:
    """Return the share of predictions that IAT changes against plain training, on the half that no score is from."""
    predictions = _predictions(study, dose, gate_half, [dose.ending, PLAIN])
    return changed_share(predictions[dose.ending], predictions[PLAIN])


def changed_beside_d(study: Study, dose: Dose) -> float:
    """Return the same on the examples that stand beside those D is scored on: fewer are evaluated under lesions."""
    pruned = [_pruned(study, dose, name) for name in (dose.ending, PLAIN)]
    return changed_share(
        *({t: gate_examples(iap, t).predictions for t in iap.tasks} for iap in pruned)
    )


def _effects(study: Study, dose: Dose) -> dict[str, tuple[Part, Part]]:
    """Return the two parts of C3 and of C4: IAT minus plain training, and minus IAT with random heads."""
    names = (dose.ending, PLAIN, dose.control)
    by_claim = {
        "C3": (dissociation_measures(study, dose, names), 1.0),
        "C4": (score_measures(study, dose, names), 100.0),
    }
    found = {}
    for claim, (measures, scale) in by_claim.items():
        treated, plain, random = (
            mean_of(list(measures[name].values())).scaled(scale) for name in names
        )
        found[claim] = (
            Part.of("IAT minus plain training", treated - plain),
            Part.of("IAT minus IAT with random heads", treated - random),
        )
    return found


def decide(study: Study) -> dict[str, Evidence]:
    """Return what there is on C3 and C4: IAT minus plain training, and minus IAT with random heads; both are needed."""
    dose = deciding(study)
    failed = {"C3": _too_weak(changed_beside_d(study, dose)), "C4": _too_weak(changed(study, dose))}
    if len(learned(above_constant(_pruned(study, dose, PLAIN)))) < 2:
        failed["C3"] = failed["C3"] or "fewer than two tasks are learned"
    return {
        claim: Evidence(claim, parts, failed[claim])
        for claim, parts in _effects(study, dose).items()
    }


def _too_weak(share: float) -> str:
    """Say that a treatment is none, by the share of predictions that it changes, or nothing ("") if it is one."""
    if share >= LEAST_CHANGED:
        return ""
    return f"{100 * share:.1f} % of predictions changed, and a treatment is {100 * LEAST_CHANGED:g} % or more"


def doses(study: Study) -> pd.DataFrame:
    """Return one row per dose and part of a claim: how much of a treatment it is, and its effect with the interval.

    dose: the share of the learning rate, summed over steps, that the ending gets. changed: of the predictions of plain
    training. decides: whether the claims are decided at this dose.
    """
    rows = []
    for dose in all_doses(study):
        shared = {
            "delta": dose.delta,
            "floor": dose.floor,
            "dose": dose.share,
            "changed": changed(study, dose),
        }
        for claim, parts in _effects(study, dose).items():
            for part in parts:
                i = part.interval
                row = {
                    "claim": claim,
                    "difference": part.what,
                    **shared,
                    "seeds": len(dose.units),
                    "value": i.value,
                }
                row |= {
                    "low": i.low,
                    "high": i.high,
                    "p": part.tested,
                    "MDE": i.mde,
                    "decides": dose.decides,
                }
                rows.append(row)
    order = {what: i for i, what in enumerate(dict.fromkeys(row["difference"] for row in rows))}
    keys = {"difference": order.get}
    return pd.DataFrame(rows).sort_values(
        ["claim", "difference", "floor", "dose"],
        key=lambda column: column.map(keys[column.name]) if column.name in keys else column,
        ignore_index=True,
    )


def _records(study: Study) -> list[Record]:
    return [study.store.get(unit) for unit in deciding(study).units]


def movement(study: Study) -> pd.DataFrame:
    """Return one row per ending: how far head rows moved (root mean square), in units of plain training's."""
    moved = [r.result["moved"] for r in _records(study)]
    rows = []
    for name in dict.fromkeys(name for m in moved for name in m):
        mine = [m for m in moved if m.get(name)]
        parts = dict.fromkeys(k for m in mine for k in m[name])
        shares = {
            k: np.mean([m[name][k] / m["plain"][k] for m in mine if k in m[name]]) for k in parts
        }
        if shares:
            rows.append(
                {
                    "ending": name,
                    "seeds": len(mine),
                    **{f"rows of heads {k}": v for k, v in shares.items()},
                }
            )
    return pd.DataFrame(rows)


def parameters(study: Study) -> pd.DataFrame:
    """Return one row per seed and ending: the parameters of the model after it."""
    rows = [
        {"seed": s, "ending": name, "parameters": n}
        for s, record in zip(study.ending_seeds, _records(study), strict=True)
        for name, n in record.result["parameters"].items()
    ]
    return pd.DataFrame(rows)


def counted_steps(study: Study) -> pd.DataFrame:
    """Count the steps that the endings took by branching, and would have taken one by one."""
    unit = study.endings_unit(study.seeds[0])
    branched = study.store.get(unit).result["branched"]
    stops = {
        name: unit.steps if ending is None else ending.stop(unit.steps)
        for name, ending in unit.made().items()
    }
    trunk = max(branched.values())
    named = {
        "one trunk, all endings": trunk
        + sum(stops[name] - start for name, start in branched.items()),
        "every ending from the first step": sum(stops.values()),
    }
    return pd.DataFrame(
        [{"how": how, "steps": n, "trainings": n / unit.steps} for how, n in named.items()]
    )


def sentences(study: Study) -> str:
    """Say what becomes of C3 and C4 by themselves, before p is corrected for the other claims."""
    return "\n".join(
        [*(f"{claim} {found}" for claim, found in decide(study).items()), dose(study)]
    )


@styled
def plot_scores(table: pd.DataFrame, order: Sequence[str], reference: str = "plain") -> Figure:
    """Draw scores minus the reference's, mean and per task; without the trunk, far below. order: of tasks' colours."""
    tasks = list(dict.fromkeys(table["task"]))
    tasks = ["mean", *(t for t in tasks if t != "mean")]
    names = [n for n in dict.fromkeys(table["ending"]) if n not in (reference, TRUNK)]
    figure, axes = panels(
        len(tasks),
        0.8 + 0.22 * len(names),
        sharey=True,
        width_ratios=[1.6, *[1] * (len(tasks) - 1)],
    )
    for ax, task in zip(axes, tasks, strict=True):
        part = table[table["task"] == task].set_index("ending").loc[names]
        colour = "black" if task == "mean" else looks(order)[task]["color"]
        forest(
            ax,
            names,
            *(100 * part[k] for k in (f"minus {reference}", "diff low", "diff high")),
            color=colour,
        )
        ax.axvline(0, color="black", linewidth=0.6)
        ax.set_title("mean over tasks" if task == "mean" else task)
    figure.supxlabel(f"score minus that of {reference} multi-task training (points)", fontsize=8.5)
    return figure


@styled
def plot_dissociation(table: pd.DataFrame, reference: str = "plain") -> Figure:
    """Draw, left: dissociation before the ending (trunk) and after it. Right: an ending's minus the reference's."""
    part = table[table["task"] == "mean"]
    beside = part.mask(part["ending"] == TRUNK)
    figure, (left, right) = panels(2, 0.8 + 0.26 * len(part), sharey=True)
    forest(left, part["ending"], part["D"], part["low"], part["high"])
    forest(
        right, part["ending"], beside[f"minus {reference}"], beside["diff low"], beside["diff high"]
    )
    for ax in (left, right):
        ax.axvline(0, color="black", linewidth=0.6)
    left.set(xlabel="dissociation D (points)")
    right.set(xlabel=f"D minus that of {reference} training (points)")
    return figure


@styled
def plot_doses(table: pd.DataFrame) -> Figure:
    """Draw the effect of IAT over its dose, one panel per claim and control, one line per floor of the learning rate.

    table: of `doses`. Band: below the smallest effect of interest. Filled: the dose that decides.
    """
    pairs = list(table[["claim", "difference"]].drop_duplicates().itertuples(index=False))
    figure, axes = panels(len(pairs), 2.5, 2, sharex=True, sharey="row")
    for number, (ax, (claim, difference)) in enumerate(zip(axes, pairs, strict=True)):
        sesoi, unit = SESOI[claim][0], "points of score" if claim == "C4" else "points of D"
        ax.axhspan(-sesoi, sesoi, color="#eeeeee", lw=0)
        ax.axhline(0, color="black", linewidth=0.6)
        rows = table[(table["claim"] == claim) & (table["difference"] == difference)]
        for i, (floor, part) in enumerate(rows.groupby("floor")):
            ax.plot(part["dose"], part["value"], color=COLOURS[i], linewidth=1)
            for _, row in part.iterrows():
                error = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
                ax.errorbar(
                    row["dose"],
                    row["value"],
                    yerr=error,
                    fmt=MARKERS[i],
                    color=COLOURS[i],
                    markerfacecolor=COLOURS[i] if row["decides"] else "white",
                    capsize=2,
                )
                ax.annotate(
                    rf"$\delta$ {row['delta']:g}",
                    (row["dose"], row["high"]),
                    fontsize=6.5,
                    ha="center",
                    va="bottom",
                )
            ax.plot(
                [],
                [],
                color=COLOURS[i],
                marker=MARKERS[i],
                label=f"floor {floor:g}" if floor else "decay to 0",
            )
        ax.set_title(f"{claim}: {difference}")
        percent(ax, "x")
        if number % 2 == 0:  # the first of a row, whose axes are shared
            mine = table[table["claim"] == claim]
            ends, most = np.array([*mine["low"], *mine["high"], -sesoi, sesoi]), table["dose"].max()
            ax.set(
                ylabel=unit,
                xlim=(-0.05 * most, 1.1 * most),
                ylim=(1.2 * np.nanmin(ends), 1.2 * np.nanmax(ends)),
            )
    for ax in axes[-2:]:
        ax.set_xlabel("share of the learning rate in the ending (%)")
    axes[0].legend(loc="best")
    return figure

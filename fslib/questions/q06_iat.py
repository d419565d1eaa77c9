"""Notebook 06: claims C3, C4, C6, does training only own heads raise specialization and scores?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fslib import claims
from fslib.data.tasks import Task
from fslib.iap import IAP
from fslib.iat import IAT
from fslib.intervals import Measure, mean_of, score_measure
from fslib.plot import (
    COLOURS,
    MARKERS,
    Look,
    forest,
    looks,
    panels,
    percent,
    styled,
    whiskers,
    zero,
)
from fslib.questions.tables import D_ENDS, ENDS, columns, ends, minus, scope
from fslib.study.design import at_dose
from fslib.study.store import Record
from fslib.study.study import Study
from fslib.study.units import PLAIN, RANDOM, TREATED, TRUNK, Data, recorded_iap
from fslib.training import lr_share

NAMES = ("ending", "task")
DOSES = ["claim", "difference", "delta", "floor", "dose", "changed", "seeds", *ENDS, "p", "MDE"]
DOSES += ["decides"]
CONTROLS = ("plain training", "IAT with random heads")  # what IAT is compared with, in this order
Measures = dict[str, dict[str, Measure]]  # {ending: {task: one number of every seed's model}}


@dataclass(frozen=True)
class Dose:
    """An ending with IAT, the same with random heads, and the trunks that they go on from.

    Attributes:
        ending: The name of the ending with IAT.
        control: The name of that with random heads.
        delta: The share of the steps that the ending takes.
        floor: Of the trunk's learning rate, as a share of the highest.
        records: Trunks with their endings, one per seed.
        decides: Whether claims are decided at this dose.
    """

    ending: str
    control: str
    delta: float
    floor: float
    records: Sequence[Record]
    decides: bool = False

    @property
    def share(self) -> float:
        """The share of the learning rate, summed over steps, that the ending gets."""
        return lr_share(self.records[0].config["steps"], self.delta, self.floor)

    def predictions(self, ending: str, task: str) -> np.ndarray:
        """Return what every seed's model answers after an ending, (seeds, n)."""
        return np.stack([r.arrays[f"predictions/{ending}/{task}"] for r in self.records])

    def pruned(self, ending: str) -> IAP:
        """Return what pruning did after an ending, over seeds."""
        return IAP.over_seeds([recorded_iap(record, ending) for record in self.records])


def main(study: Study, seeds: Sequence[int] | None = None) -> Dose:
    """Return the dose of the profile's `delta`, in the trunks of these seeds (None: of all)."""
    p, chosen = study.profile, study.ending_seeds if seeds is None else seeds
    records = [study.store.get(study.endings_unit(s)) for s in chosen]
    return Dose(TREATED, RANDOM, p.delta, p.lr_floor, records)


def all_doses(study: Study) -> list[Dose]:
    """Return the main dose, other lengths of the ending, and other floors.

    What decides is the paper's length, where there is one, else the main one.
    """
    p, found = study.profile, [main(study)]
    whole = main(study, study.dose_seeds)
    for delta in p.doses:
        names = at_dose(TREATED, delta), at_dose(RANDOM, delta)
        found.append(Dose(*names, delta, p.lr_floor, whole.records))
    for floor in p.dose_floors:
        records = [study.store.get(study.floor_unit(s, floor)) for s in study.dose_seeds]
        found.append(Dose(TREATED, RANDOM, p.floor_delta, floor, records))
    decides = next((d for d in found if (d.delta, d.floor) == (IAT().delta, p.lr_floor)), found[0])
    return [replace(dose, decides=dose is decides) for dose in found]


def deciding(study: Study) -> Dose:
    """Return the dose that claims are decided at."""
    return next(dose for dose in all_doses(study) if dose.decides)


def evaluated_tasks(study: Study, names: tuple[str, ...]) -> dict[str, Task]:
    """Return tasks with as many evaluation examples as endings and transfer are scored on."""
    return Data(tasks=names, eval_examples=study.profile.ending_examples).load()


def half_score(task: Task, predictions: np.ndarray) -> Measure:
    """Return the score of predictions (seeds, n), on the half of the examples that is scored."""
    rows, labels = (claims.halved(v, claims.score_half) for v in (predictions, task.eval.labels))
    return score_measure(task.name, task.metric, rows, labels)


def score_measures(study: Study, dose: Dose, endings: Iterable[str]) -> Measures:
    """Return the score after each ending, on the half of the examples that is scored."""
    tasks = evaluated_tasks(study, study.ending_tasks)
    return {
        ending: {t: half_score(task, dose.predictions(ending, t)) for t, task in tasks.items()}
        for ending in endings
    }


def dissociation_measures(study: Study, dose: Dose, endings: Iterable[str]) -> Measures:
    """Return D after each ending, of the tasks that plain training has learned, or all.

    Whatever the dose, the trunks of the main one say which tasks are learned: all are compared on
    the same ones.
    """
    gated, found = main(study).pruned(PLAIN), {}
    for ending in endings:
        iap = claims.entering(dose.pruned(ending), gated)
        result = iap.dissociation(draws=study.profile.draws)
        found[ending] = {task: result.measure(task) for task in result.tasks}
    return found


def scores(study: Study, reference: str = PLAIN) -> pd.DataFrame:
    """Return a row per ending (and single-task training) and task, and their mean.

    The score, and its difference from the reference's, of the same seeds.
    """
    single: dict[str, Measure] = {}
    for t, task in evaluated_tasks(study, study.ending_tasks).items():
        records = [study.store.get(study.single_unit(s, t)) for s in study.single_seeds]
        single[t] = half_score(task, np.stack([r.arrays[f"predictions/{t}"] for r in records]))
    alone = main(study, study.single_seeds)
    measures = {"single-task": single} | score_measures(study, alone, [reference])
    table = claims.paired_differences(measures, reference, NAMES).query("ending == 'single-task'")
    table.insert(2, "seeds", len(study.single_seeds))
    return pd.concat([table, _compared(study, "score", reference)], ignore_index=True)


def dissociation(study: Study, reference: str = PLAIN) -> pd.DataFrame:
    """Return D (lesion) before and after each ending, per task and as mean over tasks."""
    return _compared(study, "D", reference)


def _compared(study: Study, value: str, reference: str) -> pd.DataFrame:
    """Return endings beside the reference, both of as many seeds as have that ending.

    Args:
        study: The study.
        value: "score" or "D", the name of the column.
        reference: The ending that is subtracted.
    """
    measures, done, frames = dissociation_measures if value == "D" else score_measures, [], []
    for dose in (main(study), main(study, study.dose_seeds)):
        each = [record.config["pruned" if value == "D" else "endings"] for record in dose.records]
        shared = [e for e in each[0] if all(e in other for other in each) and e not in done]
        if shared:
            found = measures(study, dose, dict.fromkeys((*shared, reference)))
            table = claims.paired_differences(found, reference, NAMES, value=value)
            table.insert(2, "seeds", len(dose.records))
            frames.append(table[table["ending"].isin(shared)])
            done += shared
    return pd.concat(frames, ignore_index=True)


def _dose_sentence(study: Study, dose: Dose) -> str:
    """Say how much of a treatment a dose of IAT is."""
    return (
        f"Dose: the last {100 * dose.delta:g} % of the steps spend {100 * dose.share:.1f} % of "
        f"the learning rate, and IAT changes {100 * changed(study, dose):.1f} % of the "
        "predictions of plain training."
    )


def changed(study: Study, dose: Dose) -> float:
    """Return the share of predictions that IAT changes, on the half that no score is from."""

    def after(ending: str) -> dict[str, np.ndarray]:
        answers = {t: dose.predictions(ending, t) for t in study.ending_tasks}
        return {t: claims.halved(rows, claims.gate_half) for t, rows in answers.items()}

    return claims.changed_share(after(dose.ending), after(PLAIN))


def changed_beside_d(dose: Dose) -> float:
    """Return the same on the examples beside those D is scored on: fewer are lesioned on."""

    def after(ending: str) -> dict[str, np.ndarray]:
        iap = dose.pruned(ending)
        return {t: claims.gate_examples(iap, t).predictions for t in iap.tasks}

    return claims.changed_share(after(dose.ending), after(PLAIN))


def effects(study: Study, dose: Dose) -> dict[str, tuple[claims.Part, ...]]:
    """Return the two parts of C3 and of C4: IAT minus plain training, and minus random heads."""

    def parts(measures: Measures, scale: float) -> tuple[claims.Part, ...]:
        treated, *others = (mean_of([*m.values()]).scaled(scale) for m in measures.values())
        pairs = zip(CONTROLS, others, strict=True)
        return tuple(
            claims.Part(f"IAT minus {words}", (treated - other).interval())
            for words, other in pairs
        )

    names = (dose.ending, PLAIN, dose.control)
    d, score = (
        measures(study, dose, names) for measures in (dissociation_measures, score_measures)
    )
    return {"C3": parts(d, 1.0), "C4": parts(score, 100.0)}


def decide(study: Study) -> dict[str, claims.Claim]:
    """Return what there is on C3 and C4: IAT minus plain training, and minus random heads."""
    dose = deciding(study)
    weak = {"C3": _too_weak(changed_beside_d(dose)), "C4": _too_weak(changed(study, dose))}
    of, failed, n = scope_of(study, dose), at_chance(dose), len(dose.records)
    return {
        claim: claims.Claim(claim, parts, of, n, failed, weak[claim])
        for claim, parts in effects(study, dose).items()
    }


def scope_of(study: Study, dose: Dose) -> str:
    """Say what a dose of IAT was tried on."""
    config = dose.records[0].config
    rate = f"falling to {dose.floor:g} of the highest" if dose.floor else "falling to 0"
    more = f"IAT in the last {100 * dose.delta:g} % of the steps, learning rate {rate}"
    return scope(config["encoder"], len(dose.records), config["steps"], study.ending_tasks, more)


def at_chance(dose: Dose) -> str:
    """Say which tasks are not learned when IAT chooses heads, or nothing ("") if all are.

    On the trunk where it was pruned there, else after plain training, which went on from it.
    """
    config = dose.records[0].config
    begins = config["endings"].get(TRUNK) or {}
    known = all(TRUNK in record.config["pruned"] for record in dose.records)
    iap = dose.pruned(TRUNK if known and begins.get("delta") == dose.delta else PLAIN)
    passed = claims.learned(claims.above_constant(iap))
    low = [task for task in iap.tasks if task not in passed]
    return f"at chance when IAT chooses heads: {', '.join(low)}" if low else ""


def _too_weak(share: float) -> str:
    """Say that a treatment is none, by the share of predictions that it changes, or nothing."""
    if share >= claims.LEAST_CHANGED:
        return ""
    least = f"a treatment is {100 * claims.LEAST_CHANGED:g} % or more"
    return f"{100 * share:.1f} % of predictions changed, and {least}"


def doses(study: Study) -> pd.DataFrame:
    """Return a row per dose and part of a claim: how much of a treatment it is, and its effect.

    dose: the share of the learning rate, summed over steps, that the ending gets. changed: of the
    predictions of plain training. decides: whether the claims are decided at this dose.
    """
    rows = []
    for dose in all_doses(study):
        about = dose.delta, dose.floor, dose.share, changed(study, dose), len(dose.records)
        for claim, parts in effects(study, dose).items():
            for part in parts:
                numbers = *ends(part.interval), part.tested, part.interval.mde, dose.decides
                rows.append((claim, part.what, *about, *numbers))
    by = ["claim", "difference", "floor", "dose"]
    # plain training, which begins with the later letter, comes before random heads
    order = [True, False, True, True]
    table = pd.DataFrame(rows, columns=DOSES)
    return table.sort_values(by, ascending=order, ignore_index=True)


def movement(study: Study) -> pd.DataFrame:
    """Return how far head rows moved after each ending, in units of plain training's.

    As a root mean square, the mean over seeds.
    """
    frames = []
    for record in main(study).records:
        moved = pd.DataFrame(record.result["moved"]).T.dropna(how="all")
        frames.append(moved / moved.loc[PLAIN])
    by_ending = pd.concat(frames).add_prefix("rows of heads ").groupby(level=0, sort=False)
    table = by_ending.mean().rename_axis("ending")
    table.insert(0, "seeds", by_ending.size())
    return table.reset_index()


def parameters(study: Study) -> pd.DataFrame:
    """Return a row per seed and ending: the parameters of the model after it."""
    counts = [record.result["parameters"] for record in main(study).records]
    table = pd.DataFrame(counts, study.ending_seeds).stack().dropna().astype(int)
    return table.rename_axis(["seed", "ending"]).rename("parameters").reset_index()


def counted_steps(study: Study) -> pd.DataFrame:
    """Count the steps that endings took by branching, and would have taken one by one."""
    unit = study.endings_unit(study.seeds[0])
    branched = study.store.get(unit).result["branched"]
    made = unit.made().items()
    stops = {n: unit.steps if end is None else end.stop(unit.steps) for n, end in made}
    together = max(branched.values()) + sum(stops[n] - start for n, start in branched.items())
    table = pd.DataFrame({"how": ["one trunk, all endings", "every ending from the first step"]})
    table["steps"] = [together, sum(stops.values())]
    return table.assign(trainings=table["steps"] / unit.steps)


def sentences(study: Study) -> str:
    """Say what becomes of C3 and C4 by themselves, before p is corrected for other claims."""
    lines = [f"{claim} {found}" for claim, found in decide(study).items()]
    return "\n".join([*lines, _dose_sentence(study, deciding(study))])


@styled
def plot_scores(table: pd.DataFrame, order: Sequence[str], reference: str = PLAIN) -> Figure:
    """Draw scores minus the reference's, mean and per task; the trunk, far below, is left out.

    Args:
        table: Of `scores`.
        order: All tasks of the study, so that each keeps its colour.
        reference: The ending that was subtracted.
    """
    tasks = list(dict.fromkeys(("mean", *table["task"])))
    names = [n for n in dict.fromkeys(table["ending"]) if n not in (reference, TRUNK)]
    widths = [1.6, *[1] * (len(tasks) - 1)]
    figure, axes = panels(len(tasks), 0.8 + 0.22 * len(names), sharey=True, width_ratios=widths)
    for ax, task in zip(axes, tasks, strict=True):
        part = 100 * table[table["task"] == task].set_index("ending").loc[names, minus(reference)]
        colour = "black" if task == "mean" else looks(order)[task]["color"]
        forest(ax, names, columns(part, part), "", color=colour)
        zero(ax)
        ax.set_title("mean over tasks" if task == "mean" else task)
    figure.supxlabel(f"score minus that of {reference} multi-task training (points)", fontsize=8.5)
    return figure


@styled
def plot_dissociation(table: pd.DataFrame, reference: str = PLAIN) -> Figure:
    """Draw, left: D before the ending (trunk) and after it. Right: minus the reference's."""
    part = table[table["task"] == "mean"]
    beside = part.mask(part["ending"] == TRUNK)
    figure, (left, right) = panels(2, 0.8 + 0.26 * len(part), sharey=True)
    forest(left, part["ending"], columns(part, D_ENDS), "dissociation D (points)")
    label = f"D minus that of {reference} training (points)"
    forest(right, part["ending"], columns(beside, minus(reference)), label)
    zero(left)
    zero(right)
    return figure


@styled
def plot_doses(table: pd.DataFrame) -> Figure:
    """Draw the effect of IAT over its dose, of `doses`: a panel per claim and control.

    A line per floor of the learning rate. Band: below the smallest effect of interest. Filled: the
    dose that decides.
    """
    pairs = list(table[["claim", "difference"]].drop_duplicates().itertuples(index=False))
    figure, axes = panels(len(pairs), 2.5, 2, sharex=True, sharey="row")
    most = table["dose"].max()
    for ax, (claim, difference) in zip(axes, pairs, strict=True):
        sesoi, unit = claims.SESOI[claim][0], "points of score" if claim == "C4" else "points of D"
        ax.axhspan(-sesoi, sesoi, color="#eeeeee", lw=0)
        zero(ax, "y")
        mine = table[table["claim"] == claim]
        for i, (floor, part) in enumerate(mine[mine["difference"] == difference].groupby("floor")):
            label = f"floor {floor:g}" if floor else "decay to 0"
            _draw_floor(ax, part, COLOURS[i], MARKERS[i])
            ax.plot([], [], color=COLOURS[i], marker=MARKERS[i], label=label)
        percent(ax, "x")
        every = [*mine["low"], *mine["high"], -sesoi, sesoi]
        limits = 1.2 * np.nanmin(every), 1.2 * np.nanmax(every)
        ax.set(title=f"{claim}: {difference}", xlim=(-0.05 * most, 1.1 * most), ylim=limits)
        ax.set(xlabel="share of the learning rate in the ending (%)", ylabel=unit)
        ax.label_outer()
    axes[0].legend(loc="best")
    return figure


def _draw_floor(ax: Axes, part: pd.DataFrame, colour: str, marker: str) -> None:
    """Draw effects over doses at one floor of the learning rate."""
    ax.plot(part["dose"], part["value"], color=colour, linewidth=1)
    words: Look = {"fontsize": 6.5, "ha": "center", "va": "bottom"}
    for row in part.to_dict("records"):
        look: Look = {"color": colour, "markerfacecolor": colour if row["decides"] else "white"}
        whiskers(ax, row["dose"], (row[k] for k in ENDS), fmt=marker, **look)
        ax.annotate(rf"$\delta$ {row['delta']:g}", (row["dose"], row["high"]), **words)

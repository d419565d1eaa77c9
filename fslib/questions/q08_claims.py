"""Notebook 08: the claims one by one, how the released code differs from this package, and the teaser."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fslib.claims import (
    CONTRADICTED,
    LEAST_CHANGED,
    LEAST_TASKS,
    NOT_TESTABLE,
    SESOI,
    SUPPORTED,
    Evidence,
    Part,
    decided,
    entering,
)
from fslib.iap import CONVENTIONS, Dissociation, score_left
from fslib.intervals import Interval
from fslib.plot import COLOURS, GREY, MARKERS, panels, styled
from fslib.questions import (
    q02_importance,
    q03_pruning,
    q04_models,
    q05_similarity,
    q06_iat,
    q07_transfer,
)
from fslib.questions.teaser import Story
from fslib.scoring import rank_correlation
from fslib.study.study import Study

SAYS = {
    "C1": "heads specialize under multi-task training, on seven pre-trained models",
    "C2": "the more similar the tasks, the weaker the specialization",
    "C3": "IAT raises specialization",
    "C4": "IAT beats plain multi-task training",
    "C5": "IAT transfers better to new tasks",
    "C6": "no parameter is added",
}
PROFILES_SHOWN = ("mini", "evidence")  # side by side
REACH = 8  # smallest effects of interest that the figure shows; an interval of a few seeds may go far beyond
NOTEBOOK = {"C1": "03, 04", "C2": "05", "C3": "06", "C4": "06", "C5": "07", "C6": "06"}


def decide(study: Study) -> dict[str, Evidence]:
    """Return what there is on claims C1 to C5, with p corrected for their number."""
    iap = study.iap()
    c1 = q03_pruning.decide(
        entering(iap).dissociation(draws=study.profile.draws), q03_pruning.not_testable(iap)
    )
    c2 = q05_similarity.decide(q05_similarity.correlations(study, q05_similarity.pairs(study)))
    return decided(
        {"C1": c1, "C2": c2, **q06_iat.decide(study), "C5": q07_transfer.decide(study)}
    )


def seeds(study: Study) -> dict[str, int]:
    """Return how many seeds each claim is decided on."""
    p = study.profile
    endings = dict.fromkeys(("C3", "C4", "C6"), p.ending_seeds)
    return {"C1": p.seeds, "C2": p.pair_seeds, "C5": p.transfer_seeds} | endings


def design(study: Study) -> pd.DataFrame:
    """Return one row per claim: what decides on it, in how many models, and what must hold, as the profile fixes it."""
    p, mean = study.profile, "mean over tasks, and over 10 and 30 % of heads pruned where both are"
    ending = f"last {100 * p.delta:g} % of {study.training(0, small=True, tasks=study.ending_tasks).steps} steps"
    known = set(p.transfer_targets) & set(study.ending_tasks)
    sources = f"IAT on {', '.join(study.source_tasks)}" if known else "these endings"
    rows: dict[str, tuple[str, str, tuple[str, ...], str]] = {
        "C1": (
            f"D ({mean}): own lesion against others', and top heads against random ones of the same layers",
            p.encoder,
            p.tasks,
            "two tasks are learned, in two models or more",
        ),
        "C2": (
            f"minus the rank correlation, over pairs of tasks, of {q05_similarity.PRIMARY} similarity with D",
            p.small_encoder,
            study.pair_tasks,
            f"{LEAST_TASKS} tasks are learned",
        ),
        "C3": (
            f"D ({mean}) after IAT ({ending}), minus plain training's, and minus that with random heads",
            p.small_encoder,
            study.ending_tasks,
            f"two tasks are learned, and IAT changes {100 * LEAST_CHANGED:g} % of predictions",
        ),
        "C4": (
            f"score, mean over tasks, after IAT ({ending}), minus the same two",
            p.small_encoder,
            study.ending_tasks,
            f"IAT changes {100 * LEAST_CHANGED:g} % of predictions",
        ),
        "C5": (
            f"score on new tasks, full model, mean over tasks and sizes, from {sources}, minus the same two",
            p.small_encoder,
            p.transfer_targets,
            "each new task is learned from every ending at every size",
        ),
    }
    counts, table = seeds(study), []
    for claim, (number, encoder, tasks, gate) in rows.items():
        row: dict[str, object] = {
            "claim": claim,
            "what decides": number,
            "encoder": encoder,
            "tasks": ", ".join(tasks),
        }
        first, last = study.seeds[0], study.seeds[0] + counts[claim] - 1
        row |= {"seeds": f"{first} to {last}" if last > first else str(first)}
        sesoi, unit = SESOI[claim]
        table.append(
            row | {"smallest effect of interest": f"{sesoi:g} {unit}".strip(), "testable if": gate}
        )
    return pd.DataFrame(table)


def claims(study: Study) -> pd.DataFrame:
    """Return one row per number that a claim stands on: estimate, interval, p, minimum detectable effect; and verdict.

    p: of the part by itself. claim p: of the whole claim, corrected for five claims (Holm). why: the gate that failed.
    """
    rows, counts = [], seeds(study)
    for claim, found in decide(study).items():
        shared: dict[str, object] = {"claim": claim, "the paper says": SAYS[claim]}
        last = {
            "claim p": found.claim_p,
            "verdict": found.verdict,
            "why": found.failed,
            "seeds": counts[claim],
        }
        for part in found.parts or (Part("nothing", Interval(np.nan, np.nan, np.nan)),):
            i = part.interval
            row = shared | {
                "measured here": part.what,
                "value": i.value,
                "low": i.low,
                "high": i.high,
                "p": part.tested,
            }
            rows.append(
                row | {"MDE": i.mde, "SESOI": SESOI[claim][0], **last, "notebook": NOTEBOOK[claim]}
            )
    return pd.DataFrame([*rows, _c6(study, counts["C6"])])


def _c6(study: Study, count: int) -> dict[str, object]:
    """Decide C6, a count and no estimate: supported if there are as many parameters after every ending."""
    counts = q06_iat.parameters(study)["parameters"]
    added = float(counts.max() - counts.min())
    row: dict[str, object] = {"claim": "C6", "the paper says": SAYS["C6"]}
    row |= {
        "measured here": "parameters after IAT minus after plain training, every ending and seed"
    }
    row |= {
        "value": added,
        "low": added,
        "high": added,
        "p": np.nan,
        "MDE": 0.0,
        "SESOI": np.nan,
        "claim p": np.nan,
    }
    row |= {"verdict": SUPPORTED if added == 0 else CONTRADICTED, "why": "", "seeds": count}
    return row | {"notebook": NOTEBOOK["C6"]}


def release_differences(study: Study) -> pd.DataFrame:
    """Return one row per difference of the paper's released code, seen from outside, and its measured effect here."""
    selections = q04_models.selections(study)
    rows = [
        (
            "scale of layers in importance",
            "none in pruning, another for the last layer in training",
            "none, the same everywhere; normalize='layer' on request",
            _effect_of_selection(selections, "gradient, layer-normalized"),
        ),
        (
            "dissociation score",
            "own lesion's effect on different tasks (released)",
            "different lesions on the same task (lesion); both are shown",
            _effect_of_convention(study),
        ),
        (
            "rows outside the set in IAT",
            "zero gradient: Adam's momentum and weight decay still move them (leaky)",
            "no update at all (strict)",
            _effect_of_leak(study),
        ),
        (
            "random control heads",
            "drawn over all layers, but one head kept in each; top heads need not keep one",
            "as many in every layer as the top heads",
            _effect_of_matching(study),
        ),
        (
            "batches",
            "every step shuffles anew and takes the first batch",
            "every example once per epoch",
            f"an epoch of such steps misses {100 * _missed(study):.0f} % of the examples (simulated)",
        ),
        (
            "gradients of the importance pass",
            "leak into the next update",
            "the model is left as it was",
            "not measured; tested",
        ),
        (
            "mode after the importance pass",
            "stays in evaluation mode: no dropout",
            "restored",
            "not measured; tested",
        ),
        (
            "annealed sampling, one epoch",
            "divides by zero",
            "proportional sampling",
            "not measured; tested",
        ),
    ]
    return pd.DataFrame(rows, columns=["what", "released code", "this package", "measured effect"])


def _effect_of_selection(table: pd.DataFrame, name: str) -> str:
    row = table.set_index("selection").loc[name]
    return (
        f"rank correlation {row['rank correlation']:.2f}, overlap of top heads {row['overlap of top heads']:.2f}; "
        f"D {row['minus gradient']:+.1f} points [{row['diff low']:+.1f}, {row['diff high']:+.1f}]"
    )


def _effect_of_convention(study: Study) -> str:
    iap, parts = entering(study.iap()), []
    for convention in CONVENTIONS:
        result = iap.dissociation(convention, draws=study.profile.draws)
        known = [
            task for task in iap.tasks if np.isfinite(result.of(task).value)
        ]  # retention: none at chance
        order = sorted(known, key=lambda task: -result.of(task).value)
        d = result.mean
        mean = (
            f"mean D {d.value:.1f} [{d.low:.1f}, {d.high:.1f}]"
            if len(known) == len(iap.tasks)
            else (f"D is defined in {len(known)} of {len(iap.tasks)} tasks")
        )
        ends = f", most specialized {order[0]}, least {order[-1]}" if order else ""
        parts.append(f"{convention}: {mean}{ends}")
    return "; ".join(parts)


def _effect_of_leak(study: Study) -> str:
    if "IAT, leaky" not in study.profile.other_endings:
        return "not measured: this profile has no such ending"
    moved = q06_iat.movement(study).set_index("ending")["rows of heads in no set"]
    score = (
        q06_iat.scores(study, reference="IAT")
        .set_index(["ending", "task"])
        .loc[("IAT, leaky", "mean")]
    )
    return (
        f"leaky rows move {100 * moved['IAT, leaky']:.0f} % as far as in plain "
        f"training, strict ones {100 * moved['IAT']:.0f} %; mean score, leaky minus "
        f"strict: {100 * score['minus IAT']:+.2f} points "
        f"[{100 * score['diff low']:+.2f}, {100 * score['diff high']:+.2f}]"
    )


def _effect_of_matching(study: Study) -> str:
    left = q04_models.random_controls(study).set_index("random sets")["score left (%)"]
    return (
        f"score left: {left['matched by layer']:.1f} % matched, {left['not matched']:.1f} % not matched, "
        f"{left['(top heads)']:.1f} % top heads"
    )


def _missed(study: Study) -> float:
    """Return the share of a task's training examples missed if every step takes the first batch of a new shuffle."""
    n, batch, rng = (
        len(study.tasks[study.profile.tasks[0]].train),
        study.profile.batch_size,
        np.random.default_rng(0),
    )
    seen = np.concatenate([rng.permutation(n)[:batch] for _ in range(n // batch)])
    return 1 - len(np.unique(seen)) / n


def by_profile(study: Study, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return {profile: its table of claims}: the study's own, and of `PROFILES_SHOWN` those that notebook 08 has saved.

    table: of `claims`. Other profiles are only looked for beside a study without other settings.
    """
    found = {study.name: table}
    for name in PROFILES_SHOWN if not study.overrides and study.seed == 0 else ():
        saved = study.folder.parent / name / "tables" / "08_claims.csv"
        if name != study.name and saved.is_file():
            found[name] = pd.read_csv(saved, keep_default_na=False, na_values=["", "nan"]).fillna(
                {"why": ""}
            )
    return {name: found[name] for name in (*PROFILES_SHOWN, *found) if name in found}


def side_by_side(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return one row per number that a claim stands on: estimate with interval, p, MDE and verdict in every profile."""
    keys = _numbers(tables)
    shown = keys.to_frame(index=False)
    for name, table in tables.items():
        rows = table.set_index(keys.names).reindex(keys)
        shown[f"{name}: estimate"] = [
            f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            if np.isfinite(row["value"])
            else "none"
            for _, row in rows.iterrows()
        ]
        shown[f"{name}: p"], shown[f"{name}: MDE"] = rows["p"].to_numpy(), rows["MDE"].to_numpy()
        shown[f"{name}: verdict"] = rows["verdict"].to_numpy()
    return shown


def _numbers(tables: Mapping[str, pd.DataFrame]) -> pd.MultiIndex:
    """Return (claim, what is measured) of every number in some of the tables, in the order of the claims."""
    every = pd.concat(
        [table[["claim", "measured here"]] for table in tables.values()]
    ).drop_duplicates()
    return pd.MultiIndex.from_frame(every.sort_values("claim", kind="stable"))


@styled
def plot_claims(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw every number that claims C1 to C5 stand on, in units of the smallest effect of interest (band: below it).

    tables: {profile: of `claims`}, a line per profile in every row. Dot and line: estimate and 95 % interval. Bar: the
    minimum detectable effect, or a triangle where it lies beyond the panel. Hollow: the claim is not testable.
    """
    rows = [key for key in _numbers(tables) if key[0] in SESOI]
    figure, (ax,) = panels(1, 0.8 + (0.12 + 0.18 * len(tables)) * len(rows))
    ax.axvspan(-1, 1, color="#eeeeee", lw=0)
    ax.axvline(0, color="black", linewidth=0.6)
    for number, (name, table) in enumerate(tables.items()):
        shift = (number - (len(tables) - 1) / 2) * 0.3
        shown = table.set_index(["claim", "measured here"]).sort_index()
        for i, key in enumerate(rows):
            if key not in shown.index:
                continue
            row, colour = shown.loc[key], COLOURS[number]
            value, low, high, mde = (row[k] / row["SESOI"] for k in ("value", "low", "high", "MDE"))
            face = "white" if row["verdict"] == NOT_TESTABLE else colour
            ax.errorbar(
                value,
                i + shift,
                xerr=[[value - low], [high - value]],
                fmt=MARKERS[number],
                color=colour,
                markerfacecolor=face,
                capsize=2,
            )
            if mde > REACH:
                ax.plot(0.98 * REACH, i + shift, ">", color=GREY)
            ax.plot([mde, mde], [i + shift - 0.13, i + shift + 0.13], color=GREY, linewidth=2)
            ax.text(
                1.01,
                i + shift,
                row["verdict"],
                transform=ax.get_yaxis_transform(),
                va="center",
                fontsize=7,
                color=colour,
            )
        ax.plot([], [], color=COLOURS[number], marker=MARKERS[number], label=name)
    ax.set_xlim(-REACH, REACH)
    ax.set_yticks(range(len(rows)), [f"{claim}: {what}" for claim, what in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("effect, in smallest effects of interest (above 0: as the paper says)")
    if len(tables) > 1:
        ax.legend(loc="lower left")
    return figure


def story(study: Study, result: Dissociation, fraction: float = 0.3) -> Story:
    """Return the method on the two tasks in D whose maps differ most, with the fraction pruned nearest to the given."""
    maps, iap = q02_importance.importance_maps(study), study.iap()
    pair = min(
        combinations(result.tasks, 2), key=lambda p: rank_correlation(maps[p[0]], maps[p[1]])
    )
    f = int(np.argmin(np.abs(np.array(iap.fractions) - fraction)))
    base = iap.baseline()
    left = score_left(iap.top.scores[:, f], base[:, None]).mean(0)  # (pruned, scored)
    random_left = score_left(iap.random.scores[:, f], base[:, None, None]).mean(
        0
    )  # (pruned, controls, scored)
    at = {t: iap.tasks.index(t) for t in pair}
    return Story(
        {t: maps[t] for t in pair},
        {t: iap.top.heads[0, f, i] for t, i in at.items()},
        pd.DataFrame(left, iap.tasks, iap.tasks).loc[list(pair), list(pair)],
        {t: float(random_left[i, :, i].mean()) for t, i in at.items()},
        result,
        iap.tasks,
    )

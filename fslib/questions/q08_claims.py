"""Notebook 08: the claims one by one, how the released code differs, and the teaser."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fslib import claims as rules
from fslib.iap import CONVENTIONS, Dissociation, score_left
from fslib.intervals import Interval
from fslib.plot import COLOURS, GREY, MARKERS, Look, name_rows, panels, styled, whiskers, zero
from fslib.questions import q02_importance as q02
from fslib.questions import q03_pruning as q03
from fslib.questions import q04_models as q04
from fslib.questions import q05_similarity as q05
from fslib.questions import q06_iat as q06
from fslib.questions import q07_transfer as q07
from fslib.questions.tables import D_ENDS, ENDS, Rows, ends, minus, said, table_of
from fslib.questions.teaser import Story
from fslib.scoring import rank_correlation
from fslib.study.study import Study

DESIGN = ["claim", "what decides", "encoder", "tasks", "seeds", "smallest effect of interest"]
DESIGN += ["testable if"]
COLUMNS = ["claim", "the paper says", "measured here", *ENDS, "p", "MDE", "SESOI", "claim p"]
COLUMNS += ["verdict", "scope", "why", "n", "notebook"]
NOTHING = rules.Part("nothing", Interval(np.nan, np.nan, np.nan))
PROFILES_SHOWN = ("evidence", "base")  # side by side: those that decide
LAPTOP = "laptop run; see evidence"  # what stands in the place of a verdict that nothing decides
EXPLORED = ["claim", "what was seen", *ENDS, "p", "MDE", "scope"]
REACH = 8  # smallest effects of interest that the figure shows; a few seeds' interval may go beyond
# of the claims, and of what the released code does otherwise
TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
CLAIMS, RELEASED = TEXTS["claims"], TEXTS["released"]


def decide(study: Study) -> dict[str, rules.Claim]:
    """Return what there is on claims C1 to C5, with p corrected for their number."""
    iap = study.iap()
    result = rules.entering(iap).dissociation(draws=study.profile.draws)
    c1 = q03.decide(result, q03.scope_of(study, result.tasks), q03.not_testable(iap))
    c2 = q05.decide(q05.correlations(study, q05.pairs(study)), q05.scope_of(study))
    return rules.decided({"C1": c1, "C2": c2, **q06.decide(study), "C5": q07.decide(study)})


def seed_counts(study: Study) -> dict[str, int]:
    """Return how many seeds each claim is decided on."""
    p = study.profile
    tried = len(q06.deciding(study).records)
    endings = {"C3": tried, "C4": tried, "C6": p.ending_seeds}
    return {"C1": p.seeds, "C2": p.pair_seeds, "C5": p.transfer_seeds} | endings


@table_of(*DESIGN)
def design(study: Study) -> Rows:
    """Return a row per claim: what decides on it, in which models, and what must hold."""
    p, tasks, counts = study.profile, study.ending_tasks, seed_counts(study)
    words = {
        "steps": study.training(0, small=True, tasks=tasks).steps,
        "delta": f"{100 * q06.deciding(study).delta:g} %",
        "changed": f"{100 * rules.LEAST_CHANGED:g} %",
        "similarity": q05.PRIMARY,
        "least": rules.LEAST_TASKS,
        "sources": "these endings",
    }
    if set(p.transfer_targets) & set(tasks):
        words["sources"] = f"IAT on {', '.join(study.source_tasks)}"
    compared = {"C1": p.tasks, "C2": study.pair_tasks, "C5": p.transfer_targets}
    first = study.seeds[0]
    for claim, (sesoi, unit) in rules.SESOI.items():
        decides, gate = (CLAIMS[claim][k].format(**words) for k in ("decides", "gate"))
        encoder = p.encoder if claim == "C1" else p.small_encoder
        of = ", ".join(compared.get(claim, tasks))
        last = first + counts[claim] - 1
        seeds = f"{first} to {last}" if last > first else str(first)
        yield claim, decides, encoder, of, seeds, f"{sesoi:g} {unit}".strip(), gate


@table_of(*COLUMNS)
def claims(study: Study) -> Rows:
    """Return a row per number that a claim stands on: estimate, interval, p, MDE; and verdict.

    p: of the part by itself. claim p: of the whole claim, corrected for how many there are (Holm).
    scope: what the verdict is about. why: the gate that failed, or what is too weak to decide. n:
    trainings that the interval generalizes over; of C2, tasks. C6 is a count and no estimate.
    """
    parameters, counts = q06.parameters(study)["parameters"], seed_counts(study)
    for claim, found in decide(study).items():
        verdict = found.verdict if study.profile.decides else LAPTOP
        decision = found.p, verdict, found.scope, found.why, found.n, CLAIMS[claim]["notebook"]
        for part in found.parts or (NOTHING,):
            numbers = *ends(part.interval), part.tested, part.interval.mde, rules.SESOI[claim][0]
            yield claim, CLAIMS[claim]["says"], part.what, *numbers, *decision
    added = float(parameters.max() - parameters.min())
    what = "parameters after IAT minus after plain training, every ending and seed"
    count = added, added, added, np.nan, 0.0, np.nan, np.nan
    verdict = rules.CONTRADICTED if added else rules.SUPPORTED
    said_of = verdict, "every model of notebook 06", "", counts["C6"], CLAIMS["C6"]["notebook"]
    yield "C6", CLAIMS["C6"]["says"], what, *count, *said_of


@table_of(*EXPLORED)
def exploratory(study: Study) -> Rows:
    """Return what was seen and not fixed beforehand: rows without a verdict."""
    iap = rules.entering(study.iap())
    of = q03.scope_of(study, iap.tasks)
    for row in q03.without_question(iap, study.profile.draws).iloc[1:].to_dict("records"):
        what = f"D without tasks that ask about {row['without tasks that ask about']}"
        yield "C1", what, *(row[k] for k in (*D_ENDS, "p, shared")), np.nan, of
    for row in q03.shared_lesions(iap).to_dict("records"):
        what = f"points lost: lesion of {row['lesion of']} minus of {row['hurts more than of']}"
        yield "C1", what, *(row[k] for k in ("by", "low", "high", "p", "MDE")), of
    pairs, of = q05.pairs(study), q05.scope_of(study)
    for row in q05.correlations(study, pairs).to_dict("records"):
        if row["similarity"] != q05.PRIMARY:
            what = ", ".join(filter(None, [f"correlation of {row['similarity']}", row["given"]]))
            numbers = (row[k] for k in (q05.CORRELATION, "low", "high", "p"))
            yield "C2", what, *numbers, np.nan, of
    for dose in q06.all_doses(study):
        for claim, parts in () if dose.decides else q06.effects(study, dose).items():
            scope = "; ".join(filter(None, [q06.scope_of(study, dose), q06.at_chance(dose)]))
            for part in parts:
                i = part.interval
                yield claim, f"{part.what} ({rules.SESOI[claim][1]})", *ends(i), i.p, i.mde, scope


def release_differences(study: Study) -> pd.DataFrame:
    """Return a row per difference of the released code, seen from outside, with its effect."""
    missed = f"an epoch of such steps misses {100 * _missed(study):.0f} % of the examples"
    effects = {
        "scale of layers in importance": _effect_of_layers(study),
        "dissociation score": _effect_of_convention(study),
        "rows outside the set in IAT": _effect_of_leak(study),
        "random control heads": _effect_of_matching(study),
        "batches": f"{missed} (simulated)",
    }
    table = pd.DataFrame(RELEASED)
    table["measured effect"] = table["what"].map(effects).fillna("not measured; tested")
    return table


def _effect_of_layers(study: Study) -> str:
    row = q04.selections(study).set_index("selection").loc["gradient, layer-normalized"]
    return (
        f"rank correlation {row['rank correlation']:.2f}, overlap of top heads "
        f"{row['overlap of top heads']:.2f}; D {row['minus gradient']:+.1f} points "
        f"[{row['diff low']:+.1f}, {row['diff high']:+.1f}]"
    )


def _effect_of_convention(study: Study) -> str:
    iap, parts = rules.entering(study.iap()), []
    for convention in CONVENTIONS:
        result = iap.dissociation(convention, draws=study.profile.draws)
        d = {task: result.of(task).value for task in iap.tasks}
        known = [task for task in d if np.isfinite(d[task])]  # retention: none at chance
        text = f"D is defined in {len(known)} of {len(d)} tasks"
        if len(known) == len(d):
            text = f"mean D {said(result.mean._asdict(), ENDS, '.1f')}"
        if known:
            order = sorted(known, key=lambda task: -d[task])
            text += f", most specialized {order[0]}, least {order[-1]}"
        parts.append(f"{convention}: {text}")
    return "; ".join(parts)


def _effect_of_leak(study: Study) -> str:
    leaky = "IAT, leaky"
    if leaky not in study.profile.other_endings:
        return "not measured: this profile has no such ending"
    moved = 100 * q06.movement(study).set_index("ending")["rows of heads in no set"]
    scores = q06.scores(study, reference="IAT").set_index(["ending", "task"])
    value, low, high = 100 * scores.loc[(leaky, "mean"), minus("IAT")].astype(float)
    return (
        f"leaky rows move {moved[leaky]:.0f} % as far as in plain training, strict ones "
        f"{moved['IAT']:.0f} %; mean score, leaky minus strict: {value:+.2f} points "
        f"[{low:+.2f}, {high:+.2f}]"
    )


def _effect_of_matching(study: Study) -> str:
    left = q04.random_controls(study).set_index("random sets")["score left (%)"]
    return (
        f"score left: {left['matched by layer']:.1f} % matched, {left['not matched']:.1f} % not "
        f"matched, {left['(top heads)']:.1f} % top heads"
    )


def _missed(study: Study) -> float:
    """Return the share of examples missed if every step takes the first batch of a new shuffle."""
    n, batch = len(study.tasks[study.profile.tasks[0]].train), study.profile.batch_size
    rng = np.random.default_rng(0)
    seen = np.concatenate([rng.permutation(n)[:batch] for _ in range(n // batch)])
    return 1 - len(np.unique(seen)) / n


def by_profile(study: Study, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return {profile: its table of claims} of those that decide, or of the study itself.

    Others, of `PROFILES_SHOWN`, are what their notebook 08 has saved; they are only looked for
    beside a study without other settings.

    Args:
        study: The study.
        table: Of `claims`.
    """
    found = {study.name: table}
    for name in PROFILES_SHOWN if not study.overrides and study.seed == 0 else ():
        path = study.folder.parent / name / "tables" / "08_claims.csv"
        if name != study.name and path.is_file():
            saved = pd.read_csv(path, keep_default_na=False, na_values=["", "nan"])
            found[name] = saved.fillna({"why": ""})
    deciding = {name: found[name] for name in PROFILES_SHOWN if name in found}
    return deciding or {study.name: table}


def side_by_side(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return a row per number that a claim stands on, and what every profile says of it."""
    keys = _numbers(tables)
    table = keys.to_frame(index=False)
    for name, saved in tables.items():
        rows = saved.set_index(keys.names).reindex(keys).reset_index()
        estimates = rows.apply(said, axis=1, columns=ENDS, form=".2f")
        table[f"{name}: estimate"] = estimates.where(np.isfinite(rows["value"]), "none")
        for column in ("p", "MDE", "verdict"):
            table[f"{name}: {column}"] = rows[column]
    return table


def _numbers(tables: Mapping[str, pd.DataFrame]) -> pd.MultiIndex:
    """Return (claim, what is measured) of every number in some table, in the order of claims."""
    every = pd.concat([table[["claim", "measured here"]] for table in tables.values()])
    once = every.drop_duplicates().sort_values("claim", kind="stable")
    return pd.MultiIndex.from_frame(once)


@styled
def plot_claims(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the numbers of C1 to C5 in units of the smallest effect of interest (band: below it).

    Dot and line: estimate and 95 % interval. Bar: the minimum detectable effect, or a triangle
    where it lies beyond the panel. Hollow: the claim is not testable. Beside each claim, its
    verdict and scope.

    Args:
        tables: {profile: of `claims`}, a line per profile in every row.
    """
    keys = [key for key in _numbers(tables) if key[0] in rules.SESOI]
    figure, (ax,) = panels(1, 0.8 + 0.36 * len(tables) * len(keys))
    ax.axvspan(-1, 1, color="#eeeeee", lw=0)
    zero(ax)
    for number, (name, table) in enumerate(tables.items()):
        look: Look = {"color": COLOURS[number], "fmt": MARKERS[number]}
        shift = (number - (len(tables) - 1) / 2) * 0.45
        for claim, rows in table[table["claim"].isin(rules.SESOI)].groupby("claim"):
            places = [keys.index((claim, what)) + shift for what in rows["measured here"]]
            for y, row in zip(places, rows.to_dict("records"), strict=True):
                _draw_number(ax, y, row, look)
            said_of = "\n".join([row["verdict"], *wrap(row["scope"], 52)])
            words: Look = {"va": "center", "fontsize": 7, "color": look["color"]}
            place = float(np.mean(places))
            ax.text(1.02, place, said_of, transform=ax.get_yaxis_transform(), **words)
        ax.plot([], [], color=COLOURS[number], marker=MARKERS[number], label=name)
    name_rows(ax, [f"{claim}: {chr(10).join(wrap(what, 28))}" for claim, what in keys])
    label = "effect, in smallest effects of interest\n(above 0: as the paper says)"
    ax.set(xlim=(-REACH, REACH), xlabel=label)
    if len(tables) > 1:
        ax.legend(loc="lower left")
    return figure


def _draw_number(ax: Axes, y: float, row: dict[str, Any], look: dict[str, str]) -> None:
    """Draw one number of a claim with its minimum detectable effect."""
    *ends, mde = (row[k] / row["SESOI"] for k in (*ENDS, "MDE"))
    face = "white" if row["verdict"] == rules.NOT_TESTABLE else look["color"]
    whiskers(ax, y, ends, "x", markerfacecolor=face, **look)
    if mde > REACH:
        ax.plot(0.98 * REACH, y, ">", color=GREY)
    ax.plot([mde, mde], [y - 0.13, y + 0.13], color=GREY, linewidth=2)


def story(study: Study, result: Dissociation, fraction: float = 0.3) -> Story:
    """Return the method on the two tasks in D whose maps differ most.

    Args:
        study: The study.
        result: Its D.
        fraction: Of heads pruned; the nearest that there is is shown.
    """
    maps, iap = q02.importance_maps(study), study.iap()
    pairs = combinations(result.tasks, 2)
    pair = min(pairs, key=lambda p: rank_correlation(maps[p[0]], maps[p[1]]))
    f = int(np.argmin(np.abs(np.array(iap.fractions) - fraction)))
    base = iap.baseline()
    left = score_left(iap.top.scores[:, f], base[:, None]).mean(0)  # (pruned, scored)
    random = score_left(iap.random.scores[:, f], base[:, None, None]).mean((0, 2))
    at = {t: iap.tasks.index(t) for t in pair}
    importance, heads = {t: maps[t] for t in pair}, {t: iap.top.heads[0, f, at[t]] for t in pair}
    frame = pd.DataFrame(left, iap.tasks, iap.tasks)
    of_random = {t: float(random[i, i]) for t, i in at.items()}
    return Story(importance, heads, frame, of_random, result, iap.tasks)

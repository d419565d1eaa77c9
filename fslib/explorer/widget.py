"""The head explorer: look at heads, switch them off, and see what it costs, in JupyterLab or in a file of its own.

`explore` shows a study's model, from its records, or any model with any tasks. What the page does is in explorer.js,
the same module in both places. In JupyterLab a kernel scores any set of heads; a file shows what was recorded.
"""

import base64
import html
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from jaxtyping import Bool, Shaped
from torch import Tensor

from fslib.data.batches import Batch
from fslib.data.tasks import Split, Task, as_tasks
from fslib.errors import FslibError, check_count, checked_path, first_line, unknown
from fslib.evaluation import EVAL_BATCH, blank_predictions, check_several, length_batches, predicted
from fslib.explorer.view import View, Whole, effect_json, pattern_json, pruned_sets, single_heads
from fslib.heads import head_name, top_heads
from fslib.importance import head_importance
from fslib.model.attention import HOOKED
from fslib.model.multitask import MultiTaskModel, check_model
from fslib.plot import head_maps
from fslib.progress import hidden
from fslib.pruning import each_pruned
from fslib.study.design import LONGEST, TEXTS
from fslib.study.files import write_text
from fslib.study.fingerprints import require
from fslib.study.store import Unit
from fslib.study.study import Study
from fslib.study.units import pattern, scored_on, short_texts

HERE = Path(__file__).parent
MODULE, STYLE = HERE / "explorer.js", HERE / "explorer.css"
FIRST_PERCENT = 10


def explore(
    what: object,
    tasks: Task | Iterable[Task] | Mapping[str, Task] | None = None,
    *,
    seed: int | None = None,
    examples: int | None = None,
) -> "Explorer":
    """Return the head explorer of a study's model, or of a model and tasks: the last line of a cell shows it.

    what: a `Study`, shown from its records (what is missing is computed first), or a model, with the `tasks` that its
    heads are scored for. seed: which of a study's main models, by default the first. examples: how many training
    examples a model's importance is estimated on and how many evaluation examples scores are from, per task; 256 and
    200 by default. A study takes what its profile says.
    Raises FslibError for a model without tasks, or with one that has a single evaluation example, a study with tasks,
    and a seed that the study does not have.
    """
    if isinstance(what, Study):
        if tasks is not None or examples is not None:
            raise FslibError(
                "a study has its own tasks and examples: give fslib.explore(study) alone, or a model"
            )
        return _of_study(what, seed)
    if not isinstance(what, MultiTaskModel):
        raise FslibError(
            f"{what!r:.80} cannot be explored: give a Study, or a MultiTaskModel and tasks"
        )
    if tasks is None or seed is not None:
        raise FslibError(
            "a model is explored with tasks, and without a seed: fslib.explore(model, tasks)"
        )
    if examples is not None:
        check_count("examples", examples, 2)
    return _of_model(what, as_tasks(tasks), examples)


def shown_units(study: Study, seed: int | None = None) -> list[Unit]:
    """Return the units that `explore` shows of one of a study's models.

    Of those about single heads, what has a record or can be computed here. Raises FslibError for a seed that the study
    does not have.
    """
    chosen = _chosen(study, seed)
    return [
        *study.units(chosen),
        *(unit for unit in study.head_units(chosen) if _can_be_had(study, unit)),
    ]


def _chosen(study: Study, seed: int | None) -> int:
    seeds = study.seeds
    if seed is not None and seed not in seeds:
        raise unknown("seed of this study", str(seed), [str(s) for s in seeds])
    return seeds[0] if seed is None else seed


def _can_be_had(study: Study, unit: Unit) -> bool:
    """Return whether a unit has a record, or its data are at hand, so that it can be computed."""
    if study.store.find(unit) is not None:
        return True
    try:
        require(unit.task_names(), unit.kind)
    except FslibError:
        return False
    return True


def _of_study(study: Study, seed: int | None) -> "Explorer":
    shown = {unit.key for unit in shown_units(study, seed)}
    chosen, p = _chosen(study, seed), study.profile
    units, alone, looked_at = study.units(chosen), study.lesion(chosen), study.pattern(chosen)
    iap = units.prune.iap(study.store)
    sets, rise = pruned_sets(iap), {}
    if alone.key in shown:
        lesions = alone.lesions(study.store)
        sets += single_heads(lesions)
        rise = {name: lesions.rise(name) for name in lesions.tasks}
    patterns = looked_at.patterns(study.store) if looked_at.key in shown else {}
    maps = {
        t: parts.importance() for t, parts in units.importance.contributions(study.store).items()
    }
    view = View(
        title=f"{study.name}: {p.encoder}, seed {chosen}",
        about=f"Importance from {p.importance_examples} training examples per task; this one model.",
        importance=maps,
        metrics={name: task.metric for name, task in study.tasks.items()},
        descriptions={name: task.description for name, task in study.tasks.items()},
        sets=sets,
        rise=rise,
        texts={name: len(patterns[name]) if patterns else TEXTS for name in maps},
        patterns=patterns,
    )
    scored = {name: scored_on(task, p.lesioned_on) for name, task in study.tasks.items()}
    recorded = {name: rows[0] for name, rows in iap.unpruned.items()}
    return Explorer(
        view, Kernel(lambda: units.train.trained(study.store), scored, study.tasks, recorded)
    )


def _of_model(model: MultiTaskModel, tasks: dict[str, Task], examples: int | None) -> "Explorer":
    check_model(model, *tasks.values())
    check_several({name: len(task.eval) for name, task in tasks.items()})
    trained_on, scored = examples or 256, examples or 200
    maps = {name: head_importance(model, task, examples=trained_on) for name, task in tasks.items()}
    tasks = {name: task.limited(eval=scored) for name, task in tasks.items()}
    kernel = Kernel(lambda: model, tasks, tasks)
    is_seen = model.encoder.config.model_type not in HOOKED
    view = View(
        title=f"{model.source}: {model.n_layers} layers of {model.n_heads} heads",
        about=f"Importance from at most {trained_on} training examples per task.",
        importance=maps,
        metrics={name: task.metric for name, task in tasks.items()},
        descriptions={name: task.description for name, task in tasks.items()},
        sets=(),
        rise={},
        texts={name: len(kernel.texts(name)) if is_seen else 0 for name in maps},
        patterns={},
    )
    return Explorer(view, kernel)


@dataclass(eq=False)
class Kernel:
    """What computes for a page: a model, got when it is first needed, and tasks.

    scored: the tasks with the evaluation examples that scores are from. shown: with those that texts are taken from.
    recorded: what the model with all heads predicted when it was recorded, on the examples that are scored.
    """

    get: Callable[[], MultiTaskModel]
    scored: Mapping[str, Task]
    shown: Mapping[str, Task]
    recorded: Mapping[str, Shaped[np.ndarray, " n"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._texts: dict[str, list[Split]] = {}

    @cached_property
    def model(self) -> MultiTaskModel:
        """The model."""
        return self.get()

    @cached_property
    def _batches(self) -> dict[str, list[Batch]]:
        return {
            name: length_batches(self.model, task.eval, EVAL_BATCH)
            for name, task in self.scored.items()
        }

    def predictions(
        self, off: Bool[np.ndarray, "layers heads"], tell: Callable[[int, int], None]
    ) -> dict[str, Shaped[np.ndarray, "2 n"]]:
        """Return {task: predictions}, first of the whole model as it is now, then without some heads.

        `tell` hears how many passes over a batch are done, of how many.
        """
        found = {
            name: blank_predictions(task, len(task.eval), 2) for name, task in self.scored.items()
        }
        total, done = 2 * sum(map(len, self._batches.values())), 0

        def keep(task: str, batch: Batch, number: int, logits: Tensor) -> None:
            nonlocal done
            found[task][batch.indices, number] = predicted(self.scored[task], logits)
            done += 1
            tell(done, total)

        with hidden():
            each_pruned(self.model, self._batches, np.stack([np.zeros_like(off), off]), keep)
        return {name: rows.T for name, rows in found.items()}

    def scores(
        self, off: Bool[np.ndarray, "layers heads"], tell: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Return every task's scores without some heads and with all of them, as the page takes them, and a note.

        The note is empty unless the model answers otherwise than the recorded one, as one that was trained again on
        another type of machine may.
        """
        found = self.predictions(off, tell)
        labels = {name: task.eval.labels for name, task in self.scored.items()}
        metrics = {name: task.metric for name, task in self.scored.items()}
        whole = Whole(metrics, labels, {name: rows[0] for name, rows in found.items()})
        effects = whole.effects({name: rows[1] for name, rows in found.items()})
        pairs = [(whole.predictions[name], known) for name, known in self.recorded.items()]
        others = sum(int((~np.isclose(now, known, atol=1e-3)).sum()) for now, known in pairs)
        note = (
            f"With all heads, this model answers {others} of {sum(map(len, labels.values()))} examples otherwise than "
            "the recorded one: it is not that model to the bit. Compare these scores with each other, not with records."
        )
        return {
            "scores": [effect_json(e) for e in effects],
            "whole": whole.json(),
            "note": note if others else "",
        }

    def texts(self, task: str) -> list[Split]:
        """Return the texts of a task that can be looked at."""
        if task not in self._texts:
            self._texts[task] = short_texts(self.model, self.shown[task], TEXTS, LONGEST)
        return self._texts[task]

    def pattern(self, task: str, number: int) -> dict[str, Any]:
        """Return one of the texts of a task, or the last of fewer, as the page takes it: which one, of how many."""
        texts = self.texts(task)
        number = min(number, len(texts) - 1)
        shown = pattern(self.model, self.shown[task], texts[number])
        return {"number": number, "texts": len(texts), "pattern": pattern_json(shown)}


class Explorer(anywidget.AnyWidget):
    """A page to look at a model's heads, from `explore`.

    off: positions of the heads that are switched off, layer by layer. percent: the share of heads in a task's top set.
    Both can be read and set, and follow what is done on the page.
    """

    _esm = MODULE
    _css = STYLE
    view = traitlets.Dict().tag(sync=True)
    off = traitlets.List(traitlets.Int()).tag(sync=True)
    percent = traitlets.Int(FIRST_PERCENT, min=0, max=100).tag(sync=True)
    kernel = traitlets.Bool(True).tag(sync=True)

    def __init__(self, view: View, kernel: Kernel) -> None:
        self._shown, self._kernel = view, kernel
        super().__init__(view=view.json())
        self.on_msg(self._heard)

    @traitlets.validate("off")
    def _in_the_model(self, proposal: Any) -> list[int]:
        layers, heads = self._shown.shape
        if wrong := [at for at in proposal["value"] if not 0 <= at < layers * heads]:
            raise FslibError(
                f"head {wrong[0]} is outside 0..{layers * heads - 1}, the heads of {layers} layers"
            )
        return sorted(set(proposal["value"]))

    @property
    def heads(self) -> Bool[np.ndarray, "layers heads"]:
        """The heads that are switched off, True = off; can be set."""
        return self._as_heads(self.off)

    @heads.setter
    def heads(self, wanted: object) -> None:
        array = np.asarray(wanted)
        if array.dtype != np.bool_ or array.shape != self._shown.shape:
            raise FslibError(
                f"heads of this explorer are a bool array {self._shown.shape} (layers, heads), True = off; "
                f"got {array.dtype} of shape {array.shape}"
            )
        self.off = np.flatnonzero(array).tolist()

    def _as_heads(self, off: list[int]) -> Bool[np.ndarray, "layers heads"]:
        found = np.zeros(self._shown.shape, dtype=bool)
        found.flat[off] = True
        return found

    def to_html(self, path: str | Path) -> Path:
        """Write the page into one file that needs no kernel and no network, and return its path."""
        path = checked_file(path)
        text = page({"view": self.view, "off": self.off, "percent": self.percent, "kernel": False})
        write_text(path, text, instead="another file")
        return path

    def summary(self) -> list[str]:
        """Return a line per task: its most important heads, and how many of its top set are special."""
        maps, percent = self._shown.importance, max(self.percent, 1)
        tops = {name: top_heads(values, percent / 100) for name, values in maps.items()}
        counts = np.sum(list(tops.values()), axis=0)
        lines = []
        for name, values in maps.items():
            best = np.unravel_index(np.argsort(-values, axis=None, kind="stable")[:3], values.shape)
            named = ", ".join(
                head_name(int(layer), int(head)) for layer, head in zip(*best, strict=True)
            )
            special = int((tops[name] & (counts == 1)).sum())
            size = int(tops[name].sum())
            lines.append(
                f"{name}: most important {named}; of its top {percent} %, {special} of {size} special"
            )
        return lines

    def __repr__(self) -> str:
        layers, heads = self._shown.shape
        return f"Explorer({self._shown.title}; {len(self._shown.importance)} tasks, {layers} x {heads} heads)"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """Show the page; where no page can run, a picture of the maps and a line per task."""
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        figure, picture = head_maps(self._shown.importance), BytesIO()
        figure.savefig(picture, format="png", bbox_inches="tight", metadata={"Software": None})
        image = picture.getvalue()
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self.summary())
        told = (
            f"<p>{html.escape(repr(self))}. Run the cell to explore it.</p><ul>{lines}</ul>"
            f'<img alt="importance of every head" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        )
        return {**data, "text/plain": repr(self), "text/html": told, "image/png": image}, metadata

    def _heard(self, _: Any, message: Any, buffers: Any) -> None:
        """Answer a question of the page."""
        try:
            if message["type"] == "scores":
                self._score(message["id"], [int(at) for at in message["off"]])
            elif message["type"] == "pattern":
                name = list(self._shown.importance)[int(message["task"])]
                asked = int(message["number"])
                self.send({**message, "asked": asked, **self._kernel.pattern(name, asked)})
        except KeyboardInterrupt:
            self._fail(message, "interrupted")
        except Exception as error:  # a page that waits for an answer has to hear of anything
            told = (
                str(error)
                if isinstance(error, FslibError)
                else f"{type(error).__name__}: {first_line(error)}"
            )
            self._fail(message, told)

    def _fail(self, message: dict[str, Any], told: str) -> None:
        """Tell the page why its question has no answer."""
        about: dict[str, Any] = {
            key: message[key] for key in ("id", "task", "number") if key in message
        }
        self.send(about | {"type": "problem", "text": told})

    def _score(self, number: int | str, off: list[int]) -> None:
        def tell(done: int, total: int) -> None:
            say(done, total, f"{done} of {total} passes")

        def say(done: int, total: int, text: str) -> None:
            self.send(
                {"type": "progress", "id": number, "done": done, "total": total, "text": text}
            )

        say(
            0,
            1,
            "Getting the model: without a checkpoint it is trained again, which takes minutes …",
        )
        self._in_the_model({"value": off})
        self.send(
            {
                "type": "scores",
                "id": number,
                "off": off,
                **self._kernel.scores(self._as_heads(off), tell),
            }
        )


def checked_file(path: str | Path) -> Path:
    """Return where a page is to be written. Raises FslibError for what is no path, and for a folder."""
    path = checked_path("file of the explorer", path)
    if path.is_dir():
        raise FslibError(
            f"{path} is a folder: give the name of a file, such as {path / 'explorer.html'}"
        )
    return path


def page(state: Mapping[str, Any]) -> str:
    """Return the HTML file: module, style and state in one, nothing loaded from anywhere."""
    # In a script, only "</script" and "<!--" could end or change it: no "<" is left in the state.
    told = json.dumps(state, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    module = MODULE.read_text(encoding="utf-8").replace("export default {", "const explorer = {")
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(str(state["view"]["title"]))}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; }}
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main id="explorer"></main>
<script type="application/json" id="state">{told}</script>
<script type="module">
{module}
const state = JSON.parse(document.getElementById("state").textContent);
explorer.render({{ model: explorer.standIn(state), el: document.getElementById("explorer") }});
</script>
</body>
</html>
"""

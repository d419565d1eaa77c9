"""The head explorer: switch heads off and see what it costs, in JupyterLab or in a file.

`explore` shows a study's model, from its records, or any model with any tasks. What the page does
is in explorer.js, the same module in both places. In JupyterLab a kernel scores any set of heads; a
file shows what was recorded.
"""

import base64
import html
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

import anywidget
import numpy as np
import traitlets
from jaxtyping import Bool, Shaped

from fslib.data.tasks import Split, Task, Tasks, as_tasks
from fslib.errors import FslibError, check_count, checked_path, explained, unknown
from fslib.evaluation import Score, check_several, evaluate
from fslib.explorer.view import View, as_json, as_text, compare, lone_heads, pruned_sets, task_views
from fslib.heads import head_name
from fslib.importance import head_importance
from fslib.model.attention import HOOKED, pruned
from fslib.model.multitask import MultiTaskModel, check_model
from fslib.plot import head_maps
from fslib.study.design import LONGEST, TEXTS
from fslib.study.files import write_text
from fslib.study.store import Unit
from fslib.study.study import Study
from fslib.study.units import LesionUnit, PatternUnit, pattern, scored_on, short_texts

HERE = Path(__file__).parent
MODULE, STYLE, PAGE = HERE / "explorer.js", HERE / "explorer.css", HERE / "page.html"
IMPORTANCE_EXAMPLES, SCORED_EXAMPLES = 256, 200
Tell = Callable[[int, int], None]


def explore(
    what: object,
    tasks: Tasks | None = None,
    *,
    seed: int | None = None,
    examples: int | None = None,
) -> "Explorer":
    """Return the head explorer of a study's model, or of a model with tasks.

    The last line of a cell shows it.

    Args:
        what: A `Study`, shown from its records (what is missing is computed first), or a model.
        tasks: Those that a model's heads are scored for; a study has its own.
        seed: Which of a study's main models; None: the first.
        examples: Of each task, how many training examples a model's importance is estimated on, and
            how many evaluation examples it is scored on; None: 256 and 200.

    Raises:
        FslibError: For a study with tasks or examples, a model without tasks or with a seed, a task
            with a single evaluation example, and a seed that the study does not have.
    """
    if isinstance(what, Study) and tasks is None and examples is None:
        return _of_study(what, seed)
    if isinstance(what, MultiTaskModel) and tasks is not None and seed is None:
        return _of_model(what, as_tasks(tasks), examples)
    mend = "give a study (and seed=), or a MultiTaskModel with tasks (and examples=)"
    raise FslibError(f"{' '.join(repr(what).split()):.80} cannot be explored so: {mend}")


def shown_units(study: Study, seed: int | None = None) -> list[Unit]:
    """Return the units that `explore` shows of one of a study's main models.

    Raises:
        FslibError: For a seed that the study does not have.
    """
    chosen = _chosen(study, seed)
    return [*study.units(chosen), *study.head_units(chosen)]


def _chosen(study: Study, seed: int | None) -> int:
    if seed is not None and seed not in study.seeds:
        raise unknown("seed of this study", seed, map(str, study.seeds))
    return study.seeds[0] if seed is None else seed


def _of_study(study: Study, seed: int | None) -> "Explorer":
    chosen, p, store = _chosen(study, seed), study.profile, study.store
    units = study.units(chosen)
    contributions = units.importance.contributions(store)
    maps = {name: parts.importance() for name, parts in contributions.items()}
    tasks, iap = task_views(study.tasks, maps), units.prune.iap(store)
    whole, sets = compare(pruned_sets(iap))
    wholes = [whole]
    for unit in study.head_units(chosen):
        if isinstance(unit, LesionUnit):
            lesions = unit.lesions(store)
            whole, alone = compare(lone_heads(lesions), number=1)
            wholes, sets = [*wholes, whole], sets + alone
            for task in tasks:
                task.rise = lesions.rise(task.name)
        elif isinstance(unit, PatternUnit):
            for task in tasks:
                task.patterns = [as_text(text) for text in unit.patterns(store)[task.name]]
                task.texts = len(task.patterns)
    title = f"{study.name}: {p.encoder}, seed {chosen}"
    about = f"Importance from {p.importance_examples} training examples per task; this one model."
    scored = {name: scored_on(task, p.lesioned_on) for name, task in study.tasks.items()}
    recorded = {name: rows[0] for name, rows in iap.unpruned.items()}
    kernel = Kernel(lambda: units.train.trained(store), scored, study.tasks, recorded)
    return Explorer(View(title, about, iap.heads.shape[-2:], tasks, wholes, sets), kernel)


def _of_model(model: MultiTaskModel, tasks: dict[str, Task], examples: int | None) -> "Explorer":
    check_count("examples", examples, 2, none=True)
    check_model(model, *tasks.values())
    check_several({name: len(task.eval) for name, task in tasks.items()})
    most, shape = examples or IMPORTANCE_EXAMPLES, (model.n_layers, model.n_heads)
    maps = {name: head_importance(model, task, examples=most) for name, task in tasks.items()}
    tasks = {name: task.limited(eval=examples or SCORED_EXAMPLES) for name, task in tasks.items()}
    kernel, shown = Kernel(lambda: model, tasks, tasks, {}), task_views(tasks, maps)
    is_seen = model.encoder.config.model_type not in HOOKED
    for task in shown:
        task.texts = len(kernel.texts(task.name)) if is_seen else 0
    title = f"{model.source}: {shape[0]} layers of {shape[1]} heads"
    about = f"Importance from at most {most} training examples per task."
    return Explorer(View(title, about, shape, shown, [], []), kernel)


@dataclass(eq=False)
class Kernel:
    """What computes for a page.

    Args:
        get: Returns the model; called when it is first needed.
        scored: The tasks, with the evaluation examples that scores are from.
        shown: The tasks, with those that texts are taken from.
        recorded: What the model with all heads predicted for the scored examples when it was
            recorded, {task: (n,)}.
    """

    get: Callable[[], MultiTaskModel]
    scored: Mapping[str, Task]
    shown: Mapping[str, Task]
    recorded: Mapping[str, Shaped[np.ndarray, " n"]]

    @cached_property
    def model(self) -> MultiTaskModel:
        """The model."""
        return self.get()

    def scores(self, off: Bool[np.ndarray, "layers heads"], tell: Tell) -> dict[str, Any]:
        """Return every task's scores with all heads and without some, and a note, for the page.

        The model is scored as it is now. The note is empty unless it answers otherwise than the
        recorded model, as one may that was trained again on another type of machine.

        Args:
            off: The heads to switch off.
            tell: Is told of how many of how many tasks the scores are known.
        """
        whole, without = dict[str, Score](), dict[str, Score]()
        for name, task in self.scored.items():
            tell(len(whole), len(self.scored))
            whole |= evaluate(self.model, {name: task})
            with pruned(self.model, off):
                without |= evaluate(self.model, {name: task})
        before, (after,) = compare([("all heads", [], whole), ("", [], without)])
        pairs = [(whole[name].predictions, known) for name, known in self.recorded.items()]
        changed = sum(int((~np.isclose(now, known, atol=1e-3)).sum()) for now, known in pairs)
        count = sum(estimate.examples for estimate in before)
        how = f"answers {changed} of {count} examples otherwise than the recorded model"
        note = f"With all heads, this one {how}. Compare its scores with each other only."
        parts = {"whole": before, "scores": after.scores, "lost": after.lost}
        return as_json(parts) | {"note": note if changed else ""}

    def texts(self, task: str) -> list[Split]:
        """Return the texts of a task that can be looked at."""
        return short_texts(self.model, self.shown[task], TEXTS, LONGEST)

    def pattern(self, task: str, number: int) -> dict[str, Any]:
        """Return a text of a task, or the last of fewer, for the page: its number, of how many."""
        texts = self.texts(task)
        number = min(number, len(texts) - 1)
        shown = as_text(pattern(self.model, self.shown[task], texts[number]))
        return {"number": number, "texts": len(texts), "pattern": as_json(shown)}


class Explorer(anywidget.AnyWidget):
    """A page to look at a model's heads, from `explore`.

    `off`, positions of the heads that are switched off, layer by layer, and `percent`, the share of
    heads in a task's top set, can be read and set, and follow what is done on the page.
    """

    _esm = MODULE
    _css = STYLE
    view = traitlets.Dict().tag(sync=True)
    off = traitlets.List(traitlets.Int()).tag(sync=True)
    percent = traitlets.Int(10, min=0, max=100).tag(sync=True)
    kernel = traitlets.Bool(True).tag(sync=True)

    def __init__(self, view: View, kernel: Kernel) -> None:
        self._shown, self._kernel = view, kernel
        super().__init__(view=as_json(view))
        self.on_msg(self._answer)

    @traitlets.validate("off")
    def _in_the_model(self, proposal: Any) -> list[int]:
        (layers, heads), chosen = self._shown.shape, sorted(set(proposal["value"]))
        for at in chosen:
            if not 0 <= at < layers * heads:
                raise FslibError(f"head {at} is outside 0..{layers * heads - 1} of this model")
        return chosen

    @property
    def heads(self) -> Bool[np.ndarray, "layers heads"]:
        """The heads that are switched off, True = off; can be set."""
        found = np.zeros(self._shown.shape, dtype=bool)
        found.flat[self.off] = True
        return found

    @heads.setter
    def heads(self, wanted: object) -> None:
        array, shape = np.asarray(wanted), self.heads.shape
        if array.dtype != np.bool_ or array.shape != shape:
            got = f"got {array.dtype} of shape {array.shape}"
            raise FslibError(f"heads are a bool array {shape} (layers, heads), True = off; {got}")
        self.off = np.flatnonzero(array).tolist()

    def to_html(self, path: str | Path) -> Path:
        """Write the page into a file that needs no kernel and no network, and return its path."""
        path = checked_file(path)
        text = page({"view": self.view, "off": self.off, "percent": self.percent, "kernel": False})
        write_text(path, text, instead="another file")
        return path

    def __repr__(self) -> str:
        count, (layers, heads) = len(self._shown.tasks), self._shown.shape
        return f"Explorer({self._shown.title}; {count} tasks, {layers} x {heads} heads)"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """Show the page; where no page can run, a picture of the maps and a line per task."""
        bundle: Any = super()._repr_mimebundle_(**options)
        maps, file = {task.name: task.importance for task in self._shown.tasks}, BytesIO()
        options = {"format": "png", "bbox_inches": "tight", "metadata": {"Software": None}}
        head_maps(maps).savefig(file, **options)
        text = f"<p>{html.escape(repr(self))}. Run the cell to explore it.</p><ul>"
        for name, values in maps.items():
            order = np.argsort(-values, axis=None, kind="stable")[:3].tolist()
            best = ", ".join(head_name(*divmod(at, values.shape[1])) for at in order)
            text += f"<li>{html.escape(name)}: most important {best}</li>"
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        text += f'</ul><img alt="importance of every head" src="{source}">'
        shown = {"text/plain": repr(self), "text/html": text, "image/png": file.getvalue()}
        return bundle[0] | shown, bundle[1]

    def _answer(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        """Answer a question of the page, or say why it has no answer."""

        def tell(done: int, total: int) -> None:
            self.send({"type": "progress", "id": message["id"], "done": done, "total": total})

        try:
            if message["type"] == "scores":
                heads = np.zeros_like(self.heads)
                heads.flat[self._in_the_model({"value": message["off"]})] = True
                answer = self._kernel.scores(heads, tell)
            else:
                task, number = self._shown.tasks[message["task"]].name, message["number"]
                answer = {"asked": number} | self._kernel.pattern(task, number)
        except KeyboardInterrupt:
            answer = {"type": "problem", "text": "interrupted"}
        except Exception as error:  # a page that waits for an answer has to hear of anything
            text = str(error) if isinstance(error, FslibError) else explained(error)
            answer = {"type": "problem", "text": text}
        self.send(message | answer)


def checked_file(path: str | Path) -> Path:
    """Return where a page is to be written.

    Raises:
        FslibError: For what is no path, and for a folder.
    """
    path = checked_path("file of the explorer", path)
    if path.is_dir():
        raise FslibError(f"{path} is a folder: give the name of a file, such as explorer.html")
    return path


def page(state: Mapping[str, Any]) -> str:
    """Return the HTML file: module, style and state in one, nothing loaded from anywhere."""
    # In a script, only "</script" and "<!--" could end or change it: no "<" is left in the state.
    text = json.dumps(state, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    module = MODULE.read_text(encoding="utf-8").replace("export default {", "const explorer = {")
    words = {"title": html.escape(str(state["view"]["title"])), "state": text, "module": module}
    style = STYLE.read_text(encoding="utf-8")
    return Template(PAGE.read_text(encoding="utf-8")).substitute(words, style=style)

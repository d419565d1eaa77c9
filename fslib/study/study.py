"""`Study`: what a notebook asks for results.

A study is a profile, a first seed and a results folder. It makes the units of the profile's models
(`Design`), hands out their records in a form that a notebook can use, and saves tables and figures.
"""

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fslib.data.bbc import EMBEDDED
from fslib.data.loading import load_tasks
from fslib.data.tasks import Task
from fslib.errors import FslibError, check_among, checked_path
from fslib.iap import IAP
from fslib.importance import Contributions
from fslib.scoring import chance_level
from fslib.study.design import Design
from fslib.study.files import save_figure, save_table, write_bytes, write_text
from fslib.study.fingerprints import RecordedTask, cached_task, consult
from fslib.study.profiles import make_profile
from fslib.study.provenance import ROOT
from fslib.study.store import Record, Store, results_root

PARAMETERS = ("profile", "seed", "overrides")  # of every notebook
Given = Mapping[str, Any] | None
Root = str | Path | None


class Study(Design):
    """One profile's results.

    Args:
        profile: smoke, mini, evidence or paper.
        seed: added to the profile's seeds.
        overrides: {field: value} of the profile. An overridden profile keeps its results in a
            folder of its own, named by a hash of the settings, which stand there in settings.json.
        results: the folder of all results; default `results_root()`.

    Raises:
        FslibError: for an unknown profile, field or task, and for a value out of range.
    """

    def __init__(
        self, profile: str = "mini", *, seed: int = 0, overrides: Given = None, results: Root = None
    ) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
            raise FslibError(f"seed {seed!r:.80}: give a whole number, 0 or more and below 2**31")
        changes = {} if overrides is None else overrides
        super().__init__(make_profile(profile, changes), seed)
        # as they were understood: in one spelling, and with whole paths
        understood = self.profile.model_dump(mode="json")
        self.name, self.overrides = profile, {k: understood[k] for k in sorted(changes)}
        root = checked_path("results folder", results or results_root()).absolute()
        self.folder = root / folder_name(profile, seed, self.overrides)
        self.store = Store(self.folder, self.profile.threads)
        consult(self.folder)

    @classmethod
    def from_parameters(cls, namespace: Mapping[str, Any]) -> "Study":
        """Return the study that a notebook's parameters ask for.

        Used as `fslib.Study.from_parameters(globals())`. papermill puts its parameters into a cell
        of their own after the notebook's; a name there that no notebook knows would change nothing
        and say nothing.

        Raises:
            FslibError: for such a name, with the nearest valid one.
        """
        executed = namespace.get("In", ())  # by IPython, so far
        cells = [cell for cell in executed if cell.startswith("# Parameters\n")]
        for name in re.findall(r"^(\w+) *=", "\n".join(cells), re.M):
            check_among("parameter", name, PARAMETERS)
        return cls(namespace["profile"], seed=namespace["seed"], overrides=namespace["overrides"])

    def write_settings(self) -> None:
        """Write profile, seed and settings into the folder of an overridden profile."""
        if self.overrides:
            settings = {"profile": self.name, "seed": self.seed, "overrides": self.overrides}
            text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
            write_text(self.folder / "settings.json", text)

    @property
    def is_plain(self) -> bool:
        """Whether this is what the committed notebooks show: mini, without other settings."""
        return self.name == "mini" and self.seed == 0 and not self.overrides

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The study's tasks, with as many evaluation examples as the profile takes."""
        return self.data.load()

    @cached_property
    def every_task(self) -> dict[str, Task]:
        """All tasks of some notebook: the study's own, of pairs, endings and transfer.

        Each with as many evaluation examples as the first notebook that takes it evaluates.
        """
        p, found = self.profile, dict(self.tasks)
        ending = (*self.ending_tasks, *p.transfer_targets)
        for names, limit in ((self.pair_tasks, p.small_eval_examples), (ending, p.ending_examples)):
            new = [name for name in names if name not in found]
            found |= {name: cached_task(name).limited(eval=limit) for name in new}
        return found

    @cached_property
    def example_tasks(self) -> dict[str, Task]:
        """Real texts to show a method on.

        Those of the study's tasks, or of the embedded ones where their data are not at hand.
        """
        at_hand = not any(isinstance(task, RecordedTask) for task in self.tasks.values())
        return self.tasks if at_hand else load_tasks(list(EMBEDDED))

    def chance(self) -> dict[str, float]:
        """Return, per task, the score of the best constant answer."""
        return {n: chance_level(task.metric, task.eval.labels) for n, task in self.tasks.items()}

    def with_records(self, records: Sequence[Record]) -> "Study":
        """Return the same study with these records in the place of its own; write nothing."""
        other = copy.copy(self)
        other.store = self.store.with_records(records)
        return other

    def multitask(self) -> list[Record]:
        """Return the training records of the main models, one per seed."""
        return [self.store.get(self.units(s).train) for s in self.seeds]

    def contributions(self) -> list[dict[str, Contributions]]:
        """Return per-example importance, one {task: contributions} per seed."""
        return [self.units(s).importance.contributions(self.store) for s in self.seeds]

    def iap(self) -> IAP:
        """Return the pruning results over all seeds."""
        return IAP.over_seeds([self.units(s).prune.iap(self.store) for s in self.seeds])

    def figure(self, name: str, figure: Figure, caption: str, *, feature: str = "") -> None:
        """Save a figure as PNG and SVG under the study's folder, and show it.

        Args:
            name: of the files; it begins with the notebook's number.
            figure: what to save.
            caption: shown below it.
            feature: of the reference results, also keep it in figures/ under this name.
        """
        from IPython.display import Markdown, display  # only notebooks show figures

        folder = self.folder / "figures"
        save_figure(folder, name, figure, caption, f"fslib run {name[:2]} --profile {self.name}")
        if feature and self.is_plain and self.folder.parent.resolve() == ROOT / "results":
            # copied: drawn again, a layout may differ in the last digit
            for kind in ("png", "svg"):
                drawn = (folder / f"{name}.{kind}").read_bytes()
                write_bytes(ROOT / "figures" / f"{feature}.{kind}", drawn)
        display(figure, Markdown(f"*{caption}*"))

    def table(self, name: str, table: pd.DataFrame, digits: int = 3, *, show: Any = None) -> None:
        """Save a table as CSV and Markdown under the study's folder, and show it rounded.

        Args:
            name: of the files.
            table: what to save.
            digits: to round to.
            show: show only these rows; None: all.
        """
        from IPython.display import HTML, display

        rounded = save_table(self.folder, name, table, digits)
        rows = rounded if show is None else rounded[show]
        with pd.option_context("display.max_colwidth", None):
            display(HTML(rows.to_html(index=False, border=0)))


def folder_name(profile: str, seed: int, overrides: Mapping[str, Any]) -> str:
    """Return the name of a study's results folder.

    Readable, of bounded length, and another for other settings.
    """
    name = profile
    if overrides:
        words = "+".join(f"{k}={v}" for k, v in overrides.items())
        readable = re.sub(r"[^\w.+=-]+", "_", words, flags=re.ASCII)[:40]
        whole = json.dumps([profile, overrides], sort_keys=True)
        name += f"+{readable}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return name + (f"+seed={seed}" if seed else "")

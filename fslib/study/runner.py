"""Run notebooks through papermill, and verify records by computing them again."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import papermill
from nbclient.exceptions import DeadKernelError

from fslib.errors import FslibError, unknown
from fslib.scoring import rank_correlation
from fslib.study.records import ROOT, Record, Store, Unit, machine, write_bytes, writing
from fslib.study.study import Study

# What may differ between machines of different types, where floating-point sums come out in another order.
SCORE_TOLERANCE = 0.08  # metric values
AGREEMENT = 0.85  # share of equal predictions
RANK_TOLERANCE = 0.80  # rank correlation of other arrays


class NotebookError(FslibError):
    """A notebook did not run through."""


def notebooks_folder() -> Path:
    """Return the folder of notebooks. Raises FslibError outside a clone."""
    folder = ROOT / "notebooks"
    if not folder.is_dir():
        raise FslibError(
            f"no notebooks at {folder}: run from a clone of the repository, installed with pip install -e ."
        )
    return folder


def find_notebooks(names: list[str] | None = None) -> list[Path]:
    """Return notebooks by number (03), name or file name; all, in order, if none is named."""
    all_notebooks = sorted(notebooks_folder().glob("[0-9][0-9]_*.ipynb"))
    if not names:
        return all_notebooks
    chosen = []
    for name in names:
        wanted = Path(name).name.removesuffix(".ipynb")
        match = [p for p in all_notebooks if wanted in (p.stem, p.stem[:2], p.stem[3:])]
        if not match:
            raise unknown("notebook", name, [p.stem for p in all_notebooks])
        chosen += match
    return chosen


def check_in_place(study: Study) -> None:
    """Raise FslibError for a study whose outputs must not stand in the committed notebooks."""
    if not study.is_plain:
        raise FslibError("--in-place is for the default profile without other settings: the notebooks show its results")


def run_notebook(study: Study, source: Path, *, in_place: bool = False) -> Path:
    """Compute what is missing, execute the notebook on records, and return where it is, as executed.

    in_place: write the outputs into the source as well (only for a profile's plain results).
    Raises FslibError, naming the cell, if the notebook fails; what it had done is kept as <name>.failed.ipynb.
    """
    if in_place:
        check_in_place(study)
    for unit in study.plan(source.stem):
        study.store.get(unit)
    settings = {"profile": study.name, "seed": study.seed, "overrides": study.overrides}
    parameters = None if study.is_plain else settings
    target = study.folder / "notebooks" / source.name
    with writing(target), tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / source.name
        failed = target.with_name(f"{source.stem}.failed.ipynb")
        before = os.environ.get("FSLIB_RESULTS")
        os.environ["FSLIB_RESULTS"] = str(study.folder.parent.resolve())
        try:
            papermill.execute_notebook(
                str(source),
                str(output),
                parameters,
                kernel_name="python3",
                progress_bar=False,
                cwd=str(ROOT),
                extra_arguments=["--log-level=ERROR"],
            )
        except papermill.PapermillExecutionError as error:
            write_bytes(failed, output.read_bytes())
            reason = " ".join(f"{error.ename}: {error.evalue}".split())
            raise NotebookError(
                f"notebook {source.stem} failed in cell {error.exec_count}: {reason} ({failed})"
            ) from error
        except DeadKernelError as error:
            raise NotebookError(f"notebook {source.stem} failed: its kernel died (out of memory?)") from error
        finally:
            os.environ.pop("FSLIB_RESULTS")
            if before is not None:
                os.environ["FSLIB_RESULTS"] = before
        content = tidy(output)
    write_bytes(target, content)
    failed.unlink(missing_ok=True)
    if in_place:
        write_bytes(source, content)
    return target


def tidy(path: Path) -> bytes:
    """Return a notebook without the time stamps and paths of its execution: the same run gives the same bytes."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        for stamp in ("papermill", "execution"):
            cell.metadata.pop(stamp, None)
        if cell.metadata.get("tags") == []:
            cell.metadata.pop("tags")
    return (nbformat.writes(notebook) + "\n").encode()


@dataclass(frozen=True)
class Comparison:
    """A recomputed record against the stored one: what differs beyond what is allowed, one line each."""

    unit: Unit
    exact: bool
    problems: list[str]
    seconds: float


def verify_unit(study: Study, unit: Unit) -> Comparison:
    """Compute a recorded unit from scratch, in an empty folder, and return how it compares with its record."""
    stored = study.store.find(unit)
    if stored is None:
        raise FslibError(f"no record of {unit.kind}-{unit.key} to verify: run fslib run first")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        again = Store(Path(scratch)).get(unit)
    exact = stored.machine == machine() and stored.versions == again.versions
    return Comparison(unit, exact, differences(stored, again, exact), time.perf_counter() - started)


def differences(stored: Record, again: Record, exact: bool) -> list[str]:
    """Say where two records of one unit differ: bit by bit (exact), or beyond the tolerances above."""
    problems = _result_differences(stored.result, again.result, exact, "result")
    if stored.arrays.keys() != again.arrays.keys():
        return [*problems, f"arrays {sorted(stored.arrays)} became {sorted(again.arrays)}"]
    for name, old in stored.arrays.items():
        new = again.arrays[name]
        if old.shape != new.shape:
            problems.append(f"{name}: shape {old.shape} became {new.shape}")
        elif np.array_equal(old, new):
            continue
        elif exact:
            share = float(np.mean(old != new))
            problems.append(f"{name}: {share:.1%} of the values differ, where this machine must repeat them")
        elif old.dtype.kind == "f":
            if (r := rank_correlation(old, new)) < RANK_TOLERANCE:
                problems.append(f"{name}: rank correlation {r:.3f}, below {RANK_TOLERANCE}")
        elif (same := float(np.mean(old == new))) < AGREEMENT:
            problems.append(f"{name}: {same:.1%} of the values agree, below {AGREEMENT:.0%}")
    return problems


def _result_differences(old: Any, new: Any, exact: bool, where: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [p for k in old for p in _result_differences(old[k], new[k], exact, f"{where}.{k}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [p for i, (a, b) in pairs for p in _result_differences(a, b, exact, f"{where}[{i}]")]
    if old == new:
        return []
    if not exact and isinstance(old, float) and isinstance(new, float) and abs(old - new) <= SCORE_TOLERANCE:
        return []
    return [f"{where}: {old} became {new}"]

"""fslib run | list | verify | check | explore | site.

Exit codes: 0 done (verify: all equal; check: all can be used), 1 a notebook failed, a record differs or cannot be read,
a model cannot be used, 2 bad input, nothing to verify, or no place to write, 130 interrupted, 141 nobody reads the
output any more, 143 terminated.
"""

import argparse
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fslib.checks import check
from fslib.errors import FslibError, first_line
from fslib.model.devices import keep_freed_memory
from fslib.study.config import settings_of
from fslib.study.files import sweep
from fslib.study.fingerprints import require
from fslib.study.profiles import PROFILES
from fslib.study.provenance import ROOT
from fslib.study.runner import (
    NotebookError,
    check_in_place,
    find_notebooks,
    notebooks_folder,
    run_notebook,
)
from fslib.study.schedule import Failure, Where, compute, missing
from fslib.study.store import DamagedRecordError, Record, Unit, distinct
from fslib.study.study import Study
from fslib.study.terminal import OutputError, Parser, close_output, say
from fslib.study.verify import told, told_claims
from fslib.study.workers import default_workers

FILE_HANDLES = 256  # a run and its kernel use about 100 each


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with _terminable():
        try:
            try:
                code = _obey(arguments)
            finally:
                say()
            return code
        except OutputError as error:
            close_output()
            if isinstance(
                error.__cause__, BrokenPipeError
            ):  # as for any command whose reader has gone
                return 141
            return _fail(f"cannot write to standard output: {error}")
        except FslibError as error:
            return _fail(str(error))
        except OSError as error:  # too few file handles, a folder that may not be read
            return _fail(
                (error.strerror or first_line(error))
                + (f": {error.filename}" if error.filename else "")
            )
        except Terminated:
            return _fail("terminated; finished units are recorded, run again to go on", 143)
        except KeyboardInterrupt:
            return _fail("interrupted; finished units are recorded, run again to go on", 130)


def _obey(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        parser.exit(2)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    if options.action in (_check, _site):
        return int(options.action(options))
    overrides = settings_of(options.set)
    study = Study(options.profile, seed=options.seed, overrides=overrides, results=options.results)
    return int(options.action(study, options))


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception inside the block; a thread that is not the main one must do without."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int = 2) -> int:
    """Say on standard error what is wrong, if it can be said, and return an exit code."""
    with suppress(OSError):
        print(f"fslib: {message}", file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fslib", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(
        required=True, metavar="run | list | verify | check | explore | site"
    )
    study = Parser(add_help=False)
    study.add_argument(
        "--profile", default="mini", help=f"one of: {', '.join(PROFILES)} (default: mini)"
    )
    study.add_argument(
        "--results", type=Path, help="folder for results (default: results/, or FSLIB_RESULTS)"
    )
    study.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    study.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of the profile",
    )
    shared = Parser(add_help=False, parents=[study])
    shared.add_argument("notebooks", nargs="*", help="notebooks by number or name (default: all)")
    run = actions.add_parser(
        "run", parents=[shared], help="compute what is missing and execute the notebooks"
    )
    run.add_argument(
        "--workers",
        type=int,
        help="how many units at a time (default: cores / threads of the profile)",
    )
    run.add_argument(
        "--ray", metavar="WHERE", help="compute on a Ray cluster: local, auto, or its HOST:PORT"
    )
    run.add_argument(
        "--gpus-per-unit",
        type=float,
        metavar="N",
        help="GPUs of a unit on the cluster (default: 0)",
    )
    run.add_argument(
        "--fresh",
        action="store_true",
        help="compute everything anew, and replace records one by one",
    )
    run.add_argument(
        "--in-place", action="store_true", help="also write the outputs into notebooks/"
    )
    run.set_defaults(action=_run)
    listing = actions.add_parser(
        "list", parents=[shared], help="notebooks and their units, recorded or missing"
    )
    listing.set_defaults(action=_list)
    verify = actions.add_parser(
        "verify", parents=[shared], help="compute records again and compare"
    )
    verify.add_argument(
        "--sample",
        type=int,
        default=3,
        help="how many records, drawn at random (default: 3; 0: all)",
    )
    verify.add_argument("--draw", type=int, default=0, help="seed of that draw (default: 0)")
    verify.set_defaults(action=_verify)
    looked_at = actions.add_parser(
        "check", help="whether a model's heads can be switched off and trained, and why not"
    )
    looked_at.add_argument("models", nargs="+", help="fslib's name, a local folder or a Hub id")
    looked_at.set_defaults(action=_check)
    page = actions.add_parser(
        "explore", parents=[study], help="write a page that shows a model's heads"
    )
    page.add_argument(
        "--out", type=Path, required=True, metavar="FILE.html", help="where to write it"
    )
    page.add_argument(
        "--model-seed", type=int, help="which of the profile's models (default: the first)"
    )
    page.set_defaults(action=_explore)
    site = actions.add_parser(
        "site", help="write the site: notebooks, method, results and the explorer as pages"
    )
    site.add_argument(
        "--out", type=Path, default=ROOT / "site", metavar="FOLDER", help="where (default: site/)"
    )
    site.add_argument(
        "--repository",
        default="",
        metavar="OWNER/NAME",
        help="on GitHub: adds a link to the notebooks on Binder",
    )
    site.set_defaults(action=_site)
    return parser


def _check_file_handles() -> None:
    """Raise FslibError where a notebook's kernel could not open its connections: it would stop anywhere, or never."""
    with suppress(ImportError):  # Windows has no such limit
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= limit < FILE_HANDLES:
            raise FslibError(
                f"too few open files are allowed ({limit}): ulimit -n {FILE_HANDLES}, or more"
            )


def _run(study: Study, options: argparse.Namespace) -> int:
    _check_file_handles()
    where = _where(study, options)
    notebooks = find_notebooks(options.notebooks)
    if options.in_place:
        check_in_place(study)
    planned = _units(study, notebooks)
    units = _to_compute(study, planned, fresh=options.fresh)
    for folder in (notebooks_folder(), ROOT / "figures", Path(tempfile.gettempdir())):
        sweep(folder)
    study.store.sweep()
    started = time.perf_counter()
    titles = {
        source: f"[{number}/{len(notebooks)}] {source.stem}"
        for number, source in enumerate(notebooks, start=1)
    }
    _announce(study, titles, units)
    recorded = len({unit.key for unit in planned} - {unit.key for unit in units})
    say(f"{recorded + len(units)} units: {recorded} recorded, {len(units)} to compute")
    failures = compute(study.store, units, where, fresh=options.fresh, say=say) if units else {}
    if units:
        say(f"{len(units) - len(failures)} units computed, {len(failures)} failed")
    say("executing the notebooks on their records")
    failed = [
        s.stem
        for s, title in titles.items()
        if not _run_one(study, s, title, failures, options.in_place)
    ]
    if failed:
        return _fail(f"{len(failed)} of {len(notebooks)} notebooks failed: {', '.join(failed)}", 1)
    say(f"all done in {time.perf_counter() - started:.0f} s")
    for part in ("tables", "figures", "notebooks"):
        say(f"{part:10} {study.folder / part}")
    return 0


def _to_compute(study: Study, planned: Sequence[Unit], *, fresh: bool = False) -> list[Unit]:
    """Return the units without a record, or all; what cannot be computed is refused before the first one is."""
    units = missing(study.store, planned, fresh=fresh)
    for unit in units:
        require(unit.task_names(), f"{unit.kind}-{unit.key}")
        unit.check()
    study.store.tell_data(dict.fromkeys(name for unit in planned for name in unit.task_names()))
    return units


def _where(study: Study, options: argparse.Namespace) -> Where:
    """Return where the options say that units are computed. Raises FslibError for options that say two things."""
    if options.ray is None:
        if options.gpus_per_unit is not None:
            raise FslibError(
                "--gpus-per-unit goes with --ray: on this machine a unit takes the GPU that there is"
            )
        workers = (
            default_workers(study.profile.threads) if options.workers is None else options.workers
        )
        if workers < 1:
            raise FslibError(f"--workers {workers}: give 1 or more")
        return Where(workers)
    if options.workers is not None:
        raise FslibError(
            "--workers are processes of this machine: leave it out with --ray, which counts its own"
        )
    gpus = options.gpus_per_unit or 0.0
    if not (0 <= gpus < 1 or (math.isfinite(gpus) and gpus == int(gpus) >= 0)):
        raise FslibError(
            f"--gpus-per-unit {gpus:g}: give a whole number, or a share of one between 0 and 1"
        )
    return Where(ray=options.ray, gpus=gpus)


def _announce(study: Study, titles: Mapping[Path, str], units: Sequence[Unit]) -> None:
    """Say how many units will be computed for each notebook, those of an earlier one not counted again."""
    left = {unit.key for unit in units}
    for source, title in titles.items():
        mine = {unit.key for unit in study.plan(source.stem)} & left
        say(f"{title}: {len(mine) or 'nothing'} to compute")
        left -= mine


def _run_one(
    study: Study, source: Path, title: str, failures: Mapping[str, Failure], in_place: bool
) -> bool:
    """Run one notebook on its records, say how it went, and return whether it ran through."""
    begun = time.perf_counter()
    try:
        for key in (unit.key for unit in study.plan(source.stem)):
            if key in failures:
                unit, reason = failures[key].unit, failures[key].reason
                raise NotebookError(
                    f"notebook {source.stem} failed, computing {unit.kind}-{unit.key}: {reason}"
                )
        run_notebook(study, source, in_place=in_place)
    except NotebookError as error:
        _fail(str(error))
        return False
    say(f"{title}: done in {time.perf_counter() - begun:.0f} s")
    return True


def _units(study: Study, notebooks: Sequence[Path]) -> list[Unit]:
    """Return every unit behind the notebooks, once, dependencies first."""
    return distinct(unit for source in notebooks for unit in study.plan(source.stem))


def _state(study: Study, unit: Unit) -> Record | FslibError | None:
    """Return the unit's record, None if there is none, or the error that says why it cannot be used."""
    try:
        return study.store.load(unit.kind, unit.key)
    except FslibError as error:
        return error


def seconds_left(
    units: Sequence[Unit], recorded: Sequence[tuple[Unit, Record]]
) -> dict[str, float]:
    """Return {key: seconds} of units without a record: the median of those of its kind that have one."""
    seconds: dict[str, list[float]] = {}
    for unit, record in recorded:
        seconds.setdefault(unit.kind, []).append(record.seconds)
    return {
        unit.key: float(np.median(seconds[unit.kind])) for unit in units if unit.kind in seconds
    }


def _list(study: Study, options: argparse.Namespace) -> int:
    say(f"profile {study.name}, seeds {study.seeds}, results in {study.folder}")
    notebooks = {source: study.plan(source.stem) for source in find_notebooks(options.notebooks)}
    units = {unit.key: unit for plan in notebooks.values() for unit in plan}
    states = {key: _state(study, unit) for key, unit in units.items()}  # a record is read once
    recorded = [
        (units[key], record) for key, record in states.items() if isinstance(record, Record)
    ]
    done = {unit.key for unit, _ in recorded}
    left = seconds_left([unit for key, unit in units.items() if key not in done], recorded)
    said = set()
    for source, plan in notebooks.items():
        say(source.stem)
        for unit in plan:
            record, key = states[unit.key], unit.key
            state = f"missing, about {left[key]:6.0f} s" if key in left else "missing"
            if isinstance(record, Record):
                state = f"recorded {record.seconds:12.1f} s"
            elif record is not None:
                state = "DAMAGED" if isinstance(record, DamagedRecordError) else "UNREADABLE"
            again = "  (as above)" if key in said else ""
            said.add(key)
            say(f"    {unit.kind:11} {key}  {state:23}  {unit.describe()}{again}")
    workers = default_workers(study.profile.threads)
    hours = (
        f"; about {sum(left.values()) / 3600 / workers:.1f} hours with --workers {workers}"
        if left
        else ""
    )
    say(f"{len(recorded)} of {len(units)} units recorded{hours}")
    for trouble in states.values():
        if isinstance(trouble, FslibError):
            say(str(trouble))
    for path in study.store.set_aside():
        say(f"set aside, damaged: {path}")
    return 0


def _check(options: argparse.Namespace) -> int:
    works = True
    for name in options.models:
        report = check(name)
        say(str(report))
        works &= report.works
    return 0 if works else 1


def _explore(study: Study, options: argparse.Namespace) -> int:
    from fslib.explorer.widget import (  # widgets take a second to import
        checked_file,
        explore,
        shown_units,
    )

    checked_file(options.out)
    if units := _to_compute(study, shown_units(study, options.model_seed)):
        say(f"{len(units)} units have no record: computing them first")
        failures = compute(
            study.store, units, Where(default_workers(study.profile.threads)), fresh=False, say=say
        )
        for failure in failures.values():
            return _fail(f"{failure.unit.kind}-{failure.unit.key}: {failure.reason}", 1)
    path = explore(study, seed=options.model_seed).to_html(options.out)
    say(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0


def _site(options: argparse.Namespace) -> int:
    from fslib.site.build import build  # which needs more packages than anything else

    begun = time.perf_counter()
    landing = build(options.out.absolute(), say, options.repository)
    say(f"{landing}: open it in a browser; built in {time.perf_counter() - begun:.0f} s")
    return 0


def _verify(study: Study, options: argparse.Namespace) -> int:
    from fslib.questions.q08_claims import decide  # plots take a second to import

    notebooks_folder()
    for name in ("sample", "draw"):
        if getattr(options, name) < 0:
            raise FslibError(
                f"--{name} {getattr(options, name)}: give 0{' (all)' * (name == 'sample')} or more"
            )
    states = [
        (unit, _state(study, unit)) for unit in _units(study, find_notebooks(options.notebooks))
    ]
    recorded = [unit for unit, state in states if isinstance(state, Record)]
    unread = [state for _, state in states if isinstance(state, FslibError)]
    if not recorded and not unread:
        raise FslibError(f"no record in {study.folder}: run fslib run --profile {study.name} first")
    for error in unread:
        say(str(error))
    order = np.random.default_rng(options.draw).permutation(len(recorded))
    chosen = [recorded[i] for i in order[: options.sample or None]]
    compared = [told(study, unit, say) for unit in chosen]
    wrong = sum(comparison is None or bool(comparison.problems) for comparison in compared)
    changed = told_claims(
        study, [c.again for c in compared if c is not None and not c.exact], evidence, say
    )
    missed = f", {len(unread)} more could not be read" if unread else ""
    say(f"{len(chosen)} of {len(recorded)} records verified, {wrong} differ{missed}")
    return 1 if wrong or unread or changed else 0

"""fslib run | list | verify.

Exit codes: 0 done (verify: all equal), 1 a notebook failed or a record differs, 2 bad input or nothing to
verify, 130 interrupted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fslib.errors import FslibError
from fslib.model.devices import keep_freed_memory
from fslib.study.profiles import PROFILES
from fslib.study.records import Unit, distinct
from fslib.study.runner import (
    NotebookError,
    check_in_place,
    find_notebooks,
    notebooks_folder,
    run_notebook,
    verify_unit,
)
from fslib.study.study import Study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        keep_freed_memory()
        overrides = _settings(options.set)
        study = Study(options.profile, seed=options.seed, overrides=overrides, results=options.results)
        return int(options.action(study, options))
    except FslibError as error:
        print(f"fslib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fslib: interrupted; finished units are recorded, run again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fslib", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(required=True, metavar="run | list | verify")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("notebooks", nargs="*", help="notebooks by number or name (default: all)")
    shared.add_argument("--profile", default="mini", help=f"one of: {', '.join(PROFILES)} (default: mini)")
    shared.add_argument("--results", type=Path, help="folder for results (default: results/, or FSLIB_RESULTS)")
    shared.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    shared.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the profile")
    run = actions.add_parser("run", parents=[shared], help="compute what is missing and execute the notebooks")
    run.add_argument("--fresh", action="store_true", help="compute everything anew, records or not")
    run.add_argument("--in-place", action="store_true", help="also write the outputs into notebooks/")
    run.set_defaults(action=_run)
    listing = actions.add_parser("list", parents=[shared], help="notebooks and their units, recorded or missing")
    listing.set_defaults(action=_list)
    verify = actions.add_parser("verify", parents=[shared], help="compute records again and compare")
    verify.add_argument("--sample", type=int, default=3, help="how many records, drawn at random (default: 3; 0: all)")
    verify.add_argument("--draw", type=int, default=0, help="seed of that draw (default: 0)")
    verify.set_defaults(action=_verify)
    return parser


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise FslibError(f"--set {pair!r}: write it as key=value, such as steps=100")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise FslibError(f"--set {pair!r}: {value!r} is not a value in YAML") from None
    return settings


def _run(study: Study, options: argparse.Namespace) -> int:
    notebooks = find_notebooks(options.notebooks)
    if options.in_place:
        check_in_place(study)
    if options.fresh:
        for unit in _units(study, notebooks):
            study.store.forget(unit)
    started = time.perf_counter()
    for number, source in enumerate(notebooks, start=1):
        begun = time.perf_counter()
        missing = sum(study.store.find(unit) is None for unit in study.plan(source.stem))
        say(f"[{number}/{len(notebooks)}] {source.stem}: {missing or 'nothing'} to compute")
        try:
            run_notebook(study, source, in_place=options.in_place)
        except NotebookError as error:
            print(f"fslib: {error}", file=sys.stderr)
            return 1
        say(f"[{number}/{len(notebooks)}] {source.stem}: done in {time.perf_counter() - begun:.0f} s")
    say(f"all done in {time.perf_counter() - started:.0f} s")
    for part in ("tables", "figures", "notebooks"):
        say(f"{part:10} {study.folder / part}")
    return 0


def _units(study: Study, notebooks: Sequence[Path]) -> list[Unit]:
    """Return every unit behind the notebooks, once, dependencies first."""
    return distinct(unit for source in notebooks for unit in study.plan(source.stem))


def _list(study: Study, options: argparse.Namespace) -> int:
    say(f"profile {study.name}, seeds {study.seeds}, results in {study.folder}")
    shown: set[str] = set()
    for source in find_notebooks(options.notebooks):
        say(source.stem)
        for unit in study.plan(source.stem):
            record = study.store.find(unit)
            state = f"recorded {record.seconds:8.1f} s" if record else "missing            "
            again = "  (as above)" if unit.key in shown else ""
            say(f"    {unit.kind:11} {unit.key}  {state}  {unit.describe()}{again}")
            shown.add(unit.key)
    return 0


def _verify(study: Study, options: argparse.Namespace) -> int:
    notebooks_folder()
    if options.sample < 0:
        raise FslibError(f"--sample {options.sample}: give 0 (all) or more")
    recorded = [u for u in _units(study, find_notebooks(options.notebooks)) if study.store.find(u)]
    if not recorded:
        raise FslibError(f"no record in {study.folder}: run fslib run --profile {study.name} first")
    order = np.random.default_rng(options.draw).permutation(len(recorded))
    chosen = [recorded[i] for i in order[: options.sample or None]]
    wrong = 0
    for unit in chosen:
        comparison = verify_unit(study, unit)
        how = "bit-equal" if comparison.exact else "within tolerance (another machine or other versions)"
        state = "DIFFERS" if comparison.problems else how
        wrong += bool(comparison.problems)
        say(f"{unit.kind}-{unit.key} ({unit.describe()}, {comparison.seconds:.0f} s): {state}")
        for problem in comparison.problems:
            say(f"    {problem}")
    say(f"{len(chosen)} of {len(recorded)} records verified, {wrong} differ")
    return 1 if wrong else 0

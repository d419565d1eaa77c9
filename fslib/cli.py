"""Compute records, execute notebooks on them, verify them, look into models.

\b
Exit codes:
  0 done (verify: all equal; check: all can be used)
  1 a notebook failed, a record differs or cannot be read, a model cannot be used
  2 bad input, nothing to verify, or no place to write
  130 interrupted, 143 terminated, 141 nobody reads the output any more
"""

import errno
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click  # and nothing else: help is there at once, and torch is not

if TYPE_CHECKING:
    from fslib.study.store import Unit
    from fslib.study.study import Study

HEAVY = ["fslib.checks", *(f"fslib.study.{name}" for name in ("parallel", "runner", "verify"))]
Action = Callable[..., int]
Names = tuple[str, ...]
Units = Sequence["Unit"]
AS_PATH: click.Path = click.Path(path_type=Path)
say = partial(print, flush=True)  # at once, also into a pipe
_begun = False  # whether heavy modules are imported


def _stop(number: int, frame: Any) -> None:
    """Answer Ctrl-C and SIGTERM with an exception, or at once while heavy modules are imported.

    Inside a library's start-up an exception can abort or be lost, and nothing was begun.
    """
    if _begun:
        raise KeyboardInterrupt(number)
    word = "interrupted" if number == signal.SIGINT else "terminated"
    os.write(2, f"fslib: {word} before anything was begun\n".encode())
    os._exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with suppress(AttributeError):  # there is no output, or a stream of another kind
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for number in (signal.SIGINT, signal.SIGTERM) if arguments is None else ():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with command.make_context("fslib", list(words) or ["--help"]) as context:
            return int(command.invoke(context))
    except click.exceptions.Exit as left:
        return left.exit_code if words else 2
    except click.ClickException as error:
        return _fail(error.format_message())
    except OSError as error:  # too few file handles, a folder that may not be read, no reader
        return _unwritten(error) or _fail(": ".join(filter(None, [error.strerror, error.filename])))
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        word = "interrupted" if number == signal.SIGINT else "terminated"
        return _fail(f"{word}; finished units are recorded, run again to go on", 128 + number)
    finally:
        if arguments is None:  # all is said: Python's own end would answer in a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unwritten(error: OSError) -> int:
    """Return the exit code if it is standard output that cannot be written, else 0."""
    if error.filename is not None or error.errno in (errno.EMFILE, errno.ENFILE):
        return 0
    with suppress(OSError, ValueError):  # Python would try again on its way out, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # as for any command whose reader has gone
        return 141
    return _fail(f"cannot write to standard output: {error.strerror}")


def _fail(message: str, code: int = 2) -> int:
    """Say on standard error what is wrong, if it can be said, and return an exit code."""
    with suppress(OSError):
        print(f"fslib: {message}", file=sys.stderr, flush=True)
    return code


class Heavy(click.Command):
    """A command that imports what is heavy before its action; to it, bad input is one line."""

    def invoke(self, context: click.Context) -> Any:
        """Call the action."""
        global _begun
        try:
            for name in HEAVY:
                import_module(name)
        except (ImportError, OSError) as error:
            why = f"cannot be started ({' '.join(str(error).split())})"
            raise click.ClickException(f"{why}: pip install -r requirements.lock -e .") from error
        _begun = True
        from fslib.errors import FslibError

        try:
            return super().invoke(context)
        except FslibError as error:
            raise click.ClickException(str(error)) from error


@click.group(help=__doc__)
def command() -> None:
    """Say what all commands share, which is nothing but their name."""


command.command_class = Heavy


def _on_study(action: Action) -> Action:
    """Give an action the study that its options ask for."""

    @click.option("--profile", default="mini", show_default=True, help="Settings of all units.")
    @click.option("--results", type=AS_PATH, help="Folder for results.")
    @click.option("--seed", default=0, show_default=True, help="First seed.")
    @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
    @wraps(action)
    def on_study(profile: str, results: Any, seed: int, settings: Any, **options: Any) -> int:
        from fslib.model.devices import keep_freed_memory
        from fslib.study import config, study

        keep_freed_memory()
        changes = config.settings_of(settings)
        asked = study.Study(profile, seed=seed, overrides=changes, results=results)
        return action(asked, **options)

    return on_study


NOTEBOOKS = click.argument("notebooks", nargs=-1)


@command.command()
@NOTEBOOKS
@click.option("--workers", type=click.IntRange(1), help="Units at a time (default: by cores).")
@click.option("--ray", metavar="WHERE", help="Ray cluster: local, auto or HOST:PORT.")
@click.option("--gpus-per-unit", "gpus", type=click.FloatRange(0), help="GPUs of a unit there.")
@click.option("--fresh", is_flag=True, help="Compute everything anew, record by record.")
@click.option("--in-place", is_flag=True, help="Also write the outputs into notebooks/.")
@_on_study
def run(study: "Study", notebooks: Names, fresh: bool, in_place: bool, **where: Any) -> int:
    """Compute what is missing and execute NOTEBOOKS, given by number or name (default: all)."""
    from fslib.study import files, runner
    from fslib.study.provenance import ROOT

    _check_where(**where)
    sources = runner.find_notebooks(notebooks)
    if in_place and not study.is_plain:
        return _fail("--in-place is for the default profile as it is, which the notebooks show")
    planned = study.plan(*(source.stem for source in sources))
    units = _to_compute(study, planned, fresh)
    for folder in (runner.notebooks_folder(), ROOT / "figures", Path(tempfile.gettempdir())):
        files.sweep(folder)
    study.store.sweep()
    started, left = time.perf_counter(), {unit.key for unit in units}
    titles = {s: f"[{n}/{len(sources)}] {s.stem}" for n, s in enumerate(sources, start=1)}
    for source, title in titles.items():  # what an earlier one waits for is not counted again
        mine = {unit.key for unit in study.plan(source.stem)} & left
        say(f"{title}: {len(mine) or 'nothing'} to compute")
        left -= mine
    recorded = len({unit.key for unit in planned} - {unit.key for unit in units})
    say(f"{recorded + len(units)} units: {recorded} recorded, {len(units)} to compute")
    failures = _compute(study, units, fresh, **where) if units else {}
    if units:
        say(f"{len(units) - len(failures)} units computed, {len(failures)} failed")
    say("executing the notebooks on their records")
    failed = []
    for source, title in titles.items():
        begun = time.perf_counter()
        lost = [failures[unit.key] for unit in study.plan(source.stem) if unit.key in failures]
        try:
            if lost:
                raise runner.NotebookError(f"notebook {source.stem} failed, computing {lost[0]}")
            runner.run_notebook(study, source, in_place=in_place)
            say(f"{title}: done in {time.perf_counter() - begun:.0f} s")
        except runner.NotebookError as error:
            _fail(str(error))
            failed.append(source.stem)
    if failed:
        return _fail(f"{len(failed)} of {len(sources)} notebooks failed: {', '.join(failed)}", 1)
    say(f"all done in {time.perf_counter() - started:.0f} s")
    say(f"tables, figures and notebooks: {study.folder}")
    return 0


def _check_where(workers: int | None, ray: str | None, gpus: float | None) -> None:
    """Refuse options that say two things about where units are computed."""
    if ray is None and gpus is not None:
        raise click.ClickException("--gpus-per-unit goes with --ray")
    if ray is not None and workers is not None:
        raise click.ClickException("--workers are processes of this machine: not with --ray")
    if gpus is not None and not (gpus < 1 or gpus % 1 == 0):
        raise click.ClickException(f"--gpus-per-unit {gpus:g}: give a whole number or a share of 1")


def _compute(study: "Study", units: Units, fresh: bool = False, **where: Any) -> dict[str, Any]:
    """Compute a study's units on a Ray cluster, or this machine, and return what failed."""
    from fslib.study import parallel

    if where.get("ray") is not None:
        from fslib.study.ray import Cluster

        engine: parallel.Engine = Cluster(study.store, where["ray"], where["gpus"] or 0)
    else:
        workers = where.get("workers") or parallel.default_workers(study.profile.threads)
        engine = parallel.local_engine(study.store, units, workers, fresh=fresh)
    return parallel.compute(study.store, units, engine, say)


def _to_compute(study: "Study", planned: Units, fresh: bool = False) -> list["Unit"]:
    """Return the units without a record, or all; refuse now what cannot be computed."""
    from fslib.study import fingerprints, parallel

    units = parallel.missing(study.store, planned, fresh=fresh)
    for unit in units:
        fingerprints.require(unit.task_names(), f"{unit.kind}-{unit.key}")
        unit.check()
    study.store.tell_data(dict.fromkeys(name for unit in planned for name in unit.task_names()))
    return units


@command.command("list")
@NOTEBOOKS
@_on_study
def list_units(study: "Study", notebooks: Names) -> int:
    """List the units of NOTEBOOKS, recorded or missing, and how long the missing ones take."""
    from fslib.study import parallel, runner, store

    say(f"profile {study.name}, seeds {study.seeds}, results in {study.folder}")
    sources = runner.find_notebooks(notebooks)
    planned = study.plan(*(source.stem for source in sources))
    states = {unit.key: study.store.state(unit) for unit in planned}
    recorded = [state for state in states.values() if isinstance(state, store.Record)]
    typical = parallel.typical_seconds([(record.kind, record.seconds) for record in recorded])
    for source in sources:
        say(source.stem)
        for unit in study.plan(source.stem):
            state, seconds = states[unit.key], typical.get(unit.kind)
            words = f"missing, about {seconds:6.0f} s" if seconds else "missing"
            if isinstance(state, store.Record):
                words = f"recorded {state.seconds:12.1f} s"
            elif state is not None:
                words = "DAMAGED" if isinstance(state, store.DamagedRecordError) else "UNREADABLE"
            say(f"    {unit.kind:11} {unit.key}  {words:23}  {unit.describe()}")
    workers = parallel.default_workers(study.profile.threads)
    missing = [unit.kind for unit in planned if not isinstance(states[unit.key], store.Record)]
    time_left = sum(typical.get(kind, 0.0) for kind in missing) / 3600 / workers
    hours = f"; about {time_left:.1f} hours with --workers {workers}" if time_left else ""
    say(f"{len(recorded)} of {len(states)} units recorded{hours}")
    aside = [f"set aside, damaged: {path}" for path in study.store.set_aside()]
    for line in (*(state for state in states.values() if isinstance(state, ValueError)), *aside):
        say(str(line))
    return 0


@command.command()
@NOTEBOOKS
@click.option("--sample", default=3, type=click.IntRange(0), help="How many (default: 3; 0: all).")
@_on_study
def verify(study: "Study", notebooks: Names, sample: int) -> int:
    """Compute some records of NOTEBOOKS again, and compare."""
    from fslib.questions.q08_claims import decide
    from fslib.study import runner, store
    from fslib.study.verify import compare_claims, told

    units = study.plan(*(source.stem for source in runner.find_notebooks(notebooks)))
    states = [(unit, study.store.state(unit)) for unit in units]
    recorded = [unit for unit, state in states if isinstance(state, store.Record)]
    unread = [state for _, state in states if isinstance(state, ValueError)]
    if not recorded and not unread:
        return _fail(f"no record in {study.folder}: run fslib run --profile {study.name} first")
    for error in unread:
        say(str(error))
    chosen = random.Random(0).sample(recorded, min(sample or len(recorded), len(recorded)))
    compared = [told(study, unit, say) for unit in chosen]
    wrong = sum(comparison is None or bool(comparison.problems) for comparison in compared)
    other = [c.again for c in compared if c is not None and not c.exact]
    lines, changed = compare_claims(study, other, decide)
    for line in (*lines, *changed):
        say(f"    {line}")
    missed = f", {len(unread)} more could not be read" if unread else ""
    say(f"{len(chosen)} of {len(recorded)} records verified, {wrong} differ{missed}")
    return 1 if wrong or unread or changed else 0


@command.command()
@click.argument("models", nargs=-1, required=True)
def check(models: Names) -> int:
    """Say whether the heads of MODELS can be switched off and trained, or why not.

    A model is a name of fslib's, a local folder or an id of the Hub.
    """
    from fslib.checks import check as checked

    works = True
    for report in map(checked, models):
        say(str(report))
        works &= report.works
    return 0 if works else 1


@command.command()
@click.option("--out", type=AS_PATH, required=True, help="Page to write: *.html.")
@click.option("--model-seed", type=int, help="Which model (default: the first).")
@_on_study
def explore(study: "Study", out: Path, model_seed: int | None) -> int:
    """Write a page that shows a model's heads."""
    from fslib.explorer import widget  # widgets take a second to import

    widget.checked_file(out)
    if units := _to_compute(study, widget.shown_units(study, model_seed)):
        say(f"{len(units)} units have no record: computing them first")
        for failed in _compute(study, units).values():
            return _fail(str(failed), 1)
    path = widget.explore(study, seed=model_seed).to_html(out)
    say(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0


@command.command()
@click.option("--out", type=AS_PATH, help="Folder (default: site/).")
@click.option("--repository", default="", metavar="OWNER/NAME", help="For a link to Binder.")
def site(out: Path | None, repository: str) -> int:
    """Write notebooks, method, results and the explorer as a site."""
    from fslib.site.build import write_site  # which needs more packages than anything else
    from fslib.study.provenance import ROOT

    begun = time.perf_counter()
    landing = write_site((out or ROOT / "site").absolute(), say, repository)
    say(f"{landing}: open it in a browser; built in {time.perf_counter() - begun:.0f} s")
    return 0

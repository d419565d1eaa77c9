"""Execute notebooks on records through papermill, each in a kernel of its own, and tidy them."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fslib.errors import FslibError, explained, unknown
from fslib.study.files import remove, scratch_folder, write_bytes
from fslib.study.fingerprints import SAID
from fslib.study.provenance import ROOT
from fslib.study.study import Study

LOG = "kernel.log"  # what a kernel says outside of its cells, in case it does not start or dies


class NotebookError(FslibError):
    """A notebook did not run through."""


def notebooks_folder() -> Path:
    """Return the folder of notebooks. Raises FslibError outside a clone."""
    folder = ROOT / "notebooks"
    if not folder.is_dir():
        raise FslibError(f"no notebooks at {folder}: run in a clone of the repository")
    return folder


def notebooks_in(folder: Path) -> list[Path]:
    """Return the numbered notebooks of a folder, in order; none if there is no such folder."""
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Return notebooks by number (3 or 03), name or file name; all, in order, if none is named."""
    every = notebooks_in(notebooks_folder())
    chosen = []
    for name in names:
        word = Path(name).name.removesuffix(".ipynb")
        match = [p for p in every if p.stem[:2] == word.zfill(2) or word in (p.stem, p.stem[3:])]
        if not match:
            raise unknown("notebook", name, [p.stem for p in every])
        chosen += match
    return chosen if names else every


def run_notebook(study: Study, source: Path, *, in_place: bool = False) -> None:
    """Execute a notebook on records, and keep it, as executed, with the results.

    Args:
        study: what the notebook shows.
        source: the notebook.
        in_place: whether the outputs are written into the source as well.

    Raises:
        FslibError: the notebook fails. It names the cell; what was done until then is kept as
            <name>.failed.ipynb.
    """
    study.write_settings()
    target = study.folder / "notebooks" / source.name
    failed = target.with_name(f"{source.stem}.failed.ipynb")
    with scratch_folder() as scratch:
        output = scratch / source.name
        try:
            execute(study, source, output)
        except NotebookError as error:
            if not output.is_file():
                raise
            write_bytes(failed, output.read_bytes())
            raise NotebookError(f"{error} ({failed})") from error
        content = tidy(output)
    write_bytes(target, content)
    remove(failed)
    if in_place:
        write_bytes(source, content)


def kernel_of(study: Study, scratch: Path) -> type:
    """Return the class of kernels that mean what this process means, from elsewhere.

    Each is this very Python: whatever else is registered as `python3` may be broken, or another's.
    """
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    variables = os.environ | {SAID: "yes"}  # it need not stand in every notebook
    variables |= {"FSLIB_RESULTS": str(study.folder.parent), "JUPYTER_RUNTIME_DIR": str(scratch)}
    if data := os.environ.get("FSLIB_DATA"):
        variables["FSLIB_DATA"] = str(Path(data).absolute())
    if paths := os.environ.get("PYTHONPATH"):
        wholes = [str(Path(path).absolute()) for path in paths.split(os.pathsep)]
        variables["PYTHONPATH"] = os.pathsep.join(wholes)

    class Kernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict())

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
            self.connection_file = str(scratch / "connection.json")
            with (scratch / LOG).open("wb") as log:
                await super().start_kernel(env=variables, stderr=log, **options)

    return Kernel


def execute(study: Study, source: Path, output: Path) -> None:
    """Execute a notebook with the study's parameters.

    Raises:
        NotebookError: it does not run through; in one line.
    """
    import papermill  # takes seconds, and no other command needs it
    from nbclient.exceptions import DeadKernelError

    settings = {"profile": study.name, "seed": study.seed, "overrides": study.overrides}
    options = {"kernel_name": "python3", "cwd": str(ROOT), "progress_bar": False}
    # a kernel takes two seconds to say goodbye
    options |= {"extra_arguments": ["--log-level=CRITICAL"], "shutdown_kernel": "immediate"}
    options |= {"kernel_manager_class": kernel_of(study, output.parent)}
    parameters = None if study.is_plain else settings
    try:
        papermill.execute_notebook(str(source), str(output), parameters, **options)
    except KeyboardInterrupt:
        # nobody waits for what nbclient had begun, and asyncio would complain of it at length
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    except Exception as error:  # papermill, nbclient, jupyter and zmq have no error in common
        log, failed = output.with_name(LOG), f"notebook {source.stem} failed"
        lines = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        words = lines.rstrip().split("\n")[-1].strip()[:200]
        how = f": {words or explained(error)}, in the kernel of {sys.executable}"
        if isinstance(error, papermill.PapermillExecutionError):
            reason = " ".join(f"{error.ename}: {error.evalue}".split())[:500]
            how = f" in cell {error.exec_count}: {reason}"
        elif isinstance(error, DeadKernelError):
            how = f": its kernel died ({words or 'out of memory?'})"
        raise NotebookError(failed + how) from error


def tidy(path: Path) -> bytes:
    """Return a notebook without what differs from run to run: time stamps, paths, cell ids.

    Nor with widgets, whose state is gone with the kernel: their outputs keep what can be shown
    without one.
    """
    import nbformat  # as papermill

    notebook = nbformat.read(path, as_version=4)
    for gone in ("papermill", "widgets"):
        notebook.metadata.pop(gone, None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        for stamp in ("papermill", "execution"):
            cell.metadata.pop(stamp, None)
        if cell.metadata.get("tags") == []:
            cell.metadata.pop("tags")
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return (nbformat.writes(notebook) + "\n").encode()

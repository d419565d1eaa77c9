"""Progress of long work: live in a terminal and in a notebook, sparse lines in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
QUIET: dict[str, Any] = {"leave": False, "dynamic_ncols": True}
_shown = True


class _Forgiving:
    """A stream that loses what it cannot write: no work is given up for a bar."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def bar(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterable[T]:
    """Iterate with a bar that shows the rate and the time left, unless inside `hidden()`."""
    # A kernel's standard error would stand in the notebook as a warning.
    ipython = sys.modules.get("IPython")
    kernel = ipython is not None and ipython.get_ipython() is not None
    stream = sys.stdout if kernel else sys.stderr
    live = kernel or (stream is not None and stream.isatty())
    options = dict(QUIET, disable=stream is None or not _shown, file=_Forgiving(stream))
    options["mininterval"] = 0.2 if live else 60
    return tqdm(items, desc=what, unit=f" {unit}", total=total, **options)


@contextmanager
def hidden() -> Iterator[None]:
    """Show no bars inside the block."""
    global _shown
    before, _shown = _shown, False
    try:
        yield
    finally:
        _shown = before


def span(seconds: float) -> str:
    """Return a time as a person would say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class Count:
    """How many units are done, and which are under way: a bar, or lines of a log.

    Args:
        total: how many there are.
        say: takes a line of the log.
    """

    quiet = 5.0  # seconds between two lines of a log

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._say, self._said = say, -self.quiet
        self.is_live = sys.stderr is not None and sys.stderr.isatty()
        options = dict(QUIET, disable=not (self.is_live and _shown), file=_Forgiving(sys.stderr))
        options["bar_format"] = "{n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}"
        self._bar = tqdm(total=total, **options)
        self._done, self._total = 0, total

    def show(self, words: Iterable[str]) -> None:
        """Show on the bar what is under way, and what else there is to say."""
        self._bar.set_postfix_str(", ".join(filter(None, words)))

    def end(self, line: str, *, urgent: bool) -> None:
        """Count a unit that is through; a line is said now and then, an urgent one always."""
        self._done += 1
        self._bar.update()
        if urgent or (not self.is_live and time.perf_counter() - self._said >= self.quiet):
            self.tell(line)

    def tell(self, line: str) -> None:
        """Say a line, above the bar."""
        with tqdm.external_write_mode():
            self._say(f"[{self._done}/{self._total}] {line}")
        self._said = time.perf_counter()

    def __enter__(self) -> "Count":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

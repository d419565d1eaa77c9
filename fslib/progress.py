"""Progress of all long work: live in a terminal and in a notebook, sparse lines in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
_shown = True


class _Forgiving:
    """A stream that loses what it cannot write: no work is given up for a bar that nobody can see."""

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
    return tqdm(
        items,
        desc=what,
        unit=f" {unit}",
        total=total,
        file=_Forgiving(stream),
        leave=False,
        mininterval=0.2 if live else 60,
        disable=stream is None or not _shown,
        dynamic_ncols=True,
    )


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


class Board:
    """What several workers are on, and how much is done: live lines in a terminal, a plain line now and then in a log.

    say: takes a line of the log. workers: of how many there is a line each; of others only what is done is told.
    """

    quiet = 5.0  # seconds between two lines of a log

    def __init__(self, total: int, workers: int, say: Callable[[str], None]) -> None:
        self._say, self._total, self._done, self._said = say, total, 0, -self.quiet
        self._on: list[tuple[str, float]] = [("", 0.0)] * workers
        self._left = ""
        stream = _Forgiving(sys.stderr)
        self._lines = [
            tqdm(
                total=0,
                bar_format="{desc}",
                position=i,
                leave=False,
                file=stream,
                dynamic_ncols=True,
            )
            for i in range((workers + 1) * (self.is_live() and _shown))
        ]
        self.tick()

    @staticmethod
    def is_live() -> bool:
        """Whether lines can be written over."""
        return sys.stderr is not None and sys.stderr.isatty()

    def begin(self, worker: int, what: str) -> None:
        """Show that a worker, counted from 0, is on something."""
        self._set(worker, what)
        self.tick()

    def end(self, worker: int, how: str, left: str, *, urgent: bool, skipped: int) -> None:
        """Show how it ended. skipped: how many will not be begun. urgent: an end that no log may leave out."""
        self._set(worker, "")
        self._left = left
        self._done += 1
        now, is_last = time.perf_counter(), self._done + skipped == self._total
        if not self._lines and (urgent or is_last or now - self._said >= self.quiet):
            self._say(f"[{self._done}/{self._total}] {how}{left}")
            self._said = now
        self.tick()

    def _set(self, worker: int, what: str) -> None:
        if worker < len(self._on):
            self._on[worker] = (what, time.perf_counter())

    def tick(self) -> None:
        """Bring live lines up to date."""
        if not self._lines:
            return
        self._lines[0].set_description_str(f"{self._done}/{self._total} units{self._left}")
        for number, (line, (what, begun)) in enumerate(
            zip(self._lines[1:], self._on, strict=True), start=1
        ):
            line.set_description_str(
                f"worker {number}: {what}, {span(time.perf_counter() - begun)}" if what else ""
            )

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *error: object) -> None:
        for line in reversed(self._lines):
            line.close()

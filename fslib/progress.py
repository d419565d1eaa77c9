"""One progress bar for all long work: live in a terminal and in a notebook, sparse lines in a log."""

import sys
from collections.abc import Iterable, Iterator
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

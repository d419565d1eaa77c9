"""One error for whatever a user can mend, and the help to spell a name."""

import difflib
from collections.abc import Iterable


class FslibError(ValueError):
    """Bad input. The message is one line that names the thing and says what to do about it."""


def unknown(kind: str, name: object, valid: Iterable[str], also: str = "") -> FslibError:
    """Return the error for a name that is not among `valid`, with the nearest valid one."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return FslibError(f"unknown {kind} {name!r}: {hint}valid: {', '.join(valid)}{also}")


def first_line(error: Exception) -> str:
    """Say what went wrong, short enough to stand inside another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

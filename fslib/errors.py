"""Refuse bad input: one error, help to spell a name, checks that all layers share."""

import difflib
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path

import numpy as np
from jaxtyping import Float

LARGEST_COUNT = 2**63 - 1  # what numpy and torch hold in an integer, a seed for instance


class FslibError(ValueError):
    """Bad input. The message is one line that names it and says what to do."""


class NotAtHandError(FslibError):
    """Data are neither on this machine nor could they be fetched."""


def unknown(kind: str, name: object, valid: Iterable[str], also: str = "") -> FslibError:
    """Return the error for a name that is not valid, with the nearest valid one."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return FslibError(f"unknown {kind} {name!r}: {hint}valid: {', '.join(valid)}{also}")


def check_among(kind: str, value: object, valid: Iterable[str], *, none: bool = False) -> None:
    """Refuse a word that is not among the valid ones.

    Args:
        kind: what the word is, for the message.
        value: what was given.
        valid: the words that are valid; a mapping stands for its keys.
        none: whether None is valid, too.

    Raises:
        FslibError: it is none of them; the nearest is named.
    """
    if not ((isinstance(value, str) and value in valid) or (none and value is None)):
        raise unknown(kind, value, valid, ", or None" if none else "")


def first_line(error: Exception) -> str:
    """Say what went wrong, short enough to stand inside another message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    # what ends in a colon says only where, and the next line what
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]


def explained(error: Exception) -> str:
    """Say in one line what kind of error it is, and what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


def check_count(name: str, value: object, least: int = 1, *, none: bool = False) -> None:
    """Refuse what is no whole number of at least `least`.

    Why not leave it to Python: a slice takes -1, and True or 2.5 go far before they stop anything,
    so the answer would be a number that nobody asked for.

    Args:
        name: what the message calls it.
        value: what was given.
        least: the smallest that is allowed.
        none: None is allowed, too.

    Raises:
        FslibError: it is another thing, or too large for numpy.
    """
    if none and value is None:
        return
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not least <= int(value) <= LARGEST_COUNT:  # type: ignore[call-overload]
        allowed = ", or None" if none else ""
        raise FslibError(f"{name} {value!r}: give a whole number of at least {least}{allowed}")


def check_number(
    name: str, value: object, interval: str, hint: str = "", *, none: bool = False
) -> None:
    """Refuse what is no number in an interval such as "(0, 1]".

    NaN and True are in none. With `none`, None is allowed, too.

    Raises:
        FslibError: with `hint`, where there is one.
    """
    if none and value is None:
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        above = low <= number if interval[0] == "[" else low < number
        if above and (number <= high if interval[-1] == "]" else number < high):
            return
    raise FslibError(f"{name} {value!r} is outside {interval}: {hint or 'give a number in it'}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is not True or False: any text is true, "no" as well."""
    if not isinstance(value, bool | np.bool_):
        raise FslibError(f"{name} {value!r}: give True or False")


def checked_path(name: str, value: object) -> Path:
    """Return a path; refuse what names none."""
    if not isinstance(value, str | Path):
        raise FslibError(f"{name} {value!r:.80} is no path: give a str or a Path")
    return Path(value)


def number_array(name: str, value: object) -> Float[np.ndarray, "..."]:
    """Return numbers as float64, NaN and infinity among them; refuse other things."""
    try:
        array = np.asarray(value)
        # numpy would read the numbers in a text, and drop the imaginary part of complex ones
        if array.dtype.kind not in "SUc":
            return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor that requires a gradient
        pass
    raise FslibError(f"{name} must be an array of numbers, not {type(value).__name__}")


def finite_array(name: str, value: object, shape: tuple | None = None) -> Float[np.ndarray, "..."]:
    """Return an array of numbers as float64; refuse other things, NaN and infinity.

    Of the given shape, where there is one.
    """
    array = number_array(name, value)
    if shape is not None and array.shape != shape:
        raise FslibError(f"{name}: got shape {array.shape}, where {shape} is needed")
    if not np.isfinite(array).all():
        raise FslibError(f"{name} of shape {array.shape} must be finite: it holds NaN or infinity")
    return array

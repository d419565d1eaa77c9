"""Who computes units: what an engine is asked, and what it answers.

`fslib.study.schedule` says which units are next; engines are this process and others of this machine
(`fslib.study.workers`), or a Ray cluster (`fslib.study.ray`). Units do not depend on who computes them, so records
are the same whoever it is.
"""

import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fslib.errors import FslibError, explained, first_line
from fslib.study.config import Config
from fslib.study.files import CannotWriteError
from fslib.study.store import Store, Unit

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Done:
    """A unit that a worker is through with.

    failure: why it has no record, "" if it has one. then: the unit that the worker goes on with, if it has one.
    """

    unit: Unit
    worker: int
    seconds: float
    failure: str = ""
    then: Unit | None = None


class Engine(ABC):
    """Who computes units, several at a time.

    takes_chains: whether it is given, at once, all units that are measured on one trained model, as models do not
    travel from one machine to another.
    """

    takes_chains = False

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many workers there are."""

    @abstractmethod
    def has_room(self) -> bool:
        """Return whether a worker is idle."""

    @abstractmethod
    def begin(self, units: Sequence[Unit]) -> int:
        """Give a unit, or a chain of them, to an idle worker, and return its number, from 0."""

    @abstractmethod
    def ended(self, patience: float) -> list[Done]:
        """Return the units that are through, once there is one, or none after so many seconds.

        Raises CannotWriteError, or another FslibError after which no unit can be computed.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up what is under way."""


def named(unit: Unit) -> str:
    """Return a unit as lines of progress name it."""
    return f"{unit.kind}-{unit.key} ({unit.describe()})"


def built_on(unit: Unit) -> list[Unit]:
    """Return the units inside a unit's config, each after those that it is itself built on."""
    found: list[Unit] = []

    def look(value: object) -> None:
        if isinstance(value, Config):
            look(list(vars(value).values()))
            if isinstance(value, Unit) and value is not unit:
                found.append(value)
        elif isinstance(value, Mapping):
            look(list(value.values()))
        elif isinstance(value, list | tuple):
            for inner in value:
                look(inner)

    look(unit)
    return found


def attempt(store: Store, unit: Unit, *, fresh: bool) -> str:
    """Compute a unit; return "", or why it has no record, in one line. Raises CannotWriteError, which ends them all."""
    try:
        store.renew(unit) if fresh else store.get(unit)
    except CannotWriteError:
        raise
    except OSError as error:
        raise CannotWriteError(
            f"{unit.kind}-{unit.key}: {error.strerror} ({error.filename})"
        ) from error
    except Exception as error:  # a mistake in one unit should not keep others from being computed
        return (
            first_line(error)
            if isinstance(error, FslibError)
            else f"{explained(error)}{place_of(error)}"
        )
    return ""


def place_of(error: Exception) -> str:
    """Say where in this package an error came from."""
    ours = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(PACKAGE))
    ]
    return f" (at {Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

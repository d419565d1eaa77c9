"""How bad input must be answered: one line that names the thing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import fslib


@contextmanager
def refused(*parts: object) -> Iterator[None]:
    """The block must raise a FslibError whose message is one line that holds all parts."""
    with pytest.raises(fslib.FslibError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message

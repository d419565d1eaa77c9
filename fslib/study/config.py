"""Values that are checked before use: the base of units and profiles."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fslib.errors import FslibError, check_among

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Hold checked values: unknown keys are refused, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def check(self) -> None:
        """Raise FslibError for values that together cannot work, before any work.

        Nested configs check themselves.
        """
        for value in vars(self).values():
            if isinstance(value, Config):
                value.check()


def checked(config: type[C], values: Mapping[str, Any], what: str) -> C:
    """Return a config of untrusted values.

    Args:
        config: the class to make.
        values: {field: value}; types are taken strictly: no text or flag stands for a number.
        what: what a field is called in messages, such as "setting".

    Raises:
        FslibError: for the first thing wrong; an unknown field gets the nearest valid name.
    """
    for name in values:
        check_among(what, str(name), config.model_fields)
    try:
        # from JSON, since only there does strict mode take a list for a tuple
        return config.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise FslibError(f"{what} {name}={first['input']!r:.80}: {reason}") from None
    except (ValueError, RecursionError) as error:  # a list inside itself
        raise FslibError(f"{what}s: {error}") from None


class PlainLoader(yaml.SafeLoader):
    """Load YAML with 1e-4 as a number, as JSON and Python have it."""


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} of the command line's key=value, with values in YAML."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or key in settings:
            raise FslibError(f"--set {pair!r:.80}: write it once, as key=value, such as steps=100")
        try:
            settings[key] = yaml.load(value, Loader=PlainLoader)
        # the date 2020-13-45 is a ValueError
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
            raise FslibError(f"--set {pair!r:.80}: that is not a value in YAML") from None
    return settings

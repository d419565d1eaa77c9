"""Values that were checked before they are used: what a unit of work and a profile are made of."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fslib.errors import FslibError, unknown


class Config(BaseModel):
    """Values that were checked: unknown keys are refused, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def check(self) -> None:
        """Raise FslibError for what can be seen, before any work, not to work; what is nested checks itself."""
        for value in vars(self).values():
            if isinstance(value, Config):
                value.check()


def shown(value: object) -> str:
    """Return a value as a message can hold it."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= 80 else text[:77] + "..."


def checked(config: type[Config], values: Mapping[str, Any], what: str) -> Any:
    """Return a config of untrusted values. Raises FslibError for the first thing wrong, with the nearest valid name."""
    for name, value in values.items():
        if name not in config.model_fields:
            raise unknown(
                what, shown(name) if not isinstance(name, str) else name, config.model_fields
            )
        # pydantic would take True for the number 1; no field is a flag
        inside = list(value.values()) if isinstance(value, Mapping) else value
        if any(
            isinstance(v, bool) for v in (inside if isinstance(inside, list | tuple) else [inside])
        ):
            raise FslibError(
                f"{what} {name}={shown(value)}: true and false are neither numbers nor names"
            )
    try:
        return config(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        message = (
            f"{what} {name}={shown(first['input'])}: {first['msg'].removeprefix('Value error, ')}"
        )
        raise FslibError(message) from None


class _PlainValues(yaml.SafeLoader):
    """YAML without references, by which a short text may stand for an endless value."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references are not supported")
        return super().compose_node(parent, index)


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} of settings as the command line has them, key=value, with values in YAML."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise FslibError(f"--set {shown(pair)}: write it as key=value, such as steps=100")
        if key in settings:
            raise FslibError(f"--set {shown(pair)}: {key} is set twice")
        try:
            settings[key] = yaml.load(value, Loader=_PlainValues)
        except (
            yaml.YAMLError,
            ValueError,
            OverflowError,
            RecursionError,
        ):  # 2020-13-45 is a ValueError
            raise FslibError(
                f"--set {shown(pair)}: {shown(value)} is not a value in YAML"
            ) from None
    return settings

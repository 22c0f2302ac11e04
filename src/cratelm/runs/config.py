"""Configurations: what of them decides a result, what their options' defaults are, what they may be."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cratelm.errors import InputError
from cratelm.runs.atomic import valid_text


@dataclass(frozen=True)
class Settings:
    """A configuration as a completion record keeps it."""

    values: dict[str, Any]
    """what decides the result, as JSON values"""
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    """the value of each option where the user names none: what a record that lacks it stands for"""
    options: tuple[str, ...] = ()
    """words of the command line that give these values again, without `--run`"""


def settings_of(config: Any) -> Settings:
    """Return the settings of a configuration dataclass, of a mapping, or the settings themselves."""
    if isinstance(config, Settings):
        return config
    if isinstance(config, Mapping):
        return Settings(config_dict(config))
    return Settings(config_dict(config), _defaults(config), options_of(config))


def config_dict(config: Any) -> dict[str, Any]:
    """Return a configuration dataclass as JSON values, without what does not change results.

    Fields made by `not_in_identity` (`--run`, `--force`, device, workers ...) are absent.
    """
    if isinstance(config, Mapping):
        return _plain(config)
    kept = {f.name: getattr(config, f.name) for f in _deciding(config)}
    return _plain(
        {
            k: dataclasses.asdict(v)
            if dataclasses.is_dataclass(v) and not isinstance(v, type)
            else v
            for k, v in kept.items()
        }
    )


def options_of(config: Any) -> tuple[str, ...]:
    """Return the options that differ from their defaults, and `--model`, as words of a command line."""
    values, defaults = config_dict(config), _defaults(config)
    words: list[str] = []
    for name, value in values.items():
        unset = value is None or value == [] or isinstance(value, dict)
        if unset or (value == defaults.get(name) and name != "model"):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            given = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, given)]
    return tuple(words)


def not_in_identity(default: Any) -> Any:
    """Return a dataclass field that does not enter the identity of a stage (where to run, how to show)."""
    return dataclasses.field(default=default, metadata={"identity": False})


def at_least(config: object, lowest: Mapping[str, float], why: str = "") -> None:
    """Raise `InputError` for the first option in `lowest` that is below its lowest value, or NaN.

    `config` has the options as attributes; an option that is None was not given. `why` ends the
    message: the reason for the limit, or what to type.
    """
    for name, least in lowest.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            option = name.replace("_", "-")
            told = f": {why}" if why else ""
            raise InputError(f"--{option} must be at least {least}, not {value}{told}")


def _deciding(config: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(config) if f.metadata.get("identity", True)]


def _defaults(config: Any) -> dict[str, Any]:
    found = {}
    for f in _deciding(config):
        if f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
        if dataclasses.is_dataclass(found.get(f.name)):
            found[f.name] = dataclasses.asdict(found[f.name])
    return _plain(found)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as they are read back from a record."""
    text = json.dumps(dict(values), default=str)
    return _valid(json.loads(text))


def _valid(value: Any) -> Any:
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list):
        return [_valid(v) for v in value]
    if isinstance(value, dict):
        return {valid_text(k): _valid(v) for k, v in value.items()}
    return value

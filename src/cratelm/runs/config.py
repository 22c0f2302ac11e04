"""Configurations: which options decide a result, their defaults, and their limits."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cratelm.errors import InputError
from cratelm.runs.arguments import check_fields
from cratelm.runs.atomic import valid_text
from cratelm.runs.memory import check_memory

MOST_RESAMPLES = 10**8


class Options:
    """Base of the configurations of all verbs: checks the types of the fields when one is created.

    A subclass that checks more calls `super().__post_init__()` first.
    """

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Settings:
    """A configuration as a completion record stores it."""

    values: dict[str, Any]
    """the options that decide the result, as JSON values"""
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    """the default of each option; a record that lacks an option counts as having its default"""
    options: tuple[str, ...] = ()
    """words of the command line that reproduce these values, without `--run`"""


def settings_of(config: Any) -> Settings:
    """Return the settings of a configuration dataclass, of a mapping, or the settings themselves."""
    if isinstance(config, Settings):
        return config
    if isinstance(config, Mapping):
        return Settings(config_dict(config))
    return Settings(config_dict(config), _defaults(config), options_of(config))


def config_dict(config: Any) -> dict[str, Any]:
    """Return a configuration dataclass as JSON values, without options that do not change results.

    Fields made by `not_in_identity` (`--run`, `--force`, device, workers ...) are absent.
    """
    if isinstance(config, Mapping):
        return _plain(config)
    return _values(config, _deciding(config))


def _values(config: Any, of: Sequence[dataclasses.Field[Any]]) -> dict[str, Any]:
    options = {f.name: getattr(config, f.name) for f in of}
    return _plain(
        {
            k: dataclasses.asdict(v)
            if dataclasses.is_dataclass(v) and not isinstance(v, type)
            else v
            for k, v in options.items()
        }
    )


def options_of(config: Any) -> tuple[str, ...]:
    """Return `--model` and the options that differ from their defaults, as words of a command line.

    These are the options that decide the result, and those without which the command would not run
    (`metadata["in_commands"]`).
    """
    of = [
        f
        for f in dataclasses.fields(config)
        if f.metadata.get("identity", True) or f.metadata.get("in_commands")
    ]
    values, defaults = _values(config, of), _default_values(of)
    words: list[str] = []
    for name, value in values.items():
        unset = value is None or value == [] or isinstance(value, dict)
        if unset or (value == defaults.get(name) and name != "model"):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            items = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, items)]
    return tuple(words)


def not_in_identity(default: Any) -> Any:
    """Return a dataclass field that is not part of a stage's identity (where to run, what to display)."""
    return dataclasses.field(default=default, metadata={"identity": False})


def at_least(config: object, lowest: Mapping[str, float], why: str = "") -> None:
    """Raise `InputError` for the first option in `lowest` that is below its lowest value, or NaN.

    `config` has the options as attributes; None means that an option was not given. `why` ends the
    message: the reason for the limit, or what to type.
    """
    for name, least in lowest.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            option = name.replace("_", "-")
            reason = f": {why}" if why else ""
            raise InputError(f"--{option} must be at least {least}, not {value}{reason}")


def check_resamples(config: Any) -> None:
    """Raise `InputError` if `resamples` of a configuration are more than fit into memory, or than make sense.

    A figure of two layers holds six numbers per resample: means and variances of each, and copies of both.
    """
    check_memory(config, {"resamples": 6 * 8 * config.resamples}, "the resamples")
    at_most(config, {"resamples": MOST_RESAMPLES}, "more no longer change an interval")


def at_most(config: object, highest: Mapping[str, float], why: str = "") -> None:
    """Raise `InputError` for the first option in `highest` that is above its highest value.

    As `at_least` otherwise.
    """
    for name, most in highest.items():
        value = getattr(config, name)
        if value is not None and not value <= most:
            option = name.replace("_", "-")
            reason = f": {why}" if why else ""
            raise InputError(f"--{option} must be at most {most:,}, not {value:,}{reason}")


def _deciding(config: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(config) if f.metadata.get("identity", True)]


def _defaults(config: Any) -> dict[str, Any]:
    return _default_values(_deciding(config))


def _default_values(of: Sequence[dataclasses.Field[Any]]) -> dict[str, Any]:
    defaults = {}
    for f in of:
        if f.default is not dataclasses.MISSING:
            defaults[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            defaults[f.name] = f.default_factory()
        if dataclasses.is_dataclass(defaults.get(f.name)):
            defaults[f.name] = dataclasses.asdict(defaults[f.name])
    return _plain(defaults)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON would give them back when a record is read."""
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


def known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those `values` that the dataclass `kind` has fields for.

    A later version may have written more: what is read from a file goes through here, so that it is ignored
    and not an error.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}

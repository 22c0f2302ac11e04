"""Python code that comes with a model which transformers itself does not have: found, named, run only on request."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratelm.errors import InputError
from cratelm.runs.identity import hash_file, hash_json

_CLASS = "AutoModelForCausalLM"
"""entry of `auto_map` in config.json that names the class of the language model, as `module.Class`"""


@dataclass(frozen=True)
class RemoteCode:
    """Code that a model's config.json names."""

    source: str | Path
    """folder or Hub id that holds the code"""
    files: tuple[str, ...]
    """of a folder: all of its Python files; on the Hub: the files that config.json names, which may import others"""
    model_class: str
    revision: str | None = None
    """commit of the Hub's repository; None for folders"""

    @property
    def identity(self) -> str:
        """Return a string that changes when the code does: the commit, or a sha256 over the files of a folder."""
        if isinstance(self.source, Path):
            return hash_json({name: hash_file(self.source / name) for name in self.files})
        return f"hub:{self.source}@{self.revision}"

    def __str__(self) -> str:
        where = f"folder {self.source}, sha256 {self.identity[:12]}"
        if not isinstance(self.source, Path):
            where = f"Hub's repository {self.source} at commit {self.revision}"
        return f"class {self.model_class} of {', '.join(self.files)} ({where})"


def remote_code_of(
    location: str | Path, revision: str | None = None, **hub: Any
) -> RemoteCode | None:
    """Return the code that must run to open a model, of a folder or Hub id; None for models of transformers.

    transformers has a class if it has one for the `model_type` in config.json. `hub` are arguments of `cached_file`.
    Raises what the Hub's library raises if there is no config.json.
    """
    content = _config(location, revision, hub)
    auto_map = content.get("auto_map")
    reference = auto_map.get(_CLASS) if isinstance(auto_map, dict) else None
    if not isinstance(reference, str) or "." not in reference:
        return None
    if _library_class(content.get("model_type")) is not None:
        return None
    assert isinstance(auto_map, dict)
    repository, separator, _ = reference.rpartition("--")
    modules = dict.fromkeys(_module(value) for value in auto_map.values() if isinstance(value, str))
    name = reference.rpartition(".")[2]
    if separator:
        return RemoteCode(repository, tuple(modules), name, commit_of(repository, None, **hub))
    folder = Path(location)
    if folder.is_dir():
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
        return RemoteCode(folder, tuple(names), name)
    return RemoteCode(
        str(location), tuple(modules), name, commit_of(str(location), revision, **hub)
    )


def options_for(
    location: str | Path, revision: str | None = None, *, trusted: bool | None, **hub: Any
) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that run the code of a model; none if it needs no code.

    The code that will run is printed on stderr. Raises `InputError`, which says what would be run, if it is not
    `trusted`; None: the caller has no option for it.
    """
    code = remote_code_of(location, revision, **hub)
    if code is None:
        return {}
    if not trusted:
        advice = "read the code, then add --trust-remote-code"
        if trusted is None:
            advice = "let a server run it, and name it as openai:MODEL"
        raise InputError(
            f"{location} is no model that transformers has: opening it runs {code} on this machine: {advice}"
        )
    print(f"note: {location}: runs {code}", file=sys.stderr, flush=True)
    pinned = {} if code.revision is None else {"code_revision": code.revision}
    return {"trust_remote_code": True, **pinned}


def commit_of(name: str, revision: str | None = None, **hub: Any) -> str:
    """Return the commit of the Hub's repository at a revision (None: the newest).

    Without a network, it is the commit in the local cache.
    """
    return _cached(name, revision, hub).parent.name


def _cached(name: str, revision: str | None, hub: dict[str, Any]) -> Path:
    from transformers.utils.hub import cached_file

    path = cached_file(name, "config.json", revision=revision, **hub)
    assert path is not None, "cached_file raises if there is none"
    parts = Path(path).parts  # the cache keeps a file in `.../snapshots/COMMIT/`
    return Path(*parts[: parts.index("snapshots") + 2]) / "config.json"


def _config(location: str | Path, revision: str | None, hub: dict[str, Any]) -> dict[str, Any]:
    path = Path(location) / "config.json" if Path(location).is_dir() else None
    path = path or _cached(str(location), revision, hub)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}  # reported by what reads the configuration next
    return content if isinstance(content, dict) else {}


def _module(reference: str) -> str:
    return reference.rpartition("--")[2].rpartition(".")[0] + ".py"


def _library_class(model_type: Any) -> type | None:
    """Return the class that transformers, or cratelm, has for a kind of model; None if it has none."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    mapping: Any = AutoModelForCausalLM._model_mapping  # type: ignore[attr-defined]
    config = CONFIG_MAPPING[model_type]
    return mapping.get(config, None)

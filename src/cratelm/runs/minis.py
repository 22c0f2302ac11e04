"""Small trained models that come with cratelm: `mini:crate-2l` stands for a model's name wherever one is opened.

`cratelm.load("mini:crate-2l")` needs no network. The folders are what `cratelm export model --dtype bf16` writes;
`hashes.json` beside them has the sha256 of every file (`scripts/make_minis.py`).
"""

import json
from pathlib import Path

from cratelm.errors import InputError
from cratelm.runs.identity import hash_file

PREFIX = "mini:"
FOLDER = Path(__file__).parents[1] / "minis"
HASHES = "hashes.json"


def is_mini(name: str | Path) -> bool:
    """Return whether a name stands for a model that comes with cratelm."""
    return str(name).startswith(PREFIX)


def mini_names() -> list[str]:
    """Return the names of the models that come with cratelm, without the prefix."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def mini_folder(name: str | Path) -> Path:
    """Return the folder of the model that `mini:NAME` names, with its files checked.

    Raises `InputError` if there is no such model, or if one of its files has changed.
    """
    short = str(name).removeprefix(PREFIX)
    if short not in mini_names():
        known = ", ".join(PREFIX + known for known in mini_names()) or "none in this installation"
        raise InputError(f"there is no model {PREFIX}{short}: those of cratelm are {known}")
    folder = FOLDER / short
    hashes = json.loads((FOLDER / HASHES).read_text(encoding="utf-8")).get(short, {})
    for file, expected in hashes.items():
        path = folder / file
        if not path.is_file() or hash_file(path) != expected:
            raise InputError(
                f"{path} is missing or has changed since cratelm was built: install cratelm again"
            )
    return folder

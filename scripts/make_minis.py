"""Write the small models that come with cratelm from a finished run: `src/cratelm/minis/`.

    python scripts/make_minis.py runs/study crate-2l gpt2-2l

Each is exported in bf16 with its tokenizer and a card, must be below 2 MB of weights, and must have been trained on
the built-in corpus.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from cratelm.errors import InputError
from cratelm.interop.config import ExportModelConfig
from cratelm.interop.export_model import export_model
from cratelm.runs import Run, hash_file, write_json
from cratelm.runs.minis import FOLDER, HASHES, PREFIX
from cratelm.runs.names import seed_of

LARGEST = 2_000_000
"""bytes of weights"""


def without_code(folder: Path) -> None:
    """Remove the copies of cratelm's own code, and say how to load the model with cratelm."""
    for path in folder.glob("*.py"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    write_json(folder / "config.json", config)
    card = (folder / "README.md").read_text(encoding="utf-8")
    loading = f'## How to load it\n\n```python\nimport cratelm\n\nmodel = cratelm.load("{PREFIX}{folder.name}")\n```\n\n'
    card, found = re.subn(r"## How to load it\n.*?(?=## )", loading, card, flags=re.DOTALL)
    assert found == 1, "the card has no section on loading"
    (folder / "README.md").write_text(card, encoding="utf-8")


def main(words: list[str]) -> None:
    """Write the models that are named, in place of those that were there."""
    run, *names = words
    tokens = Run(run).stage("tokens").require("tokenize")
    if tokens.config["corpus"] != "builtin":
        raise InputError(f"{run} was trained on {tokens.config['corpus']}: name a run of --corpus builtin")  # fmt: skip
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    hashes = {}
    for name in names:
        out = FOLDER / seed_of(name)[0]
        export_model(ExportModelConfig(run=Path(run), model=name, dtype="bf16", out=out))
        without_code(out)
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        if size > LARGEST:
            raise InputError(f"the weights of {name} take {size:,} bytes, more than {LARGEST:,}")
        hashes[out.name] = {p.name: hash_file(p) for p in sorted(out.iterdir()) if p.is_file()}
        print(f"{out}: {size / 1e6:.2f} MB")
    write_json(FOLDER / HASHES, hashes)


if __name__ == "__main__":
    main(sys.argv[1:])

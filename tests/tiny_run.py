"""The tiny run that version 0.1.0 wrote, copied: every stage of two models, ready to be made again."""

import json
import shutil
import uuid
from pathlib import Path

from cratelm.runs import RECORD, Run, hash_file

SOURCE = Path(__file__).parent / "run_0_1_0"
MODEL = "crate-2l"


def copied(folder: Path) -> Path:
    """A copy of the run with its corpus next to it."""
    shutil.copytree(SOURCE, folder, dirs_exist_ok=True)
    return folder / "run"


def with_side_stages(path: Path) -> Path:
    """Adds autoencoders, their latents' harvest, an analysis, explanations and scores by a language model.

    Their records are real, their files copies or none: whether a stage may be used is decided before
    its files are opened.
    """
    run = Run(path)

    def add(stage, name, config, inputs, source=None):
        with run.stage(stage, name).write(config, inputs) as draft:
            if source is not None:
                files = [p for p in source.iterdir() if p.is_file() and p.name != RECORD]
                for file in files:
                    shutil.copy(file, draft.path / file.name)
        return run.stage(stage, name).completion()

    def done(label):
        return run.labelled(label).completion()

    tokens, model = done("tokens"), done(f"model/{MODEL}")
    harvest, explained = done(f"activations/{MODEL}"), done(f"explanations/{MODEL}")
    sae = add("sae", f"{MODEL}@s", {"model": MODEL}, {"tokens": tokens, "model": model})
    latents = run.stage("activations", MODEL).path
    add(
        "activations",
        f"{MODEL}+s",
        {"model": MODEL, "sae": "s"},
        {"tokens": tokens, "model": model, "sae": sae},
        latents,
    )
    add("analysis", MODEL, {"model": MODEL}, {"activations": harvest, "explanations": explained})
    by_model = add(
        "explanations",
        f"{MODEL}@fake",
        {"model": MODEL, "explainer": "hf:any"},
        {"tokens": tokens, "activations": harvest, "prompts": "1"},
        run.stage("explanations", MODEL).path,
    )
    add(
        "scores",
        f"{MODEL}@fake",
        {"model": MODEL, "simulator": "hf:any"},
        {"tokens": tokens, "activations": harvest, "explanations": by_model, "prompts": "1"},
        run.stage("scores", MODEL).path,
    )
    return path


def reseal(folder: Path) -> None:
    """Give the record of a stage the hashes of its files as they are, as if the stage had written them so."""
    path = folder / RECORD
    record = json.loads(path.read_text(encoding="utf-8"))
    outputs = {name: hash_file(folder / name) for name in record["outputs"]}
    path.write_text(json.dumps(record | {"outputs": outputs, "checksum": ""}), encoding="utf-8")


def make_again(path: Path, label: str) -> None:
    """Gives a stage the record of another result, as making it again with other options would."""
    stage = Run(path).labelled(label)
    record = json.loads((stage.path / RECORD).read_text(encoding="utf-8"))
    record |= {"identity": uuid.uuid4().hex, "checksum": ""}
    (stage.path / RECORD).write_text(json.dumps(record), encoding="utf-8")
    stage.run.write_manifest()

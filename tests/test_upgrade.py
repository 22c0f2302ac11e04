"""A run that version 0.1.0 wrote goes on: what was expensive is taken over, and nothing breaks."""

import hashlib
import json
from pathlib import Path

import pytest
from tiny_run import MODEL, copied

import cratelm
from cratelm.errors import InputError
from cratelm.runs import RECORD, Run
from cratelm.runs.stage import FORMAT, OLDEST_READ

TOKENIZE = {"corpus": "corpus.jsonl", "vocab_size": 320, "fit": 0.3, "held_out": 0.3, "sequence_length": 16}  # fmt: skip
TRAIN = {
    "model": MODEL, "sequence_length": 32, "batch_size": 4, "validation_sequences": 4,
    "validate_every": 1, "tensorboard": False, "device": "cpu",
    "model_overrides": ("hidden_size=8", "num_attention_heads=2"),
}  # fmt: skip
HARVEST = {
    "tokens": 1000, "top": 4, "random": 4, "per_bin": 1, "context": 8, "short_context": 2,
    "pilot_tokens": 128, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    path = copied(tmp_path)
    monkeypatch.chdir(tmp_path)
    return path.relative_to(tmp_path)


def files(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file."""
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }  # fmt: skip


def go_on(run: Path) -> None:
    """The commands of version 0.1.0, typed again."""
    cratelm.api.tokenize(run=run, quiet=True, **TOKENIZE)
    for name, steps in ((MODEL, 2), (f"{MODEL}-init", 0)):
        cratelm.api.train(run=run, steps=steps, quiet=True, **TRAIN)
        cratelm.api.harvest(run=run, model=name, **HARVEST)
        # the default of 0.1.0; today's has concepts, too, and is another result
        cratelm.api.explain(
            run=run, model=name, neurons=8, explainers=("lookup", "trie"), quiet=True
        )
        cratelm.api.score(run=run, model=name, resamples=100, quiet=True)
    cratelm.api.effects(run=run, model=MODEL, neurons=4, tokens=100, quiet=True)


def test_the_records_are_those_of_0_1_0(run):
    for done in Run(run).completions():
        record = json.loads(
            (Run(run).labelled(done.label).path / RECORD).read_text(encoding="utf-8")
        )
        assert "format" not in record
        assert done.format == 1
        assert done.versions["cratelm"] == "0.1.0"
    assert FORMAT > 1


def test_every_stage_is_taken_over_as_it_is(run, capsys):
    before = files(run)
    go_on(run)
    after = files(run)
    assert after == before
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{label} is finished, skipped (--force redoes it)" for label in (
        "tokens", *(f"{stage}/{name}" for name in (MODEL, f"{MODEL}-init")
                    for stage in ("model", "activations", "explanations", "scores")),
        f"steer/{MODEL}",
    )]  # fmt: skip


def test_cheaper_stages_of_an_older_format_are_made_again_tokens_and_models_are_not(
    run, capsys, monkeypatch
):
    for stage in ("activations", "explanations", "scores", "steer"):
        monkeypatch.setitem(OLDEST_READ, stage, 2)
    expensive = {name: files(run / name) for name in ("tokens", "model")}
    with pytest.raises(
        InputError, match=r"older format.*type `cratelm harvest --run run .*--force`"
    ):
        cratelm.api.explain(run=run, model=MODEL, quiet=True)
    go_on(run)
    assert {name: files(run / name) for name in ("tokens", "model")} == expensive
    told = capsys.readouterr().out
    for label in (f"activations/{MODEL}", f"explanations/{MODEL}-init", f"scores/{MODEL}", f"steer/{MODEL}"):  # fmt: skip
        assert f"{label} was written by cratelm 0.1.0 in an older format" in told
        assert Run(run).labelled(label).require().format == FORMAT
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["format"] == FORMAT
    assert [s.get("format", 1) for s in manifest["stages"]] == [1, 1, 1] + [FORMAT] * 7


@pytest.mark.usefixtures("undrawn")
def test_what_follows_is_made_from_the_old_stages(run):
    cratelm.api.analyze(run=run, model=MODEL, tokens=200, quiet=True)
    result = cratelm.api.report(run=run, resamples=100)
    assert "stale" not in str(result)
    assert [row["model"] for row in result.comparison] == [MODEL]  # its null is a row of its own
    done = Run(run).stage("analysis", MODEL).require()
    assert done.input_stages == {"activations": f"activations/{MODEL}", "explanations": f"explanations/{MODEL}"}  # fmt: skip


def test_a_model_trained_again_makes_old_stages_below_it_stale(run):
    cratelm.api.train(run=run, steps=1, quiet=True, force=True, **TRAIN)
    found = Run(run).stage("scores", MODEL).freshness()
    assert found.reason == f"because activations/{MODEL} was made from an earlier model/{MODEL}"
    assert [command.split()[1] for command in found.commands] == ["harvest", "explain", "score"]
    assert "--pilot-tokens 128" in found.commands[0]
    assert Run(run).stage("scores", f"{MODEL}-init").freshness().state == "fresh"

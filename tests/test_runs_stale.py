"""No result is used, or shown without saying so, once a stage that it was made from was made again."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_llm import FakeModel
from tiny_run import MODEL, copied, make_again, with_side_stages

import cratelm
from cratelm.errors import InputError
from cratelm.results.side_results import read_sae_evaluation
from cratelm.runs import RECORD, Run, Stage
from cratelm.sae.store import evaluation_path
from cratelm.viewer.live import Live
from cratelm.viewer.pages import Pages
from cratelm.viewer.run_reader import Library

HARVEST, EXPLAINED = f"activations/{MODEL}", f"explanations/{MODEL}"
DIRECT = {
    "tokens": (),
    f"model/{MODEL}": ("tokens",),
    f"sae/{MODEL}@s": ("tokens", f"model/{MODEL}"),
    HARVEST: ("tokens", f"model/{MODEL}"),
    f"activations/{MODEL}+s": ("tokens", f"model/{MODEL}", f"sae/{MODEL}@s"),
    EXPLAINED: ("tokens", HARVEST),
    f"explanations/{MODEL}@fake": ("tokens", HARVEST),
    f"scores/{MODEL}": (HARVEST, EXPLAINED),
    f"scores/{MODEL}@fake": ("tokens", HARVEST, f"explanations/{MODEL}@fake"),
    f"steer/{MODEL}": ("tokens", HARVEST),
    f"analysis/{MODEL}": (HARVEST, EXPLAINED),
}
"""the stages of the run, with those that each was made from"""


def above(label: str) -> set[str]:
    """All stages that a stage was made from, directly or not."""
    return set(DIRECT[label]).union(*(above(found) for found in DIRECT[label]))


LLM = {"offline": False, "quiet": True}
VERBS = {
    "evaluate": ((f"model/{MODEL}",), {"model": MODEL}),
    "predict": ((f"model/{MODEL}",), {"models": (MODEL,), "text": "a red stone"}),
    "steer": ((f"model/{MODEL}",), {"neurons": ("0:1",), "zero": True, "text": "a red stone"}),
    "steer latents": (
        (f"model/{MODEL}", f"sae/{MODEL}@s"),
        {"neurons": ("0:1",), "zero": True, "text": "a red stone", "sae": "s", "generate": 0},
    ),
    "export model": ((f"model/{MODEL}",), {"out": "out"}),
    "harvest": ((f"model/{MODEL}",), {"tokens": 100}),
    "harvest latents": ((f"sae/{MODEL}@s",), {"tokens": 100, "sae": "s"}),
    "sae train": ((f"model/{MODEL}",), {"tokens": 4096}),
    "sae evaluate": ((f"model/{MODEL}", f"sae/{MODEL}@s"), {"sae": "s"}),
    "sae compare": ((HARVEST, f"scores/{MODEL}"), {"models": (MODEL,)}),
    "explain": ((HARVEST,), {}),
    "explain with a model": ((HARVEST,), {"explainer": "hf:any", **LLM}),
    "score": ((HARVEST, EXPLAINED), {}),
    "score with a model": (
        (HARVEST, f"explanations/{MODEL}@fake"),
        {"simulator": "hf:any", "metrics": ("detection",), **LLM},
    ),
    "analyze": ((HARVEST, EXPLAINED), {}),
    "effects": ((HARVEST,), {}),
    "intervene": ((HARVEST, EXPLAINED), {"judge": "hf:any", **LLM}),
    "intervene promoted": (
        (HARVEST, f"steer/{MODEL}"),
        {"judge": "hf:any", "explanations": "promoted", **LLM},
    ),
    "export records": ((HARVEST,), {"out": "out"}),
    "export neuronpedia": (
        (HARVEST, EXPLAINED, f"scores/{MODEL}", f"scores/{MODEL}@fake"),
        {"out": "out", "model_id": "tiny"},
    ),
    "live": ((HARVEST,), {}),
}
"""every verb that uses what a run holds, with the stages that it reads and its options"""
PAIRS = [
    (again, verb)
    for verb, (read, _) in VERBS.items()
    for again in sorted(set().union(*(above(label) for label in read)))
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return with_side_stages(copied(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def run(whole, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("cratelm.llm.session._backend", lambda config, spec: FakeModel())
    return Path(shutil.copytree(whole, tmp_path / "run"))


def use(verb: str, run: Path, tmp_path: Path) -> None:
    """Type the verb, or ask the live page."""
    options = dict(VERBS[verb][1])
    if verb == "live":
        Live(Library([run])).activations("run", MODEL, "a red stone", 0, 1)
        return
    if "out" in options:
        options["out"] = tmp_path / "out"
    if not {"models", "model"} & set(options):
        options["model"] = MODEL
    words = verb.split()
    name = "_".join(words[:2]) if words[0] in ("sae", "export") else words[0]
    getattr(cratelm.api, name)(run=run, **options)


@pytest.mark.parametrize(("again", "verb"), PAIRS, ids=[f"{a} - {v}" for a, v in PAIRS])
def test_a_verb_says_what_was_made_again_and_what_to_type(again, verb, run, tmp_path):
    make_again(run, again)
    with pytest.raises(InputError) as caught:
        use(verb, run, tmp_path)
    told = str(caught.value)
    assert re.search(rf"was made from an earlier {re.escape(again)}: ", told)
    assert re.search(rf"type `cratelm [^`]*--run {re.escape(str(run))} [^`]*--force`", told)
    assert "\n" not in told


@pytest.mark.parametrize("again", DIRECT)
def test_what_lies_below_is_stale_and_nothing_else(again, run):
    make_again(run, again)
    found = {label: Run(run).labelled(label).freshness() for label in DIRECT}
    assert {label for label, f in found.items() if f.is_stale} == {
        label for label in DIRECT if again in above(label)
    }
    for label, freshness in found.items():
        if freshness.is_stale:
            verb = Run(run).labelled(label).completion().verb
            assert freshness.commands[-1].startswith(f"cratelm {verb} --run {run}")
            assert freshness.commands[-1].endswith("--force")


def test_nothing_is_stale_in_a_run_as_it_was_made(run):
    for label in DIRECT:
        assert Run(run).labelled(label).freshness().state == "fresh"
        Run(run).labelled(label).require()
    assert Run(run).stage("scores", "absent").freshness().state == "missing"


def test_a_stage_that_was_deleted_was_not_made_again(run):
    shutil.rmtree(run / "model" / MODEL)
    assert Run(run).labelled(f"scores/{MODEL}").freshness().state == "fresh"
    with pytest.raises(InputError, match=f"cratelm train --run {run} --model {MODEL}"):
        cratelm.api.effects(run=run, model=MODEL, quiet=True, force=True)


def test_commands_come_in_the_order_in_which_they_are_typed(run):
    make_again(run, f"model/{MODEL}")
    commands = Run(run).labelled(f"scores/{MODEL}@fake").freshness().commands
    verbs = [command.split()[1] for command in commands]
    assert verbs == ["harvest", "explain", "score"]
    assert "--tokens 1000" in commands[0]
    assert f"--model {MODEL} --simulator hf:any --force" in commands[-1]


def test_really_trained_again(run, tmp_path, capsys):
    """The story of the first fault: train again, do not harvest, and nobody says a word."""
    options = {"hidden_size": 8, "num_attention_heads": 2}
    cratelm.api.train(
        run=run, model=MODEL, steps=1, sequence_length=32, batch_size=4, validation_sequences=4,
        tensorboard=False, force=True, quiet=True, device="cpu",
        model_overrides=tuple(f"{k}={v}" for k, v in options.items()),
    )  # fmt: skip
    for verb in ("explain", "score", "effects", "analyze", "export records"):
        with pytest.raises(InputError, match=f"{HARVEST} was made from an earlier model/{MODEL}"):
            use(verb, run, tmp_path)


# ---- report and browser show it -------------------------------------------------------------------


@pytest.fixture
def shown(run) -> Path:
    """Without the analysis, of which there is but the record."""
    shutil.rmtree(run / "analysis")
    return run


@pytest.mark.usefixtures("undrawn")
def test_a_report_marks_what_is_stale(shown):
    run = shown
    fresh = cratelm.api.report(run=run, resamples=100)
    assert "stale" not in str(fresh)
    assert "stale" not in (run / "report" / "report.html").read_text(encoding="utf-8").split("</style>")[1]  # fmt: skip
    make_again(run, f"model/{MODEL}")
    with pytest.raises(InputError, match=r"input model/crate-2l that has changed since.*--force"):
        cratelm.api.report(run=run, resamples=100)
    result = cratelm.api.report(run=run, resamples=100, force=True)
    lines = str(result).splitlines()
    assert any(f"{MODEL} (stale)" in line for line in lines[:2])
    (told,) = [line for line in lines if line.startswith(f"scores/{MODEL} is stale")]
    assert f"because {HARVEST} was made from an earlier model/{MODEL}: type `cratelm score" in told
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert 'id="stale"' in page
    assert f"{HARVEST} is stale" in page
    tables = json.loads((run / "report" / "tables.json").read_text(encoding="utf-8"))
    for name in ("comparison", "by_layer", "nulls", "effects"):
        models = {row["model"] for row in tables[name]["rows"] if "model" in row}
        assert models <= {f"{MODEL} (stale)", f"{MODEL}-init"}, name
        assert f"{MODEL} (stale)" in models, name
    assert {row["model"] for row in tables["models"]["rows"]} == {MODEL, f"{MODEL}-init"}
    states = {row["model"]: row["state"] for row in tables["stages"]["rows"]}
    assert states[f"{MODEL} (stale)"] == "stale: activations, explanations, scores"
    assert states[f"{MODEL}-init"] == states["all"] == "fresh"


@pytest.mark.usefixtures("undrawn")
def test_text_of_other_tokens_is_not_spelled_with_those_of_today(shown):
    run = shown
    make_again(run, "tokens")
    library = Library([run])
    view = library.neuron("run", MODEL, 0, 1)
    assert not view.excerpts
    assert any("harvested from earlier tokens" in line for line in view.problems)
    result = cratelm.api.report(run=run, resamples=100, force=True)
    tables = json.loads(result.tables.read_text(encoding="utf-8"))
    assert "neurons" not in tables


def test_the_browser_shows_what_is_stale_with_its_command(run):
    for stale in (False, True):
        if stale:
            make_again(run, f"model/{MODEL}")
        library = Library([run])
        pages = Pages(library)
        command = f"cratelm harvest --run {run}"
        shown = {
            "overview": pages.overview("run"),
            "layer": pages.layer("run", MODEL, 0, _query()),
            "neuron": pages.neuron(library.neuron("run", MODEL, 0, 1)),
            "search": library.search("run", "stone").note,
        }
        for name, html in shown.items():
            assert (command in html) == stale, name
            assert (f"{HARVEST} is stale" in html) == stale, name
        assert (f"{MODEL} (stale)" in shown["overview"]) == stale


def _query():
    from cratelm.results.views import LayerQuery

    return LayerQuery()


# ---- models from elsewhere ------------------------------------------------------------------------


def test_a_model_in_a_folder_is_compared_where_it_is_opened(run, tmp_path):
    folder = Path(shutil.copytree(run / "model" / MODEL, tmp_path / "elsewhere"))
    (folder / RECORD).unlink()
    common = {"run": run, "model": str(folder), "name": "other", "tokens": 200, "device": "cpu"}
    cratelm.api.harvest(
        **common, top=2, random=2, per_bin=1, context=4, short_context=2, pilot_tokens=64
    )
    assert Run(run).labelled("activations/other").freshness().state == "fresh"
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"no longer has the model that was harvested.*cratelm harvest .*--force"):  # fmt: skip
        cratelm.api.effects(run=run, model="other", tokens=100, quiet=True)


@pytest.mark.parametrize("role", ["identity", "model_identity", "tokens_identity"])
def test_figures_of_other_autoencoders_models_or_tokens_are_not_reported(role, run):
    """`evaluation.json` is no stage: it names what it is of."""
    harvest = Run(run).labelled(f"activations/{MODEL}+s").require()
    read = harvest.inputs
    identities = {"identity": read["sae"], "model_identity": read["model"], "tokens_identity": read["tokens"]}  # fmt: skip
    sums: dict[str, list[int]] = {n: [] for n in ("document", "targets", "loss", "reconstruction")}
    names = {"model": MODEL, "sae": "s", "site": "ista", "split": "held_out", "documents": 1, "tokens": 9}  # fmt: skip
    lists: dict[str, list] = {n: [] for n in ("layers", "places", "steering", "own_steering")}
    figures = {"loss": {"value": 1.0, "error": 0.1}, "by_document": sums, "config": {}}
    path = evaluation_path(Run(run), MODEL, "s")

    def reported(record: dict[str, Any]) -> bool:
        content = {**names, **lists, **figures, **record}
        path.write_text(json.dumps(content), encoding="utf-8")
        return read_sae_evaluation(Run(run), harvest) is not None

    assert reported(identities)
    assert reported({k: v for k, v in identities.items() if k != "tokens_identity"})
    assert not reported({**identities, role: "another"})


def test_inputs_without_a_stage_are_not_walked(tmp_path):
    stage: Stage = Run(tmp_path).stage("activations", "m")
    with stage.write({}, {"model": "hub:owner/name", "tokens": "abc"}):
        pass
    assert stage.freshness().state == "fresh"
